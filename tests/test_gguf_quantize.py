"""quantize --method gguf as a whole: against llama-quantize, llama.cpp's own logits, and data-free files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import qexport
from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.gguf_files import gguf_files
from qexport.errors import GateError, SpecError, VerificationError
from qexport.events import Event, Noted
from qexport.formats.gguf.container import Header, PlannedTensor, Typed, read_header
from qexport.formats.gguf.container import text as said
from qexport.formats.gguf.splitting import read_model
from qexport.formats.gguf.tensors import gguf_tensors
from qexport.formats.gguf.writing import header_bytes, tensor_offsets
from qexport.modeling.calibration import calibration_data
from qexport.modeling.skeleton import Skeleton, build_skeleton, is_conv1d
from qexport.ollama import chat_reading
from qexport.ollama.chat_rendering import Render, Rendered, render_all
from qexport.quantization.imatrix import make_imatrix
from qexport.results import QuantizeResult
from qexport.specs import CalibrationSpec, spec_of
from qexport.verification.runtimes.check import (
    check_of,
    compare,
    job_for,
    our_logits,
    require_agreement,
    token_ids,
)
from qexport.verification.runtimes.process import require_python, run_jobs
from tests.conftest import RunCli
from tests.runtimes import run_in_runtime
from tests.tiny import edit_weights, in_transformers, logits, tiny_adapter, tiny_model, tokens
from tests.zoo import VARIANTS, ZOO, zoo_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("numba")

LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
# Rows of 256 for super-blocks; weights small enough that attention is not all or nothing, as in real models.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.08}
MIXTRAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}
QWEN3_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "head_dim": 64,
    "norm_topk_prob": True,
}
GPT2: dict[str, Any] = {
    "n_embd": 256,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "num_key_value_heads": 4,
}
GEMMA2: dict[str, Any] = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 80}


_rendered: dict[str, list[Rendered]] = {}


def render_once(template: str, renders: Sequence[Render], tokens: Mapping[str, Any]) -> list[Rendered]:
    key = repr((template, renders, tokens))
    if key not in _rendered:
        _rendered[key] = render_all(template, renders, tokens)
    return _rendered[key]


@pytest.fixture(autouse=True)
def _a_template_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each file's Modelfile a process renders its chat template, and all files here have the same one."""
    monkeypatch.setattr(chat_reading, "render_all", render_once)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows hold super-blocks, with a few channels that are much larger than the others."""
    path = tiny_model(tmp_path_factory.mktemp("wide") / "wide", **WIDE)
    return spiky(path)


def spiky(path: Path) -> Path:
    """Norms that make some channels large: what importance, GPTQ and AWQ are for."""
    norms = {k: v.clone() for k, v in load_file(path / "model.safetensors").items() if "layernorm" in k}
    for norm in norms.values():
        norm[::37] *= 12
    edit_weights(path, **norms)
    return path


def little(text: Path, **options: Any) -> dict[str, Any]:
    """A little calibration."""
    return {"calibration": (str(text),), "samples": 24, "sequence_length": 64, **options}


def make(source: Path, out: Path, *, adapters: Sequence[Path] = (), **options: Any) -> QuantizeResult:
    return qexport.quantize(source, out, spec_of("gguf", **options), adapters=adapters)


def file_of(result: QuantizeResult, number: int = 0) -> Path:
    return result.path / result.files[number].file


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor."""
    return {
        name: (tensor.type.name, tensor.shape, raw(tensor))
        for name, tensor in read_model(path).tensors.items()
    }


def raw(tensor: Any) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return bytes(file.read(tensor.size))


def types(path: Path) -> dict[str, str]:
    return {name: tensor.type.name for name, tensor in read_model(path).tensors.items()}


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """All values, by gguf-py's own reader and decoder."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def llama_quantize(source: Path, out: Path, file_type: int, *, pure: bool = False) -> Path:
    """What llama.cpp's own llama-quantize makes of a file."""
    llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp")
    llama_cpp.set_log_callback(lambda level, text: None)
    options = llama_cpp.LlamaModelQuantizeParams()
    options.ftype, options.pure, options.nthread = file_type, pure, 1
    llama_cpp.model_quantize(str(source), str(out), options)
    return out


# --- beside llama.cpp's own tool ---------------------------------------------------------------------


