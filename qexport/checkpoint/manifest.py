"""qexport.json: what an output was made of, how, and what its files must hash to."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import CONFIG_FILE, read_json
from qexport.checkpoint.disk import is_file
from qexport.checkpoint.gguf_files import gguf_files, in_the_users_words
from qexport.checkpoint.hashing import ALGORITHM, file_hash
from qexport.checkpoint.sharding import INDEX_FILE
from qexport.checkpoint.sidecars import sidecar_files
from qexport.checkpoint.staging import write_file_atomically
from qexport.errors import QexportError
from qexport.results import plain
from qexport.version import __version__

MANIFEST_FILE = "qexport.json"
_MERGED = "merged_adapters"
_REPORTED = ("torch", "transformers", "peft", "safetensors", "bitsandbytes", "numpy", "sacrebleu")


@dataclass(frozen=True)
class Recipe:
    """What determines an output: the step, its options (seeds included), its inputs' hashes.

    `packages` are those whose arithmetic it depends on: their versions are part of the key.
    """

    task: str
    options: Mapping[str, Any]
    inputs: Mapping[str, str]
    packages: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Hash of the recipe, of qexport's version and of the packages': equal keys, equal outputs."""
        installed = installed_versions(self.packages)
        versions = {package: installed.get(package) for package in self.packages}
        content = {**asdict(self), "qexport": __version__, "versions": versions}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and hash of one file of the output."""

    size: int
    blake3: str


@dataclass(frozen=True)
class Manifest:
    """The content of qexport.json."""

    recipe: Recipe
    files: Mapping[str, FileRecord]
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text."""
        content = {
            "qexport": __version__,
            "key": self.recipe.key,
            "recipe": asdict(self.recipe),
            "versions": installed_versions(self.recipe.packages),
            "figures": plain(self.figures),
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def installed_versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python and of the packages whose arithmetic outputs depend on, `packages` among them."""
    versions = {"python": platform.python_version()}
    for package in dict.fromkeys((*_REPORTED, *packages)):
        try:
            versions[package] = _version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def _version(package: str) -> str:
    return metadata.version(package)


def content_files(directory: Path) -> list[Path]:
    """The files of a model or adapter that matter to what is made of it, relative and sorted.

    Of a GGUF model its own alone: whatever lies beside them was made of them.
    """
    if gguf := gguf_files(directory):
        return [file.relative_to(directory) for file in gguf]
    found = (file for file in directory.glob("*.safetensors") if file.is_file())
    weights = {file.relative_to(directory) for file in found}
    configs = {
        Path(name)
        for name in (CONFIG_FILE, INDEX_FILE, "adapter_config.json", "adapter_model.bin")
        if (directory / name).is_file()
    }
    return sorted(weights | configs | set(sidecar_files(directory)))


def fingerprint(source: Path) -> str:
    """Hash over the content of a model directory, or of a single file."""
    if source.is_file():
        return file_hash(source)
    digest = hashlib.sha256()
    for file in content_files(source):
        digest.update(f"{file.as_posix()}\0{file_hash(source / file)}\n".encode())
    return digest.hexdigest()


def record_files(directory: Path) -> dict[str, FileRecord]:
    """Size and hash of every file below `directory`, the manifest itself left out."""
    return {
        file.relative_to(directory).as_posix(): FileRecord(file.stat().st_size, file_hash(file))
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST_FILE
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """The content of a directory's qexport.json; empty when qexport did not make it."""
    path = directory / MANIFEST_FILE
    return read_json(path) if is_file(path) else {}


def changed_files(directory: Path) -> list[str]:
    """Files of an output whose bytes are no longer those that its manifest records, or that are gone.

    Empty for a directory that qexport did not make.
    """
    manifest = read_manifest(directory)
    records = manifest.get("files", {})
    if not isinstance(records, dict) or (manifest and not records):
        return [MANIFEST_FILE]
    return sorted(
        name
        for name, record in records.items()
        if not isinstance(record, dict)
        or ".." in Path(name).parts
        or not is_file(directory / name)
        or file_hash(directory / name) != record.get(ALGORITHM)
    )


def stands(directory: Path, key: str) -> bool:
    """Whether `directory` holds the whole, unchanged output of the recipe with this key."""
    try:
        manifest = read_manifest(directory)
        if manifest.get("key") != key or changed_files(directory):
            return False
        # a file that came in since would be read with the others
        return {file.as_posix() for file in content_files(directory)} <= set(manifest["files"])
    except QexportError:
        return False


def merged_adapters(directory: Path) -> set[str]:
    """Hashes of the adapters that are in a model's weights, as far as qexport merged them.

    The steps that came after the merge carry them on.
    """
    manifest = read_manifest(directory)
    recipe, figures = manifest.get("recipe"), manifest.get("figures")
    inputs = recipe.get("inputs") if isinstance(recipe, dict) else None
    carried = figures.get(_MERGED) if isinstance(figures, dict) else None
    found = set(map(str, carried)) if isinstance(carried, list) else set()
    if isinstance(inputs, dict):
        found |= {str(value) for name, value in inputs.items() if name.startswith("adapter")}
    return found


def carried_figures(sources: Sequence[Path]) -> dict[str, Any]:
    """What an output says of the models that it was made of."""
    held = sorted(set().union(*(merged_adapters(source) for source in sources)))
    carried: dict[str, Any] = {_MERGED: held} if held else {}
    return {**carried, "sources": [_told(source) for source in sources]} if sources else carried


def _told(source: Path) -> dict[str, Any]:
    """A model or an adapter by its place, with its base's name and its own sources where it tells them."""
    told: dict[str, Any] = {"path": in_the_users_words(str(source))}
    adapter = source / "adapter_config.json"
    base = read_json(adapter).get("base_model_name_or_path") if is_file(adapter) else None
    if isinstance(base, str) and base:
        told["base_model"] = base
    figures = read_manifest(source).get("figures") if source.is_dir() else None
    if isinstance(figures, dict) and isinstance(figures.get("sources"), list):
        told["sources"] = figures["sources"]
    return told


def read_figures(directory: Path) -> dict[str, Any]:
    """The figures that an output carries; empty when it has no manifest."""
    figures = read_manifest(directory).get("figures", {})
    return figures if isinstance(figures, dict) else {}


def add_figures(directory: Path, figures: Mapping[str, Any]) -> None:
    """Adds measured figures to an output's manifest; a directory without one is left alone."""
    manifest = read_manifest(directory)
    if manifest:
        manifest["figures"] = {**read_figures(directory), **figures}
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_file_atomically(directory / MANIFEST_FILE, text)
