"""quantize on bad input: one line that says what to do, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qexport
from qexport.methods import FORMATS
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.whole import load_whole
from qexport.specs import spec_of
from tests.conftest import RunCli
from tests.tiny import edit_weights, logits, tiny_model, tokens
from tests.zoo import ZOO

BITS = {
    "gptq": (2, 3, 4, 8),
    "gptq_v2": (2, 3, 4, 8),
    "awq": (4,),
    "hqq": (1, 2, 3, 4, 5, 6, 8),
    "bitsandbytes": (4, 8),
    "compressed-tensors": (4, 8),
    "mlx": (2, 3, 4, 5, 6, 8),
    "eetq": (8,),
}
IMPOSSIBLE_BITS = [
    (name, bits) for name, has in BITS.items() for bits in (1, 2, 3, 4, 5, 6, 8) if bits not in has
]


@pytest.fixture
def refused(cli: RunCli, tmp_path: Path) -> Any:
    """Runs `quantize` that must refuse; gives the line. Nothing may have come into being."""

    def call(model: Path, *options: str | Path) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, shown, err = cli("quantize", model, "-o", tmp_path / "out", *options)
        assert (code, shown) == (2, ""), (code, shown, err)
        assert "Traceback" not in err
        *notes, line = err.splitlines()
        assert line.startswith("error: "), err
        assert not [note for note in notes if note.startswith("error")], err
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        return line

    return call


@pytest.fixture
def little(text: Path) -> tuple[str, ...]:
    """Options for a little calibration."""
    return ("--calibration", str(text), "--samples", "8", "--sequence-length", "32")


def data(text: Path, **options: Any) -> dict[str, Any]:
    """The same for the library."""
    return {"calibration": str(text), "samples": 8, "sequence_length": 32, **options}


@pytest.mark.parametrize(("format_name", "bits"), IMPOSSIBLE_BITS)
def test_bits_that_a_format_has_not(
    format_name: str, bits: int, llama: Path, tmp_path: Path, refused: Any
) -> None:
    """The formats that have them are listed, each with its runtimes, and each takes them indeed."""
    line = refused(llama, "--method", "rtn", "--format", format_name, "--bits", str(bits))
    assert f"{bits} bits" in line
    listed = re.findall(r"([\w-]+) \(read by ([^)]+)\)", line)
    assert {name for name, _ in listed} == {name for name, has in BITS.items() if bits in has}
    for name, runtimes in listed:
        assert runtimes == " and ".join(FORMATS[name].runtimes)


@pytest.mark.parametrize("name", BITS)
def test_the_bits_of_a_format_are_taken(name: str, llama: Path, tmp_path: Path) -> None:
    """So the remedy of the refusals above is one."""
    for bits in BITS[name]:
        spec = spec_of("rtn", format=name, bits=bits)
        assert qexport.quantize(llama, tmp_path / str(bits), spec).bits == bits


@pytest.mark.parametrize(
    ("format_name", "size"),
    [
        *(("gptq", size) for size in ("48", "0", "-2", "8", "4096", "7")),
        *(("awq", size) for size in ("48", "0", "256")),
        *(("mlx", size) for size in ("16", "-1", "256", "0")),
        *(("hqq", size) for size in ("12", "0", "-64", "1024")),
        *(("compressed-tensors", size) for size in ("16", "0", "256")),
        *(("bitsandbytes", size) for size in ("32", "-1", "0")),
        *(("eetq", size) for size in ("64", "0")),
    ],
)
def test_group_sizes_that_cannot_be(format_name: str, size: str, llama: Path, refused: Any) -> None:
    bits = "8" if format_name == "eetq" else "4"
    options = ("--method", "rtn", "--format", format_name, "--bits", bits, "--group-size", size)
    line = refused(llama, *options)
    assert re.search(rf"group(s| size) (of )?{size}\b", line), line


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--method", "bnb", "--bits", "3"), ["bitsandbytes with 3 bits", "mlx (read by mlx-lm)"]),
        (("--method", "gptq", "--format", "eetq"), ["eetq with 4 bits", "8 bits"]),
        (("--method", "hqq", "--symmetric"), ["HQQ moves the zero", "--no-symmetric"]),
        (("--method", "hqq", "--format", "gptq", "--symmetric"), ["HQQ moves the zero", "gptq"]),
        (("--method", "hqq", "--format", "mlx", "--symmetric"), ["HQQ moves the zero", "mlx"]),
        (("--method", "hqq", "--format", "bitsandbytes"), ["bitsandbytes", "zero"]),
        (("--method", "hqq", "--format", "eetq", "--bits", "8"), ["eetq", "zero"]),
        (("--method", "bnb", "--no-symmetric"), ["bitsandbytes with zero points"]),
        (("--method", "bnb", "--bits", "8", "--quant-type", "nf4"), ["8 bits", "4 bits"]),
        (("--method", "rtn", "--calibration", "x.txt"), ["--calibration is no option of solver rtn"]),
        (("--method", "gptq", "--clip"), ["--clip is no option of solver gptq"]),
        (("--method", "awq", "--damp", "0.1"), ["--damp is no option of solver awq"]),
        (("--method", "gptq", "--solver", "hqq", "--damp", "0.1"), ["--damp is no option of solver hqq"]),
        (("--method", "gptq", "--solver", "gtpq"), ["gtpq", "gptq"]),
        (("--method", "gptq", "--samples", "0"), ["--samples"]),
        (("--method", "gptq", "--sequence-length", "4"), ["--sequence-length"]),
        (("--method", "awq", "--grid-points", "0"), ["--grid-points"]),
    ],
)
def test_options_that_do_not_go_together(
    options: tuple[str, ...], parts: list[str], llama: Path, refused: Any
) -> None:
    line = refused(llama, *options)
    for part in parts:
        assert part in line


@pytest.mark.parametrize("format_name", ["gptq", "gptq_v2", "awq", "hqq", "compressed-tensors", "mlx"])
@pytest.mark.parametrize("options", [("--quant-type", "nf4"), ("--double-quant",), ("--no-double-quant",)])
def test_bitsandbytes_own_options_are_not_passed_over(
    format_name: str, options: tuple[str, ...], llama: Path, refused: Any
) -> None:
    line = refused(llama, "--method", "rtn", "--format", format_name, *options)
    assert "bitsandbytes" in line


@pytest.mark.parametrize("format_name", ["awq", "mlx", "hqq", "compressed-tensors"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_reordered_groups_go_into_gptq_alone(
    format_name: str, method: str, llama: Path, little: tuple[str, ...], refused: Any
) -> None:
    solver = ("--solver", "awq+gptq", "--no-clip") if method == "awq" else ()
    line = refused(llama, "--method", method, *solver, "--format", format_name, "--no-static-groups", *little)
    assert "--static-groups, or a format that has: gptq, gptq_v2" in line
    assert format_name in line


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_architecture_without_a_row(
    method: str, tmp_path: Path, little: tuple[str, ...], refused: Any
) -> None:
    model = tiny_model(tmp_path / "granite", model_type="granite")
    line = refused(model, "--method", method, *little)
    assert "no architecture row for 'granite'" in line
    for free in ("bnb", "eetq", "hqq", "mlx", "rtn"):
        assert re.search(rf"\b{free}\b", line), line


def test_an_output_that_is_there_is_not_touched(llama: Path, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for method in ("rtn", "gptq"):
        assert str(tmp_path / "out") in refused(llama, "--method", method)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", BITS)
def test_a_model_that_is_quantized_already(
    name: str, llama: Path, tmp_path: Path, little: tuple[str, ...], refused: Any
) -> None:
    quantized = tmp_path / "quantized"
    qexport.quantize(llama, quantized, spec_of("rtn", format=name, bits=8 if name == "eetq" else 4))
    for options in (("--method", "rtn"), ("--method", "bnb"), ("--method", "gptq", *little)):
        line = refused(quantized, *options)
        assert "is quantized already" in line


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "no"),
        ('{"messages": []}\n', "record 1"),
        ('{"label": 3}\n', "record 1"),
        ('{"text": "a"}\n{"text": 3}\n', "record 2"),
        ("{", "line 1"),
    ],
)
def test_calibration_records_that_hold_no_text(
    content: str, part: str, llama: Path, tmp_path: Path, refused: Any
) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text(content)
    line = refused(llama, "--method", "gptq", "--calibration", source)
    assert "data.jsonl" in line
    assert part in line


def test_a_mixture_of_experts_into_hqq(tmp_path: Path, refused: Any) -> None:
    model = ZOO["mixtral"](tmp_path / "mixtral")
    line = refused(model, "--method", "hqq")
    assert "mixture of experts" in line
    assert "gptq" in line


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        # infinite only once the gate's and the other's outputs are multiplied
        (
            ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.down_proj",
        ),
        (("model.layers.1.input_layernorm.weight",), "model.layers.1.self_attn.q_proj"),
        (("model.layers.0.self_attn.v_proj.weight",), "model.layers.0.self_attn.o_proj"),
    ],
)
@pytest.mark.parametrize("options", [("gptq",), ("awq",), ("awq", "--solver", "awq+gptq")], ids="-".join)
def test_activations_that_overflow_name_their_layer(
    change: tuple[str, ...],
    layer: str,
    options: tuple[str, ...],
    tmp_path: Path,
    little: tuple[str, ...],
    refused: Any,
) -> None:
    """Weights are all finite. In the middle of the work; an older output that was to be replaced stays."""
    model = tiny_model(tmp_path / "model", dtype=torch.float32)
    weights = load_file(model / "model.safetensors")
    # scales of 32 bits: in 16 the grid's end would hide it
    written = ("--method", *options, "--format", "mlx", *little)
    qexport.quantize(model, tmp_path / "out", spec_of("rtn"))
    edit_weights(model, **{name: weights[name] * 1e25 for name in change})
    line = refused(model, *written, "--overwrite")
    assert re.search(rf"{re.escape(layer)}\b", line), line
    assert qexport.open_checkpoint(tmp_path / "out").is_quantized("model.layers.0.mlp.up_proj.weight")


def check_whole(path: Path, model: Path, largest: float) -> None:
    """All weights finite, and the logits not far from the model's."""
    after = qexport.open_checkpoint(path)
    for name in after.names():
        assert after.read(name).isfinite().all(), name
    full = logits(load_whole(build_skeleton(model), qexport.open_checkpoint(model)), tokens())
    found = logits(load_whole(build_skeleton(path), after), tokens())
    assert (found - full).norm() <= largest * full.norm()


