"""merge: the merged model is the model with the adapter still on (PEFT's forward pass is the oracle)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import qexport
from qexport.errors import AdapterError, NonFiniteError, UnsafeFileError
from qexport.merging.lora import lora_scale, product_square, with_magnitude
from qexport.specs import MergeSpec
from tests.conftest import RunCli, shared
from tests.tiny import edit_json, edit_weights, in_transformers, logits, tiny_adapter, tiny_model, tokens

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_adapters(base: Path, *adapters: Path) -> torch.Tensor:
    """Logits in fp32 with the adapters on, unmerged."""
    model = in_transformers(base, dtype=torch.float32)
    if len(adapters) == 1:
        return logits(PeftModel.from_pretrained(model, adapters[0]), tokens())
    adapted: Any = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], start=1):
        adapted.load_adapter(adapter, adapter_name=str(number))
    adapted.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return logits(adapted, tokens())


def merged(out: Path) -> torch.Tensor:
    model = in_transformers(out, dtype=torch.float32)
    return logits(model, tokens())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"r": 8, "lora_alpha": 3, "modules": ALL},
        {"modules": ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32, "0.mlp.up_proj": 1}},
    ],
    ids=["lora", "rslora", "all linears", "patterns"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_is_adapter_on(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32, tied=tied)
    adapter = tiny_adapter(tmp_path / "adapter", base, **options)
    qexport.merge(base, [adapter], tmp_path / "out", MergeSpec(max_shard_size="200KB"))
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    expected = with_adapters(base, adapter)
    assert (expected - logits(in_transformers(base), tokens())).abs().max() > 0.1
    torch.testing.assert_close(merged(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_several_adapters_add_up(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32)
    one = tiny_adapter(tmp_path / "one", base, seed=1)
    two = tiny_adapter(tmp_path / "two", base, seed=2, modules=("q_proj", "up_proj"), use_rslora=True)
    qexport.merge(base, [one, two], tmp_path / "out")
    torch.testing.assert_close(merged(tmp_path / "out"), with_adapters(base, one, two), rtol=1e-4, atol=1e-4)


def test_sixteen_bits_are_rounded_once(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    adapters = [tiny_adapter(tmp_path / name, base, seed=n) for n, name in enumerate(("a", "b"))]
    qexport.merge(base, adapters, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    exact = load_file(base / "model.safetensors")[f"{name}.weight"].double()
    for adapter in adapters:
        held = load_file(adapter / "adapter_model.safetensors")
        a, b = (held[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        exact += 2.0 * b @ a
    written = load_file(tmp_path / "out" / "model.safetensors")
    # an fp32 sum may fall on the other side of a tie; two roundings to bf16 would differ far more often
    assert (written[f"{name}.weight"] != exact.to(torch.bfloat16)).float().mean() < 1e-3
    untouched = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(written[untouched], load_file(base / "model.safetensors")[untouched])


def test_lora_arithmetic() -> None:
    assert lora_scale(16, 4, rank_stabilized=False) == 4
    assert lora_scale(16, 4, rank_stabilized=True) == 8
    left, right = torch.randn(7, 3), torch.randn(3, 5)
    assert product_square(left, right) == pytest.approx(float((left @ right).norm()) ** 2, rel=1e-5)
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    expected = torch.tensor([[6.0, 8.0], [0.0, 1.0]])
    assert torch.equal(with_magnitude(weight, torch.tensor([10.0, 1.0])), expected)


def refused(base: Path, adapter: Path, out: Path, kind: type[Exception], pattern: str) -> None:
    with pytest.raises(kind, match=pattern):
        qexport.merge(base, [adapter], out)
    assert not out.exists()


def test_an_adapter_of_another_base_tells_how_it_differs(llama: Path, tmp_path: Path) -> None:
    wider = tiny_model(tmp_path / "wider", hidden_size=256)
    adapter = tiny_adapter(tmp_path / "adapter", wider)
    shapes = r"made for another base.*4 of its 4 tensors have other shapes.*\[128, 256\] in .*, \[256, 256\]"
    refused(llama, adapter, tmp_path / "out", AdapterError, shapes)
    deeper = tiny_model(tmp_path / "deeper", num_hidden_layers=3)
    adapter = tiny_adapter(tmp_path / "deep", deeper)
    refused(
        llama,
        adapter,
        tmp_path / "out",
        AdapterError,
        r"2 of its 6 modules are not in .*: model\.layers\.2\.mlp\.down_proj \(nearest: "
        r"model\.layers\.1\.mlp\.down_proj\), model\.layers\.2\.self_attn\.q_proj \(nearest: ",
    )


def test_half_a_pair_and_other_ranks(llama: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama)
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if "q_proj.lora_B" in name)
    save_file({key: value for key, value in whole.items() if key != name}, file)
    refused(llama, adapter, tmp_path / "out", AdapterError, "only lora_A of model.layers.0.self_attn.q_proj")
    save_file({**whole, name: torch.zeros(128, 5)}, file)
    refused(llama, adapter, tmp_path / "out", AdapterError, "ranks .* differ: lora_A has 4, lora_B 5")
    save_file({**whole, name: whole[name].to(torch.int8)}, file)
    refused(llama, adapter, tmp_path / "out", AdapterError, "holds torch.int8; floats")
    save_file({**whole, "base_model.model.lm_head.weight": torch.zeros(2)}, file)
    refused(llama, adapter, tmp_path / "out", AdapterError, r"other shapes; lm_head.weight is \[320, 128\]")
    save_file(whole, file)
    edit_json(adapter / "adapter_config.json", r=8)
    refused(llama, adapter, tmp_path / "out", AdapterError, "lora_A of .* has rank 4, its config says 8")


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING adapter and cannot be merged: it changes the input"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING adapter and cannot be merged: it adds keys"),
        ({"peft_type": "NEXT_YEARS"}, "PEFT does not take"),
        ({"peft_type": None}, "names no peft_type"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 0}, "r is 0; a rank of 1 or more"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1]; an object"),
        ({"alpha_pattern": {"q_proj(": 64}}, "the pattern 'q_proj(' is no regular expression"),
        ({"alpha_pattern": {"((.|.)+)+$^": 64}}, "the pattern '((.|.)+)+$^' takes too long"),
        ({"init_lora_weights": "corda"}, "was initialised by corda, which changed the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "was initialised by pissa_niter_4"),
        ({"layer_replication": [[0, 9]]}, "layer_replication is [[0, 9]]"),
    ],
)
def test_adapters_that_cannot_be_merged_say_why(
    llama: Path, tmp_path: Path, changes: dict[str, Any], pattern: str
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama)
    edit_json(adapter / "adapter_config.json", **changes)
    refused(llama, adapter, tmp_path / "out", AdapterError, re.escape(pattern))


class _Runs:
    """What a hostile pickle is made of."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickles_and_missing_files(llama: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama)
    qexport.merge(llama, [adapter], tmp_path / "safe")
    held, pickle = load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin"
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(held, pickle)
    qexport.merge(llama, [adapter], tmp_path / "tensors")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("safe", "tensors")]
    assert weights[0] == weights[1]
    torch.save({**held, "more": _Runs(tmp_path / "mark")}, pickle)
    refused(llama, adapter, tmp_path / "out", UnsafeFileError, "torch's weights-only loader refuses")
    assert not (tmp_path / "mark").exists()
    pickle.unlink()
    refused(llama, adapter, tmp_path / "out", AdapterError, "has no adapter_model.safetensors and no")
    (adapter / "adapter_config.json").unlink()
    refused(llama, adapter, tmp_path / "out", AdapterError, "has no adapter_config.json")


