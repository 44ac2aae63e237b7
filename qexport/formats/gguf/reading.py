"""GGUF read back: the tensors under transformers' names, decoded from their blocks one at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from qexport.checkpoint.tensors import TensorInfo
from qexport.errors import (
    CorruptFileError,
    MissingDependencyError,
    NotACheckpointError,
    UnsupportedModelError,
)
from qexport.formats.gguf.container import PLAIN, Header, StoredBlocks
from qexport.formats.gguf.settings import config_of
from qexport.formats.gguf.tensors import COMPUTED, Origin, origins, restore
from qexport.grids.ggml.types import BlockType

METHOD = "gguf"  # what a config calls the quantization of a file with blocks
_FLOATS = ("f32", "f16", "bf16")
_MAX_FACTORS = 1 << 16
_PROJECTORS = ("clip", "mmproj")  # `general.architecture` and `general.type` of a projector


@dataclass(frozen=True)
class GgufDecoder:
    """Reads the tensors of a GGUF model; see `Decoder`. What lies in blocks comes in fp32."""

    tensors: Mapping[str, StoredBlocks]
    origins: Mapping[str, Origin]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in transformers' order."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(name, _dtype(self.tensors[origin.tensor].type), origin.shape)
            for name, origin in self.origins.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """One full-precision tensor; of the experts in one of the file's, its own alone."""
        origin = self.origins[name]
        return restore(read_values(self.tensors[origin.tensor], origin.expert), origin)

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor lies in the file as blocks."""
        return self.tensors[self.origins[name].tensor].type.name not in _FLOATS


def _dtype(kind: BlockType) -> torch.dtype:
    return PLAIN.get(kind.name, torch.float32)


def read_values(stored: StoredBlocks, expert: int | None = None) -> torch.Tensor:
    """The tensor's values in its shape, or those of the matrix `expert` of its first side.

    They are as they stand in the file or, where that has blocks, decoded to fp32.

    Raises CorruptFileError, and MissingDependencyError for a type that a missing package decodes.
    """
    shape = stored.shape if expert is None else stored.shape[1:]
    rows = math.prod(shape[:-1])
    first = (expert or 0) * rows
    blocks = stored.read_rows(first, first + rows)
    values = blocks if stored.type.name in PLAIN else _decoded(stored.type, blocks)
    return values.reshape(shape)


def _decoded(kind: BlockType, blocks: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, in] of blocks uint8 [rows, bytes]."""
    if kind.family:
        return kind.decode(blocks)
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise MissingDependencyError(
            f"the GGUF type {kind.name} needs gguf, which is not installed",
            remedy="pip install 'qexport[gguf]'",
        ) from error
    array: Any = blocks.numpy()
    try:
        with np.errstate(all="ignore"):  # NaN is for others to find
            return torch.from_numpy(quants.dequantize(array, GGMLQuantizationType(kind.number))).float()
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedModelError(
            f"tensors of the GGUF type {kind.name} cannot be decoded",
            remedy="try a newer gguf: pip install -U gguf",
        ) from error


def require_model(header: Header) -> None:
    """Raises NotACheckpointError for a GGUF file that holds something else than a language model."""
    settings = header.plain()
    architecture, kind = settings.get("general.architecture"), settings.get("general.type", "model")
    found, remedy = "", ""
    if kind == "adapter":
        found = "is an adapter, not a model"
        remedy = "merge the safetensors adapter that it was made of: qexport merge BASE -a ADAPTER -o OUT"
    elif kind == "imatrix":
        found, remedy = "is an importance matrix, not a model", "name the model's own file"
    elif architecture in _PROJECTORS or kind in _PROJECTORS:
        found = "is the projector of a multimodal model (mmproj), which holds no language model"
        remedy = "name the model's own file beside it"
    elif not header.tensors:
        found = "holds a vocabulary alone, and no tensor"
        remedy = "name a file with the model's weights"
    if found:
        raise NotACheckpointError(f"{header.path} {found}", expected="a language model", remedy=remedy)
    if not isinstance(architecture, str) or not architecture:
        raise CorruptFileError(f"{header.path} does not tell its general.architecture")


def places(header: Header) -> dict[str, Origin]:
    """Where each tensor lies under transformers' name. Raises UnsupportedModelError and CorruptFileError."""
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    with settings_of(header):
        return origins(header.plain(), shapes)


def read_config(header: Header) -> dict[str, Any]:
    """The config.json of the model, with a `quantization_config` where tensors lie in blocks.

    Raises UnsupportedModelError and CorruptFileError.
    """
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    with settings_of(header):
        computed = {name: _small(header.tensors[name]) for name in COMPUTED & shapes.keys()}
        config = config_of(header.plain(), shapes, computed)
    types = sorted({tensor.type.name for tensor in header.tensors.values()} - {*_FLOATS})
    if types:
        config |= {"dtype": "float32", "quantization_config": {"quant_method": METHOD, "types": types}}
    return config


def _small(stored: StoredBlocks) -> torch.Tensor:
    if stored.numel > _MAX_FACTORS:
        raise CorruptFileError(f"{stored.name} has {stored.numel} values, expected one for two of a head")
    return read_values(stored)


@contextlib.contextmanager
def settings_of(header: Header) -> Iterator[None]:
    """Within it, an error about a file's settings names the file."""
    try:
        yield
    except (UnsupportedModelError, CorruptFileError) as error:
        raise type(error)(
            f"{header.path}: {error.found}", expected=error.expected, remedy=error.remedy
        ) from error
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise CorruptFileError(  # a setting of another kind than the reader of settings counts on
            f"the settings of {header.path} make no sense: {type(error).__name__}: {str(error)[:100]}",
            expected="a GGUF file as llama.cpp writes it",
        ) from error
