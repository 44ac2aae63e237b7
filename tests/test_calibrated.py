"""Calibrated methods end to end: what they write computes what the model did, and better than rounding."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qexport
from qexport.calibrate.texts import read_documents
from qexport.checkpoint.hashing import ALGORITHM, file_hash
from qexport.errors import NonFiniteError, OutputExistsError, SpecError
from qexport.events import Started
from qexport.methods import FORMATS
from qexport.modeling.blocks import BlockStream
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.modeling.whole import load_whole
from qexport.quantization.blockwise.lanes import stages
from qexport.specs import SOLVERS, AnyQuantizeSpec, CalibrationSpec, spec_of
from tests.conftest import RunCli
from tests.tiny import calibration_windows, edit_weights, logits, tiny_model, tokens
from tests.zoo import LENGTH, VARIANTS, ZOO

GetModel = Callable[[str], Path]
_MLX, _CT = ("mlx", "awq"), ("compressed-tensors", "awq+gptq")
# model, format, solver. mlx-lm has no OPT, compressed-tensors no Conv1D.
AWQ_CASES = [
    *(("llama", *_MLX), ("llama", *_CT), ("gemma2", *_MLX), ("phi3_as_many_kv_heads", *_MLX), ("opt", *_CT)),
    *(("mixtral", *_MLX), ("qwen3_moe", *_CT)),
]
MORE_AWQ_CASES = [
    *((name, *_MLX) for name in ("llama_as_many_kv_heads", "qwen2", "qwen3", "phi3", "gpt2")),
    *((name, *_MLX) for name in ("gpt_neox", "gemma3_text", "qwen3_moe_with_dense_layer", "qwen3_moe")),
    *(
        (name, *_CT)
        for name in ("llama_as_many_kv_heads", "gemma2", "opt_norms_after", "opt_gelu", "mixtral")
    ),
]
LOUD = (3, 40, 77, 101)  # channels of the norms that are made larger than all others


def decoded(path: Path) -> Any:
    """transformers' plain model with the weights that qexport decodes from the files."""
    return load_whole(build_skeleton(path), qexport.open_checkpoint(path))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def calibrated(method: str, text: Path, **options: Any) -> AnyQuantizeSpec:
    """A spec with a little text."""
    return spec_of(method, **{"calibration": str(text), "samples": 16, "sequence_length": 32, **options})


