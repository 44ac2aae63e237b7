"""The compiled loop of `refine`, for grids of evenly spaced values: see kernels.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from qexport.grids.ggml.compiled import compiled

_TILE = 64  # rows that fill whole registers
_fused = compiled("contract")


@_fused
def descend(
    codes: Any,
    values: Any,
    own: Any,
    steps: Any,
    origins: Any,
    hessian: Any,
    outputs: Any,
    bottom: Any,
    top: Any,
    start: int,
    begin: int,
    end: int,
) -> None:
    """One pass over neighbouring columns, in the blocks of rows from `begin` to `end`.

    `codes` and `values` [out, in], of which the columns from `start` on take part, as many as `hessian`
    [columns, columns] and `own`, `steps` and `origins` [out, columns] have; `own` is the gradient, `outputs`
    [blocks, size, size]. `codes`, `values` and `own` change.
    """
    out, columns = own.shape
    size = outputs.shape[1]
    moved = np.empty(size, np.float32)
    pushed = np.empty(size, np.float32)
    for block in range(begin, end):
        first = block * size
        count = min(size, out - first)
        G = outputs[block]  # noqa: N806
        for i in range(columns):
            any_moved = False
            for r in range(count):
                moved[r] = 0
                pivot = G[r, r] * hessian[i, i]
                if pivot > 0:
                    old = values[first + r, start + i]
                    step, origin = steps[first + r, i], origins[first + r, i]
                    q = np.rint((old - own[first + r, i] / pivot - origin) / step)
                    q = min(max(q, bottom), top)
                    new = q * step + origin
                    if q != codes[first + r, start + i]:
                        change = new - old
                        codes[first + r, start + i] = q
                        values[first + r, start + i] = new
                        moved[r] = change
                        any_moved = True
                        push = change * hessian[i, i]
                        for other in range(count):
                            own[first + other, i] += G[other, r] * push
            if any_moved and i + 1 < columns:
                for r in range(count):
                    total = np.float32(0)
                    for other in range(count):
                        total += G[r, other] * moved[other]
                    pushed[r] = total
                for r in range(count):
                    if pushed[r] != 0:
                        for later in range(i + 1, columns):
                            own[first + r, later] += pushed[r] * hessian[i, later]


@_fused
def descend_alone(
    codes: Any,
    values: Any,
    own: Any,
    steps: Any,
    origins: Any,
    hessian: Any,
    bottom: Any,
    top: Any,
    start: int,
    begin: int,
    end: int,
) -> None:
    """As `descend` for rows that do not depend on each other, from `begin` to `end`: many at a time.

    `own` does not change.
    """
    columns = own.shape[1]
    pulls = np.zeros((columns, _TILE), np.float32)
    held = np.zeros((columns, _TILE), np.float32)  # codes
    at = np.zeros((columns, _TILE), np.float32)  # values
    step = np.ones((columns, _TILE), np.float32)
    origin = np.zeros((columns, _TILE), np.float32)
    change = np.zeros(_TILE, np.float32)
    for first in range(begin, end, _TILE):
        count = min(_TILE, end - first)
        for r in range(count):
            for i in range(columns):
                pulls[i, r] = own[first + r, i]
                held[i, r] = codes[first + r, start + i]
                at[i, r] = values[first + r, start + i]
                step[i, r] = steps[first + r, i]
                origin[i, r] = origins[first + r, i]
        for i in range(columns):
            pivot = hessian[i, i]
            if not pivot > 0:
                continue
            most = np.float32(0)
            for r in range(_TILE):
                q = np.rint((at[i, r] - pulls[i, r] / pivot - origin[i, r]) / step[i, r])
                q = min(max(q, bottom), top)
                new = q * step[i, r] + origin[i, r]
                moves = q != held[i, r]
                change[r] = new - at[i, r] if moves else np.float32(0)
                at[i, r] = new if moves else at[i, r]
                held[i, r] = q
                most = max(most, abs(change[r]))
            if most > 0:
                for j in range(i + 1, columns):
                    push = hessian[i, j]
                    for r in range(_TILE):
                        pulls[j, r] += push * change[r]
        for r in range(count):
            for i in range(columns):
                codes[first + r, start + i] = held[i, r]
                values[first + r, start + i] = at[i, r]
