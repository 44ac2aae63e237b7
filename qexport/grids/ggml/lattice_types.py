"""What the parts of the IQ2 and IQ3 encoders hand each other: arrays, as numba takes them, and tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

WIDTH = 256  # weights of a block
OCTETS = WIDTH // 8
QUARTETS = WIDTH // 4

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Indices = NDArray[np.uint16]


class Lattice(NamedTuple):
    """The points of a type.

    `levels` fp32: the values of a coordinate, rising; `borders` fp32: half way between two; `grid` fp32
    [points, dims]. A cell is what rounds to the same levels in all dimensions; its number has the first
    one's level as lowest digit. `points` uint16 [cells, near]: those near a cell's middle; `coordinates` int8
    [cells, dims, near]: the same.
    """

    levels: Floats
    borders: Floats
    grid: Floats
    points: Indices
    coordinates: NDArray[np.int8]


class Fields(NamedTuple):
    """Blocks taken apart.

    `d` fp32 [blocks], numbers that fp16 has; `scales` uint8 [blocks, groups]; `points` uint16
    [blocks, WIDTH / dims]; `signs` uint8 [blocks, OCTETS], bit i for weight i.
    """

    d: Floats
    scales: Bytes
    points: Indices
    signs: Bytes


class Parts(NamedTuple):
    """`Fields` as tensors, on any device: `d` fp32, all else int32."""

    d: torch.Tensor
    scales: torch.Tensor
    points: torch.Tensor
    signs: torch.Tensor


class Work(NamedTuple):
    """Of a block, [groups, group] each; and room for the costs of points.

    The magnitudes relative to the largest, their importance, magnitudes divided by trial scales, the
    coordinates of points, levels by number.
    """

    magnitudes: Floats
    importance: Floats
    scaled: Floats
    chosen: Floats
    digits: NDArray[np.int32]
    costs: Floats


class Choice(NamedTuple):
    """Points for trial scales, and what follows from them.

    `points` uint16 [WIDTH / dims]; `flips` uint8 [OCTETS]: the weight that has the other sign, if the octet
    is odd. fp32 [groups]: `trial` scales; `wxp`, `wpp`, weighted sums of magnitude times coordinate and of
    coordinate squared; `codes`, the scales' s; `losses`, without a constant.
    """

    points: Indices
    flips: Bytes
    trial: Floats
    wxp: Floats
    wpp: Floats
    codes: Floats
    losses: Floats