def test_legacy_types_are_llamacpps_byte_by_byte(llama: Path, tmp_path: Path) -> None:
    plain = file_of(make(llama, tmp_path / "f16", type="f16"))
    for name in LEGACY:
        override = (f"token_embd={name}",)  # as --pure has it; a tied head would get more bits
        result = make(llama, tmp_path / name, type=name, override=override)
        number = read_header(file_of(result)).plain()["general.file_type"]
        theirs = stored(llama_quantize(plain, tmp_path / f"{name}.gguf", number, pure=True))
        ours = stored(file_of(result))
        assert ours.keys() == theirs.keys()
        assert {kind for kind, shape, _ in ours.values() if len(shape) > 1} == {name}
        for tensor, found in ours.items():
            assert found == theirs[tensor], (name, tensor)


@pytest.mark.parametrize(
    "name",
    ["q4_k_m", pytest.param("q2_k", marks=pytest.mark.slow), pytest.param("iq4_xs", marks=pytest.mark.slow)],
)
def test_a_mix_is_llamacpps_with_no_larger_error(name: str, wide: Path, tmp_path: Path) -> None:
    plain = file_of(make(wide, tmp_path / "f32", type="f32"))
    mine = file_of(make(wide, tmp_path / "ours", type=name))
    settings = read_header(mine).plain()
    theirs = llama_quantize(plain, tmp_path / "theirs.gguf", settings["general.file_type"])
    assert types(mine) == types(theirs)
    told = read_header(theirs).plain()
    for key in ("general.file_type", "general.quantization_version", "general.name", "general.size_label"):
        assert settings[key] == told[key], key
    full, ours, others = decoded(plain), decoded(mine), decoded(theirs)
    for tensor, weight in full.items():
        lost, allowed = ((found[tensor] - weight).square().sum() for found in (ours, others))
        assert lost <= allowed * 1.0001, tensor


# --- several types, splits, patterns -----------------------------------------------------------------


def test_several_types_of_one_read_are_those_of_several(wide: Path, text: Path, tmp_path: Path) -> None:
    for options in ({}, little(text)):
        wanted = ("q4_k_m", "q8_0") if options else ("q4_k_m", "q6_k", "q8_0", "bf16")
        together = make(wide, tmp_path / "all", type=wanted, **options)
        assert [file.type for file in together.files] == list(wanted)
        for number, name in enumerate(wanted):
            alone = make(wide, tmp_path / name, type=name, **options)
            assert file_of(alone).name == file_of(together, number).name == f"wide-{name.upper()}.gguf"
            assert file_of(alone).read_bytes() == file_of(together, number).read_bytes()
            assert alone.files[0] == together.files[number]
            modelfile = (alone.path / "Modelfile").read_text()
            own = f"Modelfile.wide-{name.upper()}"
            assert (together.path / own).read_text() == modelfile.replace("-f Modelfile", f"-f {own}")
            assert f"FROM ./wide-{name.upper()}.gguf\n" in modelfile
            _remove(alone.path)
        smallest = json.loads((together.path / "qexport.json").read_text())["figures"]["files"]
        assert list(smallest) == [file.file for file in together.files]
        assert together.bits_per_weight == together.files[0].bits_per_weight
        assert together.size_bytes == sum(file.size_bytes for file in together.files)
        _remove(together.path)


