"""LoRA adapters as GGUF: llama.cpp with the base and the adapter computes what PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexport.checkpoint.checkpoint import open_directory
from qexport.checkpoint.safetensors_file import read_tensor
from qexport.errors import AdapterError, NonFiniteError, SpecError
from qexport.formats.gguf.container import read_header
from qexport.merging.gguf_adapter import convert_adapter
from qexport.merging.merge import merge
from qexport.quantization.quantize import quantize
from qexport.specs import MergeSpec, RtnSpec
from tests.adapters import build_adapter, make_adapter, tiny_llama, tiny_qwen2
from tests.conftest import RunCli, shared
from tests.llamacpp_c import BASES, base_gguf, llamacpp_logits
from tests.test_staging import content, told_in_one_line
from tests.tiny import edit_json, in_transformers, logits, tiny_adapter, tokens

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = tokens(1)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "lora"),
        ("llama", "rslora"),
        ("llama", "patterns_rslora"),
        ("llama", "pissa_converted"),
        ("qwen2", "patterns"),
        ("qwen2", "embedding_and_head"),
        ("gpt2", "patterns"),
        ("mixtral", "experts_rslora_patterns"),
        ("qwen3_moe", "experts_and_linears"),
    ],
)
def test_llamacpp_computes_what_peft_computes(architecture: str, kind: str, tmp_path: Path) -> None:
    base = BASES[architecture](tmp_path / "base")
    adapted = build_adapter(kind, base, tmp_path / "a")
    made = convert_adapter(tmp_path / "a", base, tmp_path / "adapter.gguf")
    assert made.size_bytes == made.path.stat().st_size
    whole = base_gguf(base, tmp_path / "base.gguf")
    expected, plain = logits(adapted, TOKENS)[0], llamacpp_logits(whole, TOKENS[0])
    assert (expected - plain).abs().max() > 0.1  # the adapter is seen
    allowed = 1e-2 if architecture == "gpt2" else 1e-3  # ggml's GELU is a table in fp16
    torch.testing.assert_close(llamacpp_logits(whole, TOKENS[0], made.path), expected, rtol=0, atol=allowed)


def test_experts_adapted_one_by_one(tmp_path: Path) -> None:
    """As before transformers 5: pairs of single experts, here of some only, and of two ranks."""
    base = BASES["mixtral"](tmp_path / "base")
    generator = torch.Generator().manual_seed(2)
    trained = {}
    for block, expert, leaf, rank in ((0, 1, "w1", 2), (0, 3, "w1", 4), (1, 0, "w2", 2), (1, 2, "w3", 4)):
        outs, ins = (128, 48) if leaf == "w2" else (48, 128)
        stem = f"base_model.model.model.layers.{block}.block_sparse_moe.experts.{expert}.{leaf}"
        trained[f"{stem}.lora_A.weight"] = torch.randn(rank, ins, generator=generator)
        trained[f"{stem}.lora_B.weight"] = torch.randn(outs, rank, generator=generator)
    adapter = tiny_adapter(tmp_path / "a", base, modules=("q_proj",))
    edit_json(
        adapter / "adapter_config.json",
        rank_pattern={r"1\.w1": 2, r"0\.w2": 2},
        target_modules=["w1", "w2", "w3"],
    )
    save_file(trained, adapter / "adapter_model.safetensors")
    made = convert_adapter(adapter, base, tmp_path / "adapter.gguf")
    merge(base, [adapter], tmp_path / "merged", MergeSpec(dtype="float32"))
    expected = llamacpp_logits(base_gguf(tmp_path / "merged", tmp_path / "merged.gguf"), TOKENS[0])
    whole = base_gguf(base, tmp_path / "base.gguf")
    assert (expected - llamacpp_logits(whole, TOKENS[0])).abs().max() > 0.1
    found = llamacpp_logits(whole, TOKENS[0], made.path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_quantized_base_gives_the_same_file(tmp_path: Path) -> None:
    """Of the base names and shapes count, and a 4-bit one has the same."""
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, modules=LINEARS)
    quantize(base, tmp_path / "nf4", RtnSpec(format="bitsandbytes", bits=4))
    one = convert_adapter(adapter, base, tmp_path / "one.gguf")
    other = convert_adapter(adapter, tmp_path / "nf4", tmp_path / "other.gguf")
    assert one.path.read_bytes() == other.path.read_bytes()


def test_a_trained_adapter_of_a_real_model(tmp_path: Path) -> None:
    from peft import PeftModel

    base, adapter = shared("models", "captions22m"), shared("models", "captions22m-lora-en")
    ids = torch.randint(0, 6144, (1, 32), generator=torch.Generator().manual_seed(1))
    model: Any = PeftModel.from_pretrained(in_transformers(base, dtype=torch.float32), str(adapter))
    made = convert_adapter(adapter, base, tmp_path / "adapter.gguf")
    whole = base_gguf(base, tmp_path / "base.gguf")
    found = llamacpp_logits(whole, ids[0], made.path)
    torch.testing.assert_close(found, logits(model.eval(), ids)[0], rtol=0, atol=2e-3)


def test_a_weight_is_part_of_the_file(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, modules=LINEARS, lora_alpha=5, r=3)
    half = convert_adapter(f"{adapter}:0.5", base, tmp_path / "half.gguf")
    one = convert_adapter(adapter, base, tmp_path / "one.gguf", dtype=torch.float16)
    whole = base_gguf(base, tmp_path / "base.gguf")
    by_scale = llamacpp_logits(whole, TOKENS[0], one.path, 0.5)
    torch.testing.assert_close(
        llamacpp_logits(whole, TOKENS[0], half.path), by_scale, rtol=0, atol=2e-2
    )  # fp16
    assert one.size_bytes < 0.6 * half.size_bytes


def test_values_and_settings_as_another_reader_sees_them(tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf")
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, modules=("o_proj", "q_proj"), use_rslora=True)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/a-base")
    convert_adapter(adapter, base, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    told = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert told == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "general.name": "a",
        "general.base_model.count": 1,
        "general.base_model.0.name": "a-base",
        "general.base_model.0.repo_url": "https://huggingface.co/someone/a-base",
        "general.file_type": 0,
    }
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 8
    trained = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.o_proj"
    assert torch.equal(tensors["blk.1.attn_output.weight.lora_a"], trained[f"{stem}.lora_A.weight"])
    # 8 / 4 by llama.cpp, 8 / sqrt(4) by rsLoRA
    assert torch.equal(tensors["blk.1.attn_output.weight.lora_b"], 2 * trained[f"{stem}.lora_B.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_pair_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, modules=("down_proj",), r=3, lora_alpha=7)
    file = adapter / "adapter_model.safetensors"
    trained = {name: value.to(dtype) for name, value in load_file(file).items()}
    save_file(trained, file)
    convert_adapter(adapter, base, tmp_path / "out.gguf", dtype=dtype)
    for name, stored in read_header(tmp_path / "out.gguf").tensors.items():
        block, side = name.split(".")[1], name[-1].upper()
        wanted = trained[f"base_model.model.model.layers.{block}.mlp.down_proj.lora_{side}.weight"]
        assert torch.equal(read_tensor(stored.as_stored()), wanted)


@pytest.mark.parametrize(
    ("architecture", "kind", "reason"),
    [
        ("llama", "dora", "DoRA"),
        ("llama", "ia3", "IA3"),
        ("llama", "kasa", "variant of LoRA"),
        ("llama", "pissa", "pissa"),
        ("llama", "layer_replication", "replicated layers"),
        ("llama", "saved_norm", "layernorm.weight as a whole"),
        ("llama", "saved_embedding", "model.embed_tokens.weight as a whole"),
        ("llama", "token_indices", "single tokens of model.embed_tokens.weight"),
        ("llama", "embedding", "one matrix is embedding and output head"),
        ("llama", "head", "one matrix is embedding and output head"),
        ("qwen2", "bias_all", "as a whole"),
        ("qwen2", "lora_bias", "biases"),
    ],
)
def test_what_llamacpp_has_no_place_for_is_refused(
    architecture: str, kind: str, reason: str, tmp_path: Path
) -> None:
    base = BASES[architecture](tmp_path / "base")
    adapter = make_adapter(kind, base, tmp_path / "a")
    with pytest.raises(AdapterError, match=f"cannot become a GGUF adapter: .*{reason}.*; merge"):
        convert_adapter(adapter, base, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base)
    file = adapter / "adapter_model.safetensors"
    embedding = torch.cat(
        [open_directory(base).read("model.embed_tokens.weight").float(), torch.ones(2, 128)]
    )
    save_file({**load_file(file), "base_model.model.model.embed_tokens.base_layer.weight": embedding}, file)
    with pytest.raises(AdapterError, match="its vocabulary has 322 rows"):
        convert_adapter(adapter, base, tmp_path / "out.gguf")


def test_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    assert convert_adapter(adapter, None, tmp_path / "out.gguf").pairs == 4
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="names no base; name it"):
        convert_adapter(adapter, None, tmp_path / "other.gguf")


def test_another_base(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", tiny_llama(tmp_path / "b", intermediate_size=192))
    with pytest.raises(AdapterError, match="another base"):
        convert_adapter(adapter, base, tmp_path / "out.gguf")


def test_fp16_that_overflows_leaves_nothing(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base, lora_alpha=4)
    file = adapter / "adapter_model.safetensors"
    save_file({name: value * 1e6 for name, value in load_file(file).items()}, file)
    with pytest.raises(NonFiniteError, match="f16 cannot hold"):
        convert_adapter(adapter, base, tmp_path / "out.gguf", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []
    with pytest.raises(SpecError, match="int8"):
        convert_adapter(adapter, base, tmp_path / "out.gguf", dtype=torch.int8)


def test_an_output_that_is_there(tmp_path: Path, cli: RunCli) -> None:
    """With --overwrite a GGUF adapter takes the place of one, and of nothing else."""
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a", base)
    out, model, mine = tmp_path / "out.gguf", base_gguf(base, tmp_path / "model.gguf"), tmp_path / "mine"
    mine.write_text("mine")
    before = content(tmp_path)
    for place, reason in (
        (adapter / "adapter_model.safetensors", f"is a file of the input {adapter}; choose another name"),
        (adapter / "new.gguf", f"lies within the input {adapter}"),
        (base / "model.safetensors", f"is a file of the input {base}"),
        (model, "is no GGUF adapter; a file is replaced only by one of its kind"),
        (mine, "is no GGUF adapter"),
        (tmp_path, "is a directory; a name for one file, the GGUF adapter"),
    ):
        arguments = ("convert", adapter, "--to", "gguf-lora", "--base", base, "-o", place, "--overwrite")
        assert reason in told_in_one_line(cli(*arguments)), place
        assert content(tmp_path) == before
    call = ("convert", f"{adapter}:0.5", "--to", "gguf-lora", "--base", base, "-o", out, "-q")
    assert cli(*call) == (0, "", "")
    made = out.read_bytes()
    err = told_in_one_line(cli(*call))
    assert err == f"error: {out} is there already; add --overwrite, or choose another name with -o\n"
    assert out.read_bytes() == made
    assert convert_adapter(adapter, base, out, overwrite=True).pairs == 4
    assert out.read_bytes() != made
