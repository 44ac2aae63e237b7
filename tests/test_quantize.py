"""quantize: what qexport decodes from its own files is what the real runtime computes with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

import qexport
from qexport.calibrate.texts import read_documents
from qexport.errors import CalibrationError, NonFiniteError, SpecError, UnsupportedModelError
from qexport.grids.integer import IntegerGrid
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.modeling.whole import load_whole
from qexport.specs import AnyQuantizeSpec, GptqSpec, RtnSpec, spec_of
from tests.conftest import RunCli
from tests.tiny import (
    calibration_windows,
    edit_json,
    edit_weights,
    in_transformers,
    logits,
    tiny_model,
    tokens,
)

bnb: Any = bitsandbytes
Q_PROJ = "model.layers.0.self_attn.q_proj"


def decoded(path: Path) -> Any:
    """transformers' plain model with the weights that qexport decodes from the files."""
    return load_whole(build_skeleton(path), qexport.open_checkpoint(path))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [4, 8])
def test_bnb_is_what_transformers_and_bitsandbytes_load(tmp_path: Path, bits: int) -> None:
    # from 32 bits, so that bitsandbytes' own decoder rounds to 32 bits and equality is exact
    model = tiny_model(tmp_path / "model", dtype=torch.float32)
    qexport.quantize(model, tmp_path / "out", spec_of("bnb", bits=bits))
    theirs = in_transformers(tmp_path / "out")
    ours = qexport.open_checkpoint(tmp_path / "out")
    compared = 0
    for name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.CB.float() * module.weight.SCB[:, None] / 127
        else:
            continue
        torch.testing.assert_close(ours.read(f"{name}.weight"), weight, rtol=1e-6, atol=1e-7)
        compared += 1
    assert compared == 14
    # the runtime's kernels round activations to bf16 (4 bits) or int8 (8 bits)
    error = relative_error(logits(theirs, tokens()), logits(decoded(tmp_path / "out"), tokens()))
    assert error < (0.03 if bits == 4 else 0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_bnb_tensors_are_those_that_transformers_writes(llama: Path, tmp_path: Path, bits: int) -> None:
    from transformers import BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig
    config = (
        settings(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if bits == 4
        else settings(load_in_8bit=True)
    )
    model = in_transformers(llama, quantization_config=config, device_map="cpu", dtype=torch.float16)
    model.save_pretrained(tmp_path / "theirs")
    qexport.quantize(llama, tmp_path / "ours", spec_of("bnb", bits=bits))
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if "quant_state" in name:  # JSON: ours is padded with spaces to a size known beforehand
            read = [json.loads(bytes(t.numpy().tobytes())) for t in (ours[name], tensor)]
            assert read[0] == read[1]
        elif "proj" in name and name.endswith(".weight"):
            # bitsandbytes chooses 4-bit codes before it quantizes their scales, and rounds ties its own way
            assert (ours[name] != tensor).float().mean() < 0.02, name
        else:
            assert torch.equal(ours[name], tensor), name
    full = {n: t.float() for n, t in load_file(llama / "model.safetensors").items() if "proj" in n}
    errors = [
        sum(float((checkpoint.read(n) - t).square().sum()) for n, t in full.items())
        for checkpoint in map(qexport.open_checkpoint, (tmp_path / "ours", tmp_path / "theirs"))
    ]
    assert errors[0] <= errors[1]


def test_gptq_keeps_outputs_better_than_rounding(llama: Path, text: Path, tmp_path: Path) -> None:
    x = calibration_windows(read_documents(text), load_tokenizer(llama), samples=8, length=64, seed=9)
    full = logits(decoded(llama), x)
    errors = {}
    for bits in (4, 3, 2):
        gptq = GptqSpec.model_validate(
            {"bits": bits, "calibration": str(text), "samples": 32, "sequence_length": 64, "group_size": 32}
        )
        rtn = RtnSpec.model_validate({"bits": bits, "group_size": 32})
        for spec in (gptq, rtn):
            out = tmp_path / f"{spec.method}{bits}"
            qexport.quantize(llama, out, spec)
            errors[spec.method, bits] = float((logits(decoded(out), x) - full).pow(2).mean())
        assert errors["gptq", bits] < errors["rtn", bits]
    assert errors["gptq", 4] < errors["gptq", 3] < errors["gptq", 2]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_decodes_to_its_own_grid(llama: Path, tmp_path: Path, bits: int) -> None:
    result = qexport.quantize(llama, tmp_path / "out", RtnSpec.model_validate({"bits": bits}))
    original, written = qexport.open_checkpoint(llama), qexport.open_checkpoint(tmp_path / "out")
    grid = IntegerGrid(bits, 128)
    name = f"{Q_PROJ}.weight"
    weight = original.read(name)
    assert written.is_quantized(name)
    assert torch.equal(written.read(name), grid.decode(grid.encode(weight, grid.fit(weight))))
    norm = "model.norm.weight"
    assert torch.equal(written.read(norm), original.read(norm))
    assert result.quantized_layers == 14
    assert result.layer_bits_per_weight == pytest.approx(bits + (16 + bits) / 128, rel=0.2)


def test_gptq_config_is_told_in_both_files(llama: Path, text: Path, tmp_path: Path) -> None:
    spec = GptqSpec(calibration=str(text), samples=4, sequence_length=32)
    qexport.quantize(llama, tmp_path / "out", spec)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    expected = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    assert {key: config[key] for key in expected} == expected
    assert "dynamic" not in config
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    manifest = json.loads((tmp_path / "out" / "qexport.json").read_text())
    assert manifest["recipe"]["options"]["seed"] == 0
    assert set(manifest["recipe"]["inputs"]) == {"model", "calibration"}


def test_the_same_recipe_gives_the_same_bytes(llama: Path, text: Path, tmp_path: Path) -> None:
    spec = GptqSpec(bits=3, calibration=str(text), samples=8, sequence_length=32, seed=4)
    for name in ("one", "two"):
        qexport.quantize(llama, tmp_path / name, spec)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_like_architectures(model_type: str, text: Path, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"head_dim": 32} if model_type in ("qwen3", "mistral") else {}
    model = tiny_model(tmp_path / "model", model_type=model_type, tied=False, **extra)
    spec = GptqSpec(calibration=str(text), samples=4, sequence_length=32)
    for chosen in (spec, RtnSpec(bits=8), spec_of("bnb")):
        out = tmp_path / chosen.method
        assert qexport.quantize(model, out, chosen).quantized_layers == 14
        full, ours = logits(decoded(model), tokens()), logits(decoded(out), tokens())
        assert 0 < (full - ours).pow(2).mean() < full.pow(2).mean()


@pytest.mark.parametrize(
    ("size", "usable"),
    [(48, "16, 32, 64, 128, -1 (a whole row)"), (256, "16, 32, 64, 128, -1 (a whole row)")],
)
def test_a_group_size_that_does_not_divide_lists_those_that_do(
    llama: Path, tmp_path: Path, size: int, usable: str
) -> None:
    with pytest.raises(SpecError, match=f"group size {size} does not divide") as raised:
        qexport.quantize(llama, tmp_path / "out", RtnSpec(group_size=size))
    assert usable in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_widths_that_the_layout_cannot_hold_stay_as_they_were(text: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", dtype=torch.float32, intermediate_size=172)
    notes: list[Any] = []
    spec: AnyQuantizeSpec
    for spec in (RtnSpec(), GptqSpec(calibration=str(text), samples=4, sequence_length=32)):
        result = qexport.quantize(model, tmp_path / spec.method, spec, on_event=notes.append)
        assert len(result.layers_left) == 6
        config = json.loads((tmp_path / spec.method / "quantize_config.json").read_text())
        assert r"-:^model\.layers\.0\.mlp\.up_proj$" in config["dynamic"]
        assert "mlp.up_proj" not in config["modules_in_block_to_quantize"][0]
    assert any("6 of 14 linear layers stay in full precision" in str(note) for note in notes)
    # bitsandbytes' CPU kernels refuse 172 outputs, and misread 172 inputs (no whole blocks of 64)
    assert len(qexport.quantize(model, tmp_path / "bnb", spec_of("bnb")).layers_left) == 6
    theirs = in_transformers(tmp_path / "bnb")
    assert relative_error(logits(theirs, tokens()), logits(decoded(tmp_path / "bnb"), tokens())) < 0.03


def test_the_default_group_size_fits_the_model(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", intermediate_size=352)  # 352 = 11 x 32
    qexport.quantize(model, tmp_path / "out", RtnSpec())
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["group_size"] == 32


def test_nan_weights_are_named_before_the_work(llama: Path, text: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    weight = qexport.open_checkpoint(model).read(f"{Q_PROJ}.weight")
    weight[3, 5] = torch.inf
    edit_weights(model, **{f"{Q_PROJ}.weight": weight})
    with pytest.raises(NonFiniteError, match=rf"NaN or infinity in {Q_PROJ}\.weight"):
        qexport.quantize(model, tmp_path / "out", GptqSpec(calibration=str(text)))
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_quantized_says_so(llama: Path, text: Path, tmp_path: Path) -> None:
    qexport.quantize(llama, tmp_path / "four", spec_of("bnb"))
    with pytest.raises(UnsupportedModelError, match="is quantized already"):
        qexport.quantize(tmp_path / "four", tmp_path / "out", RtnSpec())
    stranger = tiny_model(tmp_path / "granite", model_type="granite")
    with pytest.raises(UnsupportedModelError, match=r"no architecture row for 'granite'.*bnb, eetq, rtn"):
        qexport.quantize(stranger, tmp_path / "out", GptqSpec(calibration=str(text)))
    assert qexport.quantize(stranger, tmp_path / "granite-rtn", RtnSpec()).quantized_layers == 14
    with pytest.raises(CalibrationError, match="is no file"):
        qexport.quantize(llama, tmp_path / "out", GptqSpec(calibration="nowhere.txt"))


def test_too_little_text_is_told(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a small model")
    notes: list[Any] = []
    spec = GptqSpec(calibration=str(tmp_path / "short.txt"), sequence_length=32)
    qexport.quantize(llama, tmp_path / "out", spec, on_event=notes.append)
    assert any("tokens, repeated to make one sample of 32" in str(note) for note in notes)


def test_cli_refuses_options_and_bits_of_other_methods(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    out = tmp_path / "out"
    code, _, err = cli("quantize", llama, "-o", out, "--method", "bnb", "--bits", "3")
    assert code == 2
    assert err.startswith("error: ")
    assert "3 bits" in err
    assert "mlx (read by mlx-lm)" in err
    code, _, err = cli("quantize", llama, "-o", out, "--method", "bnb", "--damp", "0.1")
    assert code == 2
    assert err.startswith("error: --damp is no option of solver rtn; it takes --max-shard-size, --format")
    code, _, err = cli("quantize", llama, "-o", out, "--method", "gptq", "--damp", "3")
    assert (code, err) == (2, "error: --damp 3.0: it should be less than 1\n")
    code, _, err = cli("quantize", llama, "-o", out, "--method", "gtpq")
    assert code == 2
    assert not out.exists()


def test_a_checkpoint_that_is_not_its_configs_model_is_refused_at_once(llama: Path, tmp_path: Path) -> None:
    path = shutil.copytree(llama, tmp_path / "model")
    edit_json(path / "config.json", num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"9 tensors unexpected \(model.layers.1"):
        qexport.quantize(path, tmp_path / "out", RtnSpec())
    edit_json(path / "config.json", num_hidden_layers=2, intermediate_size=128)
    with pytest.raises(UnsupportedModelError, match="6 tensors of the wrong shape"):
        qexport.quantize(path, tmp_path / "out", spec_of("bnb"))


def test_weights_of_other_dtypes_are_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model", dtype=torch.float64)
    for spec in (RtnSpec(), spec_of("bnb")):
        with pytest.raises(UnsupportedModelError, match=r"float64; weights in fp16, bf16 or fp32"):
            qexport.quantize(path, tmp_path / "out", spec)
