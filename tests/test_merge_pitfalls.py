"""What would merge wrongly without a word: each is right, refused, or told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import qexport
from qexport.errors import AdapterError, NonFiniteError, OutputExistsError, SpecError
from qexport.events import Noted
from qexport.specs import MergeSpec, ShardSpec, spec_of
from tests.adapters import BASES, make_adapter
from tests.tiny import edit_json, in_transformers, logits, tiny_adapter, tiny_model, tokens

FULL = MergeSpec(dtype="float32")


def adapter_on(base: Path, adapter: Path) -> torch.Tensor:
    loaded: Any = PeftModel.from_pretrained(in_transformers(base, dtype=torch.float32), str(adapter))
    return logits(loaded.eval(), tokens())


def notes_of(base: Path, adapters: list[Any], out: Path, spec: MergeSpec = FULL) -> list[str]:
    told: list[str] = []
    qexport.merge(
        base, adapters, out, spec, on_event=lambda e: told.append(e.text) if isinstance(e, Noted) else None
    )
    return told


def edit_adapter(adapter: Path, **changes: torch.Tensor | None) -> None:
    file = adapter / "adapter_model.safetensors"
    held = {**load_file(file), **{k: v for k, v in changes.items() if v is not None}}
    save_file({k: v for k, v in held.items() if changes.get(k, v) is not None}, file)


def with_larger_tokenizer(adapter: Path, base: Path, ids: int) -> None:
    """The base's tokenizer with more tokens, up to the id `ids` - 1."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if adapter != base:
            shutil.copy(base / name, adapter / name)
    content = json.loads((adapter / "tokenizer.json").read_text())
    first = 1 + max(content["model"]["vocab"].values())
    for number in range(first, ids):
        content["added_tokens"].append(
            {"id": number, "content": f"<new{number}>", "special": False, "single_word": False}
            | {"lstrip": False, "rstrip": False, "normalized": False}
        )
    (adapter / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["saved_embedding_and_head", "embedding_and_head", "dora_embedding", "head"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rows_that_nobody_trained_are_the_mean(architecture: str, kind: str, tmp_path: Path) -> None:
    base = BASES[architecture](tmp_path / "base")
    adapter = make_adapter(kind, base, tmp_path / "adapter")
    qexport.merge(base, [adapter], tmp_path / "plain", FULL)
    with_larger_tokenizer(adapter, base, 325)
    told = notes_of(base, [adapter], tmp_path / "out")
    assert any("320 rows become 325" in note for note in told)
    plain, grown = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    before = load_file(base / "model.safetensors")
    for name, tensor in grown.items():
        if tensor.shape[0] != 325:
            assert torch.equal(tensor, plain[name])
            continue
        assert torch.equal(tensor[:320], plain[name])
        mean = before.get(name, before["model.embed_tokens.weight"]).double().mean(dim=0)
        torch.testing.assert_close(tensor[320:].double(), mean.expand(5, -1), rtol=2e-3, atol=1e-4)


def test_a_tokenizer_with_more_ids_than_its_own_base_has_rows(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32)
    with_larger_tokenizer(base, base, 322)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter / name)
    (adapter / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + "\n")  # saved anew
    told = notes_of(base, [adapter], tmp_path / "out")
    assert not any("rows become" in note for note in told)


def in_hub_naming(base: Path, out: Path) -> Path:
    """GPT-2 as OpenAI's checkpoint on the Hub is named: without the base model's prefix."""
    shutil.copytree(base, out)
    held = load_file(base / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    "kind", ["lora", "embedding", "head", "saved_embedding", "dora_embedding", "token_indices"]
)
def test_gpt2_as_it_lies_on_the_hub(kind: str, tmp_path: Path) -> None:
    usual = BASES["gpt2"](tmp_path / "usual")
    base = in_hub_naming(usual, tmp_path / "base")
    adapter = make_adapter(kind, usual, tmp_path / "adapter")
    qexport.merge(base, [adapter], tmp_path / "out", FULL)
    found = logits(in_transformers(tmp_path / "out", dtype=torch.float32), tokens())
    torch.testing.assert_close(found, adapter_on(usual, adapter), rtol=1e-4, atol=2e-4)


def test_the_module_decides_what_is_transposed(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32)
    adapter = tiny_adapter(tmp_path / "adapter", base, modules=("q_proj", "o_proj"))  # both are square
    expected = adapter_on(base, adapter)
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=True)
    qexport.merge(base, [adapter], tmp_path / "out", FULL)
    found = logits(in_transformers(tmp_path / "out"), tokens())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_in_one_file(llama: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    held = load_file(adapter / "adapter_model.safetensors")
    edit_adapter(adapter, **{name.replace("lora_A.", "lora_A.other."): held[name] * 2})
    with pytest.raises(AdapterError, match=r"holds both .*q_proj.lora_A.*one adapter a directory"):
        qexport.merge(llama, [adapter], tmp_path / "out")


def test_dora_without_its_word(llama: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama, use_dora=True)
    edit_json(adapter / "adapter_config.json", use_dora=False)
    with pytest.raises(AdapterError, match=r"holds lora_magnitude_vector of .*says no use_dora"):
        qexport.merge(llama, [adapter], tmp_path / "out")


def test_an_adapter_that_lost_layers_is_told(llama: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama)
    assert not notes_of(llama, [adapter], tmp_path / "whole")
    held = load_file(adapter / "adapter_model.safetensors")
    edit_adapter(adapter, **{name: None for name in held if ".layers.1." in name})
    (note,) = notes_of(llama, [adapter], tmp_path / "out")
    assert "has no pair for 2 of the modules that its config names: model.layers.1.mlp.down_proj" in note


def test_a_loha_that_lost_a_tensor_is_refused_by_the_plan(tmp_path: Path) -> None:
    from qexport.merging.merge import planned_merge

    base = BASES["llama"](tmp_path / "base")
    adapter = make_adapter("loha", base, tmp_path / "adapter")
    held = load_file(adapter / "adapter_model.safetensors")
    edit_adapter(adapter, **{next(name for name in held if name.endswith("hada_w1_b")): None})
    with pytest.raises(AdapterError, match=r"has no hada_w1_b of .*, as it has of others"):
        planned_merge(base, [adapter])


def test_the_report_tells_of_what_the_adapters_file_says_the_base_was(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    own = load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()
    own[:5] += 1
    edit_adapter(adapter, **{"base_model.model.model.embed_tokens.weight": own})
    result = qexport.merge(base, [adapter], tmp_path / "out", FULL)
    assert "model.embed_tokens.weight" in {change.tensor for change in result.changes}
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"], own)


def test_a_cast_that_overflows_is_not_the_trainings_fault(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32)
    held = load_file(base / "model.safetensors")
    held["model.norm.weight"][0] = 1e6
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    adapter = tiny_adapter(tmp_path / "adapter", base)
    with pytest.raises(NonFiniteError, match=r"model.norm.weight, as float16; .*; choose --dtype bfloat16"):
        qexport.merge(base, [adapter], tmp_path / "out", MergeSpec(dtype="float16"))


def test_a_change_can_be_taken_back(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    qexport.merge(base, [adapter], tmp_path / "merged")
    qexport.merge(tmp_path / "merged", [f"{adapter}:-1"], tmp_path / "back")
    back, before = (load_file(path / "model.safetensors") for path in (tmp_path / "back", base))
    for name, tensor in before.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-5, atol=1e-6)


def test_mixtrals_router_has_another_name_on_disk(tmp_path: Path) -> None:
    base = BASES["mixtral"](tmp_path / "base")
    adapter = tiny_adapter(
        tmp_path / "adapter", base, modules=("q_proj",), target_parameters=["mlp.gate.weight"]
    )
    qexport.merge(base, [adapter], tmp_path / "out", FULL)
    found = logits(in_transformers(tmp_path / "out", dtype=torch.float32), tokens())
    torch.testing.assert_close(found, adapter_on(base, adapter), rtol=1e-4, atol=2e-4)


def test_an_old_rope_scaling_of_another_form(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    edit_json(base / "config.json", rope_scaling="linear")
    adapter = tiny_adapter(tmp_path / "adapter", llama)
    with pytest.raises(SpecError, match=r"scaled already .linear"):
        qexport.merge(base, [adapter], tmp_path / "out", MergeSpec(rope_scaling="yarn", rope_factor=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "lora"),
        ("llama", "dora"),
        ("gpt2", "dora"),
        ("qwen2", "bias_all"),
        ("llama", "token_indices"),
        ("qwen3_moe", "experts"),
        ("gpt_oss", "experts"),
        ("llama", "loha"),
    ],
)
def test_products_on_a_gpu(architecture: str, kind: str, tmp_path: Path) -> None:
    base = BASES[architecture](tmp_path / "base")
    adapter = make_adapter(kind, base, tmp_path / "adapter")
    for device in ("cpu", "cuda"):
        qexport.merge(base, [adapter], tmp_path / device, MergeSpec(dtype="float32", device=device))
    cpu, cuda = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    for name, tensor in cpu.items():
        torch.testing.assert_close(cuda[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_change_beyond_the_range_of_bf16(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    held = load_file(adapter / "adapter_model.safetensors")
    edit_adapter(adapter, **{n: torch.full_like(t, 1e16) for n, t in held.items() if "lora_A" in n})
    edit_json(adapter / "adapter_config.json", lora_alpha=1e26)
    with pytest.raises(NonFiniteError, match="the merged model has NaN or infinity"):
        qexport.merge(base, [adapter], tmp_path / "out")


def test_magnitudes_and_biases_of_another_length(tmp_path: Path) -> None:
    base = BASES["qwen2"](tmp_path / "base")
    for kind, key in (("dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        adapter = make_adapter(kind, base, tmp_path / kind)
        held = load_file(adapter / "adapter_model.safetensors")
        edit_adapter(adapter, **{next(n for n in held if n.endswith(key)): torch.ones(1)})
        with pytest.raises(AdapterError, match=r"is \[1\]; a number for each of the"):
            qexport.merge(base, [adapter], tmp_path / "out")


def test_trained_tokens_that_cannot_be(tmp_path: Path) -> None:
    base = BASES["llama"](tmp_path / "base")
    adapter = make_adapter("token_indices", base, tmp_path / "adapter")
    first, *others = json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    edit_json(adapter / "adapter_config.json", trainable_token_indices=[others[0], *others])
    with pytest.raises(AdapterError, match="different tokens; floats, a row for each of 3"):
        qexport.merge(base, [adapter], tmp_path / "out")
    edit_json(adapter / "adapter_config.json", trainable_token_indices=[5000, *others])
    with pytest.raises(
        AdapterError, match="trained the token 5000, which neither the base with its 320 rows"
    ):
        qexport.merge(base, [adapter], tmp_path / "out")
    edit_json(adapter / "adapter_config.json", trainable_token_indices=[first, *others])
    held = load_file(adapter / "adapter_model.safetensors")
    name = next(n for n in held if "trainable_tokens" in n)
    edit_adapter(adapter, **{name: held[name].int()})
    with pytest.raises(AdapterError, match=r"are torch\.int32, of 3 different tokens"):
        qexport.merge(base, [adapter], tmp_path / "out")


def test_what_was_merged_is_remembered_by_what_is_made_of_it(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    one, two = (tiny_adapter(tmp_path / str(n), base, seed=n) for n in (1, 2))
    qexport.merge(base, [one], tmp_path / "merged")
    qexport.merge(tmp_path / "merged", [two], tmp_path / "both")
    qexport.shard(tmp_path / "both", tmp_path / "sharded", ShardSpec(max_shard_size="200KB"))
    qexport.quantize(tmp_path / "sharded", tmp_path / "four", spec_of("bnb"))
    for made in ("merged", "both", "sharded", "four"):
        with pytest.raises(AdapterError, match=rf"is merged into .*{made} already"):
            qexport.merge(
                tmp_path / made,
                [one],
                tmp_path / "again",
                MergeSpec(base_precision="dequantize") if made == "four" else None,
            )


def test_an_output_within_its_own_base(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "adapter", base)
    with pytest.raises(OutputExistsError, match="base/out lies within the model"):
        qexport.merge(base, [adapter], base / "out")
    assert not (base / "out").exists()


def test_a_share_of_a_token_that_came_in_with_the_tokenizer(tmp_path: Path) -> None:
    base = BASES["qwen2"](tmp_path / "base")
    adapter = make_adapter("token_indices", base, tmp_path / "adapter")
    _, *others = json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    edit_json(adapter / "adapter_config.json", trainable_token_indices=[322, *others])
    with_larger_tokenizer(adapter, base, 325)
    qexport.merge(base, [adapter], tmp_path / "whole", FULL)
    qexport.merge(base, [f"{adapter}:0.5"], tmp_path / "half", FULL)
    whole, half = (
        load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
        for name in ("whole", "half")
    )
    assert not torch.equal(whole[322], whole[323])
    mean = whole[323]  # of the rows that nobody trained
    torch.testing.assert_close(half[322], (whole[322] + mean) / 2)
