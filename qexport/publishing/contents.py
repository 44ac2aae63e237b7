"""What of a directory would go to the Hub, and where to: all of it before anything is sent.

One output (a model, an adapter, GGUF files) goes as it lies; a directory of several as the user says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import exists, is_file
from qexport.checkpoint.manifest import MANIFEST_FILE, changed_files, read_manifest
from qexport.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    NotACheckpointError,
    SpecError,
    UnsafeFileError,
    first_of,
)
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.publishing.layout import Part, Plan, Upload, refuse_twins, side_by_side
from qexport.publishing.refusals import Finding, found_keys, is_pickle, refused_kind, refused_name
from qexport.publishing.spec import PushSpec

CARD = "README.md"
_WORK = {"scores"}  # what a run keeps to go on from; of no use to anyone else
_MAIN = "main"
# a name that both git and the Hub take for a branch
_BRANCH = re.compile(r"(?!.*(\.\.|--|\.lock$|\.$))[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def plan_push(
    directory: Path, spec: PushSpec, *, own: Collection[str] = (), on_event: OnEvent = ignore
) -> Plan:
    """What `push` would send; reads the files, writes nothing and asks no network.

    `own` are the user's tokens, which are looked for too. Raises CheckpointNotFoundError and
    NotACheckpointError for a directory without an output, CorruptFileError for one that is not whole,
    UnsafeFileError for what must not go, SpecError for options that do not fit what is there.
    """
    if not exists(directory) or not directory.is_dir():
        raise CheckpointNotFoundError(
            f"{directory} {'is a file' if exists(directory) else 'does not exist'}",
            expected="a directory that qexport wrote, or one of several such",
        )
    single = _is_output(directory)
    variants = [] if single else _chosen(directory, _variants(directory), spec)
    _check_options(directory, spec, single=single, variants=variants)
    if single or (len(variants) == 1 and spec.layout is None):
        root = None
        parts = [Part(directory.resolve().name, directory if single else directory / variants[0])]
    else:
        root = Part("report", directory)
        parts = [Part(name, directory / name) for name in variants]
    notes = _gather(directory, [*([root] if root else []), *parts], spec, own, skip=_variants(directory))
    parts = [part for part in parts if part.files]
    if not parts:
        raise SpecError("--exclude leaves nothing to push", remedy="leave out fewer files")
    on_event(Started("checking", len(parts), "outputs"))
    for part in parts:
        notes += _require_whole(part)
        on_event(Advanced(1, part.name))
    on_event(Finished())
    if root is None:
        uploads = [Upload(spec.revision, tuple(parts[0].items()), parts[0].name)]
    elif spec.layout == "branches":
        uploads = [Upload(part.name, tuple(part.items()), part.name) for part in parts]
        if root.files:
            uploads.append(Upload(None, tuple(root.items()), root.name))
    else:
        items = tuple(sorted((*root.items(), *side_by_side(parts)), key=lambda item: item.path_in_repo))
        refuse_twins(items)
        uploads = [Upload(spec.revision, items, first_of([part.name for part in parts]))]
    return Plan(tuple(uploads), tuple(notes))


def _is_output(directory: Path) -> bool:
    """Whether it is one output: with a manifest, or looking like a model, an adapter or GGUF files."""
    if is_file(directory / MANIFEST_FILE) or any(directory.glob("*.gguf")):
        return True
    configured = is_file(directory / "config.json") or is_file(directory / "adapter_config.json")
    return configured and any(directory.glob("*.safetensors"))


def _variants(directory: Path) -> list[str]:
    """The subdirectories that are outputs, sorted."""
    return sorted(
        child.name
        for child in directory.iterdir()
        if child.is_dir() and not child.name.startswith(".") and _is_output(child)
    )


def _chosen(directory: Path, variants: list[str], spec: PushSpec) -> list[str]:
    if not variants:
        raise NotACheckpointError(
            f"{directory} holds no output",
            expected="a model, an adapter or GGUF files, with qexport.json, or subdirectories of such",
        )
    if unknown := [name for name in spec.variant if name not in variants]:
        raise SpecError(
            f"{directory} has no variant {unknown[0]!r}", expected=f"it has {', '.join(variants)}"
        )
    return [name for name in variants if not spec.variant or name in spec.variant]


def _check_options(directory: Path, spec: PushSpec, *, single: bool, variants: Sequence[str]) -> None:
    if single and (spec.variant or spec.layout):
        raise SpecError(
            f"{'--variant' if spec.variant else '--layout'} is for a directory of several variants, and "
            f"{directory} is one output",
            remedy="leave it out",
        )
    if len(variants) > 1 and spec.layout is None:
        raise SpecError(
            f"{directory} holds {len(variants)} variants ({first_of(variants)})",
            expected="--layout branches (a revision each) or --layout subfolders (all in one tree)",
            remedy="add one, or choose a variant with --variant NAME",
        )
    if spec.revision is not None and not _BRANCH.fullmatch(spec.revision):
        raise SpecError(f"--revision {spec.revision!r} is no name that a branch can have")
    if spec.layout != "branches":
        return
    if spec.revision is not None:
        raise SpecError(
            "--revision with --layout branches", expected="each variant's name is its branch's name"
        )
    if unfit := [name for name in variants if name == _MAIN or not _BRANCH.fullmatch(name)]:
        raise SpecError(
            f"the variant {unfit[0]!r} has a name that a branch of its own cannot have",
            remedy="rename its directory, or take --layout subfolders",
        )


def _gather(
    directory: Path, parts: Sequence[Part], spec: PushSpec, own: Collection[str], *, skip: Collection[str]
) -> list[str]:
    """Fills in the parts' files. Raises UnsafeFileError for the first few that must not go."""
    findings: list[Finding] = []
    used: set[str] = set()
    notes: list[str] = []
    for part in parts:
        for file in _walk(part.directory):
            if part.directory == directory and file.parts[0] in skip and len(parts) > 1:
                continue  # a variant, which has a part of its own or was not chosen
            place = (part.directory / file).relative_to(directory)
            matching = {pattern for pattern in spec.exclude if _matches(place, pattern)}
            used |= matching
            if matching or (len(parts) > 1 and place.parts[0] in _WORK):
                continue
            if finding := _refused(part, file, place, own):
                findings.append(finding)
            part.files.append(file)
        pickles = [file.as_posix() for file in part.files if is_pickle(file)]
        if pickles and not findings:
            notes.append(f"{first_of(pickles)}: a pickle that qexport wrote; the Hub warns its readers")
    if findings:
        findings = list({finding.path: finding for finding in findings}.values())
        excludes = " ".join(dict.fromkeys(f"--exclude '{finding.pattern}'" for finding in findings[:3]))
        told = [f"{finding.path} {finding.what}" for finding in findings]
        raise UnsafeFileError(
            f"{directory}: {first_of(told)}",
            expected="nothing of this kind goes to the Hub",
            remedy=f"take it away, or leave it out with {excludes}",
        )
    notes += [f"--exclude {pattern!r} matches nothing" for pattern in spec.exclude if pattern not in used]
    return notes