def _remove(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def test_a_split_model_is_the_whole_one_in_llamacpp(wide: Path, tmp_path: Path) -> None:
    whole = make(wide, tmp_path / "whole", type="q4_k_m")
    split = make(wide, tmp_path / "split", type="q4_k_m", max_shard_size="150KB")
    assert file_of(split).name == "wide-Q4_K_M-00001-of-00006.gguf"
    assert len(list(split.path.glob("*.gguf"))) == 6
    assert stored(file_of(split)) == stored(file_of(whole))
    ids = tokens()
    runs = run_in_runtime("llamacpp", [file_of(whole), file_of(split)], ids, tmp_path / "logits")
    (one, first), (other, second) = runs
    assert "error" not in one, one
    assert "error" not in other, other
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_overrides_and_what_is_skipped(wide: Path, tmp_path: Path) -> None:
    plain = types(file_of(make(wide, tmp_path / "plain", type="q4_k_m")))
    override = ("blk.*.ffn_*=q5_k", "blk.*.ffn_down=q6_k", "blk.1.ffn_down.weight=iq4_nl", "token_embd=q8_0")
    result = make(wide, tmp_path / "out", type="q4_k_m", override=override, skip=("blk.0.attn_?",))
    found = types(file_of(result))
    changed = {name: kind for name, kind in found.items() if plain[name] != kind}
    assert changed == {
        "token_embd.weight": "q8_0",
        **{f"blk.{block}.ffn_{leaf}.weight": "q5_k" for block in (0, 1) for leaf in ("gate", "up")},
        **({} if plain["blk.0.ffn_down.weight"] == "q6_k" else {"blk.0.ffn_down.weight": "q6_k"}),
        "blk.1.ffn_down.weight": "iq4_nl",
        **{f"blk.0.attn_{leaf}.weight": "f16" for leaf in "qkv"},
    }
    assert set(result.layers_left) == {f"blk.0.attn_{leaf}.weight" for leaf in "qkv"}
    assert result.quantized_layers == 12
    assert {error.bits for error in result.tensors} == {4, 5, 6, 8}


def test_the_bits_of_a_type_are_told(wide: Path, tmp_path: Path) -> None:
    for name, bits in (("q2_k", 2), ("q6_k", 6), ("q5_0", 5), ("q8_0", 8)):
        result = make(wide, tmp_path / name, type=name)
        assert result.bits == bits
        assert {e.bits for e in result.tensors if e.tensor == "blk.0.attn_q.weight"} == {bits}
        assert result.files[0].types["f32"] == 5
    assert make(wide, tmp_path / "default").files[0].type == "q4_k_m"
    assert qexport.quantize(wide, tmp_path / "8", spec_of("gguf", bits=8)).files[0].type == "q8_0"


# --- with activations --------------------------------------------------------------------------------

Values = Mapping[str, torch.Tensor]


def inputs_of(model: Path, text: Path) -> dict[str, torch.Tensor]:
    """What each linear layer of transformers' own model is fed on the calibration windows."""
    checkpoint = qexport.open_checkpoint(model)
    spec = CalibrationSpec(**little(text))
    windows = calibration_data(checkpoint.path, spec, build_skeleton(model), on_event=lambda _: None).windows
    theirs, seen = in_transformers(model, dtype=torch.float32), {}

    def see(module: Any, args: tuple[torch.Tensor, ...], name: str) -> None:
        seen[f"{name}.weight"] = args[0].reshape(-1, args[0].shape[-1])

    for name, module in theirs.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(partial(see, name=f"model.{name}"))
    with torch.no_grad():
        theirs(windows)
    return seen


def output_errors(file: Path, weights: Values, inputs: Values) -> dict[str, float]:
    """|(W' - W) x| / |W x| of each layer of a file."""
    checkpoint = qexport.open_checkpoint(file)
    found = {}
    for name, x in inputs.items():
        weight = weights[name].float()
        lost = (checkpoint.read(name).float() - weight) @ x.T
        found[name] = float(lost.norm() / (weight @ x.T).norm())
    return found


@pytest.fixture(scope="module")
def measured(wide: Path, text: Path) -> tuple[Values, Values]:
    """The weights of `wide`, and what its layers are fed."""
    return load_file(wide / "model.safetensors"), inputs_of(wide, text)


def test_importance_out_of_a_text_is_that_of_its_matrix(wide: Path, text: Path, tmp_path: Path) -> None:
    spec = CalibrationSpec(**little(text))
    made = {form: make_imatrix(wide, tmp_path / form, spec) for form in ("m.gguf", "m.dat")}
    matrix = made["m.gguf"]
    gathered = make(wide, tmp_path / "gathered", type="iq2_xs", **little(text))
    given = make(wide, tmp_path / "given", type="iq2_xs", imatrix=str(tmp_path / "m.gguf"))
    assert gathered.solver == given.solver == "importance"
    assert stored(file_of(gathered)) == stored(file_of(given))
    assert gathered.tensors == given.tensors
    # the old form has other floats: means times calls
    new, old = (
        decoded(file_of(make(wide, tmp_path / f"{form}-q4", type="q4_0", imatrix=str(tmp_path / form))))
        for form in made
    )
    assert max(float((old[name] - new[name]).norm() / new[name].norm()) for name in new) < 0.02
    settings = read_header(file_of(given)).plain()
    assert settings["quantize.imatrix.file"] == "m.gguf"
    assert settings["quantize.imatrix.dataset"] == text.name
    assert settings["quantize.imatrix.entries_count"] == len(matrix.entries) == 14
    assert settings["quantize.imatrix.chunks_count"] == matrix.chunk_count > 1


@pytest.mark.parametrize(
    "kind",
    [
        "q4_k_m",
        "q2_k",
        pytest.param("iq4_xs", marks=pytest.mark.slow),
        pytest.param("q4_0", marks=pytest.mark.slow),
    ],
)
def test_importance_lowers_the_weighed_error(
    kind: str, wide: Path, text: Path, measured: tuple[Values, Values], tmp_path: Path
) -> None:
    """By sums of our own: sum_j h_j (W' - W)_j^2, h the mean square of the inputs."""
    weights, inputs = measured
    with_data = make(wide, tmp_path / "with", type=kind, **little(text))
    override = [f"{n}={t}" for n, t in types(file_of(with_data)).items() if t not in ("f32", "f16")]
    without = make(wide, tmp_path / "without", type=kind, override=tuple(override))  # the same types
    names = names_of(wide)
    told = {names[error.tensor]: error for error in with_data.tensors if error.weighted is not None}
    assert told.keys() == inputs.keys()
    ours, plain = (qexport.open_checkpoint(file_of(result)) for result in (with_data, without))
    total = [0.0, 0.0]
    for name, x in inputs.items():
        h, weight = x.square().mean(dim=0), weights[name].float()
        lost = [float(((c.read(name) - weight).square() @ h).sum()) for c in (ours, plain)]
        relative = (lost[0] / float((weight.square() @ h).sum())) ** 0.5
        assert told[name].weighted == pytest.approx(relative, rel=1e-3)
        assert lost[0] <= lost[1] * 1.02, name
        total = [sum(pair) for pair in zip(total, lost, strict=True)]
    assert total[0] < 0.9 * total[1]


def names_of(model: Path) -> dict[str, str]:
    """The tensor on disk of each of the file's; of experts, as in the results."""
    checkpoint = qexport.open_checkpoint(model)
    return {
        tensor.name if part.expert is None else f"{tensor.name}[{part.expert}]": part.name
        for tensor in gguf_tensors(checkpoint, build_skeleton(checkpoint))
        for part in tensor.parts
    }


@pytest.mark.parametrize(
    "kind",
    [
        "q4_k_m",
        pytest.param("q3_k_s", marks=pytest.mark.slow),
        pytest.param("q4_0", marks=pytest.mark.slow),
        pytest.param("iq4_xs", marks=pytest.mark.slow),
    ],
)
def test_error_feedback_beats_search_on_what_layers_are_fed(
    kind: str, wide: Path, text: Path, measured: tuple[Values, Values], tmp_path: Path
) -> None:
    weights, inputs = measured
    searched = make(wide, tmp_path / "search", type=kind)
    # more effort goes for other weights than these: what makes up for inputs that have changed
    solved = make(wide, tmp_path / "solved", type=kind, solver="gptq", effort="fast", **little(text))
    assert (solved.method, solved.solver, solved.format) == ("gguf", "gptq", "gguf")
    assert types(file_of(solved)).keys() == types(file_of(searched)).keys()
    before, after = (output_errors(file_of(result), *measured) for result in (searched, solved))
    assert all(after[name] < before[name] for name in inputs), (before, after)
    assert sum(after.values()) < 0.75 * sum(before.values())
    # what is told of the layers is what lies in the file
    names, opened = names_of(wide), qexport.open_checkpoint(file_of(solved))
    told = {error.tensor: error for error in solved.tensors}
    assert {names[tensor] for tensor, error in told.items() if error.weighted is not None} == inputs.keys()
    for tensor, error in told.items():
        weight = weights[names[tensor]].float()
        lost = float((opened.read(names[tensor]) - weight).norm() / weight.norm())
        assert error.relative == pytest.approx(lost, rel=1e-4), tensor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "model_type"), [("awq", "llama"), ("awq+gptq", "llama"), ("awq", "gemma2"), ("awq", "gpt2")]
)
def test_awqs_scales_go_into_the_norms_and_out_again(
    solver: str, model_type: str, wide: Path, text: Path, tmp_path: Path
) -> None:
    """Norm times weight is what it was, but for the rounding; the logits are nearer than without."""
    if model_type == "llama":
        model = wide
    else:
        options = GEMMA2 if model_type == "gemma2" else GPT2
        model = spiky(zoo_model(tmp_path / "model", model_type, **{**WIDE, **options}))
    checkpoint = qexport.open_checkpoint(model)
    skeleton = build_skeleton(checkpoint)
    spec = CalibrationSpec(**little(text))
    ids = calibration_data(model, spec, skeleton, on_event=lambda _: None).windows[:4]
    full = our_logits(skeleton, checkpoint, ids)
    errors, files = {}, {}
    for name in ("search", solver):
        calibration = {} if name == "search" else little(text, grid_points=8)
        files[name] = file_of(make(model, tmp_path / name, type="q3_k_s", solver=name, **calibration))
        opened = qexport.open_checkpoint(files[name])
        errors[name] = compare(our_logits(build_skeleton(opened), opened, ids), full)[0]
    assert errors[solver] < errors["search"], errors
    one, other = stored(files["search"]), stored(files[solver])
    moved = {n for n, (_, shape, content) in one.items() if len(shape) == 1 and content != other[n][2]}
    assert any("norm" in name for name in moved), "no scale was found worth it"
    if model_type == "llama":
        weights, opened = load_file(model / "model.safetensors"), qexport.open_checkpoint(files[solver])
        for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            norm = f"model.layers.0.{'post_attention' if 'mlp' in layer else 'input'}_layernorm.weight"
            name = f"model.layers.0.{layer}.weight"
            assert not torch.equal(opened.read(norm).float(), weights[norm].float()), layer
            product = opened.read(name) * opened.read(norm).float()
            wanted = weights[name].float() * weights[norm].float()
            assert (product - wanted).norm() < 0.35 * wanted.norm(), layer


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("solver", ["importance", pytest.param("gptq", marks=pytest.mark.slow)])
def test_experts_stand_in_their_order(model_type: str, solver: str, text: Path, tmp_path: Path) -> None:
    options = MIXTRAL if model_type == "mixtral" else QWEN3_MOE
    wide = {**WIDE, "intermediate_size": 256, "tied": False}
    model = zoo_model(tmp_path / "model", model_type, **{**wide, **options})
    # more effort goes for other weights than these: what makes up for inputs that have changed
    effort: dict[str, Any] = {"effort": "fast"} if solver == "gptq" else {}
    result = make(model, tmp_path / "out", type="q4_k_m", solver=solver, **little(text), **effort)
    weights, opened = load_file(model / "model.safetensors"), qexport.open_checkpoint(file_of(result))
    assert set(opened.names()) == weights.keys()
    stacks = [s for n, (_, s, _) in stored(file_of(result)).items() if "_exps" in n]
    assert stacks == [(4, 256, 256)] * 6
    for name, weight in weights.items():
        lost = float((opened.read(name).float() - weight.float()).norm() / weight.float().norm())
        assert lost < (0.25 if solver == "gptq" else 0.1), name
    if solver == "gptq":
        told = {error.tensor: error.relative for error in result.tensors}
        names = names_of(model)
        assert sum("_exps" in name for name in told) == 2 * 3 * 4
        for tensor, relative in told.items():
            weight = weights[names[tensor]].float()
            lost = float((opened.read(names[tensor]) - weight).norm() / weight.norm())
            assert relative == pytest.approx(lost, rel=1e-4), tensor


