"""The models of benchmarks/quality.py: what each is calibrated and measured on.

Calibration and held-out text never share a document; `Prepared.ids` are the windows that every tool gets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qexport
from qexport.calibrate.texts import read_documents
from qexport.calibrate.windows import shuffled
from qexport.modeling.calibration import calibration_data
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.packaged import calibration_text, embedded_adapter, embedded_base, heldout_pairs, heldout_text
from qexport.specs import GptqSpec, MergeSpec, VerifySpec

SHARED = Path(os.environ.get("QEXPORT_SHARED") or Path(__file__).resolve().parents[2] / "shared")
SAMPLES, LENGTH = 128, 256  # calibration windows, and tokens of one


@dataclass(frozen=True)
class Model:
    """A model under test; `adapter` is merged into it first. `answers` are pairs for BLEU.

    `group_size` is the one of all tools: 32 where it divides every layer. `layout` is what qexport writes its
    asymmetric codes in: one that holds every layer. `translations`: each held-out text is a pair of lines,
    whose order is turned round: the adapter taught the direction that is not the base's. `beginnings`: of
    each held-out text the first window alone is scored.
    """

    base: Path
    calibration: Path
    heldout: Path
    documents: int
    group_size: int = 32
    layout: str = "gptq_v2"
    adapter: Path | None = None
    answers: Path | None = None
    translations: bool = False
    beginnings: bool = False


_STORIES: dict[str, Any] = {
    "calibration": SHARED / "text" / "tinystories_calib800.txt",
    "heldout": SHARED / "text" / "tinystories_eval200.txt",
    "documents": 100,
    "beginnings": True,
}
MODELS = {
    "tinystories-656k": Model(SHARED / "models" / "tinystories-656k", **_STORIES),
    "captions22m": Model(
        SHARED / "models" / "captions22m",
        SHARED / "text" / "multi30k-calib.jsonl",
        SHARED / "text" / "multi30k-val.jsonl",
        300,
        adapter=SHARED / "models" / "captions22m-lora-en",
        answers=SHARED / "text" / "multi30k-test.jsonl",
        translations=True,
    ),
    "babyllama-105": Model(SHARED / "models" / "babyllama-105", **_STORIES),
    "embedded": Model(
        embedded_base(),
        calibration_text(),
        heldout_text(),
        1000,
        adapter=embedded_adapter(),
        answers=heldout_pairs(),
    ),
    # sides of 172: no group of 32 divides them, so that whole rows share a scale, and no word of AutoGPTQ's
    "stories260k": Model(
        SHARED / "models" / "stories260k", **_STORIES, group_size=-1, layout="hqq-safetensors"
    ),
}
_PAIRS = 100


@dataclass(frozen=True)
class Prepared:
    """A model ready to be quantized: `path` with its adapter merged, `spec` of the scores."""

    path: Path
    spec: VerifySpec
    group_size: int
    layout: str


def prepare(name: str, work: Path) -> Prepared:
    """Merges the model's adapter and writes its held-out text to `work`, where they are not there yet."""
    model = MODELS[name]
    work.mkdir(parents=True, exist_ok=True)
    path = model.base
    if model.adapter:
        path = work / "merged"
        qexport.merge(model.base, [model.adapter], path, MergeSpec(), overwrite=True)
    text = model.heldout
    documents = read_documents(model.heldout)
    if model.translations:
        documents = [_turned(document) for document in documents]
    if model.beginnings:
        tokenizer = load_tokenizer(path)
        documents = [_beginning(document, tokenizer) for document in documents[: model.documents]]
    if model.translations or model.beginnings:
        text = work / "heldout.jsonl"
        _write(documents, text)
    spec = VerifySpec(
        text=str(text),
        pairs=str(model.answers) if model.answers else None,
        max_documents=model.documents,
        max_pairs=_PAIRS,
        window=LENGTH,
    )
    return Prepared(path, spec, model.group_size, model.layout)


def calibration(name: str, path: Path, seed: int, work: Path) -> tuple[Path, list[list[int]]]:
    """A calibration file, and the windows that qexport makes of it with this seed: the windows of all tools.

    For seed 0 they are the first 128 x 256 tokens of the model's text in the order of its documents; for
    others those of the documents in an order that the seed sets.
    """
    documents = read_documents(MODELS[name].calibration)
    file = work / f"calibration-{seed}.jsonl"
    _write(_unshuffled(documents, seed) if seed == 0 else documents, file)
    spec = GptqSpec(calibration=(str(file),), samples=SAMPLES, sequence_length=LENGTH, seed=seed)
    return file, calibration_data(path, spec, build_skeleton(path)).windows.tolist()


def _unshuffled(documents: Sequence[str], seed: int) -> list[str]:
    """The order that `shuffled` turns into that of `documents`."""
    placed = list(documents)
    for document, place in zip(documents, shuffled(range(len(documents)), seed), strict=True):
        placed[place] = document
    return placed


def _turned(document: str) -> str:
    first, second = document.split("\n")
    return f"{second}\n{first}"


def _beginning(document: str, tokenizer: Any) -> str:
    """What the first window holds of a document."""
    text: str = tokenizer.decode(tokenizer(document).input_ids[:LENGTH], skip_special_tokens=True)
    return text


def _write(documents: Sequence[str], file: Path) -> None:
    lines = [json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents]
    file.write_text("".join(lines), encoding="utf-8")
