"""The lattices of ggml's IQ2 and IQ3 types: their points, and for each place in space the points near it.

The points are gguf-py's (`gguf.quants`), read from it at run time: no copy is kept here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from gguf import quants

from qexport.grids.ggml.compiled import kernel
from qexport.grids.ggml.lattice_search import NEAR_OCTET, NEAR_QUARTET
from qexport.grids.ggml.lattice_types import Bytes, Floats, Indices, Lattice


@cache
def grid(name: str) -> Floats:
    """The points of a type, fp32 [points, dims]. Not to be changed."""
    owner: Any = getattr(quants, name.upper())
    owner.init_grid()
    points: Floats = np.array(owner.grid, dtype=np.float32).reshape(-1, owner.grid.shape[-1])
    return points


@cache
def even_signs() -> Bytes:
    """The byte of signs of each 7 bits, uint8 [128]: the eighth makes the number of minus signs even."""
    return np.frombuffer(quants.IQ2_XXS.ksigns, dtype=np.uint8)


@cache
def signs_of_bytes() -> Floats:
    """1 or -1 for the bits of each byte, the lowest first: fp32 [256, 8]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    signs: Floats = np.float32(1) - np.float32(2) * bits
    return signs


@cache
def lattice(name: str) -> Lattice:
    """The points of a type as the search wants them: up to 2 MB, made once a process, in less than 0.1 s."""
    points = grid(name)
    dims = points.shape[1]
    levels = np.unique(points)
    near = np.empty((len(levels) ** dims, NEAR_OCTET if dims == 8 else NEAR_QUARTET), np.uint16)
    _nearest(points, levels, near)
    # [cells, near, dims] -> [cells, dims, near]
    coordinates = np.ascontiguousarray(points.astype(np.int8)[near].transpose(0, 2, 1))
    return Lattice(levels, (levels[1:] + levels[:-1]) / np.float32(2), points, near, coordinates)


@kernel
def _nearest(points: Floats, levels: Floats, near: Indices) -> None:
    """Into `near` [cells, some] the nearest points to the middle of each cell, nearest first."""
    count, dims = points.shape
    across = points.T.copy()
    distances = np.empty(count, np.float32)
    most = near.shape[1]
    for cell in range(len(near)):
        distances[:] = 0
        rest = cell
        for i in range(dims):
            middle = levels[rest % len(levels)]
            rest //= len(levels)
            for j in range(count):
                distances[j] += (across[i, j] - middle) ** 2
        have = 0
        for j in range(count):
            if have == most and distances[j] >= distances[near[cell, most - 1]]:
                continue
            place = min(have, most - 1)
            have = min(have + 1, most)
            while place > 0 and distances[near[cell, place - 1]] > distances[j]:
                near[cell, place] = near[cell, place - 1]
                place -= 1
            near[cell, place] = j
