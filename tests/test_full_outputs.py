"""Weights that make up for inputs that have changed: held against least squares on the inputs themselves."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from qexport.calibrate.cross import CrossMoment
from qexport.solvers.gptq import ActOrder, curvature, toward_full_outputs

TOKENS, INPUTS, OUT = 400, 48, 20


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the full model's inputs, and those there are now: changed in a way that depends on them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    full = random(TOKENS, INPUTS) @ (random(INPUTS, INPUTS) / INPUTS**0.5 + torch.eye(INPUTS))
    full *= torch.linspace(0.3, 3, INPUTS)[torch.randperm(INPUTS, generator=generator)]
    now = full @ (torch.eye(INPUTS) + 0.1 * random(INPUTS, INPUTS) / INPUTS**0.5) + 0.2 * random(
        TOKENS, INPUTS
    )
    return random(OUT, INPUTS), full, now


def moment(full: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    cross = CrossMoment(now.shape[-1])
    cross.add(full, now)
    return cross.mean()


@pytest.mark.parametrize("damp", [1e-6, 0.01, 0.3])
@pytest.mark.parametrize("act_order", get_args(ActOrder))
def test_it_is_the_damped_least_squares_of_the_outputs(act_order: ActOrder, damp: float) -> None:
    W, full, now = inputs()
    hessian = now.T @ now / TOKENS
    prepared = curvature(hessian, damp=damp, act_order=act_order, group_size=16)
    assert prepared.damp == damp
    found = toward_full_outputs(W, moment(full, now), prepared)
    # min |W x' - V x|^2 / tokens + damp * mean diagonal * |V - W|^2, as one tall system for V - W
    x, change = now.double(), (full - now).double()
    ridge = (damp * float(hessian.diagonal().mean()) * TOKENS) ** 0.5
    A = torch.cat((x, ridge * torch.eye(INPUTS, dtype=torch.float64)))
    b = torch.cat((change @ W.double().T, torch.zeros(INPUTS, OUT, dtype=torch.float64)))
    expected = W + torch.linalg.lstsq(A, b).solution.T
    assert float((expected - W).norm()) > 0.05 * float(W.norm())  # else there was nothing to make up for
    assert float((found - expected).norm()) < 1e-4 * float((expected - W).norm())


def test_outputs_come_nearer_to_the_full_models() -> None:
    W, full, now = inputs(1)
    prepared = curvature(now.T @ now / TOKENS, damp=1e-6)
    V = toward_full_outputs(W, moment(full, now), prepared)
    assert float((full @ W.T - now @ V.T).norm()) < 0.9 * float((full @ W.T - now @ W.T).norm())


@pytest.mark.parametrize("act_order", get_args(ActOrder))
def test_inputs_that_did_not_change_leave_the_weight(act_order: ActOrder) -> None:
    W, full, _ = inputs()
    prepared = curvature(full.T @ full / TOKENS, act_order=act_order, group_size=16)
    found = toward_full_outputs(W.half(), moment(full, full), prepared)
    assert found.dtype == torch.float32
    assert torch.equal(found, W.half().float())


def test_inputs_that_never_occur_keep_their_weights() -> None:
    W, full, now = inputs()
    full[:, 5] = now[:, 5] = 0
    before = W.clone()
    found = toward_full_outputs(W, moment(full, now), curvature(now.T @ now / TOKENS, act_order="full"))
    assert torch.equal(found[:, 5], W[:, 5])
    assert not torch.equal(found[:, 6], W[:, 6])
    assert torch.equal(W, before)


def test_the_cross_moment_is_a_mean_over_all_tokens() -> None:
    _, full, now = inputs()
    whole = moment(full, now)
    expected = (full.double() - now.double()).T @ now.double() / TOKENS
    assert torch.allclose(whole.double(), expected, rtol=1e-4, atol=1e-5)
    parts = CrossMoment(INPUTS)
    kept = full.clone(), now.clone()
    for begin, end in ((0, 100), (100, 101), (101, TOKENS)):  # batches [n, length, in], of any size
        parts.add(full[begin:end].view(1, -1, INPUTS), now[begin:end].view(1, -1, INPUTS))
    assert torch.allclose(parts.mean(), whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(full, kept[0])
    assert torch.equal(now, kept[1])
    assert torch.equal(CrossMoment(3).mean(), torch.zeros(3, 3))


def test_inputs_of_16_bits_lose_no_digits_in_the_difference() -> None:
    """x' - x is small beside both: it must not be rounded to their dtype, nor its products."""
    _, full, now = (value.half() for value in inputs())
    expected = (full.double() - now.double()).T @ now.double() / TOKENS
    found = moment(full, now).double()
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())
