"""From scores to the rows of a report, and what sets them apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from qexport import results
from qexport.report.content import Comparison, Interval, Layers, Measure, Report, Row, Sample, TextScores
from qexport.report.verdict import verdict
from qexport.results import Difference, Evaluation
from qexport.specs import VerifySpec
from qexport.verification.divergence import divergence_difference
from qexport.verification.gate import failures
from qexport.verification.perplexity import log_difference, relative_difference
from qexport.version import __version__

FULL = "full"
_SURE = 1.96  # standard errors of a normal distribution that 95 % lie within
_SAMPLES = 12


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
    return Report(
        qexport=__version__,
        title=title,
        verdict=verdict(rows, found),
        rows=tuple(rows),
        comparisons=found,
        samples=_samples((full, *variants), prompts),
        layers=_layers(variants),
        recipes=_recipes((full, *variants)),
        recipe_lines=tuple(recipe_lines(full.scores)),
    )


def _row(variant: Variant, full: Variant | None, gates: VerifySpec) -> Row:
    scores = variant.scores
    loss = relative_difference(full.scores.perplexity, scores.perplexity) if full else None
    kl, answers = scores.divergence, scores.answers
    return Row(
        variant=variant.name,
        path=variant.path,
        method=variant.settings.get("method") or "none",
        solver=variant.settings.get("solver"),
        format=variant.settings.get("format"),
        bits=variant.settings.get("bits") or round(scores.bits_per_weight),
        bits_per_weight=scores.bits_per_weight,
        size_bytes=scores.size_bytes,
        seconds=variant.costs.get("seconds"),
        peak_bytes=variant.costs.get("peak_bytes"),
        perplexity=_measure(scores.perplexity.value, scores.perplexity.standard_error),
        loss=_measure(loss.loss, loss.standard_error) if loss else None,
        kl=_measure(kl.mean, kl.standard_error) if kl else None,
        kl_p99=kl.percentile_99 if kl else None,
        same_top=_measure(kl.same_top, kl.same_top_error) if kl else None,
        text=_text(answers.references) if answers else None,
        text_full=_text(answers.full) if answers else None,
        tokens_per_second=dict(scores.speeds),
        tasks={name: _measure(task.value, task.standard_error) for name, task in scores.tasks.items()},
        failures=tuple(failures(scores, loss.loss, gates)) if loss else (),
    )


def _measure(value: float, error: float) -> Measure:
    return Measure(value=value, standard_error=None if math.isnan(error) else error)


def _text(scores: results.TextScores | None) -> TextScores | None:
    if scores is None:
        return None
    found = {name: getattr(scores, name) for name in ("bleu", "chrf", "rouge_l", "exact_match")}
    return TextScores(**{name: Interval(**asdict(interval)) for name, interval in found.items()})


def _comparisons(variants: Sequence[Variant]) -> Iterator[Comparison]:
    """Each pair of variants, by perplexity and by divergence."""
    for first, second in combinations(variants, 2):
        a, b = first.scores, second.scores
        yield _compared(first, second, "log perplexity", log_difference(a.perplexity, b.perplexity))
        if a.divergence and b.divergence:
            yield _compared(first, second, "kl", divergence_difference(a.divergence, b.divergence))


def _compared(first: Variant, second: Variant, measure: str, found: Difference) -> Comparison:
    known = not math.isnan(found.standard_error)
    return Comparison(
        first=first.name,
        second=second.name,
        measure=measure,
        difference=found.loss,
        standard_error=found.standard_error if known else None,
        more_than_noise=known and abs(found.loss) > _SURE * found.standard_error,
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


def _recipes(variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """Of each measure the recipe of the first variant that has it: all share it."""
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        scores = variant.scores
        found.setdefault("perplexity", dict(scores.perplexity.recipe))
        if scores.divergence:
            found.setdefault("kl", dict(scores.divergence.recipe))
        if scores.tasks:
            found.setdefault("tasks", dict(scores.task_recipe))
        if scores.answers:
            told = scores.answers.references or scores.answers.full
            signatures = {"signatures": dict(told.signatures)} if told else {}
            found.setdefault("answers", {**scores.answers.recipe, **signatures})
    return found


def recipe_lines(scores: Evaluation) -> list[str]:
    """What the scores were measured on and how, one line each."""
    text = scores.perplexity.recipe
    lines = [
        f"perplexity: {scores.perplexity.tokens} tokens of {text['documents']} documents, window "
        f"{text['window']}, stride {text['stride']}, {text['dtype']}, data blake3 {text['data'][:12]}"
    ]
    if scores.answers:
        told, found = scores.answers.recipe, scores.answers.references
        signature = f"{found.signatures['bleu']}, " if found else ""
        lines.append(
            f"answers: {told['pairs']} prompts, greedy, at most {told['max_new_tokens']} tokens, "
            f"{signature}data blake3 {told['data'][:12]}"
        )
    return lines
