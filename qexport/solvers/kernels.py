"""Compiled loops for grids of evenly spaced values: w = q * step + origin, q whole in [bottom, top].

Arrays in, arrays out, over a range of rows; they release the interpreter's lock, so that threads share the
rows. All is fp32, as in torch, `bottom` and `top` too. numba compiles a file's kernels anew when that file
changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qexport.grids.ggml.compiled import compiled, kernel

_TILE = 64  # rows whose block of columns stays in a core's first cache, and fills whole registers
_fused = compiled("contract")  # one rounding for a product and a sum, as in torch's addcmul
_summing = compiled("reassoc", "contract", "nsz")  # NaN counts, other than in ggml's


@_summing
def square_losses(
    values: Any,
    weights: Any,
    steps: Any,
    origins: Any,
    bottom: Any,
    top: Any,
    begin: int,
    end: int,
    best: Any,
) -> None:
    """For each row and group the number of the line that rounds its values with the least weighted square.

    `values` [rows, groups, width], `weights` [groups, width], `steps` and `origins` [lines, rows, groups],
    `best` int64 [rows, groups], to be written in the rows from `begin` to `end`. The first of equals.
    """
    lines = steps.shape[0]
    width = values.shape[2]
    for row in range(begin, end):
        for group in range(values.shape[1]):
            v, h = values[row, group], weights[group]
            least, found = np.float32(np.inf), 0
            for line in range(lines):
                step, origin = steps[line, row, group], origins[line, row, group]
                # much faster than to divide; a value in the middle may fall to either side
                inverse = np.float32(1) / step
                loss = np.float32(0)
                for i in range(width):
                    q = np.rint((v[i] - origin) * inverse)
                    q = min(max(q, bottom), top)
                    error = q * step + origin - v[i]
                    loss += error * error * h[i]
                if loss < least:
                    least, found = loss, line
            best[row, group] = found


@_fused
def rounding_errors(
    values: Any, steps: Any, origins: Any, bottom: Any, top: Any, begin: int, end: int, errors: Any
) -> None:
    """How far the nearest values are, to the bit as in torch.

    `values` [rows, groups, width], `steps` and `origins` [rows, groups];
    `errors` [groups, rows, width], to be written in the rows from `begin` to `end`.
    """
    for row in range(begin, end):
        for group in range(values.shape[1]):
            v, found = values[row, group], errors[group, row]
            step, origin = steps[row, group], origins[row, group]
            for i in range(values.shape[2]):
                q = np.rint((v[i] - origin) / step)
                q = min(max(q, bottom), top)
                found[i] = q * step + origin - v[i]


@kernel
def solve_columns(
    moved: Any,
    weight: Any,
    errors: Any,
    factor: Any,
    steps: Any,
    origins: Any,
    group_of: Any,
    bottom: Any,
    top: Any,
    begin: int,
    end: int,
) -> None:
    """Rounds neighbouring columns one by one; each one's whole error moves those after it, by `factor`.

    `moved` [columns, rows] are the weights with what columns before these have added, to become codes.
    `weight` [columns, rows] as it was; `errors` [columns, rows] to be written. `factor` [columns, columns],
    unit upper triangular. `steps` and `origins` [groups, rows], `group_of` int64 [columns]. Rows from
    `begin` to `end`.
    """
    columns = moved.shape[0]
    tile = np.empty((columns, _TILE), np.float32)
    error = np.empty(_TILE, np.float32)
    for first in range(begin, end, _TILE):
        count = min(_TILE, end - first)
        for i in range(columns):
            for r in range(count):
                tile[i, r] = moved[i, first + r]
        for i in range(columns):
            step, origin = steps[group_of[i]], origins[group_of[i]]
            for r in range(count):
                q = np.rint((tile[i, r] - origin[first + r]) / step[first + r])
                q = min(max(q, bottom), top)
                moved[i, first + r] = q
                error[r] = weight[i, first + r] - (q * step[first + r] + origin[first + r])
                errors[i, first + r] = error[r]
            for j in range(i + 1, columns):
                pull = factor[i, j]
                for r in range(_TILE):
                    tile[j, r] += pull * error[r]


@kernel
def lower_in_order(matrix: Any, order: Any, found: Any, begin: int, end: int) -> None:
    """Rows and columns of `matrix` [n, n] in `order` int64 [n], into `found` up to the diagonal, then zeros.

    Rows of `found` from `begin` to `end`.
    """
    for i in range(begin, end):
        row = matrix[order[i]]
        for j in range(i + 1):
            found[i, j] = row[order[j]]
        for j in range(i + 1, len(order)):
            found[i, j] = 0
