"""Perplexity from the sums of negative log-likelihoods, and how much it rose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qexport.errors import NonFiniteError
from qexport.results import Difference, Perplexity
from qexport.verification.units import standard_error


def summarize(sums: Sequence[float], counts: Sequence[int], recipe: Mapping[str, Any]) -> Perplexity:
    """exp of the token-weighted mean, from each unit's summed negative log-likelihood (nats) and tokens.

    Raises NonFiniteError when that is no number.
    """
    total = sum(counts)
    mean = sum(sums) / total
    if not math.isfinite(mean):
        raise NonFiniteError("the model's logits are NaN or infinite on the text")
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    return Perplexity(value, value * standard_error(sums, counts), total, tuple(sums), tuple(counts), recipe)


def log_difference(reference: Perplexity, candidate: Perplexity) -> Difference:
    """By how many nats a token the candidate is worse, paired by unit: both saw the same tokens."""
    if reference.unit_tokens != candidate.unit_tokens:
        raise ValueError("the two perplexities were measured on different text")
    gaps = [c - r for r, c in zip(reference.unit_nll, candidate.unit_nll, strict=True)]
    return Difference(sum(gaps) / reference.tokens, standard_error(gaps, reference.unit_tokens))


def relative_difference(reference: Perplexity, candidate: Perplexity) -> Difference:
    """The candidate's rise over the reference, a fraction, paired by unit."""
    logs = log_difference(reference, candidate)
    try:
        ratio = math.exp(logs.loss)
    except OverflowError:
        ratio = math.inf
    return Difference(ratio - 1, ratio * logs.standard_error)