def _ids(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else ",".join(map(str, value.values()))


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {}),
    ("gptq", {"act_order": "none", "static_groups": False}),
    ("gptq", {"static_groups": False, "search_scales": False}),
    ("gptq", {"act_order": "group-aware", "static_groups": False}),
    ("awq", {}),
    ("awq", {"solver": "awq+gptq"}),
]


@pytest.mark.parametrize(("method", "options"), WAYS, ids=_ids)
def test_dead_channels(method: str, options: dict[str, Any], llama: Path, text: Path, tmp_path: Path) -> None:
    """Zeros on the Hessian's diagonal: single inputs, a whole group, and the inputs of a later layer."""
    model = tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    changed: dict[str, torch.Tensor | None] = {}
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"):
        norm = weights[name].clone()
        norm[[5, 70]] = 0
        norm[32:64] = 0
        changed[name] = norm
    up = weights["model.layers.0.mlp.up_proj.weight"].clone()
    up[:40] = 0
    edit_weights(model, **changed, **{"model.layers.0.mlp.up_proj.weight": up})
    spec = spec_of(method, **data(text, bits=8, format="gptq", group_size=32, **options))
    result = qexport.quantize(model, tmp_path / "out", spec)
    assert len(result.tensors) == 14
    for error in result.tensors:
        assert error.relative < 0.05, error
        assert error.weighted is not None
        assert error.weighted < 0.05, error
    check_whole(tmp_path / "out", model, 0.1)


