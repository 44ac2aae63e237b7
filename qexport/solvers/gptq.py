"""GPTQ: column by column, each one's rounding error is made good by the columns still to come.

Frantar et al., "GPTQ" (2022), algorithm 1: W [out, in], H = X X^T over the calibration inputs, and the
upper Cholesky factor of H's inverse, here called Hinv, whose rows are all that the updates need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qexport.errors import NonFiniteError
from qexport.grids.integer import IntegerCodes, IntegerGrid

BLOCK = 128  # columns updated lazily, together (section 3.3, step 2)
_MAX_DAMP = 1.0
_THREADS_PAY = 1 << 20  # values in a block of columns from which several threads are faster


def inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Hinv: the upper Cholesky factor of the inverse of `hessian` [in, in] + damping, fp32.

    `damp` is a share of the mean diagonal (section 3.3, step 3). Where the damped matrix is still not
    positive definite the damping is raised tenfold, up to the mean diagonal itself.
    """
    identity = torch.eye(len(hessian), dtype=torch.float64)
    H = hessian.double()  # noqa: N806
    mean = float(H.diagonal().mean()) or 1.0
    while True:
        L, failed = torch.linalg.cholesky_ex(H + damp * mean * identity)  # noqa: N806
        if not failed:
            inverse = torch.cholesky_inverse(L)
            Hinv, failed = torch.linalg.cholesky_ex(inverse, upper=True)  # noqa: N806
            if not failed:
                factor: torch.Tensor = Hinv.float()
                return factor
        if damp >= _MAX_DAMP:
            raise NonFiniteError(
                "the Hessian is not positive definite even when damped by its mean diagonal",
                expected="finite activations",
            )
        damp = min(damp * 10, _MAX_DAMP)


@dataclass(frozen=True)
class Curvature:
    """What the solver needs of a Hessian, computed once for all layers that share an input."""

    Hinv: torch.Tensor  # fp32 [in, in], upper triangular


def curvature(hessian: torch.Tensor, *, damp: float = 0.01) -> Curvature:
    """Prepares `hessian` [in, in]: the sum, or any multiple, of x x^T over the calibration inputs.

    Inputs that never occur (a zero on the diagonal) are rounded by themselves. Not changed.
    Raises NonFiniteError when it cannot be inverted.
    """
    H = hessian.float().clone()  # noqa: N806
    H.diagonal()[H.diagonal() == 0] = 1
    return Curvature(inverse_factor(H, damp))


def gptq(weight: torch.Tensor, shape_of_loss: Curvature, grid: IntegerGrid) -> IntegerCodes:
    """Codes of `weight` [out, in] that keep its outputs on the calibration inputs. Not changed.

    Raises SpecError for a group that does not divide the inputs.
    """
    Hinv = shape_of_loss.Hinv  # noqa: N806
    out, inputs = weight.shape
    width = grid.group_width(inputs)
    # Transposed, a column of the paper is contiguous in memory.
    W = weight.float().t().contiguous()  # noqa: N806
    codes = torch.empty(inputs, out, dtype=torch.uint8)
    scales = torch.empty(inputs // width, out, dtype=torch.float16)
    scale = torch.ones(out)
    top = (1 << grid.bits) - 1
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        W1 = W[begin:end]  # noqa: N806 - a view: updates within the block happen in place
        Err = torch.empty_like(W1)  # noqa: N806
        with _one_thread_if_small(W1):
            for i in range(begin, end):
                at = i - begin
                if i % width == 0:
                    # The group's scale is that of the weights as the errors so far have moved them;
                    # those beyond this block have not been told of this block's errors yet.
                    group = W[i : i + width].clone()
                    if at and i + width > end:
                        group[end - i :] -= Hinv[begin:i, end : i + width].t() @ Err[:at]
                    scales[i // width] = grid.fit(group.t())[:, 0]
                    scale = scales[i // width].float()
                q = torch.round(W1[at] / scale).add_(grid.zero).clamp_(0, top)
                codes[i] = q.to(torch.uint8)
                Err[at] = (W1[at] - (q - grid.zero) * scale) / Hinv[i, i]
                W1[at + 1 :].addr_(Hinv[i, i + 1 : end], Err[at], alpha=-1)
        W[end:].addmm_(Hinv[begin:end, end:].t(), Err, alpha=-1)
    return IntegerCodes(codes.t().contiguous(), scales.t().contiguous())


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