def test_what_the_calibrated_solvers_do_not_see_is_said(text: Path, tmp_path: Path) -> None:
    """Experts that lie fused on disk: importance sees them, GPTQ does not."""
    notes: list[Event] = []
    model = VARIANTS["mixtral_fused"](tmp_path / "model")
    spec = spec_of("gguf", type="q4_0", solver="gptq", **little(text))
    result = qexport.quantize(model, tmp_path / "gptq", spec, on_event=notes.append)
    (note,) = [event.text for event in notes if isinstance(event, Noted) and "fused" in event.text]
    assert "6 tensors of experts that lie fused are encoded without data" in note
    blind = {error.tensor for error in result.tensors if error.weighted is None}
    assert blind == {name for name in types(file_of(result)) if "_exps" in name} | {
        "token_embd.weight",
        "output.weight",
    }
    seen = make(model, tmp_path / "importance", type="q4_0", **little(text))
    assert all(e.weighted is not None for e in seen.tensors if "_exps" in e.tensor)
    apart = make(ZOO["mixtral"](tmp_path / "apart"), tmp_path / "two", type="q4_0", **little(text))
    assert stored(file_of(apart)) == stored(file_of(seen))


def test_types_without_single_codes(wide: Path, text: Path, tmp_path: Path) -> None:
    """GPTQ has nothing to feed back in IQ2: the layers are searched by importance; AWQ is refused at once."""
    notes: list[Event] = []
    spec = spec_of("gguf", type="iq2_xs", solver="gptq", **little(text))
    result = qexport.quantize(wide, tmp_path / "gptq", spec, on_event=notes.append)
    (note,) = [event.text for event in notes if isinstance(event, Noted) and "feedback" in event.text]
    assert "iq2_xs: 12 layers get types without codes to be rounded one by one" in note
    assert all(error.relative < 0.6 for error in result.tensors)
    for solver in ("awq", "awq+gptq"):
        with pytest.raises(SpecError, match="no codes to be rounded one by one"):
            make(wide, tmp_path / "awq", type="iq2_xs", solver=solver, **little(text))
    assert not (tmp_path / "awq").exists()


