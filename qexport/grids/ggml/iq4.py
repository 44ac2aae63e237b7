"""ggml's IQ4_NL and IQ4_XS: four bits that choose one of 16 levels, unevenly spaced.

w = step * level(q). IQ4_NL: blocks of 32 with an fp16 step. IQ4_XS: super-blocks of 256, of which each 32
have a step that is a whole multiple, -32 to 31, of a common fp16 number. Layouts: ggml-common.h; levels:
gguf-py's IQ4_NL.kvalues. The search for steps is our own (`iq4_kernels`; `device.iq4` for weights that lie
on a GPU): the least squared error, weighed by importance where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from qexport.grids.ggml import blocks as ggml_blocks
from qexport.grids.ggml.blocks import (
    as_rows,
    cut,
    from_nibbles,
    half_bytes,
    importance_of_blocks,
    in_blocks,
    kernels,
    nibbles,
    reciprocal,
)
from qexport.grids.ggml.device import blocks as device_blocks
from qexport.grids.ggml.device.iq4 import PIECE, steps_of_blocks, steps_of_super_blocks
from qexport.grids.ggml.device.sharing import in_pieces, kept_by_device
from qexport.grids.ggml.types import Affine, Decoder, Encoder

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_WIDTH = 32
_SUPER = 256
_BINS = 512  # half units from -128 on: all borders between levels lie on them


@dataclass(frozen=True)
class Iq4Scales:
    """`d` fp16 [rows, blocks], and for IQ4_XS the steps' multiples of it, int8 [rows, groups], -32 to 31."""

    d: torch.Tensor
    multiples: torch.Tensor | None


