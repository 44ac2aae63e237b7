"""A checkpoint as a lazy stream of named full-precision tensors, whatever its bytes look like."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from qexport.checkpoint.disk import exists, is_file, read_errors
from qexport.checkpoint.gguf_files import gguf_files, reader
from qexport.checkpoint.safetensors_file import StoredTensor, iter_values, read_header, read_rows, read_tensor
from qexport.checkpoint.sharding import INDEX_FILE, SINGLE_FILE
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.ties import Tie, embedding_name, head_name, tie_of
from qexport.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    InputError,
    NotACheckpointError,
    UnsafeFileError,
)

CONFIG_FILE = "config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_JSON_BYTES = 200_000_000


class Decoder(Protocol):
    """Turns stored tensors into full-precision ones; each format brings its own."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order."""

    def read(self, name: str) -> torch.Tensor:
        """One full-precision tensor."""

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor lies in the file as codes."""


@dataclass(frozen=True)
class PlainDecoder:
    """Tensors that are stored as what they are."""

    stored: Mapping[str, StoredTensor]

    def infos(self) -> Mapping[str, TensorInfo]:
        """The stored tensors themselves."""
        return self.stored

    def read(self, name: str) -> torch.Tensor:
        """The stored tensor."""
        return read_tensor(self.stored[name])

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` of it, along its first side."""
        return read_rows(self.stored[name], begin, end)

    def is_quantized(self, name: str) -> bool:
        """Nothing is."""
        return False


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Opening reads headers only; `read` brings one tensor into memory.

    `stored` are the tensors as they lie in the files; `names`, `info` and `read` speak of the
    full-precision tensors behind them. A tied pair stands once in both, under the embedding's name.
    """

    path: Path
    config: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    tie: Tie | None = None
    decoder: Decoder = field(kw_only=True)

    @property
    def weights_size(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.size for tensor in self.stored.values())

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The config's `quantization_config`, or the `quantization` of older MLX files, if there is one."""
        found = self.config.get("quantization_config", self.config.get("quantization"))
        return found if isinstance(found, dict) else None

    def names(self) -> Iterator[str]:
        """Names of the full-precision tensors, in file order."""
        return iter(self.decoder.infos())

    def _stored_name(self, name: str) -> str:
        return self.tie.embedding if self.tie and name == self.tie.head else name

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) in self.decoder.infos()

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a full-precision tensor; KeyError for a name that is not there."""
        found = self.decoder.infos()[self._stored_name(name)]
        return TensorInfo(name, found.dtype, found.shape)

    def read(self, name: str) -> torch.Tensor:
        """A full-precision tensor, in memory of its own; either name of a tied pair will do."""
        return self.decoder.read(self._stored_name(name))

    @property
    def reads_rows(self) -> bool:
        """Whether `read_rows` reads no more than the rows."""
        return isinstance(self.decoder, PlainDecoder)

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` of a full-precision tensor, along its first side."""
        if isinstance(self.decoder, PlainDecoder):
            return self.decoder.read_rows(self._stored_name(name), begin, end)
        return self.read(name)[begin:end]

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor lies in the file as codes."""
        return self.decoder.is_quantized(self._stored_name(name))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CorruptFileError when it is anything else."""
    with read_errors(path):
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptFileError(f"{path} has {path.stat().st_size} bytes, too many for JSON")
        raw = path.read_bytes()
    try:
        content = json.loads(raw.decode("utf-8"))
        if rb"\ud" in raw.lower():  # half of a surrogate pair is JSON, but no text
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def open_directory(path: Path) -> Checkpoint:
    """The checkpoint in a local directory, with its tensors as they are stored; those of a GGUF decoded.

    Raises CheckpointNotFoundError, NotACheckpointError, CorruptFileError or UnsafeFileError.
    """
    if not exists(path) or not path.is_dir():
        found = "is a file" if exists(path) else "does not exist"
        raise CheckpointNotFoundError(
            f"{path} {found}", expected="a model is a directory with config.json and safetensors"
        )
    if not is_file(path / CONFIG_FILE):
        if (path / "adapter_config.json").is_file():
            raise NotACheckpointError(
                f"{path} is an adapter, not a model",
                remedy=f"merge it into its base: qexport merge BASE -a {path} -o OUT",
            )
        raise NotACheckpointError(
            f"{path} has no config.json", expected="a Hugging Face model directory has one"
        )
    if gguf_files(path):
        return reader().open_unpacked(path)
    config = read_json(path / CONFIG_FILE)
    stored = _stored_tensors(path)
    tie = _resolve_tie(config, stored)
    if tie:
        stored = _stored_once(stored, tie)
    return Checkpoint(path, config, stored, tie, decoder=PlainDecoder(stored))


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    # in transformers' order: a single file counts before an index
    if is_file(path / SINGLE_FILE):
        tensors = read_header(path / SINGLE_FILE)[0]
        if not tensors:
            raise NotACheckpointError(f"{path / SINGLE_FILE} holds no tensor")
        return tensors
    if is_file(path / INDEX_FILE):
        return _indexed_tensors(path)
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise UnsafeFileError(
            f"{path} holds its weights in {pickles[0]}, a pickle that can run code when loaded",
            expected="qexport reads safetensors only",
            remedy='convert it once where you trust it: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{path}').save_pretrained('OUT')\"",
        )
    others = sorted(file.name for file in path.glob("*.safetensors"))
    raise NotACheckpointError(
        f"{path} has no {SINGLE_FILE} and no {INDEX_FILE}"
        + (f", only {', '.join(others[:3])}" if others else ""),
        expected="a model's weights lie in one of the two",
    )


