"""GPTQ: column by column, each one's rounding error is made good by the columns still to come.

Frantar et al., "GPTQ" (2022), algorithm 1: W [out, in] and H = X X^T over the calibration inputs. The
updates there go by the upper Cholesky factor of H's inverse; here they are LDLQ's, which come to the same
codes by H's own factor, so that nothing is inverted (see cholesky.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch

from qexport.errors import NonFiniteError, SpecError
from qexport.grids.grid import Grid, group_width
from qexport.grids.products import multiply, worthwhile
from qexport.solvers.cholesky import damped_factor
from qexport.solvers.chosen import Chosen
from qexport.solvers.evenly import code_range, divisible, kernels, over_rows
from qexport.solvers.search import search_scales

ActOrder = Literal["none", "full", "group-aware"]

BLOCK = 128  # columns updated lazily, together (section 3.3, step 2)
_THREADS_PAY = 1 << 20  # values in a block of columns from which several threads are faster


@dataclass(frozen=True)
class Curvature:
    """What the solver needs of a Hessian, computed once for all layers that share an input.

    `factor` M fp32 [in, in], upper triangular, M M^T the damped Hessian in the order of solving; its inverse
    is the paper's Hinv. `order` int64 [in] tells which input
    comes when, None as they are. `diagonal` fp32 [in] is the Hessian's own, inputs as they are: the
    importance for a search of scales. `damp` is the share of the mean diagonal that it took in the end.
    `width` is the group's that the order was made for.
    """

    factor: torch.Tensor
    order: torch.Tensor | None
    diagonal: torch.Tensor
    damp: float
    act_order: ActOrder
    width: int


def curvature(
    hessian: torch.Tensor, *, damp: float = 0.01, act_order: ActOrder = "none", group_size: int = -1
) -> Curvature:
    """Prepares `hessian` [in, in]: the sum, or any multiple, of x x^T over the calibration inputs.

    Inputs that never occur (a zero on the diagonal) are rounded by themselves. `damp` is a share of the
    mean diagonal (section 3.3, step 3), raised tenfold and again until the matrix is positive definite.
    `act_order` is the order of solving: "none" as inputs come; "full" the largest on the diagonal first, as
    in GPTQ's reference code; "group-aware" groups by their largest and inputs by size within their group,
    so that groups stay neighbours (Gafni et al. 2025, as in GPTQModel). Only the last needs `group_size`.
    Not changed. Raises NonFiniteError when it is not finite or cannot be inverted, SpecError for an unknown
    order.
    """
    if act_order not in get_args(ActOrder):
        raise SpecError(f"act order {act_order!r}", expected=", ".join(get_args(ActOrder)))
    if not all(bool(extreme.isfinite()) for extreme in hessian.aminmax()):  # NaN comes through both
        raise NonFiniteError("the Hessian holds NaN or infinity", expected="finite activations")
    diagonal = hessian.diagonal().float()
    width = group_width(group_size, len(diagonal))
    order = _order(diagonal, act_order, width)
    alive = diagonal != 0
    # no other input is tied to a dead one, so any value will do; this one leaves the mean as it is
    filler = diagonal[alive].mean() if bool(alive.any()) else torch.ones_like(diagonal[0])
    factor, damped = damped_factor(hessian, damp, order, torch.where(alive, diagonal, filler))
    return Curvature(factor, order, diagonal.clone(), damped, act_order, width)


def toward_full_outputs(weight: torch.Tensor, cross: torch.Tensor, shape_of_loss: Curvature) -> torch.Tensor:
    """What `weight` [out, in] should become, were no rounding to follow, for its outputs on the inputs x as
    they are to be those of the full-precision model on its own inputs x'. fp32; nothing is changed.

    `cross` [in, in] is the mean of (x' - x) x^T. The least squares of |W x' - V x|^2, damped towards W, are
    V = W + W cross H^-1; GPTQ of V makes good what rounding adds. GPTAQ (Li et al. 2025, section 4) feeds the
    same difference back column by column, approximately; solved beforehand it is exact, and any solver or
    grid may follow.
    """
    M, order = shape_of_loss.factor, shape_of_loss.order  # noqa: N806
    B = (weight.float() @ cross).t()  # noqa: N806
    B = B if order is None else B[order]  # noqa: N806
    B = torch.linalg.solve_triangular(M, B, upper=True)  # noqa: N806
    B = torch.linalg.solve_triangular(M.t(), B, upper=False)  # noqa: N806
    if order is not None:
        B = torch.empty_like(B).index_copy_(0, order, B)  # noqa: N806
    return weight.float() + B.t()


def _order(diagonal: torch.Tensor, act_order: ActOrder, width: int) -> torch.Tensor | None:
    """Inputs in the order of solving; equals stay as they come."""
    if act_order == "none":
        return None
    inputs = len(diagonal)
    order = diagonal.argsort(descending=True, stable=True)
    if act_order == "full":
        return order
    groups = torch.arange(inputs, device=order.device) // width
    largest = torch.full((int(groups[-1]) + 1,), -torch.inf, device=order.device)
    largest = largest.scatter_reduce(0, groups, diagonal, "amax")
    rank = largest.argsort(descending=True, stable=True).argsort()
    # inputs are sorted already: a stable sort by their group's rank keeps that within each group
    return order[rank[groups[order]].argsort(stable=True)]


def gptq(
    weight: torch.Tensor,
    shape_of_loss: Curvature,
    grid: Grid,
    *,
    static_groups: bool = False,
    scales: Any = None,
    searched: bool = False,
) -> Chosen:
    """Codes on `grid` of `weight` [out, in] that keep its outputs on the calibration inputs. Not changed.

    By default a group's scales are fitted when its first column comes, on the weights as the errors so far
    have moved them. With `static_groups` all are fitted before, on the weights as they are, so any order
    leaves groups neighbours. So too with `scales`, from a search or a clip, which are taken as they are, and
    on a grid whose groups cannot be fitted one by one (double quantization). Otherwise, in full order,
    groups are formed in that order and the codes carry `group_of`.

    `searched` groups get the scales of `search_scales` under the Hessian's diagonal, where otherwise their
    ranges are covered. With 1 or 2 bits that is what keeps errors from growing from column to column: there
    the loss can end up above that of rounding without it.

    Raises SpecError for a Hessian of other inputs, or an order aware of other groups.
    """
    factor, order = shape_of_loss.factor, shape_of_loss.order
    inputs = weight.shape[1]
    if inputs != len(factor):
        raise SpecError(f"a Hessian of {len(factor)} inputs for a weight of {inputs}", expected="the same")
    width = grid.group_width(inputs)
    place = torch.arange(inputs, device=weight.device)
    groups = (place if order is None else order) // width
    diagonal = shape_of_loss.diagonal

    def fit(values: torch.Tensor, importance: torch.Tensor) -> Any:
        return search_scales(values, grid, importance) if searched else grid.fit(values)

    group_of = None
    fixed = None
    if scales is not None or static_groups or not grid.groups_alone:
        scales = fit(weight, diagonal) if scales is None else scales
        lines = grid.lines(scales)
        fixed = lines.step.t().contiguous(), lines.origin.t().contiguous()
    elif order is not None and shape_of_loss.act_order == "full" and width < inputs:
        groups = place // width
        group_of = torch.empty_like(groups)
        group_of[order] = groups
    elif order is not None and width != shape_of_loss.width and shape_of_loss.act_order == "group-aware":
        raise SpecError(
            f"an order aware of groups of {shape_of_loss.width} for a grid of groups of {width}",
            expected="the same group size",
        )
    # Transposed, a column of the paper is contiguous in memory.
    W = (weight if order is None else weight[:, order]).float().t()  # noqa: N806
    W = W.clone(memory_format=torch.contiguous_format)  # noqa: N806
    fitted: dict[int, Any] = {}
    in_order = diagonal if order is None else diagonal[order]
    _solve(W, factor, grid, groups.tolist(), fixed, lambda w, columns: fit(w, in_order[columns]), fitted)
    # The place of a solved column holds its codes; a few bits fit into 16, with a sign or without.
    solved = W.to(torch.int16)
    if order is not None:
        solved = torch.empty_like(solved).index_copy_(0, order, solved)
    if fixed is None:
        scales = _joined([fitted[group] for group in sorted(fitted)])
    return Chosen(solved.t().contiguous(), scales, group_of)


def _solve(
    W: torch.Tensor,  # noqa: N803
    M: torch.Tensor,  # noqa: N803
    grid: Grid,
    groups: list[int],
    fixed: tuple[torch.Tensor, torch.Tensor] | None,
    fit: Callable[[torch.Tensor, slice], Any],
    fitted: dict[int, Any],
) -> None:
    """Algorithm 1 on the transposed W [in, out], which becomes its codes.

    `groups` tells each column's group. `fixed` are the lines of all groups, transposed; without them each
    group is fitted at its first column, by `fit` on its weights and their columns, and its scales go into
    `fitted`.
    """
    inputs = len(W)
    begins = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    ends = dict(zip(begins, [*begins[1:], inputs], strict=True))
    pivots = M.diagonal()
    lines = fixed if fixed is None else (divisible(fixed[0]), fixed[1])
    # Whole errors of the columns so far. In bf16 the feedback is off by thousandths of an error.
    E = torch.empty_like(W)  # noqa: N806
    before = E.bfloat16() if worthwhile(M) else E
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        U = M[:end, begin:end] / pivots[begin:end]  # noqa: N806
        W1 = W[begin:end].clone()  # noqa: N806
        if begin:
            W1.add_(multiply(U[:begin].t(), before[:begin]))
        U1, E1 = U[begin:], E[begin:end]  # noqa: N806
        # columns whose lines are known: all, or those of a group
        cuts = [begin, end] if fixed else sorted({begin, end, *(i for i in begins if begin < i < end)})
        for first, last in pairwise(cuts):
            a, b = first - begin, last - begin
            if not fixed and first in ends:
                # The group's scale is that of the weights as the errors so far have moved them: all of it at
                # once, where U moves each column for the sake of itself, with those between already known.
                group = slice(first, ends[first])
                # those columns of the block hold what they are moved by already
                inside = slice(first, min(ends[first], end))
                pull = (W1[a : a + len(W[inside])] - W[inside]) * pivots[inside, None]
                if ends[first] > end:
                    rest = slice(end, ends[first])
                    pull = torch.cat((pull, multiply(M[:first, rest].t(), before[:first])))
                values = W[group] + torch.linalg.solve_triangular(M[group, group].t(), pull, upper=False)
                fitted[groups[first]] = fit(values.t().contiguous(), group)
                found = grid.lines(fitted[groups[first]])
                lines = divisible(found.step).t().contiguous(), found.origin.t().contiguous()
            assert lines is not None  # noqa: S101 - the first column begins a group
            of = groups[first:last] if fixed else [0] * (last - first)
            _solve_columns(W1[a:b], W[first:last], E1[a:b], U1[a:b, a:b], grid, lines, of)
            if before is not E:
                before[first:last] = E1[a:b]
            if last < end:
                W1[b:].addmm_(U1[a:b, b:].t(), E1[a:b])
        W[begin:end] = W1


def _solve_columns(
    moved: torch.Tensor,
    weight: torch.Tensor,
    errors: torch.Tensor,
    U: torch.Tensor,  # noqa: N803
    grid: Grid,
    lines: tuple[torch.Tensor, torch.Tensor],
    group_of: Sequence[int],
) -> None:
    """Columns [columns, out] one by one: `moved` becomes codes, `errors` the errors of `weight`.

    `U` [columns, columns]; `lines` [groups, out], and which of them is each column's.
    """
    step, origin = lines
    if codes := code_range(grid, moved):
        tensors = (moved, weight, errors, U.contiguous(), step, origin, torch.tensor(group_of))
        arrays = [tensor.numpy() for tensor in tensors]
        over_rows(moved.shape[1], lambda begin, end: kernels().solve_columns(*arrays, *codes, begin, end))
        return
    with _one_thread_if_small(moved):
        for i, group in enumerate(group_of):
            found, nearest = grid.round(moved[i], step[group], origin[group])
            torch.sub(weight[i], nearest, out=errors[i])
            moved[i] = found
            moved[i + 1 :].addr_(U[i, i + 1 :], errors[i])


def _joined(parts: Sequence[Any]) -> Any:
    """Scales of groups fitted one by one, [out, 1] each, as those of a matrix, [out, groups]."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts), dim=1)
    fields = {
        field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(first)
    }
    tensors = {name: values for name, values in fields.items() if isinstance(values[0], torch.Tensor)}
    return dataclasses.replace(first, **{name: torch.cat(values, dim=1) for name, values in tensors.items()})


@contextlib.contextmanager
def _one_thread_if_small(block: torch.Tensor) -> Iterator[None]:
    """A column's work is microseconds: waking threads for it costs more than it saves."""
    threads = torch.get_num_threads()
    if block.numel() < _THREADS_PAY:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
