"""Several reports: merged into one, or the later held against the earlier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qexport.errors import SpecError
from qexport.report.content import Layers, Measure, Report, Row, Sample
from qexport.report.rows import FULL
from qexport.report.verdict import verdict

_SURE = 1.96
_MEASURED_ON = ("data", "tokens", "window", "stride")


def merged(reports: Sequence[tuple[str, Report]], title: str | None = None) -> Report:
    """One report of the rows of all; a name that two runs have gets the run's beside it.

    Raises SpecError where they were not measured on the same text, or have other full-precision models.
    """
    (first_name, first), *others = reports
    for name, report in others:
        ours, theirs = ({key: _recipe(r).get(key) for key in _MEASURED_ON} for r in (first, report))
        if ours != theirs:
            other = next(key for key in _MEASURED_ON if ours[key] != theirs[key])
            raise SpecError(
                f"{first_name} and {name} were measured otherwise: {other} {ours[other]} and {theirs[other]}",
                expected="runs on the same text with the same window and stride",
            )
        a, b = first.rows[0].perplexity.value, report.rows[0].perplexity.value
        if not math.isclose(a, b, rel_tol=1e-6):
            raise SpecError(
                f"{first_name} and {name} have other full-precision models: perplexity {a:.6g} and {b:.6g}",
                expected="runs of the same model",
            )
    names = _names(reports)
    rows = [first.rows[0]]
    for run, report in reports:
        rows += [row.model_copy(update={"variant": names[run, row.variant]}) for row in report.rows[1:]]
    comparisons = tuple(
        found.model_copy(update={"first": names[run, found.first], "second": names[run, found.second]})
        for run, report in reports
        for found in report.comparisons
    )
    return Report(
        qexport=first.qexport,
        title=title or first.title,
        verdict=verdict(rows, comparisons),
        rows=tuple(rows),
        comparisons=comparisons,
        samples=_samples(reports, names),
        layers=_layers(reports, names),
        recipes={key: recipe for _, report in reversed(reports) for key, recipe in report.recipes.items()},
        recipe_lines=first.recipe_lines,
    )


def _recipe(report: Report) -> dict[str, object]:
    return report.recipes.get("perplexity", {})


def _names(reports: Sequence[tuple[str, Report]]) -> dict[tuple[str, str], str]:
    """(run, variant) -> its name in the merged report."""
    seen: dict[str, int] = {}
    for _, report in reports:
        for row in report.rows[1:]:
            seen[row.variant] = seen.get(row.variant, 0) + 1
    return {
        (run, row.variant): row.variant if seen.get(row.variant, 1) == 1 else f"{row.variant} ({run})"
        for run, report in reports
        for row in report.rows
    }


def _samples(reports: Sequence[tuple[str, Report]], names: dict[tuple[str, str], str]) -> tuple[Sample, ...]:
    found: dict[str, Sample] = {}
    for run, report in reports:
        for sample in report.samples:
            answers = {names[run, variant]: text for variant, text in sample.answers.items()}
            earlier = found.get(sample.prompt)
            found[sample.prompt] = sample.model_copy(
                update={"answers": {**(earlier.answers if earlier else {}), **answers}}
            )
    return tuple(found.values())


def _layers(reports: Sequence[tuple[str, Report]], names: dict[tuple[str, str], str]) -> Layers:
    layers = tuple(dict.fromkeys(name for _, report in reports for name in report.layers.names))
    errors: dict[str, tuple[float | None, ...]] = {}
    for run, report in reports:
        for variant, values in report.layers.errors.items():
            known = dict(zip(report.layers.names, values, strict=True))
            errors[names[run, variant]] = tuple(known.get(name) for name in layers)
    return Layers(names=layers, errors=errors)


@dataclass(frozen=True)
class Change:
    """A measure of a variant in two reports; `worse` and `better` when that is more than noise."""

    variant: str
    measure: str
    before: float
    after: float
    worse: bool
    better: bool


# measure -> (its value in a row, whether more of it is worse)
_MEASURES: dict[str, tuple[Callable[[Row], Measure | None], bool]] = {
    "loss": (lambda row: row.loss, True),
    "KL": (lambda row: row.kl, True),
    "same top token": (lambda row: row.same_top, False),
    "size": (lambda row: Measure(value=row.size_bytes, standard_error=0), True),
}


def changes(before: Report, after: Report) -> list[Change]:
    """What became of each variant that both have, and of the full model's perplexity.

    More than noise is more than 1.96 standard errors of the two, taken as independent: on the same text,
    that is on the safe side. Raises SpecError when they have no variant in common.
    """
    earlier = {row.variant: row for row in before.rows}
    common = [row for row in after.rows if row.variant in earlier]
    if not any(row.variant != FULL for row in common):
        raise SpecError(
            "the two reports have no variant in common",
            expected=f"some of {', '.join(name for name in earlier if name != FULL)}",
        )
    found = []
    for row in common:
        old = earlier[row.variant]
        if row.variant == FULL:
            found.append(
                _change(row.variant, "perplexity", old.perplexity, row.perplexity, more_is_worse=True)
            )
            continue
        for name, (value, more_is_worse) in _MEASURES.items():
            a, b = value(old), value(row)
            if a is not None and b is not None:
                found.append(_change(row.variant, name, a, b, more_is_worse=more_is_worse))
    return found


def _change(variant: str, measure: str, a: Measure, b: Measure, *, more_is_worse: bool) -> Change:
    spread = _SURE * math.hypot(a.standard_error or 0, b.standard_error or 0)
    more, less = b.value - a.value > spread, a.value - b.value > spread
    worse, better = (more, less) if more_is_worse else (less, more)
    return Change(variant, measure, a.value, b.value, worse, better)
