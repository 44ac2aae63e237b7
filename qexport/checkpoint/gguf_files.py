"""Models in GGUF files on disk: found here, read by `qexport.formats.gguf`.

The reader needs ggml's grids and the architectures, which lie above this room; it is looked up by its path
when such a file is met. A file becomes a directory of small files with a link to it (`unpack`), which
everything else takes for a model's directory as any other.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qexport.checkpoint.disk import exists, is_file

if TYPE_CHECKING:
    from qexport.checkpoint.checkpoint import Checkpoint

PATTERN = "*.gguf"
_SUFFIX, _MAGIC = ".gguf", b"GGUF"
_READER = "qexport.formats.gguf.unpacking"
# where one of these is, the GGUF beside it is not what the directory is about
_OTHERS = ("*.safetensors", "pytorch_model*", "adapter_config.json")
_given: dict[str, str] = {}


class Reader(Protocol):
    """The module that reads."""

    def unpack(self, source: Path) -> Path:
        """The directory that stands for a GGUF file, or for the one model in a directory of such files."""

    def open_unpacked(self, directory: Path) -> Checkpoint:
        """The checkpoint of such a directory."""


def reader() -> Reader:
    """The reader of GGUF files."""
    found: Reader = importlib.import_module(_READER)
    return found


def is_gguf(path: Path) -> bool:
    """Whether a file is one, by its name or by its first bytes (Ollama's have no suffix)."""
    if not is_file(path):
        return False
    if path.suffix.lower() == _SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def gguf_files(directory: Path) -> list[Path]:
    """The GGUF files in a directory, sorted; its subdirectories are not looked into.

    None where safetensors, a pickle or an adapter lie beside them, and for what is no directory.
    """
    if not exists(directory) or not directory.is_dir():
        return []
    found = sorted(file for file in directory.glob(PATTERN) if file.is_file())
    return found if found and not any(any(directory.glob(pattern)) for pattern in _OTHERS) else []


def unpacked(path: Path) -> Path:
    """The directory that stands for a GGUF file, or for the model in a directory of such files.

    Any other path as it is, one that stands for a file already too. Raises as `Reader.unpack`.
    """
    if str(path) in _given or not (is_gguf(path) or gguf_files(path)):
        return path
    directory = reader().unpack(path)
    place = path if path.is_dir() else path.parent
    for link in gguf_files(directory):
        _given[str(link)] = str(place / link.readlink().name)
    _given[str(directory)] = str(path)
    return directory


def in_the_users_words(message: str) -> str:
    """A text with the user's own paths in place of the directories that stand for them, and of the links."""
    for made in sorted(_given, key=len, reverse=True):  # a link before its directory
        message = message.replace(made, _given[made])
    return message
