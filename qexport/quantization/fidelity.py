"""How far each layer's codes are from the weights they stand for."""

from __future__ import annotations

import math

import torch

from qexport.grids.products import for_products, square_form
from qexport.results import TensorError

_ROWS = 1024  # of a matrix that are looked at together


def tensor_error(
    name: str, bits: int, weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor | None = None
) -> TensorError:
    """|W' - W| / |W| for W [out, in], and with a Hessian [in, in] of its inputs the same for its outputs.

    Nothing is changed.
    """
    square = lost = weighted_square = weighted_lost = 0.0
    H = None if hessian is None else for_products(hessian)  # noqa: N806
    for begin in range(0, len(weight), _ROWS):
        rows = slice(begin, begin + _ROWS)
        W = weight[rows].float()  # noqa: N806
        D = decoded[rows] - W  # noqa: N806
        square += float(W.square().sum())
        lost += float(D.square().sum())
        if H is not None:
            weighted_square += float(square_form(W, H).sum())
            weighted_lost += float(square_form(D, H).sum())
    weighted = None if H is None else ratio(weighted_lost, weighted_square)
    return TensorError(name, bits, ratio(lost, square), weighted)


def ratio(lost: float, square: float) -> float:
    """|W' - W| / |W| of the squares of both; infinite where something was lost of nothing."""
    if square <= 0:
        return math.inf if lost > 0 else 0.0
    return math.sqrt(max(lost, 0.0) / square)