def _walk(directory: Path) -> list[Path]:
    """Everything below that is no directory, and links to directories; relative and sorted.

    A refused directory is named as a whole, not by each of its files.
    """
    found: list[Path] = []
    for here, directories, files in os.walk(directory):
        at = Path(here).relative_to(directory)
        linked = [name for name in directories if (Path(here) / name).is_symlink()]
        refused = [name for name in directories if refused_name(Path(name))]
        found += [at / name for name in (*files, *linked, *refused)]
        directories[:] = [name for name in directories if name not in {*linked, *refused}]
    return sorted(set(found))


def _matches(place: Path, pattern: str) -> bool:
    """Whether a pattern is meant for a file: by its path, its name, or those of a directory above it."""
    pattern = pattern.rstrip("/")
    above = [Path(*place.parts[:depth]) for depth in range(1, len(place.parts) + 1)]
    return any(fnmatch(path.as_posix(), pattern) or fnmatch(path.name, pattern) for path in above)


def _refused(part: Part, file: Path, place: Path, own: Collection[str]) -> Finding | None:
    path = part.directory / file
    if finding := refused_name(file):
        return Finding(
            place.as_posix() if finding.path == file.as_posix() else finding.path,
            finding.what,
            finding.pattern,
        )
    if what := refused_kind(path, part.directory):
        return Finding(place.as_posix(), what, place.as_posix())
    if is_pickle(file) and file.as_posix() not in _recorded(part.directory):
        return Finding(place.as_posix(), "is a pickle that qexport did not write", place.as_posix())
    for what in found_keys(path, own):
        return Finding(place.as_posix(), what, place.as_posix())
    return None


def _recorded(directory: Path) -> dict[str, Any]:
    """The files that an output's manifest records."""
    records = read_manifest(directory).get("files", {})
    return records if isinstance(records, dict) else {}


def _require_whole(part: Part) -> list[str]:
    """Raises CorruptFileError for an output that is not what was written; says what could not be proved.

    The model card may be changed: it is there to be edited.
    """
    if not is_file(part.directory / MANIFEST_FILE):
        _require_readable(part)
        return [f"{part.name} has no {MANIFEST_FILE}: that it is whole could not be proved"]
    going = {file.as_posix() for file in part.files}
    there = {name for name in going | set(_recorded(part.directory)) if is_file(part.directory / name)}
    excluded = there - going
    changed = [name for name in changed_files(part.directory) if name not in excluded | {CARD}]
    if changed:
        raise CorruptFileError(
            f"{part.directory} is not whole: {first_of(changed)} "
            f"{'is' if len(changed) == 1 else 'are'} gone or changed since qexport wrote it",
            expected=f"files as {MANIFEST_FILE} records them",
            remedy="make it anew",
        )
    new = sorted(going - set(_recorded(part.directory)) - {MANIFEST_FILE, CARD})
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