def _indexed_tensors(path: Path) -> dict[str, StoredTensor]:
    index = path / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index} has no weight_map")
    files: dict[str, dict[str, StoredTensor]] = {}
    for name, file in weight_map.items():
        # A name from a downloaded file is never followed out of its own directory.
        if not isinstance(file, str) or Path(file).name != file or file in (".", "..") or "\\" in file:
            raise UnsafeFileError(
                f"{index} places {name!r} in {file!r}",
                expected="only files beside the index are read",
                remedy="do not use this checkpoint unless you know where it comes from",
            )
        if not file.endswith(".safetensors"):
            raise UnsafeFileError(
                f"{index} places {name!r} in {file!r}", expected="qexport reads safetensors only"
            )
        if file not in files:
            if not is_file(path / file):
                raise CorruptFileError(
                    f"{index} names {file}, which is not there", remedy="download it again"
                )
            files[file] = read_header(path / file)[0]
        if name not in files[file]:
            raise CorruptFileError(f"{index} places {name!r} in {file}, which does not hold it")
    stray = [name for file, held in files.items() for name in held if weight_map.get(name) != file]
    if stray:
        raise CorruptFileError(
            f"{len(stray)} tensors lie in the files but not in {index}: {', '.join(stray[:3])}"
        )
    return {name: tensor for held in files.values() for name, tensor in held.items()}


def _resolve_tie(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Tie | None:
    tie = tie_of(config, stored)
    if tie or not config.get("tie_word_embeddings"):
        return tie
    embedding, head = embedding_name(stored), head_name(stored)
    if embedding and head and _same_values(stored[embedding], stored[head]):
        return Tie(embedding, head)
    return None


def _stored_once(stored: Mapping[str, StoredTensor], tie: Tie) -> dict[str, StoredTensor]:
    once: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        once.setdefault(tie.embedding if name == tie.head else name, tensor)
    return once


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        torch.equal(a, b) for a, b in zip(iter_values(one), iter_values(other), strict=True)
    )


def local_path(source: str | Path) -> Path | None:
    """`source` as a path when it is meant as one; None when it reads as a Hub id."""
    text = str(source)
    if not text.strip():
        raise InputError("the model's name is empty", expected="a directory or a Hub id")
    if exists(Path(text)) or isinstance(source, Path):
        return Path(text)
    parts = text.split("/")
    looks_local = text.startswith((".", "/", "~")) or len(parts) > 2 or not all(parts)
    looks_local = looks_local or text.endswith(".gguf")
    if not looks_local:
        return None
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)