@pytest.mark.parametrize(("method", "options"), WAYS, ids=_ids)
def test_a_model_that_computes_nothing(
    method: str, options: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    """All inputs of all layers are zero, and some weights too."""
    model = tiny_model(tmp_path / "model", num_hidden_layers=1, tied=False)
    weights = load_file(model / "model.safetensors")
    zero = {name: torch.zeros_like(weights[name]) for name in weights if "embed" in name or "v_proj" in name}
    edit_weights(model, **zero)
    spec = spec_of(method, **data(text, format="gptq", group_size=32, **options))
    result = qexport.quantize(model, tmp_path / "out", spec)
    assert {error.weighted for error in result.tensors} == {0.0}
    errors = {error.tensor.rpartition(".")[2]: error.relative for error in result.tensors}
    assert errors.pop("v_proj") == 0
    assert 0 < max(errors.values()) < 0.2
    check_whole(tmp_path / "out", model, 0)


@pytest.mark.parametrize(("method", "options"), WAYS, ids=_ids)
def test_too_few_tokens_are_told_with_the_number_wanted(
    method: str, options: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    notes: list[Any] = []
    few = data(text, samples=1, sequence_length=16, format="gptq", group_size=32, **options)
    result = qexport.quantize(llama, tmp_path / "out", spec_of(method, **few), on_event=notes.append)
    told = [str(note) for note in notes if "too few" in str(note)]
    assert len(told) == 1
    assert "16 calibration tokens are too few for layers of 256 inputs; at least 256 are wanted" in told[0]
    assert "better 2560: --samples, --sequence-length" in told[0]
    # what 16 tokens do not tell is not thrown away
    assert max(error.relative for error in result.tensors) < 0.5
    check_whole(tmp_path / "out", llama, 1.0)
    notes.clear()
    enough = data(text, samples=8, sequence_length=32, format="gptq", group_size=32, **options)
    qexport.quantize(llama, tmp_path / "enough", spec_of(method, **enough), on_event=notes.append)
    assert not [note for note in notes if "too few" in str(note)]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_that_no_token_chose(name: str, method: str, text: Path, tmp_path: Path) -> None:
    """Two of four always win: the others are rounded, and a note says so."""
    model = ZOO[name](tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    routers = [key for key in stored if key.endswith((".gate.weight", ".router.weight"))]
    assert len(routers) == 2
    edit_weights(model, **{key: torch.zeros_like(stored[key]) for key in routers})
    notes: list[Any] = []
    way = {"search_scales": False, "static_groups": True} if method == "gptq" else {"clip": False}
    spec = spec_of(method, **data(text, format="gptq", group_size=32, **way))
    result = qexport.quantize(model, tmp_path / "out", spec, on_event=notes.append)
    unseen = {error.tensor for error in result.tensors if error.weighted is None}
    assert len(unseen) == 2 * 2 * 3
    assert all(".experts." in layer for layer in unseen)
    (note,) = [str(note) for note in notes if "saw no token" in str(note)]
    assert "12 layers of experts saw no token and were rounded" in note
    assert all(math.isfinite(error.relative) for error in result.tensors)
    manifest = json.loads((tmp_path / "out" / "qexport.json").read_text())["figures"]
    assert {e["tensor"] for e in manifest["tensor_errors"] if e["weighted"] is None} == unseen
    if method == "gptq":
        qexport.quantize(model, tmp_path / "rtn", spec_of("rtn", group_size=32))
        one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "rtn"))
        for layer in unseen:
            assert torch.equal(one[f"{layer}.qweight"], other[f"{layer}.qweight"]), layer


def test_experts_that_few_tokens_chose(text: Path, tmp_path: Path) -> None:
    model = ZOO["mixtral"](tmp_path / "model")
    notes: list[Any] = []
    spec = spec_of("gptq", **data(text))
    qexport.quantize(model, tmp_path / "out", spec, on_event=notes.append)
    (note,) = [str(note) for note in notes if "saw fewer tokens than they have inputs" in str(note)]
    assert re.search(r"\d+ layers of experts .*\.experts\.", note)
