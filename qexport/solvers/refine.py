"""Codes that are there already, made better: each one moved to its best place while the others stay, and
scales fitted to their codes, in turns. No step makes the loss greater, but for what products are rounded.

The loss is that of K-FAC (Martens & Grosse 2015): tr(G D H D^T), D the weight's error [out, in], H the second
moment of the inputs, and G that of the loss's gradient by the outputs, as in YAQA (Tseng et al. 2025,
section 3); with G = 1 it is GPTQ's. Cyclic descent on codes is QuantEase's (Behdin et al. 2023, section 3.1),
here for rows that depend on each other too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qexport.errors import SpecError
from qexport.grids.grid import Grid, Scalable
from qexport.grids.products import for_products, multiply
from qexport.solvers.chosen import Chosen
from qexport.solvers.evenly import code_range, divisible, over_rows

BLOCK = 128  # columns whose changes are told to all others together
_ROUNDS = 1  # codes, then scales; of a second one the model's outputs show nothing
_ROUNDS_ACROSS = 2  # where rows depend on each other
_PASSES = 2  # over all codes, a round; of more the outputs show nothing
_PASSES_ACROSS = 4
_RIDGE = 1e-4  # of the mean diagonal: pulls a group's factor towards 1
_FARTHEST = 2.0  # a group's scale changes by no more than this factor a round
_ROWS, _COLUMNS = 512, 1024  # of products that stay in a core's cache


def refine(
    weight: torch.Tensor,
    chosen: Chosen,
    hessian: torch.Tensor,
    grid: Grid,
    outputs: torch.Tensor | None = None,
    *,
    rounds: int | None = None,
    passes: int | None = None,
) -> Chosen:
    """Better codes and scales for `weight` fp32 [out, in], from those chosen before. Nothing is changed.

    `hessian` H fp32 [in, in], damped if it is to be. `outputs` are blocks along the diagonal of G, fp32
    [blocks, size, size], the last one filled up with 0 where `size` does not divide out; None: the identity.
    Scales are fitted by H alone, each row to itself, on grids that are `Scalable`. Groups in another order
    than the inputs (`group_of`) are kept. Raises SpecError when shapes do not fit together.
    """
    out, inputs = weight.shape
    if hessian.shape != (inputs, inputs):
        raise SpecError(
            f"a Hessian of shape {tuple(hessian.shape)} for a weight of {inputs} inputs",
            expected="one row and column an input",
        )
    if outputs is not None and (outputs.dim() != 3 or -(-out // outputs.shape[1]) != len(outputs)):
        raise SpecError(
            f"curvatures of outputs of shape {tuple(outputs.shape)} for {out} outputs",
            expected="square blocks that cover them",
        )
    weight = weight.float()
    order = None if chosen.group_of is None else chosen.group_of.argsort(stable=True)
    if order is not None:  # groups become neighbours, and so does everything else
        weight, hessian = weight[:, order], hessian[order][:, order]
        chosen = Chosen(chosen.codes[:, order], chosen.scales)
    if rounds is None:
        rounds = _ROUNDS if outputs is None else _ROUNDS_ACROSS
    if passes is None:
        passes = _PASSES if outputs is None else _PASSES_ACROSS
    quick = for_products(hessian)
    for _ in range(rounds):
        chosen = _better_codes(weight, chosen, hessian, grid, outputs, passes, quick)
        if isinstance(grid, Scalable):
            chosen = _better_scales(weight, chosen, quick, grid)
    if order is not None:
        codes = torch.empty_like(chosen.codes)
        codes[:, order] = chosen.codes
        group_of = torch.empty_like(order)
        group_of[order] = torch.arange(inputs, device=order.device) // grid.group_width(inputs)
        chosen = Chosen(codes, chosen.scales, group_of)
    return chosen


def _better_codes(
    W: torch.Tensor,  # noqa: N803
    chosen: Chosen,
    H: torch.Tensor,  # noqa: N803
    grid: Grid,
    G: torch.Tensor | None,  # noqa: N803
    passes: int,
    quick: torch.Tensor,
) -> Chosen:
    """Cyclic coordinate descent on the codes, scales as they are. `quick` is `H` as products take it."""
    inputs = W.shape[1]
    step, origin = chosen.spread_lines(grid)
    codes = chosen.codes.float().contiguous()
    # of a codebook, codes are no values: rounding a value that is on the grid gives both
    values = _values(chosen, grid)
    D = (values - W).to(quick.dtype)  # noqa: N806
    for _ in range(passes):
        for begin in range(0, inputs, BLOCK):
            block = slice(begin, min(begin + BLOCK, inputs))
            gradient = multiply(D, quick[:, block])
            if G is not None:
                gradient = _on_outputs(G, gradient)
            _descend(
                codes, values, gradient, (step[:, block], origin[:, block]), H[block, block], G, grid, block
            )
            D[:, block] = values[:, block] - W[:, block]
    return replace(chosen, codes=codes.to(torch.int16))


def _values(chosen: Chosen, grid: Grid) -> torch.Tensor:
    values: torch.Tensor = grid.decode(chosen.assembled(grid))
    return values.clone(memory_format=torch.contiguous_format)


def _on_outputs(G: torch.Tensor, D: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """G D for a G of blocks: [blocks, size, size] and [out, n] -> [out, n]."""
    blocks, size, _ = G.shape
    if size == 1:
        return D * G[:, 0]
    rows = torch.nn.functional.pad(D, (0, 0, 0, blocks * size - len(D)))
    return torch.bmm(G, rows.view(blocks, size, -1)).view(blocks * size, -1)[: len(D)]


def _descend(
    codes: torch.Tensor,
    values: torch.Tensor,
    own: torch.Tensor,
    lines: tuple[torch.Tensor, torch.Tensor],
    h: torch.Tensor,
    G: torch.Tensor | None,  # noqa: N803
    grid: Grid,
    block: slice,
) -> None:
    """One pass over the columns of `block`: of `codes` and `values` [out, in] these change, and what is left
    of the gradient is in `own` [out, columns]."""
    out = len(values)
    step, origin = lines
    if span := code_range(grid, values):
        from qexport.solvers import descent_kernels  # numba is there

        compiled: Any = descent_kernels

        tensors = (codes, values, own, divisible(step), origin, h)
        arrays = [tensor.contiguous().numpy() for tensor in tensors]
        if G is None:
            over_rows(out, lambda begin, end: compiled.descend_alone(*arrays, *span, block.start, begin, end))
            return
        outputs = G.contiguous().numpy()
        over_rows(
            len(G),
            lambda begin, end: compiled.descend(*arrays, outputs, *span, block.start, begin, end),
            at_least=1,  # of many outputs each
        )
        return
    if G is None:
        G = torch.ones(out, 1, 1, device=values.device)  # noqa: N806
    size = G.shape[1]
    diagonal = h.diagonal()
    for at in range(own.shape[1]):
        column = block.start + at
        moved = torch.zeros_like(own[:, at])
        for place in range(min(size, out)):  # rows of one block depend on each other; the blocks do not
            rows = slice(place, None, size)
            pivot = (G[: len(own[rows]), place, place] * diagonal[at]).clamp(min=1e-30)
            best = values[rows, column] - own[rows, at] / pivot
            found, nearest = grid.round(best, step[rows, at], origin[rows, at])
            live = G[: len(found), place, place] > 0
            change = torch.where(live, nearest - values[rows, column], 0)
            codes[rows, column] = torch.where(live, found.float(), codes[rows, column])
            values[rows, column] += change
            moved[rows] = change
            if size > 1:
                spread = torch.zeros(len(G) * size, device=own.device)
                spread.view(len(G), size)[: len(change)] = G[: len(change), :, place] * change[:, None]
                own[:, at] += spread[:out] * diagonal[at]
        # the column's own gradient has been kept up to date above
        if at + 1 < own.shape[1]:
            own[:, at + 1 :].addr_(_on_outputs(G, moved[:, None])[:, 0], h[at, at + 1 :])


def _better_scales(
    W: torch.Tensor,  # noqa: N803
    chosen: Chosen,
    H: torch.Tensor,  # noqa: N803
    grid: Grid,
) -> Chosen:
    """Factors on the groups' scales, those of a row by least squares together; rows that gain keep them. `H`
    as products take it."""
    assert isinstance(grid, Scalable)  # noqa: S101 - the caller asked
    out, inputs = W.shape
    width = grid.group_width(inputs)
    values = _values(chosen, grid)
    factors = torch.ones(out, -(-inputs // width), device=W.device)
    fits = []
    for begin in range(0, out, _ROWS):
        rows = slice(begin, begin + _ROWS)
        fits.append(_fit_of_factors(W[rows], values[rows], H, width))
        factors[rows] = _best_factors(*fits[-1])
    # they are stored rounded: it is those that have to be better
    scaled = grid.scaled(chosen.scales, factors)
    stored = _ratios(_values(replace(chosen, scales=scaled), grid), values, width)
    gains = []
    for (A, pull), part in zip(fits, torch.split(stored, _ROWS), strict=True):  # noqa: N806
        change = (part - 1)[:, :, None]
        gains.append((2 * pull[:, :, None] * change - (A @ change) * change).sum(dim=(1, 2)) > 0)
    gain = torch.cat(gains)
    kept = grid.scaled(chosen.scales, torch.where(gain[:, None], factors, 1.0))
    return replace(chosen, scales=kept)


def _fit_of_factors(
    W: torch.Tensor,  # noqa: N803
    V: torch.Tensor,  # noqa: N803
    H: torch.Tensor,  # noqa: N803
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What (w - f o v)^T H (w - f o v) of each row is in f [groups], around 1: with c = f - 1 it changes by
    c^T A c - 2 p^T c. A [rows, groups, groups] and p [rows, groups]."""
    inputs = V.shape[1]
    groups = -(-inputs // width)
    A = torch.empty(len(V), groups, groups, device=V.device)  # noqa: N806
    quick = V.to(H.dtype)
    across = max(_COLUMNS // width, 1)
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        for first in range(0, group + 1, across):  # the other half mirrors this
            last = min(first + across, group + 1)
            columns = slice(first * width, min(last * width, inputs))
            product = multiply(quick[:, part], H[part, columns]).mul_(V[:, columns])
            A[:, group, first:last] = _group_sums(product, width)
            A[:, first:last, group] = A[:, group, first:last]
    return A, _group_sums(multiply(W - V, H).mul_(V), width)


def _best_factors(A: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """f [rows, groups] that minimise that."""
    ridge = A.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).mul(_RIDGE).clamp(min=1e-30)
    A = A + ridge.expand_as(pull).diag_embed()  # noqa: N806
    change, failed = torch.linalg.solve_ex(A, pull)
    fine = change.isfinite() & (failed == 0)[:, None]
    return torch.where(fine, 1 + change, 1.0).clamp_(1 / _FARTHEST, _FARTHEST)


def _ratios(scaled: torch.Tensor, values: torch.Tensor, width: int) -> torch.Tensor:
    """By how much each group's values have been scaled: [out, in] both -> [out, groups]."""
    square = _group_sums(values.square(), width)
    return torch.where(square > 0, _group_sums(scaled.mul(values), width) / square, 1.0)


def _group_sums(values: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, in] -> [rows, groups]."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % width))
    return padded.view(len(values), -1, width).sum(dim=2)


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """A copy of `hessian` [in, in] with `damp` times its mean diagonal added to the diagonal."""
    found = hessian.float().clone()
    found.diagonal().add_(damp * found.diagonal().mean())
    return found


def output_blocks(gradients: torch.Tensor, size: int) -> torch.Tensor:
    """Sum of g g^T over tokens, in blocks along the diagonal: [tokens, out] -> fp32 [blocks, size, size]."""
    tokens, out = gradients.shape
    padded = torch.nn.functional.pad(gradients.float(), (0, -out % size))
    parts = padded.view(tokens, -1, size).transpose(0, 1)
    return torch.bmm(parts.transpose(1, 2), parts)


def usable_outputs(sums: torch.Tensor, damp: float, out: int) -> torch.Tensor:
    """Sums of g g^T [blocks, size, size] as `refine` takes them: damped, the mean diagonal of `out` being 1.

    Any factor would do, as the solution does not depend on it; 1 keeps fp32 in its range.
    """
    found = sums.clone()
    diagonal = found.diagonal(dim1=1, dim2=2)
    mean = diagonal.sum() / out
    if not bool(mean > 0) or not bool(mean.isfinite()):
        found.zero_()
        diagonal.fill_(1.0)
        return found
    diagonal.add_(damp * mean)
    return found / (mean * (1 + damp))
