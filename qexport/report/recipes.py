"""What each measure was measured on and how: kept for programs, told in words, and held against another's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qexport.report.content import Report
from qexport.results import Evaluation
from qexport.verification.divergence import is_bound

_TEXT = ("data", "tokens", "window", "stride")
# measure -> the keys of its recipe without which two numbers are of different things; versions may differ
_DECIDING = {
    "perplexity": _TEXT,
    "kl": (*_TEXT, "kept_logits", "vocabulary"),
    "answers": ("data", "pairs", "decoding", "max_new_tokens", "chat_template", "one_line", "signatures"),
}
_VERSION = re.compile(r"\|?version:[^|]*")  # of sacrebleu, in its signatures


def recipes(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    """Of each measure the recipe of the first evaluation that has it: all of a run share it."""
    found: dict[str, dict[str, Any]] = {}
    for scores in evaluations:
        found.setdefault("perplexity", dict(scores.perplexity.recipe))
        if scores.divergence:
            found.setdefault("kl", dict(scores.divergence.recipe))
        if scores.tasks:
            found.setdefault("tasks", dict(scores.task_recipe))
        if runtime := scores.speed_recipe.get("runtime"):
            found.setdefault("tokens/s", {}).setdefault(str(runtime), _speed(scores.speed_recipe))
        if scores.answers:
            told = scores.answers.references or scores.answers.full
            signatures = {"signatures": dict(told.signatures)} if told else {}
            found.setdefault("answers", {**scores.answers.recipe, **signatures})
    return found


def _speed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What all of a runtime's speeds have in common: of the tokens how many."""
    common = {key: recipe.get(key) for key in ("device", "threads", "versions")}
    return {**common, **{key: len(recipe.get(key, ())) for key in ("prompt", "generated")}}


def recipe_lines(*evaluations: Evaluation) -> list[str]:
    """What the scores were measured on and how, one line a measure that some evaluation has."""
    found = recipes(evaluations)
    text = found["perplexity"]
    lines = [
        f"perplexity: {evaluations[0].perplexity.tokens} tokens of {text['documents']} documents, window "
        f"{text['window']}, stride {text['stride']}, {text['dtype']}, data blake3 {text['data'][:12]}"
    ]
    if kl := found.get("kl"):
        kept, of = kl.get("kept_logits"), kl.get("vocabulary")
        how = f"at least, from the {kept} likeliest of {of}" if is_bound(kl) else f"over all {of}"
        lines.append(f"KL: {how} tokens, on the same text")
    if told := found.get("answers"):
        signature = f"{bleu}, " if (bleu := told.get("signatures", {}).get("bleu")) else ""
        lines.append(
            f"answers: {told['pairs']} prompts, greedy, at most {told['max_new_tokens']} tokens, "
            f"{signature}data blake3 {told['data'][:12]}"
        )
    if told := found.get("tasks"):
        lines.append(f"tasks: {', '.join(_tasks(told))}; lm-evaluation-harness{_version(told, 'lm_eval')}")
    if runtimes := list(dict.fromkeys(name for scores in evaluations for name in scores.speeds)):
        told = found.get("tokens/s", {}).get(runtimes[0], {})
        threads = f" with {told['threads']} threads" if "threads" in told else ""
        how = f"one answer at a time, greedy, on this machine's CPU{threads}"
        lines.append(f"tokens/s: in {', '.join(runtimes)}, {how}")
    return lines


def _tasks(recipe: Mapping[str, Any]) -> Iterator[str]:
    for name, task in recipe.get("tasks", {}).items():
        count, shots = task.get("documents"), task.get("shots")
        told = [f"version {task.get('version')}"]
        told += [f"{shots} shots"] if shots is not None else []
        told += [f"{count} documents"] if count is not None else []
        yield f"{name} ({', '.join(told)})"


def _version(recipe: Mapping[str, Any], package: str) -> str:
    versions = recipe.get("versions")
    found = versions.get(package) if isinstance(versions, Mapping) else None
    return f" {found}" if found else ""


def difference(measure: str, first: Report, second: Report) -> tuple[str, Any, Any] | None:
    """The key of a measure's recipe in which two reports differ, and both values; None where they agree.

    `measure` is a key of `Report.recipes`; for tasks see `task_difference`.
    """
    a, b = (_decisive(report.recipes.get(measure, {})) for report in (first, second))
    return next(
        ((key, a.get(key), b.get(key)) for key in _DECIDING[measure] if a.get(key) != b.get(key)), None
    )


def _decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    signatures = recipe.get("signatures")
    if not isinstance(signatures, Mapping):
        return dict(recipe)
    plain = {name: _VERSION.sub("", str(signature)) for name, signature in signatures.items()}
    return {**recipe, "signatures": plain}


def task_difference(score: str, first: Report, second: Report) -> tuple[str, Any, Any] | None:
    """The same for a score of lm-evaluation-harness, 'task/metric'."""
    name = score.rpartition("/")[0]
    a, b = ({**_task(report, name), "limit": _tasks_of(report).get("limit")} for report in (first, second))
    return next(((key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)), None)


def _tasks_of(report: Report) -> dict[str, Any]:
    return report.recipes.get("tasks", {})


def _task(report: Report, name: str) -> dict[str, Any]:
    tasks = _tasks_of(report).get("tasks")
    task = tasks.get(name) if isinstance(tasks, dict) else None
    return task if isinstance(task, dict) else {}
