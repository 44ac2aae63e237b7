"""Which variants nothing beats: the Pareto front of cost against what was lost."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The indices on the front, cheapest first: lower is better in both.

    A point is on it when no other costs no more and loses no more, one of the two strictly less. Of equal
    points the first is kept.

    Raises ValueError where the two are not as many.
    """
    best, front = float("inf"), []
    pairs = zip(costs, losses, strict=True)
    for _, loss, index in sorted((cost, loss, index) for index, (cost, loss) in enumerate(pairs)):
        if loss < best:
            best = loss
            front.append(index)
    return front
