"""ggml's IQ2 and IQ3 types: blocks of 256 weights, whose magnitudes come in eights or fours from a list.

A weight is d (2s + 1) unit p: d fp16 of the block, s (4 bits) of a group of 16 or 32, p a coordinate of the
point that its eight or four have; the sign stands beside. Source: ggml-common.h, and gguf-py's decoders. The
search is `lattice_search`'s, or `device.lattices`' for weights that lie on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from qexport.errors import SpecError
from qexport.grids.ggml import blocks as ggml_blocks
from qexport.grids.ggml.blocks import half_bytes, halves, importance_of_blocks, in_blocks
from qexport.grids.ggml.device import blocks as device_blocks
from qexport.grids.ggml.device.lattices import PIECE, parts_of_blocks
from qexport.grids.ggml.device.sharing import in_pieces, kept_by_device
from qexport.grids.ggml.lattice_search import encode_blocks
from qexport.grids.ggml.lattice_tables import even_signs, grid, lattice, signs_of_bytes
from qexport.grids.ggml.lattice_types import OCTETS, WIDTH, Fields, Parts
from qexport.grids.ggml.types import Affine, Decoder, Encoder, block_type


@dataclass(frozen=True)
class _Layout:
    """What sets the types apart.

    `dims` weights share a point, `group` weights a scale. With `even` an octet has an even number of minus
    signs. `tries` scales are searched for each group: enough that more gain less than a percent, and as fast
    as wanted. `pack` and `unpack` are the bytes behind d, uint8 [blocks, bytes], and the scales, points and
    signs in them.
    """

    dims: int
    group: int
    unit: float
    even: bool
    tries: int
    pack: Callable[[Parts], torch.Tensor]
    unpack: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _encode(name: str, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """See `Encoder`. Scales beyond fp16 become its largest number.

    Raises SpecError for a type that needs importance and has none.
    """
    kind = block_type(name)
    search = _search_in_torch if ggml_blocks.in_torch(weight) else _search
    blocks = torch.cat(
        [
            torch.cat((half_bytes(parts.d.half()), _LAYOUTS[name].pack(parts)), dim=1)
            for parts in search(name, weight, importance)
        ]
    )
    return blocks.reshape(len(weight), kind.row_bytes(weight.shape[1]))


def _search(name: str, weight: torch.Tensor, importance: torch.Tensor | None) -> list[Parts]:
    """Its blocks, by the compiled kernels."""
    layout = _LAYOUTS[name]
    values = in_blocks(weight, WIDTH)
    _refuse_none(name, importance)
    count = len(values)
    d = torch.zeros(count)
    scales = torch.zeros(count, WIDTH // layout.group, dtype=torch.uint8)
    points = torch.zeros(count, WIDTH // layout.dims, dtype=torch.uint16)
    signs = torch.zeros(count, OCTETS, dtype=torch.uint8)
    fields = Fields(d.numpy(), scales.numpy(), points.numpy(), signs.numpy())
    groups = importance_of_blocks(importance, weight.shape[1], WIDTH)
    encode_blocks(values, groups, lattice(name), np.float32(layout.unit), layout.even, layout.tries, fields)
    return [Parts(d, scales.int(), points.int(), signs.int())]


def _search_in_torch(name: str, weight: torch.Tensor, importance: torch.Tensor | None) -> Iterator[Parts]:
    """Its blocks in pieces, on the device where it lies."""
    layout = _LAYOUTS[name]
    values = device_blocks.in_blocks(weight, WIDTH)
    _refuse_none(name, importance)
    groups = device_blocks.importance_of_blocks(importance, weight.shape[1], WIDTH, weight.device)
    for piece, weights in in_pieces(values, groups, PIECE // WIDTH):
        yield parts_of_blocks(name, piece, weights, layout.group, layout.unit, layout.even, layout.tries)


def _refuse_none(name: str, importance: torch.Tensor | None) -> None:
    if importance is None and block_type(name).needs_importance:
        raise SpecError(
            f"{name} without an importance matrix",
            expected="one",
            remedy="give a calibration text or an imatrix file",
        )


def _decode(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """See `Decoder`."""
    layout = _LAYOUTS[name]
    size = block_type(name).size
    if blocks.ndim != 2 or blocks.shape[1] % size:
        raise SpecError(
            f"blocks of shape {tuple(blocks.shape)}", expected=f"rows of whole blocks of {size} bytes"
        )
    raw = blocks.reshape(blocks.numel() // size, size)
    scales, points, signs = layout.unpack(raw[:, 2:])
    steps = halves(raw[:, :2].clone(memory_format=torch.contiguous_format)) * (scales * 2.0 + 1) * layout.unit
    values = _points(name)(blocks)[0].index_select(0, points.flatten())
    values = values.view(-1, 8).mul_(_signs(blocks)[1].index_select(0, signs.flatten()))
    values = values.view(*steps.shape, layout.group).mul_(steps[:, :, None])
    return values.view(len(blocks), blocks.shape[1] // size * WIDTH)


@cache
def _points(name: str) -> Callable[[torch.Tensor], tuple[torch.Tensor]]:
    """For a device the points of a type, fp32 [points, dims]."""
    return kept_by_device(lambda device: (torch.tensor(grid(name)).to(device),))


@kept_by_device
def _signs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """See `even_signs`, here int32, and `signs_of_bytes`."""
    even = torch.tensor(even_signs().astype("i4")).to(device)
    return even, torch.tensor(signs_of_bytes()).to(device)


def _shifts(like: torch.Tensor, step: int, end: int) -> torch.Tensor:
    """0, step, ... below `end`, of the dtype and the device of `like`."""
    return torch.arange(0, end, step, dtype=like.dtype, device=like.device)


def _joined(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., some] as int32 [...]: the first in the lowest bits, each other `bits` above that before."""
    shifts = _shifts(fields, bits, bits * fields.shape[-1])
    return (fields << shifts).sum(dim=-1, dtype=torch.int32)


