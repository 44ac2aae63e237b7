"""ggml's types by name, and the module that encodes and decodes each.

A row of a matrix is cut into blocks of `values` neighbouring weights; a block takes `size` bytes. Layouts and
numbers are those of ggml (ggml.h, ggml-common.h) and of gguf-py's `constants.py`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from qexport.errors import MissingDependencyError, SpecError

_EXTRA = ("gguf", "numba", "llvmlite")  # packages of the extra

Encoder = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(weight fp32 [rows, in], importance fp32 [in] or None) -> blocks uint8 [rows, bytes]."""
Decoder = Callable[[torch.Tensor], torch.Tensor]
"""blocks uint8 [rows, bytes] -> fp32 [rows, in]."""


class Affine(Protocol):
    """What GPTQ needs of a type whose values lie on lines: scales apart from codes.

    A group is `width` neighbouring weights. Scales are of a type of the module's own: a dataclass of tensors
    [rows, groups] or a tensor.
    """

    @property
    def width(self) -> int:
        """Weights a group."""

    @property
    def bits(self) -> int:
        """Bits a code."""

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> object:
        """The scales that the encoder would choose for fp32 [rows, in]."""

    def lines(self, scales: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and origin, fp32 [rows, groups], exactly as the stored scales decode."""

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes nearest to values (elementwise, broadcast), and what they stand for, fp32."""

    def pack(self, codes: torch.Tensor, scales: object) -> torch.Tensor:
        """Codes (whole numbers) [rows, in] as `round` gives them -> blocks uint8 [rows, bytes]."""


class Family(Protocol):
    """A module of encoders: what it has, by the names of the types."""

    ENCODERS: Mapping[str, Encoder]
    DECODERS: Mapping[str, Decoder]
    AFFINE: Mapping[str, Affine]


@dataclass(frozen=True)
class BlockType:
    """A ggml type: its number in files, the weights and bytes of a block, the module that knows it."""

    name: str
    number: int
    values: int
    size: int
    family: str
    needs_importance: bool = False  # llama.cpp refuses to quantize to it without an importance matrix

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.size / self.values

    def row_bytes(self, inputs: int) -> int:
        """Bytes of a row of `inputs` weights, a multiple of `values`."""
        return inputs // self.values * self.size

    def holds(self, inputs: int) -> bool:
        """Whether a row of so many weights is made of whole blocks."""
        return inputs % self.values == 0

    def encode(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Blocks uint8 [rows, bytes] of fp32 [rows, in]; `importance` fp32 [in] weighs squared errors.

        One thread's work that releases the interpreter's lock. Inputs are not changed.
        """
        return self.module.ENCODERS[self.name](weight, importance)

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, in] of blocks uint8 [rows, bytes], as llama.cpp decodes them."""
        return self.module.DECODERS[self.name](blocks)

    @property
    def affine(self) -> Affine | None:
        """Scales and codes apart, where the type's values lie on lines."""
        return self.module.AFFINE.get(self.name)

    @property
    def module(self) -> Family:
        """The encoders' module; MissingDependencyError where it needs a package that is absent."""
        try:
            found: Family = importlib.import_module(f"qexport.grids.ggml.{self.family}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _EXTRA:
                raise
            raise MissingDependencyError(
                f"the GGUF type {self.name} needs {error.name}, which is not installed",
                remedy="pip install 'qexport[gguf]'",
            ) from error
        return found


_ALL = (
    BlockType("f32", 0, 1, 4, "floats"),
    BlockType("f16", 1, 1, 2, "floats"),
    BlockType("bf16", 30, 1, 2, "floats"),
    BlockType("q4_0", 2, 32, 18, "legacy"),
    BlockType("q4_1", 3, 32, 20, "legacy"),
    BlockType("q5_0", 6, 32, 22, "legacy"),
    BlockType("q5_1", 7, 32, 24, "legacy"),
    BlockType("q8_0", 8, 32, 34, "legacy"),
    BlockType("q2_k", 10, 256, 84, "k_quants"),
    BlockType("q3_k", 11, 256, 110, "k_quants"),
    BlockType("q4_k", 12, 256, 144, "k_quants"),
    BlockType("q5_k", 13, 256, 176, "k_quants"),
    BlockType("q6_k", 14, 256, 210, "k_quants"),
    BlockType("iq2_xxs", 16, 256, 66, "lattices", needs_importance=True),
    BlockType("iq2_xs", 17, 256, 74, "lattices", needs_importance=True),
    BlockType("iq3_xxs", 18, 256, 98, "lattices"),
    BlockType("iq4_nl", 20, 32, 18, "iq4"),
    BlockType("iq3_s", 21, 256, 110, "lattices"),
    BlockType("iq2_s", 22, 256, 82, "lattices"),
    BlockType("iq4_xs", 23, 256, 136, "iq4"),
    BlockType("tq1_0", 34, 256, 54, "ternary"),
    BlockType("tq2_0", 35, 256, 66, "ternary"),
    BlockType("mxfp4", 39, 32, 17, "mxfp4"),
)
TYPES: dict[str, BlockType] = {row.name: row for row in _ALL}
BY_NUMBER: dict[int, BlockType] = {row.number: row for row in _ALL}


def block_type(name: str) -> BlockType:
    """The type of a name, in any case. SpecError with the nearest right name for one that is none."""
    found = TYPES.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), TYPES, n=1)
        raise SpecError(
            f"there is no GGUF type {name!r}",
            expected=", ".join(TYPES),
            remedy=f"did you mean {near[0]}?" if near else "",
        )
    return found