# --- adapters ----------------------------------------------------------------------------------------


def test_adapters_are_merged_as_they_are_read(wide: Path, text: Path, tmp_path: Path) -> None:
    adapters = [
        tiny_adapter(tmp_path / name, wide, seed=seed, modules=("q_proj", "gate_proj", "down_proj"))
        for seed, name in enumerate(("first", "my-tune"))
    ]
    qexport.merge(wide, adapters, tmp_path / "merged")
    for options in (
        {"type": "q4_k_m"},
        little(text, type="q4_0"),
    ):
        number = len(list(tmp_path.iterdir()))
        direct = make(wide, tmp_path / f"direct{number}", adapters=adapters, **options)
        merged = make(tmp_path / "merged", tmp_path / f"two{number}", **options)
        assert stored(file_of(direct)) == stored(file_of(merged)), options
        assert direct.tensors == merged.tensors
        ours, theirs = (read_header(file_of(result)) for result in (direct, merged))
        assert without(ours, "general.") == without(theirs, "general.")
    assert file_of(direct).name == "my-tune-Q4_0.gguf"
    settings = ours.plain()
    assert settings["general.name"] == "My Tune"
    assert settings["general.base_model.count"] == 1
    assert settings["general.base_model.0.name"] == "Wide"
    inputs = json.loads((direct.path / "qexport.json").read_text())["recipe"]["inputs"]
    assert inputs.keys() == {"base", "adapter 1", "adapter 2", "calibration"}


