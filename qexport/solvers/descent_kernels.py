"""The compiled loop of `refine`, for grids of evenly spaced values: see kernels.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from qexport.grids.ggml.compiled import compiled

_fused = compiled("contract")


@_fused
def descend(
    codes: Any,
    values: Any,
    gradient: Any,
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

    `codes`, `values`, `steps` and `origins` [out, in], of which the columns from `start` on take part, as
    many as `hessian` [columns, columns] and `gradient` [out, columns] have; `outputs` [blocks, size, size].
    `codes` and `values` change.
    """
    out, columns = gradient.shape
    size = outputs.shape[1]
    moved = np.empty(size, np.float32)
    pushed = np.empty(size, np.float32)
    own = np.empty((size, columns), np.float32)
    for block in range(begin, end):
        first = block * size
        count = min(size, out - first)
        G = outputs[block]  # noqa: N806
        for r in range(count):
            for i in range(columns):
                own[r, i] = gradient[first + r, i]
        for i in range(columns):
            any_moved = False
            for r in range(count):
                moved[r] = 0
                pivot = G[r, r] * hessian[i, i]
                if pivot > 0:
                    old = values[first + r, start + i]
                    step, origin = steps[first + r, start + i], origins[first + r, start + i]
                    q = np.rint((old - own[r, i] / pivot - origin) / step)
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
                            own[other, i] += G[other, r] * push
            if any_moved and i + 1 < columns:
                for r in range(count):
                    total = np.float32(0)
                    for other in range(count):
                        total += G[r, other] * moved[other]
                    pushed[r] = total
                for r in range(count):
                    if pushed[r] != 0:
                        for later in range(i + 1, columns):
                            own[r, later] += pushed[r] * hessian[i, later]
