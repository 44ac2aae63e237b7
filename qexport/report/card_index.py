"""A card's model index: the numbers that were measured, as huggingface_hub's `repocard_data.py` has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qexport.report.content import Measure, Report, Row

# score -> the Hub's name of the metric, and ours
_TEXT_METRICS = {
    "bleu": ("bleu", "BLEU"),
    "chrf": ("chrf", "chrF"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "exact_match": ("exact_match", "Exact match"),
}
_DIGITS = 6  # of a number that was measured; what follows is noise
_NAMES_OF_DATA = ("dataset", "name", "text", "file", "path")
_NOT_OF_DATA = {*_NAMES_OF_DATA, "config", "split", "revision", "versions"}

Number = tuple[str, str, float, dict[str, float], Mapping[str, Any]]
"""The metric's id and name, the value, its error, and its recipe."""


def model_index(task: str | None, title: str, found: Iterable[Number]) -> list[dict[str, Any]] | None:
    """The numbers under `title`, one entry for each set of data; those that are not finite are left out."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    task = task or "text-generation"
    groups: dict[str, list[EvalResult]] = {}  # by data: custom ones of several names would become one
    for metric, name, value, error, recipe in found:
        if not math.isfinite(value):
            continue
        result = EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=_data_type(recipe),
            dataset_name=_data_name(recipe),
            dataset_config=_text_of(recipe, "config"),
            dataset_split=_text_of(recipe, "split"),
            dataset_revision=_text_of(recipe, "revision"),
            dataset_args=_settings(recipe),
            metric_type=metric,
            metric_name=name,
            metric_value=_rounded(value),
            metric_args={key: _rounded(bound) for key, bound in error.items()} or None,
        )
        groups.setdefault(repr((result.dataset_name, result.dataset_args)), []).append(result)
    indices = [eval_results_to_model_index(title, results)[0] for results in groups.values()]
    results = [one for index in indices for one in index["results"]]
    return [{"name": title, "results": results}] if results else None


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def numbers(
    figures: Mapping[str, Any], report: Report | None, own: Sequence[Row], output: str = ""
) -> Iterator[Number]:
    """What a report's rows `own` tell of an output, else the figures in its qexport.json.

    `output` is its name, told with each number where there are several outputs.
    """
    if report is None or not own:
        yield from _from_figures(figures, f", {output}" if output else "")
        return
    for row in own:
        of = f", {row.variant}" if output or len(own) > 1 else ""
        least = "at least, " if row.kl_at_least else ""
        text = _recipe(report, "perplexity")
        yield "perplexity", f"Perplexity{of}", row.perplexity.value, _error(row.perplexity), text
        if row.loss:
            name = f"Rise of perplexity over full precision{of}"
            yield "perplexity_increase", name, row.loss.value, _error(row.loss), text
        for metric, name, measure in (
            ("kl_divergence", f"KL divergence to full precision, {least}nats a token", row.kl),
            ("top1_agreement", "Same most likely token as full precision", row.same_top),
        ):
            if measure:
                yield metric, name + of, measure.value, _error(measure), _recipe(report, "kl")
        for field, (metric, name) in _TEXT_METRICS.items() if row.text else ():
            score = getattr(row.text, field)
            bounds = {"low": score.low, "high": score.high}
            yield metric, name + of, score.value, bounds, _recipe(report, "answers")
        for task, measure in row.tasks.items():
            yield task.rpartition("/")[2], f"{task}{of}", measure.value, _error(measure), {"dataset": task}


def _from_figures(figures: Mapping[str, Any], of: str) -> Iterator[Number]:
    for key, name in (("perplexity", "Perplexity"), ("bleu", "BLEU")):
        value, recipe = figures.get(key), figures.get(f"{key}_recipe")
        if isinstance(value, (int, float)) and isinstance(recipe, dict):
            error = figures.get(f"{key}_se")
            yield key, name + of, float(value), {"standard_error": error} if error else {}, recipe


def _recipe(report: Report, measure: str) -> Mapping[str, Any]:
    return report.recipes.get(measure, {})


def _error(measure: Measure) -> dict[str, float]:
    error = measure.standard_error
    return {} if error is None or not math.isfinite(error) else {"standard_error": error}


def _text_of(recipe: Mapping[str, Any], key: str) -> str | None:
    value = recipe.get(key)
    return value if isinstance(value, str) and value else None


def _data_name(recipe: Mapping[str, Any]) -> str:
    """What the data is called: a data set's name, or that of a file without its directories."""
    found = next(filter(None, (_text_of(recipe, key) for key in _NAMES_OF_DATA)), None)
    if found is None:
        return "held-out text" if "pairs" not in recipe else "held-out prompts and references"
    return found if _data_type(recipe) != "custom" else Path(found).name


def _data_type(recipe: Mapping[str, Any]) -> str:
    """The data set's id, or that it is somebody's own."""
    return _text_of(recipe, "dataset") or "custom"


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """What else the recipe tells: numbers, texts and switches."""
    plain = (str, int, float, bool)
    found = {
        key: value for key, value in recipe.items() if key not in _NOT_OF_DATA and isinstance(value, plain)
    }
    return found or None