def without(header: Header, prefix: str) -> dict[str, Typed]:
    return {key: value for key, value in header.metadata.items() if not key.startswith(prefix)}


# --- llama.cpp computes the same ---------------------------------------------------------------------


def smooth(directory: Path, name: str) -> Path:
    """A model of the zoo with weights small enough that rounding does not make it another one."""
    maker: Any = ZOO[name]
    window = {"sliding_window": 80} if name == "mistral" else {}
    return Path(maker(directory, initializer_range=0.05, **window))


@pytest.mark.slow
def test_llamacpp_computes_what_we_decode(text: Path, tmp_path: Path) -> None:
    """Architectures x types that the table of test_support.py has not, by one process of llama.cpp."""
    made: dict[str, Path] = {}

    def add(name: str, model: Path, **options: Any) -> None:
        made[name] = file_of(make(model, tmp_path / name, **options))

    # the architectures by turns: which tensors a file has and where does not depend on their types
    for number, name in enumerate(sorted(ZOO.keys() - {"llama", "opt"})):
        kind = ("q8_0", "q4_0")[number % 2]
        add(f"{name}-{kind}", smooth(tmp_path / "zoo" / name, name), type=kind)
    plain = tiny_model(tmp_path / "plain", **WIDE)
    for kind in ("q4_k_m", "q5_k_s", "q3_k_m", "q2_k", "q6_k", "iq4_xs", "tq2_0"):
        add(f"plain-{kind}", plain, type=kind)
    for kind in ("iq3_s", "iq3_xxs", "iq2_m", "iq2_xxs"):
        add(f"plain-{kind}", plain, type=kind, **little(text))
    wider = {**WIDE, "intermediate_size": 256, "tied": False}
    experts = zoo_model(tmp_path / "experts", "mixtral", **{**wider, **MIXTRAL})
    add("experts-gptq", experts, type="q4_k_m", solver="gptq", **little(text))
    add("experts-mxfp4", experts, type="mxfp4")
    folded = zoo_model(tmp_path / "folded", "gemma2", **{**WIDE, **GEMMA2})
    add("folded-awq", folded, type="q4_k_m", solver="awq", **little(text, grid_points=4))
    assert agreement(made, tmp_path / "logits") == {}


def agreement(files: Mapping[str, Path], work: Path) -> dict[str, str]:
    """What `require_agreement` has against each file, if anything; one process for all.

    llama.cpp rounds what goes into layers of codes to 8 bits: its logits may differ by what that does.
    """
    pytest.importorskip("cyllama")
    work.mkdir()
    checkpoints = {name: qexport.open_checkpoint(file) for name, file in files.items()}
    skeletons = {name: build_skeleton(checkpoint.path) for name, checkpoint in checkpoints.items()}
    jobs = [
        job_for(checkpoint, token_ids(skeletons[name]), work / f"{name}.npy")
        for name, checkpoint in checkpoints.items()
    ]
    outcomes = run_jobs("llamacpp", jobs)
    python, said = require_python(None), {}
    for (name, checkpoint), job, outcome in zip(checkpoints.items(), jobs, outcomes, strict=True):
        skeleton = skeletons[name]
        loaded = "error" not in outcome and not outcome["missing"]
        allowed = 2 * rounding(skeleton, checkpoint, torch.tensor(job["ids"])) + 1e-3 if loaded else 0
        try:
            check = check_of(outcome, job, "llamacpp", checkpoint, skeleton, python=python, tolerance=allowed)
            require_agreement(check)
        except (VerificationError, GateError) as error:
            said[name] = str(error)
    return said


