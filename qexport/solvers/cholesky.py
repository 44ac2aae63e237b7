"""The factor of a Hessian that error feedback needs: no inverse, and almost all of it matrix products.

GPTQ's updates by the inverse's factor and those of LDLQ by the Hessian's own are the same (Chee et al.,
"QuIP" (2023), theorem 6): with H = M M^T, M upper triangular, and U = M / diag(M) by columns, column j is
rounded once it has been moved by sum_{i<j} e_i U_ij, e_i the whole error w_i - q_i of column i.
"""

from __future__ import annotations

import torch

from qexport.errors import NonFiniteError
from qexport.solvers.evenly import kernels, over_rows

_MAX_DAMP = 1.0
_BLOCK = 512  # columns that are factored together


def damped_factor(
    hessian: torch.Tensor,
    damp: float,
    order: torch.Tensor | None = None,
    diagonal: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """M, upper triangular with M M^T = `hessian` [in, in] + damping, fp32 [in, in]; and the damping.

    Rows and columns are taken in `order`, int64 [in], where that is given. `diagonal` [in], inputs as they
    are, stands for the matrix's own. `damp` is a share of its mean, raised tenfold and again, up to all of
    it, until the matrix is positive definite. Not changed. Raises NonFiniteError when no damping does.

    fp32 is enough: M belongs exactly to a matrix whose entries differ from the damped one's by rounding (a
    Cholesky factor is backward stable), thousands of times less than the damping. Where it breaks down, fp64
    tells whether the matrix or the rounding is to blame.
    """
    diagonal = hessian.diagonal().float() if diagonal is None else diagonal.float()
    if order is None:
        order = torch.arange(len(hessian), device=hessian.device)
    # H = M M^T, read from the last row and column to the first, is L L^T
    order = order.flip(0)
    mean = float(diagonal.mean(dtype=torch.float64)) or 1.0
    while True:
        for dtype in (torch.float32, torch.float64):
            L = lower_in_order(hessian, order).to(dtype)  # noqa: N806
            L.diagonal().copy_(diagonal[order] + damp * mean)
            found = lower_factor(L)
            if found is not None:
                return found.flip(0, 1).float(), damp
        if damp >= _MAX_DAMP:
            raise NonFiniteError(
                "the Hessian is not positive definite even when damped by its mean diagonal",
                expected="finite activations",
            )
        damp = min(max(damp, 1e-6) * 10, _MAX_DAMP)


def lower_in_order(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`matrix` [n, n] with rows and columns in `order`, fp32; what is above the diagonal may be any."""
    if matrix.device.type == "cpu" and matrix.dtype == torch.float32 and kernels():
        found = torch.empty_like(matrix)
        arrays = [part.numpy() for part in (matrix.contiguous(), order, found)]
        over_rows(len(matrix), lambda begin, end: kernels().lower_in_order(*arrays, begin, end))
        return found
    return matrix[order][:, order].float()


def lower_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """L, lower triangular with L L^T = `matrix` [n, n], in its place; None where it is not positive definite.

    Block column by block column, each less what those before it explain: LAPACK's takes three times as long
    on a CPU. Only the lower triangle is read.
    """
    n = len(matrix)
    if matrix.device.type != "cpu":
        found, failed = torch.linalg.cholesky_ex(matrix)
        return None if bool(failed) else found
    L = matrix  # noqa: N806
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        if begin:
            L[begin:, begin:end].addmm_(L[begin:, :begin], L[begin:end, :begin].t(), alpha=-1)
        small, failed = torch.linalg.cholesky_ex(L[begin:end, begin:end].double())
        if failed or not bool(small.diagonal().isfinite().all()):
            return None
        L[begin:end, begin:end] = small
        L[begin:end, end:] = 0
        if end < n:
            identity = torch.eye(end - begin, dtype=torch.float64)
            inverse = torch.linalg.solve_triangular(small, identity, upper=False).to(L.dtype)
            L[end:, begin:end] = L[end:, begin:end] @ inverse.t()
    return L
