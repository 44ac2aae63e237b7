"""Whether an output is what was written: only a whole one is pushed."""

from __future__ import annotations

from typing import Any

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import is_file
from qexport.checkpoint.manifest import MANIFEST_FILE, changed_files, read_manifest
from qexport.errors import CorruptFileError, first_of
from qexport.publishing.layout import Part
from qexport.report.card_facts import PLOT_FILE
from qexport.report.card_file import CARD_FILE

# of ours, and come after the manifest: the card is there to be edited
_LATER = {CARD_FILE, PLOT_FILE}


def recorded(part: Part) -> dict[str, Any]:
    """The files that an output's manifest records."""
    records = read_manifest(part.directory).get("files", {})
    return records if isinstance(records, dict) else {}


def require_whole(part: Part) -> list[str]:
    """Raises CorruptFileError for an output that is not what was written; says what could not be proved."""
    if not is_file(part.directory / MANIFEST_FILE):
        _require_readable(part)
        return [f"{part.name} has no {MANIFEST_FILE}: that it is whole could not be proved"]
    going, records = {file.as_posix() for file in part.files}, set(recorded(part))
    excluded = {name for name in going | records if is_file(part.directory / name)} - going
    changed = [name for name in changed_files(part.directory) if name not in excluded | {CARD_FILE}]
    if changed:
        raise CorruptFileError(
            f"{part.directory} is not whole: {first_of(changed)} "
            f"{'is' if len(changed) == 1 else 'are'} gone or changed since qexport wrote it",
            expected=f"files as {MANIFEST_FILE} records them",
            remedy="make it anew",
        )
    new = sorted(going - records - {MANIFEST_FILE} - _LATER)
    return [f"{part.name}: {first_of(new)}: not recorded in {MANIFEST_FILE}, pushed as found"] if new else []


def _require_readable(part: Part) -> None:
    """Of a model that somebody else wrote: every shard that its index names, and none cut off."""
    from qexport.checkpoint.safetensors_file import read_header

    for file in part.files:
        if file.suffix == ".safetensors":
            read_header(part.directory / file)
        if file.name.endswith(".safetensors.index.json"):
            named = read_json(part.directory / file).get("weight_map", {})
            shards = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
            home = part.directory / file.parent
            if missing := [shard for shard in shards if not is_file(home / shard)]:
                raise CorruptFileError(
                    f"{part.directory} is not whole: {file} names {first_of(missing)}, not there",
                    remedy="fetch or make the model anew",
                )
