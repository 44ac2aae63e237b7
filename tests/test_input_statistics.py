"""What is summed up of a layer's inputs."""

from __future__ import annotations

import pytest
import torch

from qexport.calibrate.hessian import InputStatistics, mean_abs
from qexport.errors import NonFiniteError
from qexport.grids.products import fast_in_bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_over_all_tokens(dtype: torch.dtype) -> None:
    x = torch.randn(5, 40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    seen = InputStatistics(16)
    for batch in x:
        seen.add(batch)
    seen.add(x[:2])
    rows = torch.cat((x, x[:2])).reshape(-1, 16).double()
    assert seen.count == 280
    assert torch.equal(x, before)
    torch.testing.assert_close(seen.mean("l").double(), rows.t() @ rows / 280, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean_abs([seen]).double(), rows.abs().mean(dim=0), rtol=1e-6, atol=0)


def test_many_tokens_stay_exact() -> None:
    """100 000 tokens of a mean far from 0: fp32 sums that lost digits would drift."""
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) + 3
    seen = InputStatistics(8)
    for _ in range(100):
        seen.add(x)
    torch.testing.assert_close(seen.mean("l").double(), x.double().t() @ x.double() / 1000, rtol=3e-6, atol=0)
    torch.testing.assert_close(mean_abs([seen]).double(), x.double().abs().mean(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_inputs_are_summed_in_parts(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 2100, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)
    before = torch.get_float32_matmul_precision()
    seen = InputStatistics(2100)
    seen.add(x)
    assert torch.get_float32_matmul_precision() == before
    found = seen.mean("l").double()
    assert torch.equal(found, found.t())
    for rows, tolerance in ((x.bfloat16() if fast_in_bf16() else x, 1e-5), (x, 3e-3)):
        expected = rows.double().t() @ rows.double() / 300
        assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_the_mean_size_over_several_is_by_tokens() -> None:
    one, other, unseen = InputStatistics(2), InputStatistics(2), InputStatistics(2)
    one.add(torch.tensor([[1.0, -2.0]]))
    other.add(torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, -2.0]]))
    torch.testing.assert_close(mean_abs([one, other, unseen]), torch.tensor([13 / 4, 1.0]))
    assert mean_abs([unseen]).tolist() == [0, 0]
    assert unseen.mean("l").tolist() == [[0, 0], [0, 0]]


def test_fewer_tokens_than_inputs() -> None:
    seen = InputStatistics(16)
    seen.add(torch.ones(15, 16))
    assert seen.too_few
    seen.add(torch.ones(1, 16))
    assert not seen.too_few


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_name_their_layer(value: float) -> None:
    seen = InputStatistics(4)
    seen.add(torch.tensor([[1.0, value, 0.0, 2.0]]))
    with pytest.raises(NonFiniteError, match=r"inputs of model\.q_proj are NaN or infinite"):
        seen.mean("model.q_proj")
