"""How far a candidate's predictions are from the full-precision model's, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from qexport.results import Difference, Divergence
from qexport.verification.units import Units, standard_error

_VALUES_AT_ONCE = 1 << 22  # of logits, in fp32
_MOST = 1_000_000  # tokens that a percentile is taken of


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of tokens whose logits are a few megabytes."""
    step = max(1, _VALUES_AT_ONCE // vocabulary)
    for begin in range(0, tokens, step):
        yield slice(begin, min(begin + step, tokens))


def token_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference || candidate) of each token, nats, fp64 [n]; both are log-probabilities fp32 [n, values].

    What is missing to a probability of 1, where values are but the likeliest ones, counts as one more value:
    a lower bound of the divergence then.
    """
    p = reference.exp()
    total = (p * (reference - candidate)).sum(dim=-1, dtype=torch.float64)
    rest = (1 - p.sum(dim=-1, dtype=torch.float64)).clamp(min=0)
    other = (1 - candidate.exp().sum(dim=-1, dtype=torch.float64)).clamp(min=_TINY)
    matters = rest > _ROUNDING
    return total + torch.where(matters, rest * (rest.clamp(min=_TINY) / other).log(), 0.0)


_ROUNDING = 1e-5  # what sums of fp32 probabilities are off by
_TINY = 1e-30


class DivergenceSums:
    """Collects windows' divergences."""

    def __init__(self, windows: int) -> None:
        self._sums = [0.0] * windows
        self._same = [0] * windows
        self._values: list[torch.Tensor] = []

    def add(self, window: int, values: torch.Tensor, same: torch.Tensor) -> None:
        """Divergences fp64 [n] of tokens of a window, and whether the likeliest token is the same, bool."""
        self._sums[window] += float(values.sum())
        self._same[window] += int(same.sum())
        self._values.append(values.float())

    def summarize(self, units: Units, recipe: Mapping[str, Any]) -> Divergence:
        """Means over the tokens, with their standard errors by unit."""
        tokens = units.tokens
        sums, same = units.sums(self._sums), units.sums(self._same)
        total = sum(tokens)
        return Divergence(
            mean=sum(sums) / total,
            standard_error=standard_error(sums, tokens),
            percentile_99=_percentile(self._values),
            same_top=sum(same) / total,
            same_top_error=standard_error(same, tokens),
            tokens=total,
            unit_sums=sums,
            unit_tokens=tokens,
            recipe=recipe,
        )


def _percentile(parts: Sequence[torch.Tensor]) -> float:
    """The 99th percentile; of very many values, of every n-th."""
    values = torch.cat(list(parts))
    values = values[:: max(1, len(values) // _MOST)]
    return float(torch.quantile(values.double(), 0.99))


def divergence_difference(first: Divergence, second: Divergence) -> Difference:
    """By how many nats a token the second is further from full precision, paired by unit."""
    if first.unit_tokens != second.unit_tokens:
        raise ValueError("the two divergences were measured on different text")
    gaps = [b - a for a, b in zip(first.unit_sums, second.unit_sums, strict=True)]
    return Difference(sum(gaps) / first.tokens, standard_error(gaps, first.unit_tokens))


def is_bound(kl: Mapping[str, Any]) -> bool:
    """Whether the divergence of this recipe is a lower bound: not all values of a token were kept."""
    kept, of = kl.get("kept_logits"), kl.get("vocabulary")
    return isinstance(kept, int) and isinstance(of, int) and kept < of
