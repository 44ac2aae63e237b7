"""The knapsack of bits and bytes, against brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from qexport.quantization.allotment.budget import (
    Option,
    least_loss,
    least_size,
    smallest_size,
    total_loss,
    total_size,
)


def instance(generator: random.Random, units: int, step: int) -> list[list[Option]]:
    """Options as layers have them: more bytes, less loss, but for a few that are simply worse."""
    found = []
    for _ in range(units):
        weights = generator.choice([1, 2, 3, 8]) * step
        found.append(
            [
                Option(bits * weights + generator.randrange(3) * step, generator.random() * weights / 4**bits)
                for bits in (2, 3, 4, 8)
            ]
        )
    return found


def brute(units: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    return [
        (total_size(units, chosen), total_loss(units, chosen))
        for chosen in itertools.product(*(range(len(unit)) for unit in units))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_least_loss_and_the_least_size_are_those_of_brute_force(seed: int) -> None:
    generator = random.Random(seed)
    units = instance(generator, 6, step=generator.choice([1, 7, 64]))
    all_ways = brute(units)
    largest = max(size for size, _ in all_ways)
    for budget in {smallest_size(units), (smallest_size(units) + largest) // 2, largest}:
        chosen = least_loss(units, budget)
        assert chosen is not None
        assert total_size(units, chosen) <= budget
        best = min(loss for size, loss in all_ways if size <= budget)
        assert total_loss(units, chosen) == pytest.approx(best, rel=1e-9)
    assert least_loss(units, smallest_size(units) - 1) is None
    losses = sorted(loss for _, loss in all_ways)
    for limit in (losses[0], losses[len(losses) // 2], losses[-1]):
        chosen = least_size(units, limit + 1e-12)
        assert chosen is not None
        assert total_loss(units, chosen) <= limit + 1e-12
        assert total_size(units, chosen) == min(size for size, loss in all_ways if loss <= limit + 1e-12)
    assert least_size(units, losses[0] * 0.99) is None


def test_large_sizes_without_a_common_divisor_come_out_nearly_best() -> None:
    generator = random.Random(1)
    units = [
        [Option(option.size * 1_000_003 + generator.randrange(999), option.loss) for option in unit]
        for unit in instance(generator, 200, 1)
    ]
    budget = smallest_size(units) * 2
    chosen = least_loss(units, budget)
    assert chosen is not None
    assert total_size(units, chosen) <= budget
    # the Lagrangian bound: no choice within the budget loses less, whatever the multiplier
    price = [10.0 ** (-k / 8) for k in range(40, 120)]
    bound = max(sum(min(o.loss + p * o.size for o in unit) for unit in units) - p * budget for p in price)
    assert bound <= total_loss(units, chosen) <= bound * 1.02
    assert least_loss(units, budget) == chosen