def windows_of(model: Path, text: Path, seed: int = 9) -> torch.Tensor:
    """Windows of the text, chosen by another seed than the calibration's."""
    return calibration_windows(read_documents(text), load_tokenizer(model), samples=8, length=64, seed=seed)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> GetModel:
    """Models of the zoo whose norms make a few channels far larger than the rest."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            path = {**ZOO, **VARIANTS}[name](tmp_path_factory.mktemp(name) / "model")
            changed: dict[str, torch.Tensor | None] = {}
            for key, tensor in load_file(path / "model.safetensors").items():
                if (
                    tensor.dim() == 1
                    and len(tensor) == 128
                    and ("norm" in key or ".ln_" in key)
                    and key.endswith("weight")
                ):
                    changed[key] = tensor.clone()
                    changed[key][list(LOUD)] = 8.0  # type: ignore[index]
            assert changed
            edit_weights(path, **changed)
            made[name] = path
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "format_name", "solver"),
    [*AWQ_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_AWQ_CASES)],
)
def test_awqs_scales_are_made_good_in_all_that_they_touch(
    name: str, format_name: str, solver: str, loud: GetModel, text: Path, tmp_path: Path
) -> None:
    """At 8 bits the model computes what it did: a norm, bias or router that was forgotten would be seen."""
    model = loud(name)
    out, plain = tmp_path / "out", tmp_path / "plain"
    spec = calibrated("awq", text, solver=solver, format=format_name, bits=8, group_size=32)
    result = qexport.quantize(model, out, spec)
    qexport.quantize(model, plain, spec_of("rtn", format=format_name, bits=8, group_size=32))

    batch = tokens(2, LENGTH)
    full = logits(decoded(model), batch)
    error, rounding = (distance(logits(decoded(path), batch), full) for path in (out, plain))
    assert 0 < error < max(1.5 * rounding, 0.01), (error, rounding)

    before, after = qexport.open_checkpoint(model), qexport.open_checkpoint(out)
    stream = BlockStream(build_skeleton(model).bound(before), before)
    layers = [layer.name for i in range(len(stream)) for group in stream.groups(i) for layer in group]
    assert sorted(error.tensor for error in result.tensors) == sorted(layers)
    assert result.quantized_layers == len(layers)
    for tensor in result.tensors:
        assert 0 < tensor.relative < 0.05, tensor
        assert tensor.weighted is not None, tensor
        assert 0 < tensor.weighted < 0.05, tensor
    touched: set[str] = set()
    for index in range(len(stream)):
        names = stream.stored_names(index)
        for fold in stream.folds(index):
            inner = [f"{fold.source}.weight", f"{fold.source}.bias", *(f"{t}.weight" for t in fold.targets)]
            touched |= {names[key] for key in inner if key in names}
    kept = [key for key in before.names() if key.removesuffix(".weight") not in layers]
    changed = {key for key in kept if not torch.equal(before.read(key), after.read(key))}
    assert changed  # else no scale was moved, and nothing was tested
    assert changed <= touched
    assert {after.info(key).dtype for key in changed} == {torch.float16}


def test_awq_beats_rounding_where_channels_are_loud(loud: GetModel, text: Path, tmp_path: Path) -> None:
    model = loud("llama")
    batch = windows_of(model, text)
    full = logits(decoded(model), batch)
    errors = {}
    for bits in (3, 4):
        for solver in ("rtn", "awq", "awq+gptq"):
            out = tmp_path / f"{solver}{bits}"
            options = {"format": "gptq_v2", "bits": bits, "group_size": 32, "symmetric": False}
            spec = spec_of("rtn", **options) if solver == "rtn" else None
            qexport.quantize(model, out, spec or calibrated("awq", text, solver=solver, **options))
            errors[solver, bits] = distance(logits(decoded(out), batch), full)
        assert errors["awq", bits] < 0.9 * errors["rtn", bits], errors
        assert errors["awq+gptq", bits] < errors["awq", bits], errors


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_awq_with_layers_left_out_stays_the_same_model(
    name: str, loud: GetModel, text: Path, tmp_path: Path
) -> None:
    """A kept layer whose input was scaled, or whose output feeds scaled columns, is rewritten to fit."""
    model = loud(name)
    dense = ("*.q_proj", "*.o_proj", "*.1.mlp", "*.0.mlp.up_proj")
    skip = dense if name == "llama" else ("*.q_proj", "*.w3", "model.layers.1.*.experts.*.w2")
    spec = calibrated("awq", text, format="mlx", bits=8, group_size=32, skip=skip)
    qexport.quantize(model, tmp_path / "out", spec)
    batch = tokens(2, LENGTH)
    assert distance(logits(decoded(tmp_path / "out"), batch), logits(decoded(model), batch)) < 0.05
    after = qexport.open_checkpoint(tmp_path / "out")
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not after.is_quantized(q_proj)
    assert not torch.equal(after.read(q_proj), qexport.open_checkpoint(model).read(q_proj))


# order of the inputs, static groups
ORDERS = [(order, static) for order in ("none", "full", "group-aware") for static in (True, False)]
# beside balanced effort and searched scales: each of the other ways meets all orders and both kinds of groups
MORE_WAYS = [
    (*ORDERS[number], *way)
    for way, numbers in (
        (("balanced", False), (0, 3, 4)),
        (("fast", True), (1, 2, 5)),
        (("fast", False), (0, 2, 5)),
        (("best", True), (0, 2, 4)),
    )
    for number in numbers
]


@pytest.fixture(scope="module")
def rounded(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, float]:
    """The full model's logits on the text, and how far rounding to 3 bits is from them."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    qexport.quantize(llama, out, spec_of("rtn", bits=3, group_size=32))
    batch = windows_of(llama, text)
    full = logits(decoded(llama), batch)
    return full, distance(logits(decoded(out), batch), full)


