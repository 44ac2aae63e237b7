"""ggml's IQ2 and IQ3 types: blocks of 256 weights, whose magnitudes come in eights or fours from a list.

A weight is d (2s + 1) unit p: d fp16 of the block, s (4 bits) of a group of 16 or 32, p a coordinate of the
point that its eight or four have; the sign stands beside. Source: ggml-common.h, and gguf-py's decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from qexport.errors import SpecError
from qexport.grids.ggml.blocks import as_rows, importance_of_blocks, in_blocks
from qexport.grids.ggml.lattice_search import encode_blocks
from qexport.grids.ggml.lattice_tables import even_signs, grid, lattice, signs_of_bytes
from qexport.grids.ggml.lattice_types import OCTETS, WIDTH, Bytes, Fields, Indices
from qexport.grids.ggml.types import Affine, Decoder, Encoder, block_type


@dataclass(frozen=True)
class _Layout:
    """What sets the types apart.

    `dims` weights share a point, `group` weights a scale. With `even` an octet has an even number of minus
    signs. `tries` scales are searched for each group: enough that more gain less than a percent, and as fast
    as wanted. `pack` and `unpack` are the bytes behind d, uint8 [blocks, bytes].
    """

    dims: int
    group: int
    unit: float
    even: bool
    tries: int
    pack: Callable[[Fields], Bytes]
    unpack: Callable[[Bytes], tuple[Bytes, Indices, Bytes]]


def _encode(name: str, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """See `Encoder`. Scales beyond fp16 become its largest number.

    Raises SpecError for a type that needs importance and has none.
    """
    layout = _LAYOUTS[name]
    values = in_blocks(weight, WIDTH)
    if importance is None and block_type(name).needs_importance:
        raise SpecError(
            f"{name} without an importance matrix",
            expected="one",
            remedy="give a calibration text or an imatrix file",
        )
    count = len(values)
    fields = Fields(
        np.zeros(count, np.float32),
        np.zeros((count, WIDTH // layout.group), np.uint8),
        np.zeros((count, WIDTH // layout.dims), np.uint16),
        np.zeros((count, OCTETS), np.uint8),
    )
    groups = importance_of_blocks(importance, weight.shape[1], WIDTH)
    encode_blocks(values, groups, lattice(name), np.float32(layout.unit), layout.even, layout.tries, fields)
    d = fields.d.astype("<f2").view(np.uint8).reshape(count, 2)
    return as_rows(np.concatenate((d, layout.pack(fields)), axis=1), len(weight))


def _decode(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """See `Decoder`."""
    layout = _LAYOUTS[name]
    size = block_type(name).size
    if blocks.ndim != 2 or blocks.shape[1] % size:
        raise SpecError(
            f"blocks of shape {tuple(blocks.shape)}", expected=f"rows of whole blocks of {size} bytes"
        )
    raw: Bytes = blocks.contiguous().numpy().reshape(-1, size)
    count = len(raw)
    d = raw[:, :2].copy().view("<f2").astype(np.float32)
    scales, points, signs = layout.unpack(np.ascontiguousarray(raw[:, 2:]))
    steps = d * (scales * np.float32(2) + np.float32(1)) * np.float32(layout.unit)
    values = grid(name).take(points, axis=0).reshape(count, OCTETS, 8)
    values *= signs_of_bytes().take(signs, axis=0)
    values = values.reshape(count, WIDTH // layout.group, layout.group)
    values *= steps[:, :, None]
    return torch.from_numpy(values.reshape(len(blocks), blocks.shape[1] // size * WIDTH))


def _pairs(scales: Bytes) -> Bytes:
    """4-bit scales, two a byte, the first one low."""
    pairs: Bytes = scales[:, ::2] | scales[:, 1::2] << np.uint8(4)
    return pairs


def _unpaired(packed: Bytes) -> Bytes:
    scales = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    scales[:, ::2], scales[:, 1::2] = packed & 15, packed >> 4
    return scales


def _words(scales: Bytes, signs: Bytes) -> NDArray[np.uint32]:
    """uint32 [blocks, 8] of 32 weights each: four times 7 of an octet's signs, and the scale on top."""
    parts = (signs & np.uint8(127)).astype(np.uint32).reshape(len(signs), 8, 4) << _SEVENS
    words: NDArray[np.uint32] = np.bitwise_or.reduce(parts, axis=-1) | scales.astype(np.uint32) << 28
    return words


def _from_words(words: NDArray[np.uint32]) -> tuple[Bytes, Bytes]:
    signs = even_signs().take(words[:, :, None] >> _SEVENS & 127)
    return (words >> 28).astype(np.uint8), signs.reshape(len(words), OCTETS)


