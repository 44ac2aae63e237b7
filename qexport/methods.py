"""What a spec comes to: a grid x a solver x a format, and who reads the result.

A new format or solver is one row here; nothing below knows the others' names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qexport.errors import SpecError
from qexport.formats import (
    awq,
    bitsandbytes,
    compressed_tensors,
    eetq,
    gptq,
    gptq_v2,
    hqq,
    hqq_safetensors,
    mlx,
)
from qexport.formats.format import Format, Wish
from qexport.grids.grid import Grid, SelfFitting, encode
from qexport.solvers.awq import search_clip
from qexport.solvers.evenly import code_range
from qexport.solvers.gptq import Curvature, curvature, toward_full_outputs
from qexport.solvers.gptq import gptq as error_feedback
from qexport.solvers.hqq import half_quadratic
from qexport.solvers.refine import damped, refine
from qexport.solvers.rtn import round_to_nearest
from qexport.solvers.search import search
from qexport.specs import AnyQuantizeSpec, AwqGptqSpec, AwqSpec, CalibrationSpec, GptqSpec, ImportanceSpec

_LONG = 1 << 30  # inputs of a row that is longer than any group
GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)  # those that runtimes have kernels for


@dataclass(frozen=True)
class FormatRow:
    """A format that can be written: its module, the group sizes to take when the user names none, the
    first that divides every layer, and the runtimes that read it."""

    module: Format
    groups: tuple[int, ...]
    runtimes: tuple[str, ...]
    # what reads layers of differing bits, Conv1D layers and experts, where transformers does not
    not_by_transformers: str = ""
    copies: int = 1  # how many times the weights lie in the output


_OWN_LOADER = "GPTQModel's own loader and vLLM"
FORMATS: dict[str, FormatRow] = {
    "gptq": FormatRow(gptq, (128, 64, 32), ("GPTQModel", "vLLM"), _OWN_LOADER),
    "gptq_v2": FormatRow(gptq_v2, (128, 64, 32), ("GPTQModel", "vLLM"), _OWN_LOADER),
    "awq": FormatRow(awq, (128, 64, 32), ("GPTQModel", "vLLM"), _OWN_LOADER),
    "hqq": FormatRow(hqq, (64, 32, 16), ("hqq",), copies=2),
    "hqq-safetensors": FormatRow(hqq_safetensors, (64, 32, 16), ()),
    "bitsandbytes": FormatRow(bitsandbytes, (), ("transformers", "vLLM")),
    "compressed-tensors": FormatRow(compressed_tensors, (128, 64, 32), ("transformers", "vLLM")),
    "mlx": FormatRow(mlx, (64, 32), ("mlx-lm",)),
    "eetq": FormatRow(eetq, (), ("transformers on CUDA",)),
}


@dataclass(frozen=True)
class Prepared:
    """What a calibrated solver makes of the Hessian [in, in] of layers that share an input.

    `cross` [in, in], the mean of (x' - x) x^T, is set where inputs x' of the full-precision model are known,
    `damped` [in, in] where codes are refined.
    """

    hessian: torch.Tensor
    curvature: Curvature | None = None
    cross: torch.Tensor | None = None
    damped: torch.Tensor | None = None


@dataclass(frozen=True)
class Solving:
    """How codes are chosen, whatever the format."""

    spec: AnyQuantizeSpec

    @property
    def calibrated(self) -> bool:
        """Whether the solver wants to see activations."""
        return isinstance(self.spec, CalibrationSpec)

    @property
    def scaling(self) -> AwqSpec | AwqGptqSpec | None:
        """Set where AWQ's scales come before the codes are chosen."""
        return self.spec if isinstance(self.spec, (AwqSpec, AwqGptqSpec)) else None

    def solve_alone(self, weight: torch.Tensor, grid: Grid) -> Any:
        """Codes of `weight` [out, in] without data: by the solver, or by scale search if it wants some."""
        return _DATA_FREE.get(self.spec.solver, search)(weight, grid)

    @property
    def follows(self) -> bool:
        """Whether each layer is to see what those before it became, not what the full model has there."""
        return isinstance(self.spec, GptqSpec) and self.spec.effort != "fast"

    @property
    def weighs_outputs(self) -> bool:
        """Whether errors are weighed by what the model's loss makes of them, and blocks tuned at the end."""
        return isinstance(self.spec, GptqSpec) and self.spec.effort == "best"

    def prepare(self, hessian: torch.Tensor, grid: Grid, cross: torch.Tensor | None = None) -> Prepared:
        """What `target` and `solve` need, computed once for layers that share an input and a grid."""
        spec = self.spec
        if not isinstance(spec, GptqSpec) or not _has_lines(grid):
            return Prepared(hessian)
        width = grid.group_width(len(hessian))
        order = curvature(hessian, damp=spec.damp, act_order=spec.act_order, group_size=width)
        refined = None if spec.effort == "fast" else damped(hessian, order.damp)
        return Prepared(hessian, order, cross, refined)

    def target(self, weight: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        """What codes of `weight` [out, in] should come to: itself, or what makes up for changed inputs."""
        if prepared.curvature is None or prepared.cross is None:
            return weight
        return toward_full_outputs(weight, prepared.cross, prepared.curvature)

    def solve(
        self, weight: torch.Tensor, prepared: Prepared, grid: Grid, outputs: torch.Tensor | None = None
    ) -> Any:
        """Codes of a target [out, in] that keep its outputs on the calibration inputs.

        `outputs` [blocks, size, size], see `refine`, tells what errors of which outputs cost.
        """
        spec, scales = self.spec, None
        if isinstance(spec, ImportanceSpec) or (isinstance(grid, SelfFitting) and not prepared.curvature):
            return search(weight, grid, prepared.hessian.diagonal())
        if isinstance(spec, (AwqSpec, AwqGptqSpec)) and spec.clip and not isinstance(grid, SelfFitting):
            shrink = search_clip(weight, prepared.hessian, grid, points=spec.grid_points)
            scales = grid.fit(weight, shrink)
        if not isinstance(spec, GptqSpec) or not prepared.curvature:
            return encode(grid, weight, grid.fit(weight) if scales is None else scales)
        chosen = error_feedback(
            weight,
            prepared.curvature,
            grid,
            static_groups=spec.static_groups,
            scales=scales,
            searched=spec.search_scales,
        )
        if prepared.damped is not None:
            # without a compiled loop, rows that depend on each other take hours
            usable = outputs if code_range(grid, weight) else None
            chosen = refine(weight, chosen, prepared.damped, grid, usable)
        return chosen.assembled(grid)


@dataclass(frozen=True)
class Method(Solving):
    """A point on the three axes, for one model."""

    format: Format
    common: Grid
    dtype: torch.dtype

    def reorders_groups(self, grid: Grid, inputs: int) -> bool:
        """Whether a group's inputs may be no neighbours (desc_act) in rows of so many."""
        return _reorders_groups(self.spec, grid, inputs)

    def grid(self, bits: int, group_size: int | None = None) -> Grid:
        """The grid of a layer that is to have other bits; the group size is the common one unless given."""
        if group_size is None:
            group_size = getattr(self.common, "group_size", None)
        wish = grid_wish(self.spec, self.dtype, bits=bits, group_size=group_size)
        return _ordered(self.spec, _grid_for(self.spec, wish))


def _has_lines(grid: Grid) -> bool:
    return not isinstance(grid, SelfFitting) or grid.has_lines


_DATA_FREE: dict[str, Callable[[torch.Tensor, Grid], Any]] = {
    "rtn": round_to_nearest,
    "search": search,
    "hqq": half_quadratic,
}


def method_of(
    spec: AnyQuantizeSpec, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float16
) -> Method:
    """The method that `spec` asks for, fitted to the layers [out, in] of a model of `dtype`.

    Raises SpecError for a grid that the format has not, with the formats that have it, and when the wanted
    group size does not divide a layer's inputs.
    """
    row = FORMATS[spec.format]
    if not row.groups:
        return Method(spec, row.module, _ordered(spec, _grid_for(spec, grid_wish(spec, dtype))), dtype)
    usual_wish = grid_wish(spec, dtype, group_size=row.groups[0])
    usual = _grid_for(spec, usual_wish, asked=grid_wish(spec, dtype))
    storable = {name: shape for name, shape in shapes.items() if not row.module.obstacle(shape, usual)}
    group_size = group_size_for(spec.group_size, storable or shapes, row.groups)
    grid = _grid_for(spec, grid_wish(spec, dtype, group_size=group_size))
    return Method(spec, row.module, _ordered(spec, grid), dtype)


def grid_wish(
    spec: AnyQuantizeSpec, dtype: torch.dtype, *, bits: int | None = None, group_size: int | None = None
) -> Wish:
    """The grid that `spec` asks its format for, with other bits or another group size if given."""
    return Wish(
        bits=bits or spec.bits,
        group_size=spec.group_size if group_size is None else group_size,
        # HQQ moves zeros: where the user is silent, it gets a grid that has them
        symmetric=False if spec.solver == "hqq" and spec.symmetric is None else spec.symmetric,
        dtype=dtype,
        codebook=spec.quant_type,
        double_quant=spec.double_quant,
    )


def _grid_for(spec: AnyQuantizeSpec, wish: Wish, *, asked: Wish | None = None) -> Grid:
    """The format's grid for a wish; `asked` is what other formats are asked for where it has none."""
    try:
        grid = _held(spec.format, wish)
    except SpecError as error:
        others = [
            _with_runtimes(name) for name in FORMATS if name != spec.format and _holds(name, asked or wish)
        ]
        raise SpecError(
            error.found,
            expected=error.expected,
            remedy=f"or take --format {', '.join(others)}" if others else error.remedy,
        ) from error
    if spec.solver == "hqq" and getattr(grid, "zero", "middle") == "middle":
        raise SpecError(
            f"HQQ moves the zero of a grid, and {spec.format}'s has it fixed here",
            expected="an asymmetric integer grid (--no-symmetric), such as hqq's, awq's or mlx's",
            remedy="or another solver: --solver search",
        )
    return grid


def _ordered(spec: AnyQuantizeSpec, grid: Grid) -> Grid:
    """`grid`. SpecError when its groups would be in an order that the format cannot tell."""
    if _reorders_groups(spec, grid, _LONG) and not FORMATS[spec.format].module.HOLDS_GROUP_ORDER:
        holding = [name for name, row in FORMATS.items() if row.module.HOLDS_GROUP_ORDER]
        raise SpecError(
            f"{spec.format} has no place for groups in another order than the inputs",
            expected=f"--static-groups, or a format that has: {', '.join(holding)}",
        )
    return grid


def _reorders_groups(spec: AnyQuantizeSpec, grid: Grid, inputs: int) -> bool:
    if not isinstance(spec, GptqSpec) or spec.act_order != "full" or spec.static_groups:
        return False
    clips = isinstance(spec, AwqGptqSpec) and spec.clip  # then scales are there before, as with static groups
    return grid.groups_alone and not clips and grid.group_width(inputs) < inputs


def _held(name: str, wish: Wish) -> Grid:
    """The grid that a format has for a wish. SpecError where it has none, or no place for a part of it."""
    grid = FORMATS[name].module.grid_for(wish)
    if (wish.codebook is not None or wish.double_quant is not None) and not hasattr(grid, "double_quant"):
        raise SpecError(
            f"{name} has integers alone: no nf4 or fp4, and no double quantization",
            expected="--quant-type and --double-quant with bitsandbytes",
        )
    return grid


def _holds(name: str, wish: Wish) -> bool:
    if not FORMATS[name].runtimes:
        return False
    try:
        _held(name, wish)
    except SpecError:
        return False
    return True


def _with_runtimes(name: str) -> str:
    return f"{name} (read by {' and '.join(FORMATS[name].runtimes)})"


def group_size_for(wanted: int | None, shapes: Mapping[str, Sequence[int]], usual: Sequence[int]) -> int:
    """`wanted` when it divides every layer's inputs; by default the first of `usual` that does, or a row.

    Raises SpecError that names a layer it does not divide and the sizes that divide all.
    """
    common = math.gcd(*(shape[1] for shape in shapes.values()))
    if wanted is None:
        return next((size for size in usual if common % size == 0), -1)
    if wanted == -1 or (wanted > 0 and common % wanted == 0):
        return wanted
    if wanted <= 0:
        raise SpecError(f"a group size of {wanted}", expected="a positive number, or -1 for a whole row")
    usable = [str(size) for size in reversed(GROUP_SIZES) if common % size == 0]
    name, shape = next(
        ((n, s) for n, s in shapes.items() if wanted <= 0 or s[1] % wanted), ("every layer", (0, 0))
    )
    raise SpecError(
        f"group size {wanted} does not divide the {shape[1]} inputs of {name}",
        expected="group sizes that divide every layer: " + ", ".join([*usable, "-1 (a whole row)"]),
    )
