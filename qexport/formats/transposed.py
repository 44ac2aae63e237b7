"""Layers that a model stores as [in, out], though every format holds codes of [out, in] (GPT-2's Conv1D)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from qexport.checkpoint.checkpoint import Decoder
from qexport.checkpoint.tensors import TensorInfo


@dataclass(frozen=True)
class TransposedDecoder:
    """Turns decoded weights back to the [in, out] that the model has; `transposed` tells which."""

    inner: Decoder
    transposed: Callable[[str], bool]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {
            name: replace(info, shape=tuple(reversed(info.shape))) if self._turned(name) else info
            for name, info in self.inner.infos().items()
        }

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor lies in the file as codes."""
        return self.inner.is_quantized(name)

    def read(self, name: str) -> torch.Tensor:
        """One full-precision tensor."""
        tensor = self.inner.read(name)
        return tensor.T.contiguous() if self._turned(name) else tensor

    def _turned(self, name: str) -> bool:
        return name.endswith(".weight") and self.inner.is_quantized(name) and self.transposed(name)