@pytest.mark.parametrize(
    ("order", "static", "effort", "search"),
    [
        *((*order, "balanced", True) for order in ORDERS),
        *(pytest.param(*way, marks=pytest.mark.slow) for way in MORE_WAYS),
    ],
)
def test_every_way_of_gptq_beats_rounding(
    order: str,
    static: bool,
    effort: str,
    search: bool,
    llama: Path,
    text: Path,
    rounded: tuple[torch.Tensor, float],
    tmp_path: Path,
) -> None:
    spec = calibrated(
        "gptq",
        text,
        bits=3,
        group_size=32,
        samples=32,
        sequence_length=64,
        effort=effort,
        search_scales=search,
        act_order=order,
        static_groups=static,
    )
    qexport.quantize(llama, tmp_path / "out", spec)
    full, rounding = rounded
    error = distance(logits(decoded(tmp_path / "out"), windows_of(llama, text)), full)
    assert error < 0.9 * rounding, (error, rounding)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    reordered = order == "full" and not static
    assert config["desc_act"] is reordered
    assert config["true_sequential"] is (effort != "fast")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    indices = [tensor for name, tensor in stored.items() if name.endswith(".g_idx")]
    assert len(indices) == 14
    for g_idx in indices:
        in_order = torch.arange(len(g_idx), dtype=g_idx.dtype) // 32
        assert torch.equal(g_idx, in_order) is not reordered
        assert torch.equal(g_idx.sort().values, in_order)


