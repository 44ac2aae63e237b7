"""Products of large matrices in bf16 with sums in fp32, where the processor has instructions for that (AMX).

A factor rounded to bf16 is off by 1 in 512 at most, each entry to either side. That is harmless where the
factor is itself an average over calibration text, or an error whose sum over thousands of entries is wanted;
it is not where a small difference of large products is. In a second moment with a few huge directions (inputs
far from 0 in the mean, or outliers) the rounding of these is larger than what the others hold: it stays fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DIRECTIONS = 4  # of a second moment that may be huge: the mean, and some outliers
LARGE = 512  # inputs from which on products are what takes the time


@cache
def fast_in_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices several times as fast as fp32 ones."""
    asked: Callable[[], bool] | None = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and asked()  # without an answer: as on a processor that has it not


def worthwhile(matrix: torch.Tensor) -> bool:
    """Whether products with `matrix` [.., in] gain by bf16: here, and at its size."""
    return matrix.device.type == "cpu" and matrix.shape[-1] >= LARGE and fast_in_bf16()


def for_products(moment: torch.Tensor) -> torch.Tensor:
    """A second `moment` [in, in] as `multiply` takes it best: bf16 where that is worthwhile and its rounding
    small beside all of its directions, else fp32."""
    return moment.to(torch.bfloat16 if worthwhile(moment) and _even(moment) else torch.float32)


def _even(moment: torch.Tensor) -> bool:
    """Whether rounding is small beside what lies outside of the few largest directions. Entries off by up to
    1 in 512, to either side, are a matrix of norm |M|_F / (256 sqrt(in)) or so."""
    inputs = len(moment)
    largest = moment.diagonal().topk(_DIRECTIONS - 1).indices
    found = torch.cat((moment.sum(dim=1, keepdim=True), moment[:, largest]), dim=1)
    for _ in range(2):  # of subspace iteration: a few directions that stand out are met at once
        found = moment @ torch.linalg.qr(found).Q
    held = float(torch.linalg.matrix_norm(found, "nuc"))
    rest = max(float(moment.diagonal().sum()) - held, 0.0) / inputs
    size = float(torch.linalg.matrix_norm(moment))
    return bool(size / (256 * inputs**0.5) <= rest)


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left` [m, k] @ `right` [k, n] in the dtype of `right`, as fp32 [m, n]; sums are fp32 in any case."""
    return (left.to(right.dtype) @ right).float()


def square_form(D: torch.Tensor, H: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """d^T H d of every row of `D` fp32 [rows, in], fp32 [rows]; `H` [in, in], symmetric, see `for_products`.

    What lies below the diagonal mirrors what is above it, and is not multiplied.
    """
    total = torch.zeros(len(D), device=D.device)
    for begin in range(0, len(H), 2 * LARGE):
        part = slice(begin, begin + 2 * LARGE)
        if begin:
            total += multiply(D[:, :begin], H[:begin, part]).mul_(D[:, part]).sum(dim=1).mul_(2)
        total += multiply(D[:, part], H[part, part]).mul_(D[:, part]).sum(dim=1)
    return total


@contextlib.contextmanager
def fp32_factors_as_bf16(wanted: bool) -> Iterator[None]:
    """Within it torch may round fp32 factors to bf16 in products, whose sums and results stay fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if wanted else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class LinearInBf16(TorchFunctionMode):
    """Within it large linear layers in fp32 multiply in bf16: weights, inputs and results are rounded to it.

    Sums are fp32, and so is all that lies between the layers.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, and what is a linear layer in bf16."""
        kwargs = kwargs or {}
        if (
            func in (torch.nn.functional.linear, torch.addmm)
            and not kwargs
            and args[0].dtype == torch.float32
        ):
            weight = args[1] if func is torch.nn.functional.linear else args[2]
            if weight.numel() >= LARGE**2 and worthwhile(weight.reshape(-1)):
                return func(*(part if part is None else part.bfloat16() for part in args)).float()
        return func(*args, **kwargs)
