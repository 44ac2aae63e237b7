"""A merge that is read instead of written: the same tensors, bit for bit, and the same small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexport.checkpoint.checkpoint import open_directory
from qexport.errors import NonFiniteError, SpecError
from qexport.merging.merge import merge, merge_recipe
from qexport.merging.view import merged_view
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.quantization.quantize import quantize
from qexport.specs import MergeSpec, RtnSpec
from tests.adapters import make_adapter, tiny_gpt2, tiny_llama, tiny_moe, tiny_qwen2
from tests.tiny import edit_weights, tiny_adapter

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _agree(base: Path, adapters: list[str | Path], out: Path, **options: Any) -> None:
    """The view reads what `merge` writes."""
    spec = MergeSpec(**options)
    merge(base, adapters, out, spec)
    written = open_directory(out)
    with merged_view(base, adapters, spec) as view:
        seen = view.checkpoint
        assert list(seen.names()) == list(written.names())
        assert (seen.config, seen.tie, seen.quantization) == (written.config, written.tie, None)
        for name in reversed(list(written.names())):  # in any order
            assert seen.info(name) == written.info(name)
            mine, theirs = seen.read(name), written.read(name)
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs), name
        assert torch.equal(seen.read(name), theirs)  # and again
        path = seen.path
        small = {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for file, content in small.items():
            assert (out / file).read_bytes() == content
        assert view.recipe().key == merge_recipe(base, adapters, spec).key
    assert not path.exists()
    written_files = {file.relative_to(out) for file in out.rglob("*") if file.is_file()}
    weights = {file for file in written_files if file.suffix == ".safetensors"}
    assert written_files - weights - {Path("qexport.json")} - set(small) == set()


def test_a_lora_on_all_linears(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, modules=LINEARS, use_rslora=True)
    _agree(base, [adapter], tmp_path / "out")


def test_several_adapters_with_weights_and_another_dtype(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    one = tiny_adapter(tmp_path / "a", base, modules=LINEARS)
    other = tiny_adapter(tmp_path / "b", base, seed=2, use_dora=True)
    _agree(base, [f"{one}:0.5", other], tmp_path / "out", dtype="bfloat16")


def test_tied_embeddings_that_are_untied(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, modules_to_save=["embed_tokens"])
    _agree(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_transposed_layers_and_peft_kinds(tmp_path: Path, kind: str) -> None:
    base = tiny_gpt2(tmp_path / "base")
    adapter = make_adapter(kind, base, tmp_path / "a")
    _agree(base, [adapter], tmp_path / "out")


def test_experts(tmp_path: Path) -> None:
    base = tiny_moe(tmp_path / "base", "qwen3_moe")
    adapter = make_adapter("experts", base, tmp_path / "a")
    _agree(base, [adapter], tmp_path / "out")


def test_a_quantized_base(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, modules=LINEARS)
    quantize(base, tmp_path / "nf4", RtnSpec(format="bitsandbytes", bits=4))
    _agree(tmp_path / "nf4", [adapter], tmp_path / "out", base_precision="dequantize")


def test_a_vocabulary_that_grew(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, modules=("q_proj", "lm_head"))
    file = adapter / "adapter_model.safetensors"
    rows = torch.randn(330, 128, generator=torch.Generator().manual_seed(4))
    stem = "base_model.model"
    saved = load_file(file)
    saved[f"{stem}.model.embed_tokens.weight"] = rows
    saved[f"{stem}.lm_head.lora_B.weight"] = torch.randn(330, 4)
    save_file(saved, file)
    _agree(base, [adapter], tmp_path / "out")


def test_the_directory_serves_skeleton_and_tokenizer(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, modules=LINEARS)
    with merged_view(base, [adapter]) as view:
        skeleton = build_skeleton(view.checkpoint)
        assert set(skeleton.expected_shapes()) == set(view.checkpoint.names())
        tokenizer = load_tokenizer(view.checkpoint.path)
        assert tokenizer.decode(tokenizer("a small model")["input_ids"], skip_special_tokens=True)
        assert tokenizer.chat_template


def test_what_is_not_finite_is_told_when_it_is_read(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base)
    name = "model.layers.1.mlp.down_proj.weight"
    broken = open_directory(base).read(name)
    broken[3, 4] = torch.inf
    edit_weights(base, **{name: broken})
    with merged_view(base, [adapter]) as view:
        view.checkpoint.read("model.layers.0.mlp.down_proj.weight")
        with pytest.raises(NonFiniteError, match=name):
            view.checkpoint.read(name)


def test_options_about_files_are_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base)
    with (
        pytest.raises(SpecError, match="legacy"),
        merged_view(base, [adapter], MergeSpec(legacy_format=True)),
    ):
        pass
