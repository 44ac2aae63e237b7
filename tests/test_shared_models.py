"""Other people's real models, with the commands of the README: oddities included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import RunCli, shared
from tests.tiny import in_transformers, logits, tokens

TEXTS = {
    "captions22m": ("multi30k-calib.jsonl", "multi30k-val.jsonl"),
    "tinystories-656k": ("tinystories_calib800.txt", "tinystories_eval200.txt"),
    "stories260k": ("tinystories_calib800.txt", "tinystories_eval200.txt"),
    "babyllama-105": ("tinystories_calib800.txt", "tinystories_eval200.txt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TEXTS))
@pytest.mark.parametrize("method", ["bnb", "gptq", "rtn"])
def test_quantize_and_verify(name: str, method: str, tmp_path: Path, cli: RunCli) -> None:
    model = shared("models", name)
    calibration, heldout = (shared("text", file) for file in TEXTS[name])
    data = ["--calibration", calibration, "--samples", "32", "--sequence-length", "256"]
    extra = data if method == "gptq" else []
    code, out, err = cli("quantize", model, "-o", tmp_path / "out", "--method", method, "--bits", "4", *extra)
    assert code == 0, err
    assert "4 bits" in out
    code, out, err = cli(
        "verify", tmp_path / "out", "--reference", model, "--text", heldout, "--max-documents", "30", "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    # on 30 documents a calibrated model of few bits may come out ahead of its original by a hair
    assert -0.01 < result["loss"]["loss"] < 0.25
    assert result["candidate"]["perplexity"]["value"] != result["reference"]["perplexity"]["value"]
    assert result["candidate"]["size_bytes"] < result["reference"]["size_bytes"]


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
