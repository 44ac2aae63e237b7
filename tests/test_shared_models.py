"""Other people's real models, with the commands of the README: oddities included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import qexport
from qexport.specs import VerifySpec
from tests.conftest import RunCli, shared
from tests.tiny import in_transformers, logits, tokens

# calibration, held-out text, and so many documents of that as give a few thousand tokens: the standard error
# of a loss is then at most 0.011, and the losses of four bits are 0.00 to 0.07
TEXTS = {
    "captions22m": ("multi30k-calib.jsonl", "multi30k-val.jsonl", 30),
    "tinystories-656k": ("tinystories_calib800.txt", "tinystories_eval200.txt", 12),
    "stories260k": ("tinystories_calib800.txt", "tinystories_eval200.txt", 12),
    "babyllama-105": ("tinystories_calib800.txt", "tinystories_eval200.txt", 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TEXTS))
def test_quantize_and_verify(name: str, tmp_path: Path, cli: RunCli) -> None:
    """Three methods; the first is verified by the command, the others against the scores of the original."""
    model = shared("models", name)
    calibration, heldout = (shared("text", file) for file in TEXTS[name][:2])
    documents = TEXTS[name][2]
    given = VerifySpec(text=str(heldout), max_documents=documents)
    data = ["--calibration", calibration, "--samples", "12", "--sequence-length", "256"]
    reference = None
    for method in ("gptq", "bnb", "rtn"):
        out = tmp_path / method
        extra = data if method == "gptq" else []
        code, told, err = cli("quantize", model, "-o", out, "--method", method, "--bits", "4", *extra)
        assert code == 0, err
        assert "4 bits" in told
        if reference is None:
            options = ["--text", heldout, "--max-documents", str(documents), "--json"]
            code, told, err = cli("verify", out, "--reference", model, *options)
            assert code == 0, err
            by_command = json.loads(told)
            reference = qexport.evaluate(model, given)
            assert by_command["reference"]["perplexity"]["value"] == reference.perplexity.value
            assert by_command["candidate"]["size_bytes"] < reference.size_bytes
            loss, found = by_command["loss"]["loss"], by_command["candidate"]["perplexity"]["value"]
        else:
            result = qexport.verify(reference, out, given)
            loss, found = result.loss.loss, result.candidate.perplexity.value
            assert result.candidate.size_bytes < reference.size_bytes
        # on few documents a calibrated model of few bits may come out ahead of its original by a hair
        assert -0.01 < loss < 0.25, method
        assert found != reference.perplexity.value, method


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TEXTS))
def test_shard(name: str, tmp_path: Path, cli: RunCli) -> None:
    model = shared("models", name)
    code, _, err = cli("shard", model, "-o", tmp_path / "out", "--max-shard-size", "500KB")
    assert code == 0, err
    ours = in_transformers(tmp_path / "out")
    x = tokens(2, 32, 100)
    assert torch.equal(logits(ours, x), logits(in_transformers(model), x))


@pytest.mark.slow
def test_the_adapter_brings_translation(tmp_path: Path, cli: RunCli) -> None:
    base, adapter = shared("models", "captions22m"), shared("models", "captions22m-lora-en")
    assert cli("merge", base, "-a", adapter, "-o", tmp_path / "merged")[0] == 0
    code, out, err = cli(
        "verify",
        tmp_path / "merged",
        "--reference",
        base,
        "--text",
        shared("text", "multi30k-val.jsonl"),
        "--pairs",
        shared("text", "multi30k-test.jsonl"),
        "--max-documents",
        "20",
        "--max-pairs",
        "100",
        "--json",
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["reference"]["bleu"]["value"] < 8
    assert result["candidate"]["bleu"]["value"] > 15
