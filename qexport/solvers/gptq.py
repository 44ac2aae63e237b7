"""GPTQ: column by column, each one's rounding error is made good by the columns still to come.

Frantar et al., "GPTQ" (2022), algorithm 1: W [out, in], H = X X^T over the calibration inputs, and the
upper Cholesky factor of H's inverse, here called Hinv, whose rows are all that the updates need.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from qexport.errors import NonFiniteError, SpecError
from qexport.grids.grid import Grid, group_width
from qexport.solvers.search import search_scales

ActOrder = Literal["none", "full", "group-aware"]

BLOCK = 128  # columns updated lazily, together (section 3.3, step 2)
_MAX_DAMP = 1.0
_THREADS_PAY = 1 << 20  # values in a block of columns from which several threads are faster
_SMALL = 256  # triangles up to this size are inverted by LAPACK


@dataclass(frozen=True)
class Curvature:
    """What the solver needs of a Hessian, computed once for all layers that share an input.

    `Hinv` fp32 [in, in], upper triangular, in the order of solving. `order` int64 [in] tells which input
    comes when, None as they are. `diagonal` fp32 [in] is the Hessian's own, inputs as they are: the
    importance for a search of scales. `damp` is the share of the mean diagonal that it took in the end.
    `width` is the group's that the order was made for.
    """

    Hinv: torch.Tensor
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
    if not bool(hessian.isfinite().all()):
        raise NonFiniteError("the Hessian holds NaN or infinity", expected="finite activations")
    H = hessian.float().clone()  # noqa: N806
    diagonal = H.diagonal().clone()
    dead = diagonal == 0
    # no other input is tied to a dead one, so any value will do; this one leaves the mean as it is
    H.diagonal()[dead] = diagonal[~dead].mean() if not bool(dead.all()) else 1.0
    width = group_width(group_size, len(H))
    order = _order(diagonal, act_order, width)
    if order is not None:
        H = H[order][:, order]  # noqa: N806
    Hinv, damped = inverse_factor(H, damp)  # noqa: N806
    return Curvature(Hinv, order, diagonal, damped, act_order, width)


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


def inverse_factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """Hinv, the upper Cholesky factor of the inverse of `hessian` [in, in] + damping, fp32; and the damping.

    Where the damped matrix is not positive definite the damping is raised tenfold, up to the mean diagonal
    itself. Raises NonFiniteError when that does not do either.
    """
    # With rows and columns reversed H = L L^T; reversed again that is M M^T with M upper triangular, so
    # H^-1 = M^-T M^-1 and M^-1 is what we want: no inverse of H is formed, which would cost twice as much.
    H = hessian.double().flip(0, 1)  # noqa: N806
    diagonal = H.diagonal().clone()
    mean = float(diagonal.mean()) or 1.0
    while True:
        H.diagonal().copy_(diagonal + damp * mean)
        L, failed = torch.linalg.cholesky_ex(H)  # noqa: N806
        if not failed:
            Hinv = _lower_inverse(L).flip(0, 1).float()  # noqa: N806
            if bool(Hinv.isfinite().all()):
                return Hinv, damp
        if damp >= _MAX_DAMP:
            raise NonFiniteError(
                "the Hessian is not positive definite even when damped by its mean diagonal",
                expected="finite activations",
            )
        damp = min(max(damp, 1e-6) * 10, _MAX_DAMP)


def _lower_inverse(L: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """The inverse of a lower triangle, by halves: a plain triangular solve takes three times as long."""
    n = len(L)
    if n <= _SMALL:
        identity = torch.eye(n, dtype=L.dtype, device=L.device)
        small: torch.Tensor = torch.linalg.solve_triangular(L, identity, upper=False)
        return small
    half = n // 2
    inverse = torch.zeros_like(L)
    A, C = _lower_inverse(L[:half, :half]), _lower_inverse(L[half:, half:])  # noqa: N806
    inverse[:half, :half], inverse[half:, half:] = A, C
    torch.mm(C, L[half:, :half] @ A, out=inverse[half:, :half]).neg_()
    return inverse


def gptq(
    weight: torch.Tensor,
    shape_of_loss: Curvature,
    grid: Grid,
    *,
    static_groups: bool = False,
    scales: Any = None,
    searched: bool = False,
) -> Any:
    """The grid's codes of `weight` [out, in] that keep its outputs on the calibration inputs. Not changed.

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
    Hinv, order = shape_of_loss.Hinv, shape_of_loss.order  # noqa: N806
    inputs = weight.shape[1]
    if inputs != len(Hinv):
        raise SpecError(f"a Hessian of {len(Hinv)} inputs for a weight of {inputs}", expected="the same")
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
    W = weight.float().t()  # noqa: N806
    W = (W if order is None else W[order]).clone(memory_format=torch.contiguous_format)  # noqa: N806
    fitted: dict[int, Any] = {}
    in_order = diagonal if order is None else diagonal[order]
    _solve(W, Hinv, grid, groups.tolist(), fixed, lambda w, columns: fit(w, in_order[columns]), fitted)
    # The place of a solved column holds its codes; a few bits fit into 16, with a sign or without.
    solved = W.to(torch.int16)
    if order is not None:
        solved = torch.empty_like(solved).index_copy_(0, order, solved)
    if fixed is None:
        scales = _joined([fitted[group] for group in sorted(fitted)])
    return grid.assemble(solved.t().contiguous(), scales, group_of)


def _solve(
    W: torch.Tensor,  # noqa: N803
    Hinv: torch.Tensor,  # noqa: N803
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
    lengths = dict(
        zip(begins, (b - a for a, b in zip(begins, [*begins[1:], inputs], strict=True)), strict=True)
    )
    pivots = Hinv.diagonal().tolist()
    step = origin = W[0]
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        W1 = W[begin:end]  # noqa: N806 - a view: updates within the block happen in place
        Err = torch.empty_like(W1)  # noqa: N806
        with _one_thread_if_small(W1):
            for i in range(begin, end):
                at = i - begin
                if fixed is not None:
                    step, origin = fixed[0][groups[i]], fixed[1][groups[i]]
                elif i in lengths:
                    # The group's scale is that of the weights as the errors so far have moved them;
                    # those beyond this block have not been told of this block's errors yet.
                    beyond = i + lengths[i]
                    group = W[i:beyond].clone()
                    if at and beyond > end:
                        group[end - i :] -= Hinv[begin:i, end:beyond].t() @ Err[:at]
                    scales = fit(group.t().contiguous(), slice(i, beyond))
                    lines = grid.lines(scales)
                    step, origin = lines.step[:, 0].contiguous(), lines.origin[:, 0].contiguous()
                    fitted[groups[i]] = scales
                codes, nearest = grid.round(W1[at], step, origin)
                torch.sub(W1[at], nearest, out=Err[at]).div_(pivots[i])
                W1[at] = codes
                W1[at + 1 :].addr_(Hinv[i, i + 1 : end], Err[at], alpha=-1)
        W[end:].addmm_(Hinv[begin:end, end:].t(), Err, alpha=-1)


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
