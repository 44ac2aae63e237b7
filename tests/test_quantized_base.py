"""Merging into quantized bases: decoded, or replaced by the full-precision model that the adapter names.

bitsandbytes' own dequantization plus s * B @ A is the oracle; for GPTQ and AWQ it is the arithmetic of the
formats' papers on codes that were made here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import yaml
from safetensors.torch import load_file

import qexport
from qexport.errors import AdapterError, SpecError, UnsupportedModelError
from qexport.events import Event, Noted
from qexport.formats.packing import pack, unpack
from qexport.graph.recipe import parse_recipe
from qexport.modeling.skeleton import quiet_transformers
from qexport.specs import MergeSpec, RtnSpec, spec_of
from tests.conftest import RunCli
from tests.test_awq_format import awq_model
from tests.tiny import edit_json, edit_weights, in_transformers, logits, tiny_adapter, tiny_model, tokens

bnb: Any = bitsandbytes
MODULES = ("q_proj", "down_proj")
TOUCHED = [f"model.layers.{n}.{module}" for n in range(2) for module in ("self_attn.q_proj", "mlp.down_proj")]
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet_transformers()


@pytest.fixture(scope="module")
def lora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that names `llama`, which is in full precision, as its base. Not to be changed."""
    return tiny_adapter(tmp_path_factory.mktemp("lora") / "adapter", llama, modules=MODULES)


def renamed(lora: Path, out: Path, base: Path | str | None) -> Path:
    """The same adapter, which names another base."""
    shutil.copytree(lora, out)
    edit_json(out / "adapter_config.json", base_model_name_or_path=str(base) if base else None)
    return out


