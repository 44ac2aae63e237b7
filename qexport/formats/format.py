"""What every format module has: how a layer's tensors are named, written, told in config.json, and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qexport.checkpoint.checkpoint import Decoder
from qexport.checkpoint.safetensors_file import StoredTensor
from qexport.checkpoint.tensors import TensorInfo


@dataclass(frozen=True)
class Facts:
    """What a `quantization_config` tells beside the grid.

    `converted` and `left` are full names of linear layers; `head` is the output head, always left.
    """

    converted: Sequence[str]
    left: Sequence[str]
    head: str
    dtype: torch.dtype
    damp: float | None = None


class Format(Protocol):
    """A format module's functions. Grid and codes are those of the grids that the format can hold."""

    METHOD: str

    def obstacle(self, shape: Sequence[int], grid: Any) -> str | None:
        """Why a matrix [out, in] cannot be stored, in a few words; None when it can."""

    def layout(self, module: str, shape: Sequence[int], grid: Any) -> list[TensorInfo]:
        """The tensors that a linear layer [out, in] becomes."""

    def encode(self, module: str, codes: Any, grid: Any) -> dict[str, torch.Tensor]:
        """The layer's tensors, named and shaped as `layout` says."""

    def quantization_config(self, grid: Any, facts: Facts) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """Further JSON files that runtimes look for, made from the config."""

    def decoder(
        self,
        config: Mapping[str, Any],
        stored: Mapping[str, StoredTensor],
        float_dtype: torch.dtype,
    ) -> Decoder:
        """The reader of a checkpoint with this `quantization_config`."""