def rounding(skeleton: Skeleton, checkpoint: Checkpoint, ids: torch.Tensor) -> float:
    """How far our logits move when the inputs of all layers are rounded as llama.cpp does.

    ggml's Q8_K (256 values a scale) for super-blocks, Q8_0 (32 values) for others; for both where types are
    mixed the finer one.
    """
    kinds = {tensor.type.values for tensor in read_model(gguf_files(checkpoint.path)[0]).tensors.values()}
    width = 32 if 32 in kinds else 256
    exact = our_logits(skeleton, checkpoint, ids)

    def round_inputs(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        step = width if x.shape[-1] % width == 0 else 32
        blocks = x.reshape(-1, step)
        scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        return ((blocks / scale).round().mul(scale).reshape(x.shape), *args[1:])

    named = skeleton.model.named_modules()
    modules = [m for n, m in named if is_linear(m) and not n.endswith((".gate", ".router"))]
    handles = [module.register_forward_pre_hook(round_inputs) for module in modules]
    with torch.no_grad():
        moved = skeleton.model(ids).logits.float()
    for handle in handles:
        handle.remove()
    return compare(moved, exact)[0]


def is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def rewritten(
    source: Path,
    out: Path,
    *,
    drop: str = "",
    contents: Mapping[str, bytes] | None = None,
    settings: Mapping[str, Typed] | None = None,
) -> Path:
    """A GGUF file with a tensor left out, bytes of others changed, or other settings."""
    header = read_header(source)
    kept = {name: tensor for name, tensor in header.tensors.items() if name != drop}
    planned = [PlannedTensor(name, tensor.type, tensor.shape) for name, tensor in kept.items()]
    content = bytearray(header_bytes({**header.metadata, **(settings or {})}, planned))
    begin, offsets = len(content), tensor_offsets(planned)
    for tensor in planned:
        content += bytes(begin + offsets[tensor.name] - len(content))
        content += (contents or {}).get(tensor.name, raw(kept[tensor.name]))
    out.write_bytes(content + bytes(-len(content) % 32))
    return out


def test_what_llamacpp_makes_of_broken_files_is_told(llama: Path, tmp_path: Path) -> None:
    file = file_of(make(llama, tmp_path / "out", type="q4_0"))
    content = stored(file)
    assert stored(rewritten(file, tmp_path / "whole.gguf")) == content
    name = "blk.1.attn_k.weight"
    nan = b"\x00\x7e" + content[name][2][2:]  # the first block's scale
    files = {
        "whole": tmp_path / "whole.gguf",
        "nan": rewritten(file, tmp_path / "nan.gguf", contents={name: nan}),
        "missing": rewritten(file, tmp_path / "missing.gguf", drop="blk.0.attn_norm.weight"),
        "pre": rewritten(file, tmp_path / "pre.gguf", settings={"tokenizer.ggml.pre": said("no-such-one")}),
    }
    found = agreement(files, tmp_path / "logits")
    assert found.keys() == files.keys() - {"whole"}
    assert "cannot run" in found["nan"]
    assert f"tensor '{name}' has invalid data" in found["nan"]
    assert "blk.0.attn_norm.weight" in found["missing"]
    assert "unknown pre-tokenizer type: 'no-such-one'" in found["pre"]


def test_a_broken_table_of_tensors_is_told_without_llamacpp(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    file = file_of(make(llama, tmp_path / "out", type="q4_0"))
    content, number = bytearray(file.read_bytes()), content_place(file, "blk.1.attn_k.weight")
    content[number] = 99  # its type
    (tmp_path / "type.gguf").write_bytes(content)
    code, said_out, err = cli("verify", tmp_path / "type.gguf", "--runtime", "llamacpp")
    assert (code, said_out) == (2, "")
    assert "blk.1.attn_k.weight" in err
    assert "99" in err


def content_place(file: Path, name: str) -> int:
    """Where the number of a matrix's type stands: behind its name, the count of its sides and the sides."""
    return file.read_bytes().index(name.encode()) + len(name) + 4 + 2 * 8


def test_a_name_that_llamacpp_takes_for_phi_3(llama: Path, tmp_path: Path) -> None:
    """It would ask for tokens of Phi-3, and not load the file."""
    pytest.importorskip("cyllama")
    notes: list[Event] = []
    model = tmp_path / "my-phi3-tune"
    model.symlink_to(llama)
    result = qexport.quantize(model, tmp_path / "out", spec_of("gguf", type="q8_0"), on_event=notes.append)
    assert read_header(file_of(result)).plain()["general.name"] == "My Phi 3 Tune"
    assert any("'My Phi 3 Tune'" in event.text for event in notes if isinstance(event, Noted))
    assert agreement({"phi": file_of(result)}, tmp_path / "logits") == {}


# --- back, and from other formats --------------------------------------------------------------------


def test_an_output_is_replaced_by_another(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    call = ["quantize", llama, "-o", tmp_path / "out", "--method", "gguf", "--overwrite", "--type"]
    assert cli(*call, "q8_0,q4_0")[0] == 0
    code, _, err = cli(*call, "q5_0")
    assert code == 0, err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "LICENSE",
        "Modelfile",
        "README.md",
        "qexport.json",
        f"{llama.name}-Q5_0.gguf",
    }
    (tmp_path / "out" / "mine.txt").write_text("x")
    code, _, err = cli(*call, "q5_0")
    assert code == 2
    assert "mine.txt" in err


def test_sizes_told_are_those_of_the_files(wide: Path, tmp_path: Path) -> None:
    whole = make(wide, tmp_path / "whole", type="q8_0")
    assert whole.files[0].size_bytes == file_of(whole).stat().st_size
    split = make(wide, tmp_path / "split", type="q8_0", max_shard_size=200_000)
    parts = list((tmp_path / "split").glob("*.gguf"))
    assert len(parts) > 1
    assert split.files[0].size_bytes == sum(part.stat().st_size for part in parts)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_gguf_becomes_safetensors_again(kind: str, llama: Path, tmp_path: Path, cli: RunCli) -> None:
    file = file_of(make(llama, tmp_path / "gguf", type=kind))
    code, told, err = cli("convert", file, "-o", tmp_path / "back")
    assert code == 0, err
    assert told == f"{tmp_path / 'back'}: 20 tensors, 674 KB\n"
    note = "note: 15 tensors are decoded: what their quantization lost stays lost\n"
    assert err == ("" if kind == "f16" else note)
    ids, opened = tokens(), qexport.open_checkpoint(file)
    theirs = logits(in_transformers(tmp_path / "back", dtype=torch.float32), ids)
    ours = our_logits(build_skeleton(opened), opened, ids)
    assert compare(theirs, ours)[0] < (1e-6 if kind == "f16" else 5e-3)  # decoded weights became fp16
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("many words").input_ids == (
        AutoTokenizer.from_pretrained(llama)("many words").input_ids
    )
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_quantized_checkpoints_become_gguf(llama: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    for method in ("rtn", "awq", "bnb"):
        spec = spec_of(method, **({"bits": 4} if method != "awq" else little(text, samples=4)))
        qexport.quantize(llama, tmp_path / method, spec)
        options = ("--method", "gguf", "--type", "f32")
        code, _, err = cli("quantize", tmp_path / method, "-o", tmp_path / f"{method}-gguf", *options)
        assert code == 0, err
        assert "is quantized already" in err
        assert "what was lost there stays lost" in err
        before = qexport.open_checkpoint(tmp_path / method)
        after = qexport.open_checkpoint(tmp_path / f"{method}-gguf")
        for name in before.names():
            assert torch.equal(before.read(name).float(), after.read(name)), (method, name)


def test_a_gguf_in_other_types(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    """From F16 all is as from the model itself; what the file says of the model goes along."""
    (tmp_path / "tiny-one").symlink_to(llama)
    plain = file_of(make(tmp_path / "tiny-one", tmp_path / "f16", type="f16"))
    card = {"general.license": said("mit"), "general.name": said("Tiny One, by hand")}
    plain = rewritten(plain, tmp_path / "tiny-one-F16.gguf", settings=card)
    direct = make(tmp_path / "tiny-one", tmp_path / "direct", type="q4_0")
    code, told, err = cli("quantize", plain, "-o", tmp_path / "again", "--method", "gguf", "--type", "q4_0")
    assert code == 0, err
    assert told.startswith(f"{tmp_path / 'again' / 'tiny-one-Q4_0.gguf'}: gguf q4_0, ")
    again = tmp_path / "again" / "tiny-one-Q4_0.gguf"
    assert stored(again) == stored(file_of(direct))
    ours, theirs = read_header(again).metadata, read_header(file_of(direct)).metadata
    assert {key for key in ours if ours[key] != theirs.get(key)} == {"general.license", "general.name"}
    assert theirs.keys() <= ours.keys()
    assert ours["general.name"].value == "Tiny One, by hand"