def _pairs(scales: torch.Tensor) -> torch.Tensor:
    """4-bit scales, two a byte, the first one low."""
    return _joined(scales.view(len(scales), scales.shape[1] // 2, 2), 4).to(torch.uint8)


def _unpaired(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def _words(parts: Parts) -> torch.Tensor:
    """Bytes [blocks, 8, 4], words of 32 weights each: four times 7 of an octet's signs, the scale on top."""
    words = _joined((parts.signs & 127).view(-1, 8, 4), 7) | (parts.scales << 28)
    return words[:, :, None].view(torch.uint8)


def _from_words(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [blocks, 8] and signs [blocks, OCTETS] of bytes [blocks, 8, 4]."""
    words = packed.clone(memory_format=torch.contiguous_format).view(torch.int32)
    sevens = (words >> _shifts(words, 7, 28)) & 127
    signs = _signs(packed)[0].index_select(0, sevens.flatten())
    return ((words >> 28) & 15)[:, :, 0], signs.view(-1, OCTETS)


def _pack_iq2_xxs(parts: Parts) -> torch.Tensor:
    """For 32 weights: four points of 8 bits, a word of signs and the scale."""
    points = parts.points.to(torch.uint8).view(-1, 8, 4)
    return torch.cat((points, _words(parts)), dim=-1).flatten(1)


def _unpack_iq2_xxs(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    points, words = rest.reshape(-1, 8, 8).chunk(2, dim=-1)
    scales, signs = _from_words(words)
    return scales, points.flatten(1).int(), signs


def _pack_iq2_xs(parts: Parts) -> torch.Tensor:
    """For 8 weights: 9 bits of the point, 7 of signs; then the scales."""
    codes = parts.points | ((parts.signs & 127) << 9)
    pairs = torch.stack((codes & 255, codes >> 8), dim=-1).flatten(1)
    return torch.cat((pairs.to(torch.uint8), _pairs(parts.scales)), dim=1)


def _unpack_iq2_xs(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = _joined(rest[:, :64].reshape(-1, 32, 2).int(), 8)
    signs = _signs(rest)[0].index_select(0, (codes >> 9).flatten())
    return _unpaired(rest[:, 64:]), codes & 511, signs


def _pack_iq2_s(parts: Parts) -> torch.Tensor:
    """The points' low 8 bits, signs, the points' high 2 bits, scales."""
    high = _joined((parts.points >> 8).view(-1, 8, 4), 2)
    packed = torch.cat((parts.points & 255, parts.signs, high), dim=1).to(torch.uint8)
    return torch.cat((packed, _pairs(parts.scales)), dim=1)


def _unpack_iq2_s(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    high = (rest[:, 64:72, None] >> _shifts(rest, 2, 8)) & 3
    return _unpaired(rest[:, 72:]), rest[:, :32] | (high.flatten(1).int() << 8), rest[:, 32:64].int()


def _pack_iq3_xxs(parts: Parts) -> torch.Tensor:
    """Points of 8 bits; then for 32 weights a word of signs and the scale."""
    return torch.cat((parts.points.to(torch.uint8), _words(parts).flatten(1)), dim=1)


def _unpack_iq3_xxs(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales, signs = _from_words(rest[:, 64:].reshape(-1, 8, 4))
    return scales, rest[:, :64].int(), signs


def _pack_iq3_s(parts: Parts) -> torch.Tensor:
    """The points' low 8 bits, their ninth bits, signs, scales."""
    ninth = _joined((parts.points >> 8).view(-1, 8, 8), 1)
    packed = torch.cat((parts.points & 255, ninth, parts.signs), dim=1).to(torch.uint8)
    return torch.cat((packed, _pairs(parts.scales)), dim=1)


def _unpack_iq3_s(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ninth = (rest[:, 64:72, None] >> _shifts(rest, 1, 8)) & 1
    return _unpaired(rest[:, 104:]), rest[:, :64] | (ninth.flatten(1).int() << 8), rest[:, 72:104].int()


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