def by_bitsandbytes(source: Path, out: Path, **options: Any) -> Weights:
    """`source` as transformers and bitsandbytes save it; its linears as bitsandbytes itself decodes them."""
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    dtype = qexport.open_checkpoint(source).info("model.norm.weight").dtype
    model = in_transformers(source, quantization_config=config(**options), device_map="cpu", dtype=dtype)
    model.save_pretrained(out)
    decoded = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32  # unrounded
            decoded[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            codes, absmax = module.weight.data, module.weight.SCB
            decoded[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(codes, absmax)
    assert len(decoded) == 14
    return decoded


def four(kind: str, double: bool, storage: str = "uint8") -> Callable[[Path, Path], Weights]:
    return lambda source, out: by_bitsandbytes(
        source,
        out,
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=qexport.open_checkpoint(source).info("model.norm.weight").dtype,
    )


def ours_bnb(source: Path, out: Path) -> Weights:
    """What `qexport quantize --method bnb` writes; bitsandbytes' own packed bytes are in it."""
    qexport.quantize(source, out, spec_of("bnb", bits=4))
    stored = load_file(out / "model.safetensors")
    decoded = {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        parts = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in stored.items()
            if key.startswith(f"{name}.")
        }
        state = bnb.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = torch.float32
        decoded[name] = bnb.functional.dequantize_4bit(stored[name], state)
    return decoded


def gptq(bits: int, version: int, symmetric: bool) -> Callable[[Path, Path], Weights]:
    """Our own rounding's codes and scales; zero points of others' kind, in either version of the layout."""

    def make(source: Path, out: Path) -> Weights:
        qexport.quantize(source, out, RtnSpec(bits=bits, group_size=32))
        stored, changes, decoded = load_file(out / "model.safetensors"), dict[str, Any](), dict[str, Any]()
        generator = torch.Generator().manual_seed(bits)
        for name in [name for name in stored if name.endswith(".qweight")]:
            module = name.removesuffix(".qweight")
            codes, scales = unpack(stored[name], bits), stored[f"{module}.scales"]
            groups, width = scales.shape
            zeros = torch.full((groups, width), 1 << (bits - 1), dtype=torch.uint8)
            if not symmetric:
                zeros = torch.randint(1, 1 << bits, (groups, width), dtype=torch.uint8, generator=generator)
            written = zeros if version == 2 else zeros - 1
            changes[f"{module}.qzeros"] = pack(written.t().contiguous(), bits).t().contiguous()
            spread = [part.float().repeat_interleave(32, dim=0) for part in (zeros, scales)]
            decoded[f"{module}.weight"] = ((codes.float() - spread[0]) * spread[1]).t()
        edit_weights(out, **changes)
        content = json.loads((out / "config.json").read_text())
        content["quantization_config"].update(
            checkpoint_format="gptq_v2" if version == 2 else "gptq", sym=symmetric
        )
        (out / "config.json").write_text(json.dumps(content))
        assert (out / "quantize_config.json").is_file()
        return decoded

    return make


BASES: dict[str, Callable[[Path, Path], Weights]] = {
    "nf4": four("nf4", double=False),
    "nf4 double": four("nf4", double=True),
    "fp4": four("fp4", double=False),
    "fp4 double": four("fp4", double=True),
    "nf4 in bf16": four("nf4", double=True, storage="bfloat16"),
    "nf4 in fp16": four("nf4", double=False, storage="float16"),
    "fp4 in fp32": four("fp4", double=True, storage="float32"),
    "int8": lambda source, out: by_bitsandbytes(source, out, load_in_8bit=True),
    "ours nf4": ours_bnb,
    "gptq": gptq(4, 1, symmetric=True),
    "gptq v1 asymmetric": gptq(4, 1, symmetric=False),
    "gptq v2 asymmetric": gptq(4, 2, symmetric=False),
    "gptq 3 bits": gptq(3, 2, symmetric=False),
    "gptq 8 bits": gptq(8, 1, symmetric=False),
    "awq": awq_model,
}


def delta(adapter: Path, module: str) -> torch.Tensor:
    """s * B @ A, in fp64: alpha 8 over rank 4."""
    held = load_file(adapter / "adapter_model.safetensors")
    a, b = (held[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return 2.0 * b @ a


def told(work: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Noted):
            notes.append(event.text)

    return work(*arguments, on_event=listen), notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", BASES)
def test_decoded_and_merged(llama: Path, lora: Path, tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    full = llama if dtype == torch.float16 else tiny_model(tmp_path / "full", dtype=dtype)
    if dtype != torch.float16 and form.startswith(("awq", "gptq")):
        pytest.skip("its scales are fp16")
    base, out = tmp_path / "base", tmp_path / "out"
    decoded = BASES[form](full, base)
    adapter = renamed(lora, tmp_path / "adapter", None)
    result, notes = told(qexport.merge, base, [adapter], out)
    assert result.base_precision == "dequantize"
    assert any("base precision dequantize (" in note and "it names no base" in note for note in notes)
    written, untouched = load_file(out / "model.safetensors"), load_file(full / "model.safetensors")
    assert set(written) == set(untouched)
    changed = 0
    for name, tensor in written.items():
        assert tensor.dtype == dtype
        if name not in decoded:
            assert torch.equal(tensor, untouched[name])
            continue
        expected = decoded[name].double()
        module = name.removesuffix(".weight")
        if module in TOUCHED:
            expected += delta(adapter, module)
            changed += 1
        # decoded in fp32, summed in fp32, rounded once: half a step of the dtype and a little
        step = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
        torch.testing.assert_close(tensor.double(), expected, rtol=1.001 * step, atol=2e-6)
    assert changed == 4
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (out / "quantize_config.json").exists()
    found = logits(in_transformers(out), tokens())  # no key is missing, none is left over
    assert bool(found.isfinite().all())
    assert found.dtype == torch.float32
    assert "quantize" not in " ".join(path.name for path in out.iterdir())


@pytest.fixture(scope="module")
def quantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` in NF4. Not to be changed."""
    out = tmp_path_factory.mktemp("quantized") / "base"
    ours_bnb(llama, out)
    return out


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("wanted", ["full", None])
def test_the_full_precision_base_is_taken_if_it_can_be_had(
    llama: Path, quantized: Path, lora: Path, tmp_path: Path, cli: RunCli, wanted: str | None
) -> None:
    options = ["--base-precision", wanted] if wanted else []
    code, stdout, err = cli("merge", quantized, "-a", lora, "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert "4 of 20 tensors changed" in stdout
    qexport.merge(llama, [lora], tmp_path / "direct")
    assert weights(tmp_path / "out") == weights(tmp_path / "direct")
    full, coded = load_file(llama / "model.safetensors"), qexport.open_checkpoint(quantized)
    names = [name for name in coded.names() if coded.is_quantized(name)]
    apart = sum(float((coded.read(n).float() - full[n].float()).norm()) ** 2 for n in names)
    share = 100 * (apart / sum(float(full[n].float().norm()) ** 2 for n in names)) ** 0.5
    assert 5 < share < 15, "NF4 of normal weights"
    assert f"note: base precision full: {quantized} is quantized (bitsandbytes); merging into {llama}" in err
    measured = float(err.split("differ from the quantized ones by ")[1].split(" %")[0])
    assert abs(measured - share) < 1.5  # of a few layers
    figures = json.loads((tmp_path / "out" / "qexport.json").read_text())["figures"]
    assert (figures["base_precision"], figures["base"]) == ("full", str(llama))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_dequantize_is_done_when_asked_for(
    llama: Path, quantized: Path, lora: Path, tmp_path: Path, cli: RunCli
) -> None:
    code, _, err = cli(
        "merge", quantized, "-a", lora, "-o", tmp_path / "out", "--base-precision", "dequantize"
    )
    assert code == 0
    assert f"note: base precision dequantize: {quantized} is decoded from bitsandbytes" in err
    qexport.merge(quantized, [renamed(lora, tmp_path / "a", None)], tmp_path / "direct")
    assert weights(tmp_path / "out") == weights(tmp_path / "direct")
    qexport.merge(llama, [lora], tmp_path / "full")
    assert weights(tmp_path / "out") != weights(tmp_path / "full")


OTHERS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "gone": (None, "does not exist"),
    "wider": ({"hidden_size": 256}, "is another model: "),
    "shallower": ({"num_hidden_layers": 1}, "is another model: model.layers.1."),
    "deeper": ({"num_hidden_layers": 3}, "is another model: it has model.layers.2."),
    "untied": ({"tied": False}, "is another model: it has lm_head.weight too"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_base_that_is_not_to_be_had_is_refused_or_noted(
    quantized: Path, lora: Path, tmp_path: Path, cli: RunCli, other: str
) -> None:
    options, reason = OTHERS[other]
    full = tmp_path / "full"
    if options is not None:
        tiny_model(full, **options)
    adapter = renamed(lora, tmp_path / "adapter", full)
    arguments = ("merge", quantized, "-a", adapter, "-o", tmp_path / "out")
    code, stdout, err = cli(*arguments, "--base-precision", "full")
    assert (code, stdout, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: --base-precision full, but no full-precision base can be had: ")
    assert f"{adapter}: " in err
    assert reason in err
    assert not (tmp_path / "out").exists()
    code, _, err = cli(*arguments)
    assert code == 0
    assert "note: base precision dequantize (" in err
    assert reason in err
    assert "merging into that one usually scores better" in err


def test_a_quantized_model_is_no_full_precision_base(
    quantized: Path, lora: Path, tmp_path: Path, llama: Path
) -> None:
    adapter = renamed(lora, tmp_path / "adapter", quantized)
    with pytest.raises(AdapterError, match=r"the base it names, .*, is quantized too"):
        qexport.merge(quantized, [adapter], tmp_path / "out", MergeSpec(base_precision="full"))
    nameless = renamed(lora, tmp_path / "nameless", None)
    with pytest.raises(AdapterError, match="it names no base"):
        qexport.merge(quantized, [nameless], tmp_path / "out", MergeSpec(base_precision="full"))
    # of several adapters, one that names it is enough
    other = tiny_adapter(tmp_path / "other", llama, seed=5)
    result, notes = told(qexport.merge, quantized, [adapter, other], tmp_path / "out")
    assert result.base_precision == "full"
    assert len(notes) == 1


def test_a_choice_about_a_base_that_is_not_quantized(
    llama: Path, lora: Path, tmp_path: Path, cli: RunCli
) -> None:
    with pytest.raises(SpecError, match=r"--base-precision dequantize, but .* is not quantized"):
        qexport.merge(llama, [lora], tmp_path / "out", MergeSpec(base_precision="dequantize"))
    assert cli("merge", llama, "-a", lora, "-o", tmp_path / "full", "--base-precision", "full")[0] == 0
    qexport.merge(llama, [lora], tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "full")


@pytest.mark.parametrize("method", ["magic", "", None, 3, ["gptq"], "aqlm", "fp8"])
def test_an_unknown_quantization_is_refused(
    quantized: Path, lora: Path, tmp_path: Path, cli: RunCli, method: Any
) -> None:
    base = shutil.copytree(quantized, tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    content["quantization_config"]["quant_method"] = method
    (base / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match=r"is quantized by .*can be read so far"):
        qexport.merge(base, [lora], tmp_path / "out")
    code, _, err = cli("merge", base, "-a", lora, "-o", tmp_path / "out")
    assert (code, len(err.splitlines())) == (2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_nan_in_a_quantized_base_is_the_bases(
    quantized: Path, lora: Path, tmp_path: Path, cli: RunCli
) -> None:
    adapter = renamed(lora, tmp_path / "adapter", None)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        base = shutil.copytree(quantized, tmp_path / name)
        broken = load_file(base / "model.safetensors")[f"{name}.nested_absmax"].fill_(torch.nan)
        edit_weights(base, **{f"{name}.nested_absmax": broken})
        code, _, err = cli("merge", base, "-a", adapter, "-o", tmp_path / "out", "-q")
        assert code == 2, name
        assert err.startswith(f"error: {base} has NaN or infinity in {name}")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "nameless",
    [pytest.param(True, id="dequantize"), pytest.param(False, id="full", marks=pytest.mark.slow)],
)
def test_an_export_of_a_quantized_base_stands_the_second_time(
    quantized: Path, lora: Path, llama: Path, tmp_path: Path, nameless: bool
) -> None:
    full = shutil.copytree(llama, tmp_path / "full")
    adapter = renamed(lora, tmp_path / "adapter", None if nameless else full)
    recipe = parse_recipe(
        yaml.safe_dump(
            {
                "base": str(quantized),
                "adapters": str(adapter),
                "output": str(tmp_path / "out"),
                "quantize": [{"method": "rtn", "bits": 4}],
                "verify": {"max_documents": 2, "window": 32, "max_pairs": 5, "max_new_tokens": 4},
            }
        ),
        "recipe.yaml",
    )
    first = qexport.export(recipe)
    assert "merge" in first.ran
    made = weights(tmp_path / "out" / "merged")
    again = qexport.export(recipe)
    assert list(again.ran) == ["report"]
    assert "merge" in again.skipped
    assert weights(tmp_path / "out" / "merged") == made
    if not nameless:  # what was merged into is an input, though the recipe does not name it
        edit_weights(full, **{"model.norm.weight": torch.full((128,), 2.0, dtype=torch.float16)})
        assert "merge" in qexport.export(recipe).ran
        assert weights(tmp_path / "out" / "merged") != made


def test_a_dry_run_tells_the_same(quantized: Path, lora: Path, tmp_path: Path, cli: RunCli) -> None:
    adapter = renamed(lora, tmp_path / "adapter", None)
    code, stdout, err = cli("merge", quantized, "-a", adapter, "--dry-run", "--json")
    assert code == 0
    planned = json.loads(stdout)
    assert {entry["tensor"] for entry in planned["touched"]} == {f"{name}.weight" for name in TOUCHED}
    assert "base precision dequantize" in err
    qexport.merge(quantized, [adapter], tmp_path / "out")
    assert planned["size_bytes"] == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values()
    )
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == ["adapter"]