def test_nan_is_named(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "adapter", base)
    norm = torch.full((128,), torch.nan, dtype=torch.float16)
    edit_weights(base, **{"model.norm.weight": norm})
    refused(
        base, adapter, tmp_path / "out", NonFiniteError, r"base has NaN or infinity in model\.norm\.weight"
    )
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    name = next(name for name in held if "lora_A" in name)
    save_file({**held, name: torch.full_like(held[name], torch.inf)}, file)
    refused(llama, adapter, tmp_path / "out", NonFiniteError, r"adapter has NaN or infinity in .*lora_A")
    save_file({**held, name: torch.full_like(held[name], 3e38)}, file)  # finite itself, the product is not
    refused(llama, adapter, tmp_path / "out", NonFiniteError, "the merged model has NaN or infinity in")


def test_merging_twice_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama)
    with pytest.raises(AdapterError, match="is named twice; once: merging again doubles its change"):
        qexport.merge(llama, [adapter, adapter], tmp_path / "out")
    qexport.merge(llama, [adapter], tmp_path / "out")
    refused(tmp_path / "out", adapter, tmp_path / "again", AdapterError, "is merged into .*out already")


def test_cli(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama)
    out = tmp_path / "out"
    code, stdout, stderr = cli("merge", llama, "-a", adapter, "-o", out)
    assert (code, stderr) == (0, "")
    assert stdout == f"{out}: 673 KB, 4 of 20 tensors changed\n"
    code, stdout, stderr = cli("merge", llama, "-a", adapter, "-o", out)
    assert (code, stdout) == (2, "")
    assert stderr == f"error: {out} is there already; add --overwrite, or choose another place with -o\n"
    code, stdout, _ = cli("merge", llama, "-a", adapter, "-o", out, "--overwrite", "--json")
    assert code == 0
    assert json.loads(stdout)["tensors_changed"] == 4
    code, _, stderr = cli("merge", llama, "-a", tmp_path / "none", "-o", tmp_path / "other")
    assert code == 2
    assert stderr.startswith(f"error: adapter {tmp_path / 'none'} does not exist")


@pytest.mark.slow
def test_a_real_model_with_its_adapter(tmp_path: Path) -> None:
    base, adapter = shared("models", "captions22m"), shared("models", "captions22m-lora-en")
    qexport.merge(base, [adapter], tmp_path / "out")
    found, expected = merged(tmp_path / "out"), with_adapters(base, adapter)
    # bf16 weights: one rounding of the merged matrices
    assert (found - expected).norm() / expected.norm() < 0.01


def test_an_adapted_output_head_comes_with_a_copy_of_the_bases(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.float32, tied=False)
    adapter = tiny_adapter(tmp_path / "adapter", base, modules=("lm_head", "q_proj"))
    assert any("base_layer" in name for name in load_file(adapter / "adapter_model.safetensors"))
    qexport.merge(base, [adapter], tmp_path / "out")
    torch.testing.assert_close(merged(tmp_path / "out"), with_adapters(base, adapter), rtol=1e-4, atol=1e-4)
