"""The allotment itself: one option for every unit, so that the losses' sum is least and the sizes' sum fits.

The multiple-choice knapsack problem, by dynamic programming over the budget (Kellerer, Pferschy & Pisinger,
"Knapsack Problems", 2004, section 11.5): exact where the sizes' common divisor leaves few enough steps, as it
does for small models; else sizes are rounded up to steps, and what that leaves free is given away after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STEPS = 20_000  # of the table; 400 units of 12 options then take about a second


@dataclass(frozen=True)
class Option:
    """What a choice costs: bytes, and nats a token."""

    size: int
    loss: float


Units = Sequence[Sequence[Option]]


def least_loss(units: Units, budget: int) -> list[int] | None:
    """The number of each unit's option, of least loss in all within `budget` bytes; None where even the
    smallest ones are too large. Deterministic; of equals the smaller is taken."""
    slack = budget - smallest_size(units)
    if slack < 0:
        return None
    table = _Table(units, min(slack, _most(units)))
    return _given_away(units, table.traced(table.last), budget)


def least_size(units: Units, loss: float) -> list[int] | None:
    """The number of each unit's option, of least size with at most `loss` in all; None where even the best
    ones lose more."""
    if sum(min(option.loss for option in unit) for unit in units) > loss:
        return None
    table = _Table(units, _most(units))
    for state in np.nonzero(table.best <= loss)[0]:
        chosen = table.traced(int(state))
        if total_loss(units, chosen) <= loss:
            return _taken_back(units, chosen, loss)
    # rounded sums: the best options themselves do
    best = [min(range(len(unit)), key=lambda n: (unit[n].loss, unit[n].size)) for unit in units]
    return _taken_back(units, best, loss)


def smallest_size(units: Units) -> int:
    """Bytes of the smallest options together."""
    return sum(min(option.size for option in unit) for unit in units)


def total_size(units: Units, chosen: Sequence[int]) -> int:
    """Bytes of a choice."""
    return sum(unit[number].size for unit, number in zip(units, chosen, strict=True))


def total_loss(units: Units, chosen: Sequence[int]) -> float:
    """Nats a token of a choice."""
    return math.fsum(unit[number].loss for unit, number in zip(units, chosen, strict=True))


def _most(units: Units) -> int:
    """Bytes that the largest options take beyond the smallest."""
    return sum(max(option.size for option in unit) for unit in units) - smallest_size(units)


class _Table:
    """`best` [steps + 1]: the least loss when so many steps of bytes are spent beyond the smallest."""

    def __init__(self, units: Units, slack: int) -> None:
        least = [min(option.size for option in unit) for unit in units]
        extras = [option.size - low for unit, low in zip(units, least, strict=True) for option in unit]
        self._step = max(math.gcd(*extras), -(-slack // _STEPS), 1)
        self.last = slack // self._step
        self._units, self._least = units, least
        self.best = np.zeros(self.last + 1)
        self._taken: list[np.ndarray[tuple[int], np.dtype[np.int16]]] = []
        for unit, low in zip(units, least, strict=True):
            found = np.full(self.last + 1, np.inf)
            taken = np.zeros(self.last + 1, dtype=np.int16)
            # the smaller first, so that of equals it stays
            for number in sorted(range(len(unit)), key=lambda n: unit[n].size):
                steps = self._steps(unit[number].size - low)
                if steps > self.last:
                    continue
                loss = self.best[: self.last + 1 - steps] + unit[number].loss
                better = loss < found[steps:]
                found[steps:][better] = loss[better]
                taken[steps:][better] = number
            self.best = found
            self._taken.append(taken)

    def _steps(self, extra: int) -> int:
        return -(-extra // self._step)

    def traced(self, state: int) -> list[int]:
        """The options that the entry of `best` stands for."""
        chosen = []
        rows = list(zip(self._units, self._least, self._taken, strict=True))
        for unit, low, taken in reversed(rows):
            number = int(taken[state])
            chosen.append(number)
            state -= self._steps(unit[number].size - low)
        return chosen[::-1]


def _given_away(units: Units, chosen: list[int], budget: int) -> list[int]:
    """Better options for what is left of the budget, the largest gain a byte first."""
    chosen = list(chosen)
    free = budget - total_size(units, chosen)
    while True:
        gains = [
            ((now.loss - option.loss) / max(option.size - now.size, 1), -unit_number, -number)
            for unit_number, unit in enumerate(units)
            for number, option in enumerate(unit)
            if (now := unit[chosen[unit_number]]).loss > option.loss and option.size - now.size <= free
        ]
        if not gains:
            return chosen
        _, unit_number, number = max(gains)
        free -= units[-unit_number][-number].size - units[-unit_number][chosen[-unit_number]].size
        chosen[-unit_number] = -number


def _taken_back(units: Units, chosen: list[int], loss: float) -> list[int]:
    """Smaller options for what is left of the loss, the most bytes a nat first."""
    chosen = list(chosen)
    while True:
        free = loss - total_loss(units, chosen)
        gains = [
            ((now.size - option.size) / max(option.loss - now.loss, 1e-300), -unit_number, -number)
            for unit_number, unit in enumerate(units)
            for number, option in enumerate(unit)
            if (now := unit[chosen[unit_number]]).size > option.size and option.loss - now.loss <= free
        ]
        if not gains:
            return chosen
        _, unit_number, number = max(gains)
        chosen[-unit_number] = -number
