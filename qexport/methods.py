"""The user's methods: each a choice on three axes, grid x solver x format.

A new method is one row; nothing below knows the methods' names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qexport.errors import SpecError
from qexport.formats import bitsandbytes, gptq
from qexport.formats.format import Format
from qexport.grids.bitsandbytes_import import bitsandbytes_functional
from qexport.grids.bnb4 import Bnb4Grid
from qexport.grids.int8_rows import Int8RowGrid
from qexport.grids.integer import IntegerGrid
from qexport.solvers import gptq as gptq_solver
from qexport.solvers.rtn import round_to_nearest
from qexport.specs import AnyQuantizeSpec, BnbSpec, RtnSpec

GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)  # those that runtimes have kernels for
_DEFAULT_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Method:
    """A point on the three axes.

    `solve` takes a matrix [out, in] and what `prepare` made of its inputs' Hessian [in, in]; a method
    without `prepare` needs no data and is given None.
    """

    grid: Any
    solve: Callable[[torch.Tensor, Any], Any]
    format: Format
    prepare: Callable[[torch.Tensor], Any] | None = None
    damp: float | None = None


def method_of(spec: AnyQuantizeSpec, shapes: Mapping[str, Sequence[int]]) -> Method:
    """The method that `spec` asks for, fitted to the layers [out, in] of a model.

    Raises SpecError when the wanted group size does not divide a layer's inputs.
    """
    if isinstance(spec, BnbSpec):
        bitsandbytes_functional()  # its absence is told now, not after the weights were read
        grid = Bnb4Grid() if spec.bits == 4 else Int8RowGrid()
        return Method(grid, lambda weight, _: round_to_nearest(weight, grid), bitsandbytes)
    storable = {name: shape for name, shape in shapes.items() if not gptq.obstacle(shape)}
    integer = IntegerGrid(spec.bits, group_size_for(spec.group_size, storable))
    if isinstance(spec, RtnSpec):
        return Method(integer, lambda weight, _: round_to_nearest(weight, integer), gptq)

    return Method(
        integer,
        lambda weight, prepared: gptq_solver.gptq(weight, prepared, integer),
        gptq,
        prepare=lambda hessian: gptq_solver.curvature(hessian, damp=spec.damp),
        damp=spec.damp,
    )


def group_size_for(wanted: int | None, shapes: Mapping[str, Sequence[int]]) -> int:
    """`wanted` when it divides every layer's inputs; by default the largest usual one that does.

    Raises SpecError that names a layer it does not divide and the sizes that divide all.
    """
    common = math.gcd(*(shape[1] for shape in shapes.values()))
    if wanted is None:
        return next((size for size in _DEFAULT_GROUPS if common % size == 0), -1)
    if wanted == -1 or (wanted > 0 and common % wanted == 0):
        return wanted
    usable = [str(size) for size in reversed(GROUP_SIZES) if common % size == 0]
    name, shape = next(
        ((n, s) for n, s in shapes.items() if wanted <= 0 or s[1] % wanted), ("every layer", (0, 0))
    )
    raise SpecError(
        f"group size {wanted} does not divide the {shape[1]} inputs of {name}",
        expected="group sizes that divide every layer: " + ", ".join([*usable, "-1 (a whole row)"]),
    )
