"""From scores to the rows of a report, and what sets them apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from qexport import results
from qexport.report.content import (
    Comparison,
    Interval,
    Layers,
    Measure,
    Report,
    Row,
    Sample,
    TextScores,
    Z,
)
from qexport.report.recipes import recipe_lines, recipes
from qexport.report.verdict import verdict
from qexport.results import Difference, Evaluation
from qexport.specs import VerifySpec
from qexport.verification.divergence import divergence_difference, is_bound
from qexport.verification.gate import failures
from qexport.verification.perplexity import log_difference, relative_difference
from qexport.version import __version__

_SAMPLES = 12
_MOST_BITS = 64
_MOST_COST = 1e15  # seconds or bytes


@dataclass(frozen=True)
class Variant:
    """A model that was measured: how it was made, what that took, and what it lost.

    `settings` has method, solver, format and bits; `costs` seconds and peak_bytes where they are known;
    `layer_errors` |W' - W| / |W| by name.
    """

    name: str
    path: str
    settings: Mapping[str, Any]
    scores: Evaluation
    costs: Mapping[str, Any] = field(default_factory=dict)
    layer_errors: Mapping[str, float] = field(default_factory=dict)


def make_report(
    title: str,
    full: Variant,
    variants: Sequence[Variant],
    prompts: Sequence[tuple[str, str | None]],
    gates: VerifySpec,
) -> Report:
    """The report of `variants` against `full`. `prompts` are those that were answered, with references."""
    rows = [_row(full, None, gates), *(_row(variant, full, gates) for variant in variants)]
    found = tuple(_comparisons(variants))
    scores = [variant.scores for variant in (full, *variants)]
    return Report(
        qexport=__version__,
        title=title,
        verdict=verdict(rows, found),
        rows=tuple(rows),
        comparisons=found,
        samples=_samples((full, *variants), prompts),
        layers=_layers(variants),
        recipes=recipes(scores),
        recipe_lines=tuple(recipe_lines(*scores)),
    )


def _row(variant: Variant, full: Variant | None, gates: VerifySpec) -> Row:
    scores = variant.scores
    loss = relative_difference(full.scores.perplexity, scores.perplexity) if full else None
    kl, answers = scores.divergence, scores.answers
    bits = variant.settings.get("bits") or 0
    return Row(
        variant=variant.name,
        path=variant.path,
        method=variant.settings.get("method") or "none",
        solver=variant.settings.get("solver"),
        format=variant.settings.get("format"),
        bits=bits if 0 < bits <= _MOST_BITS else round(scores.bits_per_weight),
        bits_per_weight=scores.bits_per_weight,
        size_bytes=scores.size_bytes,
        seconds=_cost(variant, "seconds"),
        peak_bytes=None if (peak := _cost(variant, "peak_bytes")) is None else round(peak),
        perplexity=_measure(scores.perplexity.value, scores.perplexity.standard_error),
        loss=_measure(loss.loss, loss.standard_error) if loss else None,
        kl=_measure(kl.mean, kl.standard_error) if kl else None,
        kl_p99=_endless(kl.percentile_99) if kl else None,
        kl_at_least=kl is not None and is_bound(kl.recipe),
        same_top=_measure(kl.same_top, kl.same_top_error) if kl else None,
        text=_text(answers.references) if answers else None,
        text_full=_text(answers.full) if answers else None,
        tokens_per_second=dict(scores.speeds),
        tasks={name: _measure(task.value, task.standard_error) for name, task in scores.tasks.items()},
        failures=tuple(failures(scores, loss.loss, gates)) if loss else (),
    )


def _cost(variant: Variant, name: str) -> float | None:
    """What a manifest tells of making the variant, where that is possible."""
    cost = variant.costs.get(name)
    return cost if isinstance(cost, (int, float)) and 0 <= cost <= _MOST_COST else None


def _measure(value: float, error: float) -> Measure:
    return Measure(value=_endless(value), standard_error=None if math.isnan(error) else error)


def _endless(value: float) -> float:
    """What is no number, such as a ratio of two infinite perplexities, is no good one."""
    return math.inf if math.isnan(value) else value


def _text(scores: results.TextScores | None) -> TextScores | None:
    if scores is None:
        return None
    found = {name: getattr(scores, name) for name in ("bleu", "chrf", "rouge_l", "exact_match")}
    return TextScores(**{name: Interval(**asdict(interval)) for name, interval in found.items()})


def _comparisons(variants: Sequence[Variant]) -> Iterator[Comparison]:
    """Each pair of variants, by perplexity and by divergence."""
    for first, second in combinations(variants, 2):
        a, b = first.scores, second.scores
        yield from _compared(first, second, "log perplexity", log_difference(a.perplexity, b.perplexity))
        if a.divergence and b.divergence:
            yield from _compared(first, second, "kl", divergence_difference(a.divergence, b.divergence))


def _compared(first: Variant, second: Variant, measure: str, found: Difference) -> Iterator[Comparison]:
    if math.isnan(found.loss):  # of two that are infinite
        return
    known = not math.isnan(found.standard_error)
    yield Comparison(
        first=first.name,
        second=second.name,
        measure=measure,
        difference=found.loss,
        standard_error=found.standard_error if known else None,
        more_than_noise=known and abs(found.loss) > Z * found.standard_error,
    )


def _samples(variants: Sequence[Variant], prompts: Sequence[tuple[str, str | None]]) -> tuple[Sample, ...]:
    answered = [variant for variant in variants if variant.scores.answers]
    return tuple(
        Sample(
            prompt=prompt,
            reference=reference,
            answers={
                variant.name: variant.scores.answers.texts[number]
                for variant in answered
                if variant.scores.answers
            },
        )
        for number, (prompt, reference) in enumerate(prompts[:_SAMPLES])
        if answered
    )


def _layers(variants: Sequence[Variant]) -> Layers:
    names = tuple(dict.fromkeys(name for variant in variants for name in variant.layer_errors))
    return Layers(
        names=names,
        errors={
            variant.name: tuple(variant.layer_errors.get(name) for name in names)
            for variant in variants
            if variant.layer_errors
        },
    )