@dataclass(frozen=True)
class Iq4:
    """IQ4_XS (`in_super_blocks`) or IQ4_NL. An `Affine` whose codes are places in `LEVELS`."""

    in_super_blocks: bool
    width: int = _WIDTH
    bits: int = 4

    @property
    def block(self) -> int:
        """Weights of a block."""
        return _SUPER if self.in_super_blocks else _WIDTH

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return 136 if self.in_super_blocks else 18

    def encode(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """See `Encoder`. Scales beyond fp16 become its largest number."""
        if ggml_blocks.in_torch(weight):
            return self._encode_in_torch(weight, importance)
        values = in_blocks(weight, self.block)
        blocks = np.empty((len(values), self.size), np.uint8)
        values = values.reshape(-1, _WIDTH)
        inputs = self.block if importance is None else weight.shape[1]
        groups = importance_of_blocks(importance, inputs, self.block).reshape(-1, _WIDTH)
        levels, codes = (table.numpy() for table in _tables(weight)[:2])
        steps, growths = np.empty((2, len(values)), np.float32)
        found = kernels("iq4_kernels")
        found.best_steps(values, groups, _levels_to_try(), levels, steps, growths)
        if self.in_super_blocks:
            found.super_blocks(values, groups, steps, growths, levels, codes, blocks)
        else:
            found.single_blocks(values, groups, steps, levels, codes, blocks)
        return as_rows(blocks, len(weight))

    def _encode_in_torch(self, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """As `encode`, on the device where the weight lies."""
        values = device_blocks.in_blocks(weight, self.block)
        groups = device_blocks.importance_of_blocks(importance, weight.shape[1], self.block, weight.device)
        nearest, codes_of_bins, _ = _tables(weight)
        tries = _levels_to_try().tolist()
        parts = []
        for piece, weights in in_pieces(values, groups, PIECE // self.block):
            if self.in_super_blocks:
                parted = len(piece), _SUPER // _WIDTH, _WIDTH
                d, multiples = steps_of_super_blocks(
                    piece.view(parted), weights.reshape(parted), tries, nearest
                )
                scales = Iq4Scales(d.half()[:, None], multiples.to(torch.int8))
            else:
                scales = Iq4Scales(steps_of_blocks(piece, weights, tries, nearest).half()[:, None], None)
            step = self.lines(scales)[0]
            codes = codes_of_bins.take(_bins(piece.view(*step.shape, _WIDTH), step[..., None]))
            parts.append(self.pack(codes.view(len(piece), self.block), scales))
        return torch.cat(parts).reshape(len(weight), weight.shape[1] // self.block * self.size)

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        parts = cut(blocks, self.size)
        step, _ = self.lines(self._scales(parts))
        codes = self._codes(parts).int()
        values = _tables(blocks)[2].index_select(0, codes.flatten()).view(codes.shape)
        return values.mul_(step[..., None]).reshape(len(blocks), -1)

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> Iq4Scales:
        """The scales that `encode` stores."""
        return self._scales(cut(self.encode(weight, importance), self.size))

    def lines(self, scales: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps, which may be negative; the origin is 0."""
        assert isinstance(scales, Iq4Scales)  # noqa: S101
        step = scales.d.float()
        if scales.multiples is not None:
            step = step.repeat_interleave(_SUPER // _WIDTH, dim=1) * scales.multiples
        return step, torch.zeros_like(step)

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of the nearest levels, uint8, and what they stand for; origin 0."""
        nearest, codes, _ = _tables(values)
        places = _bins(values, step)
        return codes.take(places), nearest.take(places) * step + origin

    def pack(self, codes: torch.Tensor, scales: object) -> torch.Tensor:
        """Codes as `round` has them, with their scales, as blocks."""
        assert isinstance(scales, Iq4Scales)  # noqa: S101
        rows, inputs = codes.shape
        pairs = from_nibbles(codes.to(torch.uint8).reshape(rows, inputs // _WIDTH, _WIDTH))
        parts = [half_bytes(scales.d)]
        if scales.multiples is not None:
            whole = scales.multiples.reshape(*scales.d.shape, _SUPER // _WIDTH).int() + 32
            high = ((whole >> 4) << torch.arange(0, 16, 2, device=whole.device)).sum(dim=-1, keepdim=True)
            low = (whole[..., ::2] & 15) | ((whole[..., 1::2] & 15) << 4)
            parts += [part.to(torch.uint8) for part in (high & 0xFF, high >> 8, low)]
        parts.append(pairs.reshape(*scales.d.shape, self.block // 2))
        return torch.cat(parts, dim=-1).reshape(rows, inputs // self.block * self.size)

    def _scales(self, parts: torch.Tensor) -> Iq4Scales:
        d = parts[..., :2].contiguous().view(torch.float16)[..., 0]
        if not self.in_super_blocks:
            return Iq4Scales(d, None)
        high = parts[..., 2:3].int() | (parts[..., 3:4].int() << 8)
        high = (high >> torch.arange(0, 16, 2, device=parts.device)) & 3
        low = torch.stack((parts[..., 4:8] & 15, parts[..., 4:8] >> 4), dim=-1).flatten(-2)
        return Iq4Scales(d, ((low.int() | (high << 4)) - 32).to(torch.int8).reshape(len(parts), -1))

    def _codes(self, parts: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [rows, groups, 32]."""
        pairs = parts[..., self.size - self.block // 2 :]
        return nibbles(pairs.reshape(len(parts), -1, _WIDTH // 2))


def _bins(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Where `_tables` have what is nearest to values / step, int64."""
    places = (values * reciprocal(step)).mul_(2).clamp_(-_BINS // 2, _BINS // 2 - 1)
    return places.add_(_BINS // 2).nan_to_num_().long()


@kept_by_device
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest level fp32 [512] of half units from -128 on, its code uint8 [512]; the levels fp32 [16]."""
    levels = torch.tensor(LEVELS, dtype=torch.float32).to(device)
    inside = torch.arange(_BINS, device=device) / 2 - _BINS / 4 + 0.25
    codes = torch.bucketize(inside, (levels[1:] + levels[:-1]) / 2)
    return levels.index_select(0, codes), codes.to(torch.uint8), levels


@cache
def _levels_to_try() -> Any:
    """What the number furthest from 0 may be scaled to: the levels' far end or beyond, or the near end."""
    far, near = LEVELS[0] * np.geomspace(0.85, 2, 16), LEVELS[-1] * np.geomspace(0.9, 1.6, 8)
    return np.concatenate((far, near)).astype(np.float32)


_TYPES: Mapping[str, Iq4] = {"iq4_nl": Iq4(in_super_blocks=False), "iq4_xs": Iq4(in_super_blocks=True)}
ENCODERS: Mapping[str, Encoder] = {name: kind.encode for name, kind in _TYPES.items()}
DECODERS: Mapping[str, Decoder] = {name: kind.decode for name, kind in _TYPES.items()}
AFFINE: Mapping[str, Affine] = _TYPES
