"""What a format module has: how a checkpoint is read; and where qexport writes it too, how a layer's
tensors are named, written and told in config.json."""

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


class Reader(Protocol):
    """The functions of a format module that reads."""

    METHOD: str  # the `quant_method` of its checkpoints

    def decoder(
        self,
        config: Mapping[str, Any],
        stored: Mapping[str, StoredTensor],
        float_dtype: torch.dtype,
    ) -> Decoder:
        """The reader of a checkpoint with this `quantization_config`."""


class Format(Reader, Protocol):
    """Those of a module that writes as well. Grid and codes are of the grids that the format can hold."""

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
