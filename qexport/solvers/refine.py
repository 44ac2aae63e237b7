"""Codes that are there already, made better: each one moved to its best place while the others stay, and
scales fitted to their codes, in turns. No step makes the loss greater.

The loss is that of K-FAC (Martens & Grosse 2015): tr(G D H D^T), D the weight's error [out, in], H the second
moment of the inputs, and G that of the loss's gradient by the outputs, as in YAQA (Tseng et al. 2025,
section 3); with G = 1 it is GPTQ's. Cyclic descent on codes is QuantEase's (Behdin et al. 2023, section 3.1),
here for rows that depend on each other too.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qexport.errors import SpecError
from qexport.grids.grid import Grid, Scalable
from qexport.solvers.chosen import Chosen
from qexport.solvers.evenly import code_range, divisible, over_rows

BLOCK = 128  # columns whose changes are told to all others together
_ROUNDS = 2  # codes, then scales
_PASSES = 4  # over all codes, a round
_RIDGE = 1e-4  # of the mean diagonal: pulls a group's factor towards 1
_FARTHEST = 2.0  # a group's scale changes by no more than this factor a round
_VALUES_AT_ONCE = 1 << 24


def refine(
    weight: torch.Tensor,
    chosen: Chosen,
    hessian: torch.Tensor,
    grid: Grid,
    outputs: torch.Tensor | None = None,
    *,
    rounds: int = _ROUNDS,
    passes: int = _PASSES,
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
    if outputs is None:
        outputs = torch.ones(out, 1, 1, device=weight.device)
    elif outputs.dim() != 3 or -(-out // outputs.shape[1]) != len(outputs):
        raise SpecError(
            f"curvatures of outputs of shape {tuple(outputs.shape)} for {out} outputs",
            expected="square blocks that cover them",
        )
    weight = weight.float()
    order = None if chosen.group_of is None else chosen.group_of.argsort(stable=True)
    if order is not None:  # groups become neighbours, and so does everything else
        weight, hessian = weight[:, order], hessian[order][:, order]
        chosen = Chosen(chosen.codes[:, order], chosen.scales)
    for _ in range(rounds):
        chosen = _better_codes(weight, chosen, hessian, grid, outputs, passes)
        if isinstance(grid, Scalable):
            chosen = _better_scales(weight, chosen, hessian, grid)
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
    G: torch.Tensor,  # noqa: N803
    passes: int,
) -> Chosen:
    """Cyclic coordinate descent on the codes, scales as they are."""
    inputs = W.shape[1]
    step, origin = (part.contiguous() for part in chosen.spread_lines(grid))
    codes = chosen.codes.float().contiguous()
    # of a codebook, codes are no values: rounding a value that is on the grid gives both
    values = _values(chosen, grid)
    gradient = _on_outputs(G, values - W) @ H
    for _ in range(passes):
        for begin in range(0, inputs, BLOCK):
            block = slice(begin, min(begin + BLOCK, inputs))
            old = values[:, block].clone()
            _descend(codes, values, gradient, step, origin, H, G, grid, block)
            gradient.addmm_(_on_outputs(G, values[:, block] - old), H[block])
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
    gradient: torch.Tensor,
    step: torch.Tensor,
    origin: torch.Tensor,
    H: torch.Tensor,  # noqa: N803
    G: torch.Tensor,  # noqa: N803
    grid: Grid,
    block: slice,
) -> None:
    """One pass over some columns: `codes` and `values` [out, in] change, `gradient` not."""
    out, size = len(values), G.shape[1]
    if span := code_range(grid, values):
        tensors = (codes, values, gradient[:, block], divisible(step), origin, H[block, block], G)
        arrays = [tensor.contiguous().numpy() for tensor in tensors]
        from qexport.solvers.descent_kernels import descend as work  # compiled, so numba is there

        over_rows(len(G), lambda begin, end: work(*arrays, *span, block.start, begin, end))
        return
    own = gradient[:, block].clone()
    h = H[block, block]
    diagonal = h.diagonal()
    for at in range(own.shape[1]):
        column = block.start + at
        moved = torch.zeros_like(own[:, at])
        for place in range(min(size, out)):  # rows of one block depend on each other; the blocks do not
            rows = slice(place, None, size)
            pivot = (G[: len(own[rows]), place, place] * diagonal[at]).clamp(min=1e-30)
            best = values[rows, column] - own[rows, at] / pivot
            found, nearest = grid.round(best, step[rows, column], origin[rows, column])
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
    """Factors on the groups' scales, those of a row by least squares together; rows that gain keep them."""
    assert isinstance(grid, Scalable)  # noqa: S101 - the caller asked
    out, inputs = W.shape
    width = grid.group_width(inputs)
    values = _values(chosen, grid)
    groups = -(-inputs // width)
    factors = torch.ones(out, groups, device=W.device)
    rows_at_once = max(_VALUES_AT_ONCE // max(groups * groups, inputs), 1)
    for begin in range(0, out, rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        factors[rows] = _best_factors(W[rows], values[rows], H, width)
    scaled = replace(chosen, scales=grid.scaled(chosen.scales, factors))
    gain = _losses(values - W, H) > _losses(_values(scaled, grid) - W, H)
    kept = grid.scaled(chosen.scales, torch.where(gain[:, None], factors, 1.0))
    return replace(chosen, scales=kept)


def _best_factors(W: torch.Tensor, V: torch.Tensor, H: torch.Tensor, width: int) -> torch.Tensor:  # noqa: N803
    """f [rows, groups] that minimise (w - f o v)^T H (w - f o v) in each row."""
    rows, inputs = V.shape
    groups = -(-inputs // width)
    sums = torch.arange(inputs, device=V.device) // width
    A = torch.empty(rows, groups, groups, device=V.device)  # noqa: N806
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        product = (V[:, part] @ H[part]).mul_(V)
        A[:, group] = torch.zeros(rows, groups, device=V.device).index_add_(1, sums, product)
    pull = (W @ H).mul_(V)
    b = torch.zeros(rows, groups, device=V.device).index_add_(1, sums, pull)
    ridge = A.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).mul(_RIDGE).clamp(min=1e-30)
    A.diagonal(dim1=1, dim2=2).add_(ridge)
    factors, failed = torch.linalg.solve_ex(A, b + ridge)
    fine = factors.isfinite() & (failed == 0)[:, None]
    return torch.where(fine, factors, 1.0).clamp_(1 / _FARTHEST, _FARTHEST)


def _losses(D: torch.Tensor, H: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """d^T H d of every row."""
    return (D @ H).mul_(D).sum(dim=1)


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
