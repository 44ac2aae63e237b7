"""The stream of pieces: the same bytes whatever the pieces' size, in little memory, in any file form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qexport
from qexport.checkpoint.finiteness import is_finite
from qexport.merging import stream
from qexport.specs import MergeSpec
from tests.adapters import BASES, make_adapter
from tests.tiny import in_transformers, logits, tiny_adapter, tiny_model, tokens


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "lora"),
        ("llama", "dora"),
        ("qwen2", "embedding_and_head"),
        ("llama", "saved_embedding_and_head"),
        ("llama", "token_indices"),
        ("gpt2", "dora"),
        ("gpt2", "bias_all"),
        ("qwen3_moe", "experts"),
        ("gpt_oss", "experts"),
    ],
)
def test_the_size_of_the_pieces_changes_nothing(
    architecture: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BASES[architecture](tmp_path / "base")
    adapter = make_adapter(kind, base, tmp_path / "adapter")
    spec = MergeSpec(dtype="float32")
    qexport.merge(base, [adapter], tmp_path / "whole", spec)
    monkeypatch.setattr(stream, "PIECE_BYTES", 1536)
    monkeypatch.setattr(stream, "_TILE_VALUES", 200)
    qexport.merge(base, [adapter], tmp_path / "pieces", spec)
    whole, pieces = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces"))
    assert whole.keys() == pieces.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-5, atol=1e-6)
    figures = [
        json.loads((tmp_path / n / "qexport.json").read_text())["figures"] for n in ("whole", "pieces")
    ]
    norms = [{c["tensor"]: c["relative_norm"] for c in figure["changes"]} for figure in figures]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_relative_norms_are_those_of_the_weights(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32)
    one = tiny_adapter(tmp_path / "one", base)
    two = tiny_adapter(tmp_path / "two", base, seed=5, use_dora=True)
    result = qexport.merge(base, [one, two], tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {change.tensor for change in result.changes}
    for change in result.changes:
        moved = (after[change.tensor] - before[change.tensor]).norm() / before[change.tensor].norm()
        assert change.relative_norm == pytest.approx(float(moved), rel=1e-4)
        assert change.adapters == (1, 2)


def test_untouched_matrices_keep_their_bytes(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    result = qexport.merge(base, [adapter], tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    touched = {change.tensor for change in result.changes}
    assert 0 < len(touched) < len(before)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - touched)


@pytest.mark.parametrize("size", ["5GB", "200KB"])
def test_legacy_format(tmp_path: Path, size: str) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32)
    adapter = tiny_adapter(tmp_path / "adapter", base, modules=("lm_head", "q_proj"))
    qexport.merge(base, [adapter], tmp_path / "safe", MergeSpec(max_shard_size=size))
    qexport.merge(base, [adapter], tmp_path / "old", MergeSpec(max_shard_size=size, legacy_format=True))
    assert not list((tmp_path / "old").glob("*.safetensors*"))
    assert (tmp_path / "old" / "pytorch_model.bin.index.json").exists() == (size == "200KB")
    found = [logits(in_transformers(tmp_path / name), tokens()) for name in ("safe", "old")]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_finite_is_seen_bit_by_bit(dtype: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype)
    values[:4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    values[5] = torch.finfo(dtype).smallest_normal / 4
    assert is_finite(values)
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        broken = values.clone()
        broken[-1] = bad
        assert not is_finite(broken)
        assert not is_finite(broken.reshape(10, 100).T)
    assert is_finite(torch.empty(0, dtype=dtype))
