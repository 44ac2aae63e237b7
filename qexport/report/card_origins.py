"""What an output was made of: models and adapters, and what they were made of, as far as it is known.

Nothing is guessed: a model whose id on the Hub is not known for sure has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import exists, is_file
from qexport.checkpoint.manifest import read_manifest
from qexport.errors import QexportError
from qexport.report.card_file import CARD_FILE, read_metadata
from qexport.report.licences import licence_of

_ADAPTER_CONFIG = "adapter_config.json"
_HUB = "https://huggingface.co/"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # a directory of the Hub's cache
# a path relative to where somebody trained looks like an id, too
_FOLDERS = re.compile(
    r"(out|output|model|checkpoint|save|saved|result|export|run|data|base|merged|adapter|lora|train|training|tmp"
    r"|weight|work)s?",
    re.IGNORECASE,
)
_MAX_DEPTH = 8  # models that were made of models


@dataclass(frozen=True)
class Origin:
    """A model or an adapter that an output was made of.

    `name` is the Hub id, or the directory's name: where it lay on somebody's disk is nobody's business.
    `card` is the YAML of its README.md, `licence` that of its LICENSE file, where they are still there;
    `kind`, `weight` and `base_model` (a Hub id) are an adapter's; `origins` what a model was itself made of.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    adapter: bool = False
    kind: str = ""
    weight: float | None = None
    base_model: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    origins: tuple[Origin, ...] = ()


def walk(origins: Sequence[Origin]) -> Iterator[Origin]:
    """Each of them, and what it was made of."""
    for origin in origins:
        yield origin
        yield from walk(origin.origins)


def mapping(value: object) -> Mapping[str, Any]:
    """`value` where it is a mapping, else an empty one: qexport.json may have been edited."""
    return value if isinstance(value, dict) else {}


def origins_of(directory: Path, figures: Mapping[str, Any], header: Mapping[str, Any]) -> tuple[Origin, ...]:
    """What qexport.json tells of the sources of an output; of a GGUF without one, its own header.

    `figures` are those of qexport.json, `header` a GGUF's settings. A source that is gone counts by its name.
    """
    found = _recorded(directory, figures)
    if found or not header:
        return found
    card: dict[str, Any] = {"license": header["general.license"]} if header.get("general.license") else {}
    for key, name in (("general.languages", "language"), ("general.tags", "tags")):
        if isinstance(header.get(key), list):
            card[name] = header[key]
    url = str(header.get("general.base_model.0.repo_url") or "")
    hub_id = _known_id(url.removeprefix(_HUB), directory) if url.startswith(_HUB) else None
    name = hub_id or str(header.get("general.base_model.0.name") or "")
    return (Origin(name, hub_id, card=card),) if name else ()


def _recorded(directory: Path, figures: Mapping[str, Any], depth: int = 0) -> tuple[Origin, ...]:
    """By `figures["sources"]`, a record of each source and its own; of older merges by base and adapters."""
    adapters = [mapping(one) for one in figures.get("adapters") or () if isinstance(one, dict)]
    sources = figures.get("sources")
    if not isinstance(sources, list):
        named = [{"path": figures["base"]}] if isinstance(figures.get("base"), str) else []
        sources = [*named, *adapters]
    settings = {Path(str(one.get("path"))): one for one in adapters}
    return tuple(
        _origin(directory, record | {**settings.get(Path(record["path"]), {}), "path": record["path"]}, depth)
        for record in sources
        if isinstance(record, dict) and isinstance(record.get("path"), str)
    )


def _origin(directory: Path, record: Mapping[str, Any], depth: int) -> Origin:
    path = Path(record["path"])
    if not exists(path) and exists(directory / path):  # told from the output on
        path = directory / path
    # of a GGUF file, what lies beside it
    home = path.parent if path.suffix == ".gguf" and is_file(path) else path
    hub_id, revision = _cached(path)
    adapter = "kind" in record or "base_model" in record or is_file(path / _ADAPTER_CONFIG)
    config: Mapping[str, Any] = {}
    if adapter and is_file(path / _ADAPTER_CONFIG):
        try:
            config = read_json(path / _ADAPTER_CONFIG)
        except QexportError:
            config = {}
    trained_on = record.get("base_model") or config.get("base_model_name_or_path")
    weight = record.get("weight")
    inner = {"sources": record["sources"]} if isinstance(record.get("sources"), list) else {}
    if not inner and depth < _MAX_DEPTH and home.is_dir():
        try:
            inner = dict(mapping(read_manifest(home).get("figures")))
        except QexportError:
            inner = {}
    return Origin(
        name=hub_id or path.name or path.resolve().name,
        hub_id=hub_id,
        revision=revision,
        adapter=adapter,
        kind=str(record.get("kind") or config.get("peft_type") or ""),
        weight=float(weight) if isinstance(weight, (int, float)) and not isinstance(weight, bool) else None,
        base_model=_known_id(trained_on, path.parent) if isinstance(trained_on, str) else None,
        card=read_metadata(home / CARD_FILE) if home.is_dir() else {},
        licence=licence_of(home) if home.is_dir() else None,
        origins=() if hub_id or depth >= _MAX_DEPTH else _recorded(home, inner, depth + 1),
    )


def _cached(path: Path) -> tuple[str | None, str | None]:
    """Hub id and revision of a snapshot in the Hub's cache: models--OWNER--NAME/snapshots/REVISION."""
    for part in (path, *path.parents[:2]):
        if found := _CACHED.fullmatch(part.name):
            inside = path.relative_to(part).parts
            revision = inside[1] if len(inside) == 2 and inside[0] == "snapshots" else None
            return f"{found['owner']}/{found['name']}", revision
    return None, None


def _known_id(name: str, beside: Path) -> str | None:
    """`name` where it can only be a Hub id: no path of somebody's disk, in use here or by its looks."""
    if _CACHED.search(name):
        return _cached(Path(name))[0]
    if not _HUB_ID.fullmatch(name) or _FOLDERS.fullmatch(name.split("/")[0]):
        return None
    return None if exists(Path(name)) or exists(beside / name) else name


def hub_ids(value: object, beside: Path) -> list[str]:
    """The Hub ids in an entry of a card: one text, or a list of them."""
    texts = value if isinstance(value, list) else [value]
    found = (_known_id(one.strip(), beside) for one in texts if isinstance(one, str))
    return [one for one in found if one]
