"""Sums by independent unit, and the standard errors that follow from them.

Tokens of one document are not independent, documents are. So a mean over tokens is a ratio of two sums over
units, whose linearised variance is that of Cochran, Sampling Techniques, section 6.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qexport.calibrate.windows import ScoredWindow

_FEW_DOCUMENTS = 10  # below it, windows are the units of the standard error


class Units:
    """Which unit each window belongs to: its document, or itself where documents are few."""

    def __init__(self, windows: Sequence[ScoredWindow]) -> None:
        documents = sorted({window.document for window in windows})
        places = {document: place for place, document in enumerate(documents)}
        few = len(documents) < _FEW_DOCUMENTS
        self._of = [n if few else places[window.document] for n, window in enumerate(windows)]
        self.tokens = tuple(map(int, self.sums([window.scored for window in windows])))

    def sums(self, values: Sequence[float]) -> tuple[float, ...]:
        """One value a window -> one a unit."""
        totals = [0.0] * (max(self._of) + 1)
        for unit, value in zip(self._of, values, strict=True):
            totals[unit] += value
        return tuple(totals)


def standard_error(sums: Sequence[float], counts: Sequence[float]) -> float:
    """Of the ratio sum(sums) / sum(counts); NaN for a single unit."""
    n, total = len(sums), sum(counts)
    if n < 2:
        return math.nan
    mean = sum(sums) / total
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(squares * n / (n - 1)) / total
