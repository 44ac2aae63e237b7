"""Several reports, merged into one. See `changes` for the later held against the earlier."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from qexport.errors import SpecError
from qexport.report.changes import Change, changes
from qexport.report.content import FULL, Layers, Report, Row, Sample
from qexport.report.recipes import difference, task_difference
from qexport.report.verdict import verdict

__all__ = ["Change", "changes", "merged", "moved"]

# measure -> its name in words, and what of a row it is
_MEASURES: dict[str, tuple[str, dict[str, object]]] = {
    "kl": ("KL", {"kl": None, "kl_p99": None, "kl_at_least": False, "same_top": None}),
    "answers": ("answers", {"text": None, "text_full": None}),
}


def moved(report: Report, old: Path, new: Path) -> Report:
    """The report of directory `old` for directory `new`: what its rows point to stays the same."""
    home = os.path.abspath(new)  # noqa: PTH100 - lexical: the files need not be here
    if os.path.abspath(old) == home:  # noqa: PTH100
        return report

    def place(row: Row) -> Row:
        there = os.path.abspath(old / row.path)  # noqa: PTH100
        outside = Path(row.path).is_absolute() and not Path(there).is_relative_to(home)
        path = there if outside else os.path.relpath(there, home)
        return row.model_copy(update={"path": Path(path).as_posix()})

    return report.model_copy(update={"rows": tuple(map(place, report.rows))})


def merged(reports: Sequence[tuple[str, Report]], title: str | None = None) -> Report:
    """One report of the rows of all; a name that two runs have gets the run's beside it.

    A measure that a run made otherwise than the first run that has it is left out of that run's rows; a line
    among the recipes says so. Raises SpecError where the runs were not measured on the same text, or have
    other full-precision models.
    """
    (first_name, first), *others = reports
    for name, report in others:
        if found := difference("perplexity", first, report):
            key, ours, theirs = found
            raise SpecError(
                f"{first_name} and {name} were measured otherwise: {key} {ours} and {theirs}",
                expected="runs on the same text with the same window and stride",
            )
        a, b = first.rows[0].perplexity.value, report.rows[0].perplexity.value
        if not math.isclose(a, b, rel_tol=1e-6):
            raise SpecError(
                f"{first_name} and {name} have other full-precision models: perplexity {a:.6g} and {b:.6g}",
                expected="runs of the same model",
            )
    reports, left_out = _comparable(reports)
    first = reports[0][1]
    names = _names(reports)
    rows = [_full_row(reports)]
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
        recipe_lines=(*_recipe_lines(reports), *left_out),
    )


Reports = Sequence[tuple[str, Report]]


def _comparable(reports: Reports) -> tuple[Reports, list[str]]:
    """The reports without what cannot stand beside the earlier ones' numbers, and lines that say so."""
    kept: list[tuple[str, Report]] = []
    told = []
    for run, report in reports:
        for measure, (name, nothing) in _MEASURES.items():
            earlier = next((one for _, one in kept if measure in one.recipes), None)
            if earlier is None or measure not in report.recipes:
                continue
            if found := difference(measure, earlier, report):
                key, ours, theirs = found
                told.append(f"{name} of {run} left out: measured otherwise, {key} {theirs} and not {ours}")
                report = _without(report, measure, nothing)
        report, lines = _with_same_tasks(run, report, [one for _, one in kept])
        told += lines
        kept.append((run, report))
    return kept, told


def _without(report: Report, measure: str, nothing: dict[str, object]) -> Report:
    return report.model_copy(
        update={
            "rows": tuple(row.model_copy(update=nothing) for row in report.rows),
            "comparisons": tuple(pair for pair in report.comparisons if pair.measure != measure),
            "samples": () if measure == "answers" else report.samples,
            "recipes": {key: recipe for key, recipe in report.recipes.items() if key != measure},
        }
    )


def _with_same_tasks(run: str, report: Report, earlier: Sequence[Report]) -> tuple[Report, list[str]]:
    wrong: dict[str, str] = {}
    for score in dict.fromkeys(score for row in report.rows for score in row.tasks):
        having = next((one for one in earlier if any(score in row.tasks for row in one.rows)), None)
        if having and (found := task_difference(score, having, report)):
            key, ours, theirs = found
            wrong[score] = f"{score} of {run} left out: measured otherwise, {key} {theirs} and not {ours}"
    rows = tuple(
        row.model_copy(update={"tasks": {k: v for k, v in row.tasks.items() if k not in wrong}})
        for row in report.rows
    )
    return report.model_copy(update={"rows": rows}) if wrong else report, list(wrong.values())


def _full_row(reports: Reports) -> Row:
    """The first run's full-precision model, with what only later runs measured of it."""
    full = reports[0][1].rows[0]
    for _, report in reports[1:]:
        other = report.rows[0]
        full = full.model_copy(
            update={
                "text": full.text or other.text,
                "tasks": {**other.tasks, **full.tasks},
                "tokens_per_second": {**other.tokens_per_second, **full.tokens_per_second},
            }
        )
    return full


def _recipe_lines(reports: Reports) -> tuple[str, ...]:
    """The lines of the first run, and of the others those of measures that no earlier one has."""
    lines: list[str] = []
    for number, (_, report) in enumerate(reports):
        for line in report.recipe_lines:
            measure = line.partition(":")[0]
            if number == 0 or not any(known.partition(":")[0] == measure for known in lines):
                lines.append(line)
    return tuple(lines)


def _names(reports: Reports) -> dict[tuple[str, str], str]:
    """(run, variant) -> its name in the merged report; the full-precision model is one."""
    found: dict[tuple[str, str], str] = {}
    counts: dict[str, int] = {}
    for _, report in reports:
        for row in report.rows[1:]:
            counts[row.variant] = counts.get(row.variant, 0) + 1
    taken = {FULL, *(name for name, count in counts.items() if count == 1)}
    for run, report in reports:
        for row in report.rows:
            name = row.variant
            if counts.get(name, 1) > 1:
                name = stem = f"{row.variant} ({run})"
                number = 1
                while name in taken:
                    number += 1
                    name = f"{stem}-{number}"
                taken.add(name)
            found[run, row.variant] = name
    return found


def _samples(reports: Reports, names: dict[tuple[str, str], str]) -> tuple[Sample, ...]:
    found: dict[tuple[str, str | None], Sample] = {}
    for run, report in reports:
        for sample in report.samples:
            answers = {names[run, variant]: text for variant, text in sample.answers.items()}
            key = sample.prompt, sample.reference
            earlier = found.get(key)
            known = earlier.answers if earlier else {}
            found[key] = sample.model_copy(update={"answers": {**answers, **known}})
    return tuple(found.values())


def _layers(reports: Reports, names: dict[tuple[str, str], str]) -> Layers:
    layers = tuple(dict.fromkeys(name for _, report in reports for name in report.layers.names))
    errors: dict[str, tuple[float | None, ...]] = {}
    for run, report in reports:
        for variant, values in report.layers.errors.items():
            known = dict(zip(report.layers.names, values, strict=True))
            errors[names[run, variant]] = tuple(known.get(name) for name in layers)
    return Layers(names=layers, errors=errors)
