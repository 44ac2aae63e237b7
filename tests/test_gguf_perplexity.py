"""Perplexity of a real model's files by llama.cpp itself, and by qexport from the weights that it decodes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import qexport
from qexport.calibrate.texts import read_documents
from qexport.calibrate.windows import ScoredWindow, scored_windows
from qexport.modeling.tokenizer import load_tokenizer
from qexport.specs import VerifySpec, spec_of
from qexport.verification.evaluate import evaluate
from qexport.verification.runtimes.check import read_logits
from qexport.verification.runtimes.drivers.driver import Job
from qexport.verification.runtimes.process import run_jobs
from tests.conftest import shared

pytest.importorskip("gguf")
pytest.importorskip("numba")
llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp")

DOCUMENTS, LONGEST = 24, 40
# Found on 100 documents: 0.009, 0.006 and 0.06 %: llama.cpp rounds activations to 8 bits.
ALLOWED = {"q8_0": 1e-3, "q4_k_m": 1e-3, "q2_k": 3e-3}


@pytest.mark.slow
def test_llamacpp_finds_the_same_perplexity(tmp_path: Path) -> None:
    """Q8_0, Q4_K_M and Q2_K of one read; the text is cut into tokens by the file's own vocabulary."""
    model, text = shared("models", "captions22m"), tmp_path / "text.jsonl"
    tokenizer = load_tokenizer(model)
    documents = [
        document
        for document in read_documents(shared("text", "multi30k-val.jsonl"))
        if len(tokenizer(document).input_ids) <= LONGEST
    ][:DOCUMENTS]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    result = qexport.quantize(model, tmp_path / "out", spec_of("gguf", type=tuple(ALLOWED)))
    files = {file.type: result.path / file.file for file in result.files}
    windows = scored_windows(documents, tokenizer, length=512, stride=256)
    theirs = by_llamacpp(files, windows, documents, tmp_path)
    ours = {}
    for kind, file in files.items():
        spec = VerifySpec(text=str(text))
        ours[kind] = evaluate(file, spec).perplexity.value
        assert theirs[kind] == pytest.approx(ours[kind], rel=ALLOWED[kind]), kind
    full = evaluate(model, VerifySpec(text=str(text))).perplexity.value
    losses = {kind: value / full - 1 for kind, value in theirs.items()}
    assert abs(losses["q8_0"]) < 0.005, losses
    assert abs(losses["q4_k_m"]) < 0.01, losses
    assert 0.005 < losses["q2_k"] < 0.1, losses


def by_llamacpp(
    files: dict[str, Path], windows: list[ScoredWindow], documents: list[str], work: Path
) -> dict[str, float]:
    """exp of the mean negative log-likelihood of the windows' scored tokens, out of llama.cpp's logits."""
    assert len(windows) == len(documents)
    llama_cpp.set_log_callback(lambda level, text: None)
    model = llama_cpp.LlamaModel(
        str(files["q2_k"]), llama_cpp.LlamaModelParams()
    )  # the vocabulary lives in it
    vocabulary = model.get_vocab()
    for window, document in zip(windows, documents, strict=True):
        assert list(vocabulary.tokenize(document, True, False)) == list(window.tokens), document
    width = max(len(window.tokens) for window in windows)
    rows = [
        [*window.tokens, *[0] * (width - len(window.tokens))] for window in windows
    ]  # nothing looks ahead
    jobs: list[Job] = [
        {"model": str(file), "ids": rows, "logits": str(work / f"{kind}.npy"), "trust_remote_code": False}
        for kind, file in files.items()
    ]
    outcomes = run_jobs("llamacpp", jobs)
    found = {}
    for kind, job, outcome in zip(files, jobs, outcomes, strict=True):
        assert "error" not in outcome, outcome
        logits = read_logits(job)
        assert logits is not None
        total, count = 0.0, 0
        for row, window in zip(logits.double(), windows, strict=True):
            tokens = torch.tensor(window.tokens)
            scores = row[window.first - 1 : len(tokens) - 1].log_softmax(dim=-1)
            total -= float(scores.gather(1, tokens[window.first :, None]).sum())
            count += len(tokens) - window.first
        found[kind] = math.exp(total / count)
    return found
