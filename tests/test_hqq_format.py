"""HQQ's layout: hqq's own quantizer and loader are the oracle."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qexport
from qexport.errors import CorruptFileError, SpecError, UnsafeFileError, UnsupportedModelError
from qexport.formats import hqq, hqq_safetensors
from qexport.formats.format import Facts, Wish
from qexport.grids.grid import encode
from qexport.grids.integer import IntegerCodes, IntegerGrid, Zero
from tests.encoded import Written, require_decoded, write_encoded
from tests.tiny import edit_weights, in_transformers, logits, tiny_model, tokens
from tests.zoo import zoo_model

Q_PROJ = "model.layers.0.self_attn.q_proj"
KINDS: Sequence[Zero] = ("middle", "float")


def random_weight(out: int, inputs: int) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(out + inputs))


def own_layer(weight: torch.Tensor, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """hqq's own layer, not optimized: it is the layout that counts here."""
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(**{"group_size": 32, **settings})
    config["weight_quant_params"]["optimize"] = False
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return quantize.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("zero", KINDS)
@pytest.mark.parametrize("bits", hqq.BITS)
@pytest.mark.parametrize(("group", "out", "inputs"), [(32, 24, 96), (-1, 16, 72)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hqq_decodes_what_we_write(
    zero: Zero, bits: int, group: int, out: int, inputs: int, dtype: torch.dtype
) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    grid = IntegerGrid(bits, group, zero, dtype)
    weight = random_weight(out, inputs)
    codes = encode(grid, weight, grid.fit(weight))
    layer = quantize.HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    made = {name.removeprefix("m."): tensor for name, tensor in hqq.encode("m", codes, grid).items()}
    layer.load_state_dict(dict(made))
    assert layer.meta["shape"] == (out, inputs)
    assert (layer.meta["nbits"], layer.meta["axis"]) == (bits, 1)
    torch.testing.assert_close(layer.dequantize(), grid.decode(codes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", hqq.BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_our_tensors_are_those_of_hqqs_own_layer(bits: int, dtype: torch.dtype) -> None:
    """The same names, dtypes and shapes; the same bytes when the scales are the same."""
    theirs = own_layer(random_weight(24, 96), dtype, nbits=bits).state_dict()
    scales, zeros = (theirs[part].reshape(24, 3) for part in ("scale", "zero"))
    packing = hqq._PACKINGS[bytes(theirs["packing"].tolist()).decode()]
    codes = hqq._unpack(theirs["W_q"].data, packing, 72).reshape(24, 96)
    grid = IntegerGrid(bits, 32, "float", dtype)
    made = hqq.encode("m", IntegerCodes(codes, scales, zeros), grid)
    assert {f"m.{name}" for name in theirs} == made.keys()
    settings = {"optimize", "round_zero"}  # ours say what ours are
    for name, tensor in theirs.items():
        ours = made[f"m.{name}"]
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape), name
        assert name in settings or torch.equal(ours, tensor.data), name


@pytest.mark.parametrize("bits", hqq.BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("as_float", [False, True])
def test_we_decode_what_hqq_makes(llama: Path, tmp_path: Path, bits: int, axis: int, as_float: bool) -> None:
    weight = random_weight(64, 96)
    layer = own_layer(weight, nbits=bits, axis=axis, view_as_float=as_float)
    written = write_encoded(llama, tmp_path / "out", hqq_safetensors, IntegerGrid(4, 32, "float"))
    state = {f"m.{name}": tensor.data.contiguous() for name, tensor in layer.state_dict().items()}
    edit_weights(written.path, **state)
    opened = written.open()
    assert (opened.info("m.weight").shape, opened.is_quantized("m.weight")) == ((64, 96), True)
    torch.testing.assert_close(opened.read("m.weight"), layer.dequantize(), rtol=1e-5, atol=1e-5)


def test_words_by_hand() -> None:
    """Row halves share a byte, the first half high; ten tenths share an int32."""
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 8).contiguous()
    scales = torch.ones(8, 1).half()
    four = hqq.encode("m", IntegerCodes(codes, scales, scales), IntegerGrid(4, 8, "float"))["m.W_q"]
    assert [hex(value) for value in four[:, 0].tolist()] == ["0x4", "0x15", "0x26", "0x37"]
    three = hqq.encode("m", IntegerCodes(codes, scales, scales), IntegerGrid(3, 8, "float"))["m.W_q"]
    assert [oct(value) for value in three[:, 0].tolist()] == ["0o123456700"]
    assert three.dtype == torch.int32


def from_quantized(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """hqq's own loader; what it could not load would still be without values."""
    base = pytest.importorskip("hqq.models.hf.base")
    model = base.AutoHQQHFModel.from_quantized(str(path), compute_dtype=dtype, device="cpu")
    for name, parameter in model.named_parameters():
        assert not parameter.is_meta, name
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_hqq_itself_runs_what_we_write(tmp_path: Path, tied: bool) -> None:
    """Bits by layer, a layer left, and the head where it is one of its own; the pickle holds no code."""
    source = tiny_model(tmp_path / "full", tied=tied)
    written = write_encoded(
        source,
        tmp_path / "out",
        hqq,
        IntegerGrid(4, 64, "float"),
        others={"down_proj": IntegerGrid(8, 32, "float"), r"layers\.1.*k_proj": IntegerGrid(3, -1, "middle")},
        left=["model.layers.1.self_attn.o_proj"],
        more=[] if tied else ["lm_head"],
    )
    require_decoded(source, written)
    pickled = torch.load(written.path / hqq.PICKLE, weights_only=True)
    assert pickled[Q_PROJ]["shape"] == torch.Size([128, 128])
    assert ("weight" in pickled["lm_head"]) == tied
    model = from_quantized(written.path)
    reference = in_transformers(source, dtype=torch.float32)
    for name, weight in written.weights.items():
        reference.get_parameter(name).data = weight
    torch.testing.assert_close(logits(model, tokens()), logits(reference, tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_hqq_runs_biases(tmp_path: Path) -> None:
    source = zoo_model(tmp_path / "full", "qwen2")
    written = write_encoded(source, tmp_path / "out", hqq, IntegerGrid(4, 64, "float"))
    require_decoded(source, written)
    reference = in_transformers(source, dtype=torch.float32)
    for name, weight in written.weights.items():
        reference.get_parameter(name).data = weight
    found = logits(from_quantized(written.path), tokens())
    torch.testing.assert_close(found, logits(reference, tokens()), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_what_hqq_saves_as_safetensors_is_read(tmp_path: Path) -> None:
    """The way that the message about a pickle tells."""
    base = pytest.importorskip("hqq.models.hf.base")
    source = tiny_model(tmp_path / "full", tied=False)
    written = write_encoded(source, tmp_path / "out", hqq, IntegerGrid(4, 64, "float"))
    kind = base.AutoHQQHFModel
    kind.save_to_safetensors(from_quantized(written.path, torch.float16), str(tmp_path / "again"))
    shutil.copy(written.path / "config.json", tmp_path / "again")
    again = qexport.open_checkpoint(tmp_path / "again")
    for name, weight in written.weights.items():
        assert torch.equal(again.read(name), weight)


def test_shards(llama: Path, tmp_path: Path) -> None:
    written = write_encoded(
        llama, tmp_path / "out", hqq, IntegerGrid(4, 64, "float"), split=lambda name: "layers.1." in name
    )
    require_decoded(llama, written)
    pickled = torch.load(written.path / hqq.PICKLE, weights_only=True)
    assert torch.equal(
        pickled["model.layers.1.mlp.up_proj"]["W_q"],
        load_file(written.path / "model-00002-of-00002.safetensors")["model.layers.1.mlp.up_proj.W_q"],
    )


def test_the_form_without_a_pickle(llama: Path, tmp_path: Path) -> None:
    assert (hqq.NAME, hqq_safetensors.NAME) == ("hqq", "hqq-safetensors")
    written = write_encoded(llama, tmp_path / "out", hqq_safetensors, IntegerGrid(4, 64, "float"))
    assert not (written.path / hqq.PICKLE).exists()


def test_a_pickle_alone_is_refused(llama: Path, tmp_path: Path) -> None:
    written = write_encoded(llama, tmp_path / "out", hqq, IntegerGrid(4, 64, "float"))
    (written.path / "model.safetensors").unlink()
    with pytest.raises(UnsafeFileError, match=r"in qmodel\.pt, a pickle.*save_to_safetensors"):
        qexport.open_checkpoint(written.path)


def config_of(facts: Facts) -> Any:
    return hqq.config_entries(facts)["quantization_config"]


@pytest.mark.filterwarnings("ignore")
def test_the_config_is_that_of_transformers() -> None:
    pytest.importorskip("hqq")
    from transformers import HqqConfig

    grid = IntegerGrid(8, 32, "float")
    facts = Facts({"model.layers.0.a.b": grid}, [], grid, torch.float16, "llama")
    theirs = HqqConfig(nbits=8, group_size=32).to_dict()
    assert config_of(facts) == {**theirs, "quant_method": "hqq"}


def test_layers_that_differ_are_told_by_tags() -> None:
    four, eight = IntegerGrid(4, 64, "float"), IntegerGrid(8, -1, "float")
    grids = {f"model.layers.{n}.a.{part}": four for n in range(2) for part in "bc"}
    grids |= {f"model.layers.{n}.a.c": eight for n in range(2)}
    left = ["model.layers.0.a.d", "lm_head", "model.layers.1.a.d"]
    config = config_of(Facts(grids, left, four, torch.float16, "llama"))
    found = {key: value["weight_quant_params"]["nbits"] for key, value in config["quant_config"].items()}
    assert found == {"a.b": 4, "a.c": 8}
    assert config["quant_config"]["a.c"]["weight_quant_params"]["group_size"] is None
    assert config["skip_modules"] == ["a.d", "lm_head"]
    grids["model.layers.1.a.c"] = four  # no tag tells that
    config = config_of(Facts(grids, ["model.layers.2.a.b"], four, torch.float16, "llama"))
    assert config["quant_config"]["weight_quant_params"]["nbits"] == 4
    assert config["skip_modules"] == ["lm_head", "model.layers.2.a.b"]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish(4), IntegerGrid(4, 64, "float")),
        (Wish(1, 8, False, torch.bfloat16), IntegerGrid(1, 8, "float", torch.bfloat16)),
        (Wish(5, -1, True), IntegerGrid(5, -1, "middle")),
    ],
)
def test_grids(wish: Wish, expected: IntegerGrid) -> None:
    assert hqq.grid_for(wish) == expected


@pytest.mark.parametrize("wish", [Wish(7), Wish(4, 12), Wish(4, 0), Wish(4, -8)])
def test_impossible_grids(wish: Wish) -> None:
    with pytest.raises(SpecError, match="in HQQ"):
        hqq.grid_for(wish)


@pytest.mark.parametrize(
    ("shape", "grid", "match"),
    [
        ((8, 100), IntegerGrid(4, 32, "float"), "whole number of groups"),
        ((7, 64), IntegerGrid(4, 64, "float"), "no multiple of 2"),
        ((4, 64), IntegerGrid(1, -1, "float"), "no multiple of 8"),
        ((7, 64), IntegerGrid(3, 64, "float"), None),
        ((7, 64), IntegerGrid(5, 64, "float"), None),
    ],
)
def test_obstacles(shape: tuple[int, int], grid: IntegerGrid, match: str | None) -> None:
    found = hqq.obstacle(shape, grid)
    assert (found is None) == (match is None)
    assert match is None or match in str(found)


@pytest.fixture
def written(llama: Path, tmp_path: Path) -> Written:
    return write_encoded(llama, tmp_path / "out", hqq_safetensors, IntegerGrid(4, 64, "float"))


def text_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("scale", None, "has no scale"),
        ("zero", None, "has no zero"),
        ("shape", None, "has no shape"),
        ("axis", None, "has no axis"),
        ("packing", None, "has no packing"),
        ("W_q", None, "but no W_q"),
        ("weight", torch.zeros(128, 128), "both weight and W_q"),
        ("W_q", torch.zeros(128, 64, dtype=torch.int32), "W_q is torch.int32"),
        ("W_q", torch.zeros(127, 64, dtype=torch.uint8), "do not fit together"),
        ("W_q", torch.zeros(128, 64), "do not fit together"),
        ("scale", torch.ones(256), r"scale is torch.float32 \[256\]"),
        ("scale", torch.ones(1, 256), "do not fit together"),
        ("scale", torch.ones(100, 1), "with 100 scales"),
        ("zero", torch.ones(128, 1), "do not fit together"),
        ("zero", torch.ones(256, 1, dtype=torch.uint8), "zero is torch.uint8"),
        ("shape", torch.tensor([128, -128]), "shape is"),
        ("shape", torch.tensor([1 << 62, 1 << 62]), "do not fit together"),
        ("shape", torch.tensor([128]), "do not fit together"),
        ("axis", torch.tensor(2, dtype=torch.int32), "do not fit together"),
        ("axis", torch.tensor([0, 1], dtype=torch.int32), "one number"),
        ("axis", torch.tensor(0, dtype=torch.int32), "do not fit together"),
    ],
)
def test_damaged_layers_are_told(
    written: Written, part: str, tensor: torch.Tensor | None, match: str
) -> None:
    edit_weights(written.path, **{f"{Q_PROJ}.{part}": tensor})
    opened = qexport.open_checkpoint(written.path)
    with pytest.raises(CorruptFileError, match=match):
        list(opened.names())


@pytest.mark.parametrize("text", ["4bit_32", "", "__import__('os')", "x" * 1000, "\xff"])
def test_unknown_packings_are_told(written: Written, text: str) -> None:
    """An empty text is damage; whatever else stands there is looked up, never evaluated."""
    edit_weights(written.path, **{f"{Q_PROJ}.packing": text_tensor(text)})
    with pytest.raises((UnsupportedModelError, CorruptFileError), match=r"packing|packed as"):
        list(qexport.open_checkpoint(written.path).names())
