"""`general.` settings: what a model is called, how large, under which licence, and made from what.

Names, their parts and the size label are gguf-py's; licence, tags, languages and base models are those of the
model card, the YAML on top of README.md. Sources: ggml's docs/gguf.md, gguf-py's `metadata.py`, `utility.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import read_json
from qexport.errors import MissingDependencyError, QexportError
from qexport.formats.gguf.container import Metadata, array, text, u32
from qexport.formats.gguf.rows import Row
from qexport.formats.gguf.settings import complete

_CARD = "README.md"
_ADAPTER = "adapter_config.json"
_MAX_CARD_BYTES = 1 << 20
_HUB = "https://huggingface.co/"
_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$")
_CACHED = re.compile(r"^models--(?P<owner>.+?)--(?P<name>.+)$")  # a directory of the Hub's cache


def general(
    path: Path,
    config: Mapping[str, Any],
    *,
    parameters: int,
    name: str | None = None,
    base_model: str | None = None,
) -> Metadata:
    """The settings of the model in `path` with `parameters` values; `config` is its config.json.

    `name` stands for the directory's; `base_model` is the Hub id or path of what it was tuned from, for a
    model whose card names none. Type and quantization of the file are not among them: each file has its own.

    Raises UnsupportedModelError and NotACheckpointError as `settings.settings`; a broken card is passed over.
    """
    row, full = complete(config)
    called = name or _called(path)
    card = _front_matter(path / _CARD)
    found: Metadata = {"general.architecture": text(row.arch), "general.type": text("model")}
    found |= _names(called, parameters)
    found["general.size_label"] = text(_size_label(full, row, parameters))
    found |= _licence(card)
    bases = list(_texts(card.get("base_model"))) or list(_texts(base_model or _adapters_base(path)))
    found |= _base_models(bases, parameters)
    for key, entry in (("tags", "tags"), ("languages", "language")):
        if values := list(_texts(card.get(entry))):
            found[f"general.{key}"] = array("str", values)
    return found


def file_stem(path: Path, config: Mapping[str, Any]) -> str:
    """How a file of this model is called, without type and ending: as its directory, in plain characters."""
    stem = re.sub(r"[^\w.-]+", "-", _called(path)).strip("-.")
    return stem or str(config.get("model_type") or "model")


def _called(path: Path) -> str:
    """The name of a model's directory, or of the Hub's model whose cache it lies in."""
    whole = path.absolute()
    for part in (whole, *whole.parents[:2]):
        if cached := _CACHED.match(part.name):
            return cached["name"]
    return whole.name or whole.resolve().name


def _names(called: str, parameters: int) -> Metadata:
    """The title, and the parts that gguf-py finds in a name such as Llama-3.2-1B-Instruct."""
    whole, _, basename, finetune, version, _ = _metadata().get_model_id_components(called, parameters)
    title = _metadata().id_to_title(whole or called)
    parts = {"name": title, "version": version, "finetune": finetune, "basename": basename}
    return {f"general.{key}": text(value) for key, value in parts.items() if value}


def _size_label(full: Any, row: Row, parameters: int) -> str:
    count = each = 0
    if row.experts:
        count = int(getattr(full, row.experts.count))
        each = 3 * full.hidden_size * getattr(full, row.experts.size) * full.num_hidden_layers
    from gguf.utility import size_label

    label: str = size_label(parameters, parameters - count * each, each, count)
    return label


def _licence(card: Mapping[str, Any]) -> Metadata:
    found: Metadata = {}
    if names := list(_texts(card.get("license"))):
        found["general.license"] = text(",".join(names))
    for key in ("license_name", "license_link"):
        if value := next(_texts(card.get(key)), ""):
            found[f"general.{key.replace('_', '.')}"] = text(value)
    return found


def _base_models(bases: list[str], parameters: int) -> Metadata:
    if not bases:
        return {}
    found: Metadata = {"general.base_model.count": u32(len(bases))}
    for number, base in enumerate(bases):
        known = _HUB_ID.match(base) is not None
        owner, _, name = base.rstrip("/").rpartition("/") if known else ("", "", Path(base).name or base)
        whole, _, _, _, version, _ = _metadata().get_model_id_components(name, parameters)
        title = _metadata().id_to_title
        parts = {"name": title(whole or name), "version": version}
        if known:
            parts |= {"organization": title(owner), "repo_url": f"{_HUB}{base}"}
        for key, value in parts.items():
            if value:
                found[f"general.base_model.{number}.{key}"] = text(value)
    return found


def _adapters_base(path: Path) -> str | None:
    """What an adapter that lies beside the model was trained on."""
    try:
        found = read_json(path / _ADAPTER).get("base_model_name_or_path")
    except (QexportError, OSError):
        return None
    return found if isinstance(found, str) else None


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines `---`; nothing for a card that has none, or a broken one."""
    import yaml

    try:
        with card.open("rb") as file:
            lines = file.read(_MAX_CARD_BYTES).decode("utf-8", "replace").lstrip("\ufeff").splitlines()
    except OSError:
        return {}
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)
    # tabs are no YAML, but stand in cards; and `no` is Norwegian there, not false
    content = re.sub(r"(?m)^(\s*-\s+|language:\s*)(no)\s*$", r'\1"\2"', "\n".join(lines[1:end]))
    try:
        found = yaml.safe_load(content.replace("\t", "  "))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _texts(value: object) -> Iterator[str]:
    """The texts in an entry of a card: one, or a list of them."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str) and one.strip():
            yield one.strip()


def _metadata() -> Any:
    try:
        from gguf.metadata import Metadata as Names
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF needs the package gguf", remedy="pip install 'qexport[gguf]'"
        ) from error
    return Names
