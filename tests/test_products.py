"""Products in bf16: as near as the rounding of their factors allows, and only where they are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qexport.grids import products
from qexport.grids.products import LinearInBf16, for_products, multiply, square_form, worthwhile


def moment(inputs: int) -> torch.Tensor:
    x = torch.randn(300, inputs, generator=torch.Generator().manual_seed(0)) + 0.3
    return x.T @ x / 300


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("inputs", [48, 700, 1500])
def test_square_forms(inputs: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "fast_in_bf16", lambda: fast)
    D, H = torch.randn(7, inputs, generator=torch.Generator().manual_seed(1)), moment(inputs)
    quick = for_products(H)
    rounded = fast and inputs >= products.LARGE
    assert quick.dtype == (torch.bfloat16 if rounded else torch.float32)
    expected = torch.einsum("ri,ij,rj->r", D.double(), H.double(), D.double())
    torch.testing.assert_close(
        square_form(D, quick).double(), expected, rtol=2e-2 if rounded else 1e-5, atol=1e-3
    )
    torch.testing.assert_close(
        multiply(D, quick).double(), D.double() @ H.double(), rtol=2e-2, atol=0.3 if rounded else 1e-3
    )


@pytest.mark.parametrize(("mean", "rounded"), [(0.0, True), (0.5, True), (6.0, False), (30.0, False)])
def test_moments_with_a_huge_direction_are_not_rounded(
    mean: float, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "fast_in_bf16", lambda: True)
    x = torch.randn(2000, 640, generator=torch.Generator().manual_seed(0)) + mean
    assert (for_products(x.T @ x / len(x)).dtype == torch.bfloat16) is rounded


def test_small_matrices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "fast_in_bf16", lambda: True)
    assert not worthwhile(torch.zeros(4, products.LARGE - 1))
    assert worthwhile(torch.zeros(4, products.LARGE))


def test_only_large_linear_layers_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "fast_in_bf16", lambda: True)
    torch.manual_seed(0)
    small, large = nn.Linear(16, 16), nn.Linear(512, 512)
    with torch.no_grad(), LinearInBf16():
        x, y = torch.randn(3, 16), torch.randn(3, 512)
        found = small(x), large(y)
    assert torch.equal(found[0], small(x))
    assert found[1].dtype == torch.float32
    assert torch.equal(found[1], found[1].bfloat16().float())
    assert 0 < (found[1] - large(y)).abs().max() < 0.02
