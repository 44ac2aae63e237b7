"""The text files and the endless training documents, with the held-out sentences kept apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

from .grammar import Composer, render
from .trees import Rendering

Language = Literal["en", "de"]

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT)
INTO_GERMAN = "Translate into German: "
INTO_ENGLISH = "Translate into English: "
PAIRS_PER_DIRECTION = 100
CALIBRATION_DOCUMENTS = 520
HELDOUT_DOCUMENTS = 190

# Shorter sentences ("It snowed.") are common to all texts, so they never count as held out.
_HELDOUT_WORDS = 5


@dataclass(frozen=True)
class Pair:
    """A prompt and the answer that is expected."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class Texts:
    """All the texts that ship, and the sentences that training must not see."""

    pairs: tuple[Pair, ...]
    heldout: tuple[str, ...]
    calibration: tuple[str, ...]
    heldout_sentences: frozenset[str]


def dialogue(turns: list[Pair]) -> str:
    """The string that the chat template renders, without the leading bos."""
    return "".join(f"{USER}{turn.prompt}{ASSISTANT}{turn.reference}{EOS}" for turn in turns)


def translation(rendering: Rendering, into: Language) -> Pair:
    """A translation task."""
    if into == "de":
        return Pair(INTO_GERMAN + rendering.en, rendering.de)
    return Pair(INTO_ENGLISH + rendering.de, rendering.en)


class Writer:
    """Writes documents; ``allowed`` filters sentence by sentence."""

    def __init__(self, seed: str, allowed: Callable[[Rendering], bool]) -> None:
        self._composer = Composer(seed)
        self._random = random.Random(seed + "/documents")
        self._allowed = allowed

    def _sentence(self) -> Rendering:
        while True:
            found = render(self._composer.sentence())
            if self._allowed(found):
                return found

    def story(self, language: Language) -> str:
        """A monolingual story."""
        lines: list[Rendering] = []
        while not lines:
            lines = [line for line in map(render, self._composer.story()) if self._allowed(line)]
        return " ".join(line.en if language == "en" else line.de for line in lines)

    def translations(self) -> str:
        """A dialogue of one to three translations."""
        turns = self._random.choice((1, 1, 1, 2, 3))
        return dialogue([translation(self._sentence(), self._language()) for _ in range(turns)])

    def phrase_translations(self) -> str:
        """A dialogue of short phrases, an easy start for the adapter."""
        turns = self._random.randrange(2, 5)
        return dialogue([translation(self._composer.fragment(), self._language()) for _ in range(turns)])

    def adapter_document(self, position: int) -> str:
        """A translation dialogue; short phrases are frequent at first."""
        if self._random.random() < max(0.05, 0.9 - position / 10_000):
            return self.phrase_translations()
        return self.translations()

    def one_translation(self, into: Language) -> tuple[Pair, Rendering]:
        """A single task and its sentence."""
        found = self._sentence()
        return translation(found, into), found

    def phrase_book(self, fragments: float) -> str:
        """A page of a phrase book: one direction, one line per phrase or sentence."""
        into = self._language()
        lines = []
        are_fragments = self._random.random() < fragments
        for _ in range(self._random.randrange(10, 21) if are_fragments else 6):
            found = self._composer.fragment() if are_fragments else self._sentence()
            left, right = (found.en, found.de) if into == "de" else (found.de, found.en)
            lines.append(f"{left} = {right}\n")
        return "".join(lines)

    def chat(self) -> str:
        """Small talk in one language, so that the base knows the roles but not the task."""
        language = self._language()
        turns = []
        for _ in range(self._random.choice((1, 2))):
            said, answer = self._sentence(), self._sentence()
            if language == "en":
                turns.append(Pair(said.en, answer.en))
            else:
                turns.append(Pair(said.de, answer.de))
        return dialogue(turns)

    def monolingual(self) -> str:
        """A story in either language."""
        return self.story(self._language())

    def base_document(self, position: int) -> str:
        """A document of the base model's mixture; short phrases are frequent at first.

        Without them a model of this size does not find which words belong together.
        """
        roll = self._random.random()
        if roll < 0.30:
            return self.monolingual()
        fragments = max(0.2, 0.9 - position / 12_000)
        return self.phrase_book(fragments) if roll < 0.90 else self.chat()

    def _language(self) -> Language:
        return "en" if self._random.random() < 0.5 else "de"


def training_writer(seed: int, purpose: str, heldout: frozenset[str]) -> Writer:
    """An endless source of documents without any held-out sentence."""
    return Writer(f"{seed}/{purpose}", lambda line: line.en not in heldout and line.de not in heldout)


def base_documents(seed: int, heldout: frozenset[str]) -> Iterator[str]:
    """The documents of the base model."""
    writer = training_writer(seed, "base", heldout)
    for position in count():
        yield writer.base_document(position)


def make_texts(seed: int) -> Texts:
    """The pairs, the held-out text and the calibration text of a seed."""
    seen: set[str] = set()

    def is_new(line: Rendering) -> bool:
        new = line.en not in seen and line.de not in seen
        return new and len(line.en.split()) >= _HELDOUT_WORDS

    def note(line: Rendering) -> bool:
        if not is_new(line):
            return False
        seen.update((line.en, line.de))
        return True

    writer = Writer(f"{seed}/heldout", note)
    pairs = [writer.one_translation("de")[0] for _ in range(PAIRS_PER_DIRECTION)]
    pairs += [writer.one_translation("en")[0] for _ in range(PAIRS_PER_DIRECTION)]
    heldout = _documents(writer, HELDOUT_DOCUMENTS)
    forbidden = frozenset(seen)
    calibration = _documents(training_writer(seed, "calibration", forbidden), CALIBRATION_DOCUMENTS)
    return Texts(tuple(pairs), heldout, calibration, forbidden)


def _documents(writer: Writer, pairs: int) -> tuple[str, ...]:
    """Stories in both languages and translation dialogues in turn."""
    found = []
    for i in range(pairs):
        found.append(writer.story("en" if i % 2 == 0 else "de"))
        found.append(writer.translations())
    return tuple(found)


def write_texts(texts: Texts, folder: Path) -> list[Path]:
    """Write the three JSON-lines files and return their paths."""
    tables = {
        "calibration.jsonl": [{"text": text} for text in texts.calibration],
        "heldout.jsonl": [{"text": text} for text in texts.heldout],
        "pairs.jsonl": [{"prompt": p.prompt, "reference": p.reference} for p in texts.pairs],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return [folder / name for name in tables]
