"""Answers beside the full model's: equal ones together, and what differs marked word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from qexport.report.content import Sample

_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
_LONG = 4000  # tokens from which difflib may treat frequent ones as noise: it is quadratic otherwise

_OTHER = 0.3  # with a smaller share of words in common, an answer is another one

Kind = Literal["same", "removed", "added"]
_KINDS: tuple[Kind, ...] = ("same", "removed", "added")


@dataclass(frozen=True)
class Answer:
    """One text and all variants that gave it, as pieces of (kind, text) against the full model's."""

    variants: tuple[str, ...]
    pieces: tuple[tuple[Kind, str], ...]
    same: bool
    changed_words: int
    other: bool  # hardly a word in common: what is missing is not shown


@dataclass(frozen=True)
class SampleView:
    """A prompt with the full model's answer (None where there is none) and those of the variants."""

    prompt: str
    reference: str | None
    full: str | None
    answers: tuple[Answer, ...]
    variants: int
    same: int


def word_differences(old: str, new: str) -> list[tuple[Kind, str]]:
    """`old` and `new` as pieces: the same ones and the added ones make up `new`, without the added `old`.

    Changes with nothing but spaces between them become one.
    """
    first, second = _TOKEN.findall(old), _TOKEN.findall(new)
    matcher = SequenceMatcher(None, first, second, autojunk=max(len(first), len(second)) > _LONG)
    runs: list[list[str]] = []  # [removed, added], or [same] between two of them
    for tag, start, end, at, to in matcher.get_opcodes():
        removed, added = "".join(first[start:end]), "".join(second[at:to])
        if tag == "equal":
            runs.append([added])
        elif len(runs) > 1 and not runs[-1][0].strip():
            (space,) = runs.pop()
            runs[-1][0] += space + removed
            runs[-1][1] += space + added
        else:
            runs.append([removed, added])
    pieces: list[tuple[Kind, str]] = []
    for run in runs:
        kinds: tuple[Kind, ...] = ("same",) if len(run) == 1 else ("removed", "added")
        pieces += [(kind, text) for kind, text in zip(kinds, run, strict=True) if text]
    return pieces


def sample_view(sample: Sample, full: str | None, variants: Sequence[str]) -> SampleView:
    """A sample as the page shows it: answers of `variants` in their order, equal ones as one.

    `full` names the full-precision model; without it, or without its answer, nothing is marked.
    """
    reference_answer = sample.answers.get(full) if full is not None else None
    by_text: dict[str, list[str]] = {}
    for variant in variants:
        if variant != full and variant in sample.answers:
            by_text.setdefault(sample.answers[variant], []).append(variant)
    answers = []
    for text, names in by_text.items():
        pieces: list[tuple[Kind, str]] = [("same", text)]
        if reference_answer is not None:
            pieces = word_differences(reference_answer, text)
        words = {kind: sum(_words(piece) for one, piece in pieces if one == kind) for kind in _KINDS}
        changed = max(words["removed"], words["added"])
        other = changed > 0 and words["same"] < _OTHER * (words["same"] + changed)
        if other:
            pieces = [("added", text)] if text else []
        answers.append(Answer(tuple(names), tuple(pieces), text == reference_answer, changed, other))
    answers.sort(key=lambda answer: not answer.same)
    same = sum(len(answer.variants) for answer in answers if answer.same)
    told = sum(len(answer.variants) for answer in answers)
    return SampleView(sample.prompt, sample.reference, reference_answer, tuple(answers), told, same)


def _words(text: str) -> int:
    return len(re.findall(r"\w+", text))