_SEVENS = np.arange(0, 28, 7, dtype=np.uint32)


def _pack_iq2_xxs(fields: Fields) -> Bytes:
    """For 32 weights: four points of 8 bits, a word of signs and the scale."""
    points = fields.points.astype(np.uint8).view("<u4")
    words = np.stack((points, _words(fields.scales, fields.signs)), axis=-1)
    return words.astype("<u4").reshape(len(words), 16).view(np.uint8)


def _unpack_iq2_xxs(rest: Bytes) -> tuple[Bytes, Indices, Bytes]:
    words = rest.view("<u4")
    scales, signs = _from_words(words[:, 1::2])
    points = np.ascontiguousarray(words[:, ::2]).view(np.uint8).astype(np.uint16)
    return scales, points, signs


def _pack_iq2_xs(fields: Fields) -> Bytes:
    """For 8 weights: 9 bits of the point, 7 of signs; then the scales."""
    codes = fields.points | (fields.signs & 127).astype(np.uint16) << 9
    return np.concatenate((codes.astype("<u2").view(np.uint8), _pairs(fields.scales)), axis=1)


def _unpack_iq2_xs(rest: Bytes) -> tuple[Bytes, Indices, Bytes]:
    codes = np.ascontiguousarray(rest[:, :64]).view("<u2")
    return _unpaired(rest[:, 64:]), codes & np.uint16(511), even_signs().take(codes >> 9)


def _pack_iq2_s(fields: Fields) -> Bytes:
    """The points' low 8 bits, signs, the points' high 2 bits, scales."""
    high = (fields.points >> 8).astype(np.uint8).reshape(-1, 8, 4) << _TWOS
    parts = (
        fields.points.astype(np.uint8),
        fields.signs,
        np.bitwise_or.reduce(high, axis=-1),
        _pairs(fields.scales),
    )
    return np.concatenate(parts, axis=1)


def _unpack_iq2_s(rest: Bytes) -> tuple[Bytes, Indices, Bytes]:
    high = (rest[:, 64:72, None] >> _TWOS & 3).reshape(len(rest), 32)
    return _unpaired(rest[:, 72:]), rest[:, :32] | high.astype(np.uint16) << np.uint16(8), rest[:, 32:64]


_TWOS = np.arange(0, 8, 2, dtype=np.uint8)


def _pack_iq3_xxs(fields: Fields) -> Bytes:
    """Points of 8 bits; then for 32 weights a word of signs and the scale."""
    words = _words(fields.scales, fields.signs).astype("<u4").view(np.uint8)
    return np.concatenate((fields.points.astype(np.uint8), words), axis=1)


def _unpack_iq3_xxs(rest: Bytes) -> tuple[Bytes, Indices, Bytes]:
    scales, signs = _from_words(np.ascontiguousarray(rest[:, 64:]).view("<u4"))
    return scales, rest[:, :64].astype(np.uint16), signs


def _pack_iq3_s(fields: Fields) -> Bytes:
    """The points' low 8 bits, their ninth bits, signs, scales."""
    ninth = np.packbits(fields.points > 255, axis=1, bitorder="little")
    parts = fields.points.astype(np.uint8), ninth, fields.signs, _pairs(fields.scales)
    return np.concatenate(parts, axis=1)


def _unpack_iq3_s(rest: Bytes) -> tuple[Bytes, Indices, Bytes]:
    ninth = np.unpackbits(rest[:, 64:72], axis=1, bitorder="little")
    return _unpaired(rest[:, 104:]), rest[:, :64] | ninth.astype(np.uint16) << np.uint16(8), rest[:, 72:104]


_LAYOUTS = {
    "iq2_xxs": _Layout(8, 32, 1 / 8, True, 5, _pack_iq2_xxs, _unpack_iq2_xxs),
    "iq2_xs": _Layout(8, 16, 1 / 8, True, 5, _pack_iq2_xs, _unpack_iq2_xs),
    "iq2_s": _Layout(8, 16, 1 / 8, False, 3, _pack_iq2_s, _unpack_iq2_s),
    "iq3_xxs": _Layout(4, 32, 1 / 4, True, 7, _pack_iq3_xxs, _unpack_iq3_xxs),
    "iq3_s": _Layout(4, 32, 1.0, False, 5, _pack_iq3_s, _unpack_iq3_s),
}
ENCODERS: Mapping[str, Encoder] = {name: partial(_encode, name) for name in _LAYOUTS}
DECODERS: Mapping[str, Decoder] = {name: partial(_decode, name) for name in _LAYOUTS}
AFFINE: Mapping[str, Affine] = {}  # values come in fours and eights