@pytest.mark.parametrize(
    ("method", "options"),
    [("gptq", {"group_size": -1}), ("awq", {"solver": "awq+gptq", "format": "gptq", "group_size": 32})],
)
def test_desc_act_is_not_told_where_groups_stay(
    method: str, options: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    """One group a row has no order; a clip search fits all groups before the first is solved."""
    out = tmp_path / "out"
    qexport.quantize(llama, out, calibrated(method, text, static_groups=False, **options))
    for name, tensor in load_file(out / "model.safetensors").items():
        if name.endswith(".g_idx"):
            assert torch.equal(tensor, tensor.sort().values)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["desc_act"] is False


@pytest.mark.parametrize(
    "options",
    [
        {"format": "compressed-tensors", "group_size": -1},
        {"format": "eetq", "bits": 8},
        {"format": "bitsandbytes", "bits": 8},
    ],
)
def test_formats_without_a_group_order_take_whole_rows(
    options: dict[str, Any], small: Path, text: Path, tmp_path: Path
) -> None:
    spec = calibrated("gptq", text, static_groups=False, **options)
    assert qexport.quantize(small, tmp_path / "out", spec).quantized_layers == 7


def test_what_each_layer_sees_depends_on_the_effort(llama: Path, text: Path, tmp_path: Path) -> None:
    """With little effort what the full model has there, whatever the layers before became; else those."""
    tensors = {}
    for effort in ("fast", "balanced"):
        for name, override in (("plain", ()), ("coarse", ("model.layers.0.self_attn.*=2",))):
            out = tmp_path / effort / name
            spec = calibrated("gptq", text, effort=effort, override=override)
            qexport.quantize(llama, out, spec)
            tensors[effort, name] = load_file(out / "model.safetensors")

    def same(effort: str, layer: str) -> bool:
        plain, coarse = (tensors[effort, name] for name in ("plain", "coarse"))
        keys = [key for key in plain if key.startswith(f"model.layers.{layer}.")]
        assert keys
        return all(torch.equal(plain[key], coarse[key]) for key in keys)

    later = ("0.mlp.gate_proj", "0.mlp.down_proj", "1.self_attn.q_proj", "1.mlp.down_proj")
    for layer in later:
        assert same("fast", layer), layer
        assert not same("balanced", layer), layer
    assert not same("fast", "0.self_attn.q_proj")  # else nothing was tested


# what cannot be: (solver, format) -> part of the message
REFUSED = {
    ("hqq", "bitsandbytes"): "zero points",
    ("hqq", "eetq"): "zero points",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of a Llama, heads not tied."""
    return tiny_model(tmp_path_factory.mktemp("small") / "model", num_hidden_layers=1, tied=False)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_any_solver_into_any_fitting_format(
    solver: str, format_name: str, small: Path, text: Path, tmp_path: Path
) -> None:
    """The errors told are those of the file: its weights are what the solver made, not something near it."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"solver": solver, "format": format_name, "lm_head": format_name != "awq"}
    options |= {"bits": 8} if format_name == "eetq" else {}
    needs_data = issubclass(SOLVERS[solver], CalibrationSpec)
    if "gptq" in solver:  # more effort goes for other weights than these: what makes up for changed inputs
        options["effort"] = "fast"
    spec = calibrated("gptq", text, **options) if needs_data else spec_of("rtn", **options)
    if (solver, format_name) in REFUSED:
        with pytest.raises(SpecError, match=REFUSED[solver, format_name]):
            qexport.quantize(small, out, spec)
        assert not out.exists()
        return
    result = qexport.quantize(small, out, spec)
    told = json.loads((out / "qexport.json").read_text())["figures"]["tensor_errors"]
    assert told == [asdict(error) for error in result.tensors]
    assert len(told) == result.quantized_layers == (7 if format_name == "awq" else 8)
    before, after = qexport.open_checkpoint(small), qexport.open_checkpoint(out)
    block = "model.layers.0."
    # AWQ's scales: what became of the norms tells them
    scales = {
        part: before.read(f"{block}{norm}.weight").float() / after.read(f"{block}{norm}.weight").float()
        for norm, part in (("input_layernorm", "qkv_proj"), ("post_attention_layernorm", "gate_up_proj"))
    }
    for error in told:
        name = f"{error['tensor']}.weight"
        assert after.is_quantized(name)
        W = before.read(name).float()
        leaf = error["tensor"].rpartition(".")[2]
        if solver.startswith("awq"):
            if leaf in ("up_proj", "down_proj"):
                continue  # the scale between the two is in no norm
            part = "qkv_proj" if leaf in ("q_proj", "k_proj", "v_proj") else "gate_up_proj"
            W = W * (scales[part] if leaf in ("q_proj", "k_proj", "v_proj", "gate_proj") else 1)
            assert distance(after.read(name).float(), W) == pytest.approx(error["relative"], rel=3e-3), name
        else:
            assert distance(after.read(name).float(), W) == pytest.approx(error["relative"], rel=1e-4), name
        assert (error["weighted"] is None) is (not needs_data or leaf == "lm_head"), name


def test_the_weighted_error_is_that_of_the_outputs(small: Path, text: Path, tmp_path: Path) -> None:
    """For the first layers, whose inputs nothing has changed: recomputed with transformers' own hooks."""
    spec = calibrated("gptq", text, bits=3, samples=8)
    result = qexport.quantize(small, tmp_path / "out", spec)
    model = decoded(small)
    name = "model.layers.0.self_attn.k_proj"
    seen: list[torch.Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    batch = calibration_windows(read_documents(text), load_tokenizer(small), samples=8, length=32, seed=0)
    logits(model, batch)
    handle.remove()
    x = seen[0].float()
    before, after = (
        qexport.open_checkpoint(p).read(f"{name}.weight").float() for p in (small, tmp_path / "out")
    )
    (error,) = [error for error in result.tensors if error.tensor == name]
    assert error.bits == 3
    assert error.weighted == pytest.approx(distance(x @ after.T, x @ before.T), rel=1e-3)


def test_the_manifest_tells_the_calibration(small: Path, text: Path, tmp_path: Path) -> None:
    spec = calibrated("gptq", text, samples=6, sequence_length=24, seed=5)
    qexport.quantize(small, tmp_path / "out", spec)
    figures = json.loads((tmp_path / "out" / "qexport.json").read_text())["figures"]
    calibration = figures["calibration"]
    assert {key: calibration[key] for key in ("samples", "length", "tokens", "seed")} == {
        "samples": 6,
        "length": 24,
        "tokens": 144,
        "seed": 5,
    }
    (source,) = calibration["sources"]
    assert source[ALGORITHM] == file_hash(text)
    assert source["samples"] == 6
    assert source["documents"] >= 1
    assert figures["quantized_layers"] == len(figures["tensor_errors"]) == 7
    for error in figures["tensor_errors"]:
        assert set(error) == {"tensor", "bits", "relative", "weighted"}
        assert math.isfinite(error["relative"])
        assert math.isfinite(error["weighted"])
    qexport.quantize(small, tmp_path / "rtn", spec_of("rtn"))
    figures = json.loads((tmp_path / "rtn" / "qexport.json").read_text())["figures"]
    assert "calibration" not in figures
    assert {error["weighted"] for error in figures["tensor_errors"]} == {None}


def test_the_terminal_shows_the_five_worst(llama: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    options = ("--calibration", text, "--samples", "4", "--sequence-length", "32", "--group-size", "32")
    out = tmp_path / "out"
    code, shown, _ = cli(
        *("quantize", llama, "-o", out, "--method", "gptq", *options),
        *("--override", "*.1.mlp.down_proj=2", "--override", "*.k_proj=2"),
    )
    assert code == 0
    errors = json.loads((out / "qexport.json").read_text())["figures"]["tensor_errors"]
    assert len(errors) == 14
    worst = sorted(errors, key=lambda error: -error["weighted"])[:5]
    first, header, *rows = shown.splitlines()
    assert "14 layers quantized" in first
    assert header.split("\t") == ["tensor", "bits", "relative error", "of outputs"]
    assert [row.split("\t") for row in rows] == [
        [e["tensor"], str(e["bits"]), f"{e['relative']:.2%}", f"{e['weighted']:.2%}"] for e in worst
    ]
    assert {e["tensor"].rpartition(".")[2] for e in worst[:3]} == {"down_proj", "k_proj"}

    code, shown, _ = cli("quantize", llama, "-o", tmp_path / "json", "--method", "gptq", *options, "--json")
    assert code == 0
    assert shown.count("\n") == 1
    result = json.loads(shown)
    assert len(result["tensors"]) == 14
    assert {*result["tensors"][0]} == {"tensor", "bits", "relative", "weighted"}
    assert result["path"] == str(tmp_path / "json")
    code, shown, _ = cli("quantize", llama, "-o", tmp_path / "quiet", "--method", "rtn", "--quiet")
    assert (code, shown) == (0, "")


def test_the_stages_of_a_block_are_its_groups(tmp_path: Path) -> None:
    """fc1 and fc2 of OPT are no experts, and so no one stage."""
    for name, expected in (("opt", 4), ("mixtral", 4), ("qwen3_moe", 4)):
        model = ZOO[name](tmp_path / name)
        stream = BlockStream(build_skeleton(model), qexport.open_checkpoint(model))
        found = stages(stream.groups(0))
        assert len(found) == expected
        if name == "opt":
            assert [[layer.inner for layer in stage[0]] for stage in found][2:] == [["fc1"], ["fc2"]]


def test_nothing_is_sampled_before_what_can_be_refused(llama: Path, tmp_path: Path) -> None:
    spec = spec_of("gptq", calibration="self", samples=2, sequence_length=16)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    stages_seen: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Started):
            stages_seen.append(event.stage)

    with pytest.raises(OutputExistsError):
        qexport.quantize(llama, tmp_path / "out", spec, on_event=listen)
    model = shutil.copytree(llama, tmp_path / "model")
    name = "model.layers.0.mlp.down_proj.weight"
    weight = qexport.open_checkpoint(model).read(name)
    weight[0, 0] = torch.nan
    edit_weights(model, **{name: weight})
    with pytest.raises(NonFiniteError, match=name):
        qexport.quantize(model, tmp_path / "two", spec, on_event=listen)
    assert stages_seen == ["check weights"]


def test_an_infinite_figure_is_null_in_the_manifest(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = torch.zeros_like(qexport.open_checkpoint(model).read(name))
    edit_weights(model, **{name: weight})
    qexport.quantize(model, tmp_path / "out", spec_of("rtn"))
    text = (tmp_path / "out" / "qexport.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_overrides_name_layers_as_they_are_called_in_memory_too(tmp_path: Path) -> None:
    model = VARIANTS["gpt2_without_prefix"](tmp_path / "model")
    spec = spec_of("gptq", solver="rtn", override=("h.0.*=8",))
    qexport.quantize(model, tmp_path / "out", spec)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    told = {name for name in config["dynamic"] if name.startswith("+:")}
    assert r"+:^h\.0\.mlp\.c_fc$" in told
    assert r"+:^transformer\.h\.0\.mlp\.c_fc$" in told
