"""What became better or worse from one report to a later one, by more than noise: for a gate in CI."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qexport.errors import SpecError
from qexport.report.content import FULL, Interval, Measure, Report, Row, Z
from qexport.report.recipes import difference, task_difference

_SIZE_TOLERANCE = 0.01  # of the size: metadata alone may take some bytes more
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "brier", "loss", "ter", "wer", "mse", "mae")

Kind = Literal["worse", "better", "", "gone", "unknown"]


@dataclass(frozen=True)
class Change:
    """A measure of a variant in two reports.

    `worse` and `better` when the change is more than noise. `gone`: the variant (`measure` is "variant"), or
    this measure of it, is no more there to be judged, which counts as worse; None stands for what is not
    there. `unknown`: the noise is not known, and nothing is said.
    """

    variant: str
    measure: str
    before: float | None
    after: float | None
    kind: Kind

    @property
    def worse(self) -> bool:
        """Is this a regression?"""
        return self.kind in ("worse", "gone")

    @property
    def better(self) -> bool:
        """Has it become better?"""
        return self.kind == "better"


Part = Measure | Interval | None


@dataclass(frozen=True)
class _Measured:
    """A measure of a row; with a tolerance instead of noise, a share of the value before."""

    name: str
    of: Callable[[Row], Part]
    more_is_worse: bool
    tolerance: float | None = None


def _score(whose: str, score: str) -> Callable[[Row], Part]:
    def of(row: Row) -> Part:
        scores = getattr(row, whose)
        found: Interval | None = None if scores is None else getattr(scores, score)
        return found

    return of


_SCORES = {"BLEU": "bleu", "chrF": "chrf", "ROUGE-L": "rouge_l", "exact match": "exact_match"}
_OF_VARIANTS = (
    _Measured("loss", lambda row: row.loss, True),
    _Measured("KL", lambda row: row.kl, True),
    _Measured("same top token", lambda row: row.same_top, False),
    _Measured("size", lambda row: Measure(value=row.size_bytes), True, _SIZE_TOLERANCE),
    *(_Measured(f"{title} to full", _score("text_full", score), False) for title, score in _SCORES.items()),
)
_OF_ALL = tuple(_Measured(title, _score("text", score), False) for title, score in _SCORES.items())
_OF_FULL = (_Measured("perplexity", lambda row: row.perplexity, True),)


def changes(before: Report, after: Report) -> list[Change]:
    """What became of each variant of `before`, and of the full model.

    More than noise is more than 1.96 standard errors of the two, taken as independent: on the same data,
    that is on the safe side. Raises SpecError when they have no variant in common, or were measured
    otherwise: on other data, or with another recipe of a measure that both have.
    """
    _require_same_recipes(before, after)
    later = {row.variant: row for row in after.rows}
    if not any(row.variant in later for row in before.rows if not row.is_full):
        known = ", ".join(row.variant for row in before.rows if not row.is_full)
        raise SpecError("the two reports have no variant in common", expected=f"some of {known}")
    found: list[Change] = []
    for old in before.rows:
        new = later.get(old.variant)
        found += [Change(old.variant, "variant", None, None, "gone")] if new is None else _changes(old, new)
    return found


def _require_same_recipes(before: Report, after: Report) -> None:
    """Raises SpecError where two numbers would be of different things."""
    wrong: list[tuple[str, tuple[str, Any, Any]]] = [
        (measure, found)
        for measure in ("perplexity", "kl", "answers")
        if measure == "perplexity" or (measure in before.recipes and measure in after.recipes)
        if (found := difference(measure, before, after))
    ]
    scores = [
        dict.fromkeys(score for row in report.rows for score in row.tasks) for report in (before, after)
    ]
    for score in scores[0]:
        if score in scores[1] and (found := task_difference(score, before, after)):
            wrong.append((score, found))
    if wrong:
        measure, (key, old, new) = wrong[0]
        raise SpecError(
            f"the baseline was measured otherwise: {measure}, {key} {old}, now {new}",
            expected="a report on the same data with the same options",
        )


def _changes(old: Row, new: Row) -> Iterator[Change]:
    own: Sequence[_Measured] = _OF_FULL if old.variant == FULL else _OF_VARIANTS
    tasks = [_Measured(name, _task(name), _is_loss(name)) for name in old.tasks]
    for measured in (*own, *_OF_ALL, *tasks):
        a, b = measured.of(old), measured.of(new)
        if a is not None:
            kind: Kind = "gone" if b is None else _kind(measured, a, b)
            yield Change(old.variant, measured.name, a.value, b.value if b else None, kind)


def _task(name: str) -> Callable[[Row], Part]:
    return lambda row: row.tasks.get(name)


def _is_loss(score: str) -> bool:
    """Whether less of a score of lm-evaluation-harness is better: 'task/word_perplexity' and its like."""
    metric = score.rpartition("/")[2].partition(",")[0].lower()
    return any(part in _LOWER_IS_BETTER for part in (metric, *metric.split("_")))


def _kind(measured: _Measured, a: Measure | Interval, b: Measure | Interval) -> Kind:
    if a.value == b.value:  # both may be infinite
        return ""
    if measured.tolerance is not None:
        spread: float | None = measured.tolerance * abs(a.value)
    elif math.isinf(a.value) or math.isinf(b.value):
        spread = 0.0  # no noise makes a model's loss infinite
    else:
        spread = _spread(a, b)
    if spread is None:
        return "unknown"
    if abs(b.value - a.value) <= spread:
        return ""
    return "worse" if (b.value > a.value) == measured.more_is_worse else "better"


def _spread(a: Measure | Interval, b: Measure | Interval) -> float | None:
    """1.96 standard errors of the difference; None where they are not known.

    An interval without width is of a single prompt, or of prompts that are all alike: alone it is taken as
    exact, two of them tell nothing.
    """
    if isinstance(a, Interval) and isinstance(b, Interval):
        found = math.hypot(a.high - a.low, b.high - b.low) / 2
        return found or None
    errors = [one.standard_error for one in (a, b) if isinstance(one, Measure)]
    if any(error is None for error in errors):
        return None
    return Z * math.hypot(*(error for error in errors if error is not None))
