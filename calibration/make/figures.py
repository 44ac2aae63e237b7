"""Figures of what was made: token counts, and the scores that qexport itself measures."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerFast

import qexport
from qexport.results import Evaluation
from qexport.specs import VerifySpec


def read_lines(path: Path) -> list[dict[str, str]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def count_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
    """Tokens of all texts, each with its bos."""
    return sum(len(tokenizer.backend_tokenizer.encode(text).ids) for text in texts)


def scores(base: Path, adapter: Path | None, data: Path) -> Evaluation:
    """Perplexity and BLEU on the held-out texts and pairs, with the adapter merged when there is one."""
    spec = VerifySpec(text=str(data / "heldout.jsonl"), pairs=str(data / "pairs.jsonl"))
    if adapter is None:
        return qexport.evaluate(base, spec)
    with TemporaryDirectory() as folder:
        return qexport.evaluate(qexport.merge(base, [adapter], Path(folder) / "merged").path, spec)
