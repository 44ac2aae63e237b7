"""bitsandbytes' layouts: what it and transformers write is decoded to what it computes itself, and what we
write is read by them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file

import qexport
from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.formats import bitsandbytes as ours_format
from qexport.formats.format import Facts, Wish
from qexport.grids.bnb4 import Bnb4Grid
from qexport.grids.grid import encode
from qexport.grids.int8_rows import Int8RowGrid
from qexport.grids.integer import IntegerGrid
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.whole import load_whole
from tests.tiny import edit_json, edit_weights, in_transformers, logits, tiny_model, tokens

bnb: Any = bitsandbytes
Q_PROJ = "model.layers.0.self_attn.q_proj"
STATE = "m.weight.quant_state.bitsandbytes__nf4"


def quantized_by_transformers(source: Path, out: Path, **options: Any) -> Any:
    """The model that transformers loads with these settings of bitsandbytes, and saves to `out`."""
    from transformers import BitsAndBytesConfig

    dtype = qexport.open_checkpoint(source).info("model.norm.weight").dtype
    config: Any = BitsAndBytesConfig
    model = in_transformers(source, quantization_config=config(**options), device_map="cpu", dtype=dtype)
    model.save_pretrained(out)
    return model


def bnb_file(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of these tensors alone."""
    directory.mkdir()
    content = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (directory / "config.json").write_text(json.dumps(content))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def four_bit(
    weight: torch.Tensor, kind: str = "nf4", double: bool = True, block: int = 64, **options: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """bitsandbytes' own tensors of a layer named m, and its state."""
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=double, quant_type=kind, **options
    )
    parts = {f"m.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {"m.weight": packed, **parts}, state


def dequantized(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """bitsandbytes' own weights, in fp32 for any dtype: unrounded."""
    state.dtype = torch.float32
    result: torch.Tensor = bnb.functional.dequantize_4bit(packed, state)
    return result


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "double", "storage"),
    [
        ("nf4", True, "uint8"),
        ("nf4", False, "uint8"),
        ("fp4", True, "uint8"),
        ("fp4", False, "uint8"),
        ("nf4", True, "bfloat16"),
        ("nf4", False, "float16"),
        ("fp4", True, "float32"),
        ("nf4", True, "int8"),
    ],
)
def test_four_bits_as_transformers_saves_them(
    tmp_path: Path, dtype: torch.dtype, kind: str, double: bool, storage: str
) -> None:
    source = tiny_model(tmp_path / "model", dtype=dtype)
    theirs = quantized_by_transformers(
        source,
        tmp_path / "out",
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored[f"{Q_PROJ}.weight"].dtype == getattr(torch, storage)
    assert stored[f"{Q_PROJ}.weight.absmax"].dtype == (torch.uint8 if double else torch.float32)
    full, ours = qexport.open_checkpoint(source), qexport.open_checkpoint(tmp_path / "out")
    assert {name: ours.info(name) for name in ours.names()} == {n: full.info(n) for n in full.names()}
    for name in full.names():
        module = theirs.get_submodule(name.removesuffix(".weight"))
        assert ours.is_quantized(name) == isinstance(module, bnb.nn.Linear4bit)
        if ours.is_quantized(name):
            expected = dequantized(module.weight.data, module.weight.quant_state)
            torch.testing.assert_close(ours.read(name), expected, rtol=1e-6, atol=0)
        else:
            assert torch.equal(ours.read(name), full.read(name))
    assert sum(map(ours.is_quantized, full.names())) == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eight_bits_as_transformers_saves_them(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tiny_model(tmp_path / "model", dtype=dtype)
    theirs = quantized_by_transformers(source, tmp_path / "out", load_in_8bit=True)
    ours = qexport.open_checkpoint(tmp_path / "out")
    full = qexport.open_checkpoint(source)
    assert {name: ours.info(name) for name in ours.names()} == {n: full.info(n) for n in full.names()}
    for name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            expected = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            torch.testing.assert_close(ours.read(f"{name}.weight"), expected, rtol=1e-6, atol=0)
    assert sum(map(ours.is_quantized, full.names())) == 14


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((128, 320), 32), ((128, 320), 64), ((96, 384), 128), ((64, 1024), 512), ((32, 64), 4096)],
)
def test_blocks_of_any_size(
    tmp_path: Path, kind: str, double: bool, shape: tuple[int, int], block: int
) -> None:
    tensors, state = four_bit(weights(*shape), kind, double, block)
    if double:  # several blocks of maxima, the last one short, or a single short one
        assert len(tensors["m.weight.nested_absmax"]) == math.ceil(shape[0] * shape[1] / block / 256)
    ours = qexport.open_checkpoint(bnb_file(tmp_path / "file", tensors)).read("m.weight")
    assert ours.shape == shape
    torch.testing.assert_close(ours, dequantized(tensors["m.weight"], state), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(7, 33), (5, 172), (3, 100)])
def test_blocks_across_rows(tmp_path: Path, kind: str, double: bool, shape: tuple[int, int]) -> None:
    """Blocks run through the whole matrix; a last code may stand alone in its byte."""
    tensors, state = four_bit(weights(*shape), kind, double)
    ours = qexport.open_checkpoint(bnb_file(tmp_path / "file", tensors)).read("m.weight")
    # bitsandbytes' CPU decoder begins a block at each row, and is wrong here; a single row it reads rightly
    state.shape = torch.Size((1, shape[0] * shape[1]))
    expected = dequantized(tensors["m.weight"], state).reshape(shape)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eight_bit_maxima_of_any_float_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weights(6, 40).half())
    absmax = absmax.to(dtype)
    path = bnb_file(tmp_path / "file", {"m.weight": codes, "m.SCB": absmax})  # no weight_format: row-major
    expected = bnb.functional.int8_vectorwise_dequant(codes, absmax.float())
    torch.testing.assert_close(qexport.open_checkpoint(path).read("m.weight"), expected, rtol=1e-6, atol=0)


def test_a_decoded_model_computes_what_the_runtime_does(llama: Path, tmp_path: Path) -> None:
    """bitsandbytes' CPU kernel rounds activations to bf16, no more."""
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    theirs = logits(quantized_by_transformers(llama, tmp_path / "out", **options), tokens())
    path = tmp_path / "out"
    ours = logits(load_whole(build_skeleton(path), qexport.open_checkpoint(path)), tokens())
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def edited_state(tensors: dict[str, torch.Tensor], **changes: Any) -> torch.Tensor:
    """The state's JSON with keys changed; None takes a key out."""
    content = json.loads(tensors[STATE].numpy().tobytes())
    content.update(changes)
    text = json.dumps({key: value for key, value in content.items() if value is not None})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "changes",
    [
        {"blocksize": None},
        {"blocksize": 0},
        {"blocksize": -64},
        {"blocksize": 64.0},
        {"blocksize": True},
        {"blocksize": "64"},
        {"shape": None},
        {"shape": 2048},
        {"shape": "ab"},
        {"shape": [32, -64]},
        {"shape": [32, [64]]},
        {"dtype": None},
        {"dtype": "load"},
        {"dtype": ["float16"]},
        {"quant_type": None},
        {"quant_type": "fp4"},
        {"nested_offset": None},
        {"nested_offset": float("nan")},
        {"nested_offset": float("inf")},
        {"nested_offset": 10**400},
        {"nested_offset": [1.0]},
        {"nested_blocksize": 0},
    ],
)
def test_a_damaged_state_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors, _ = four_bit(weights(32, 64))
    path = bnb_file(tmp_path / "file", {**tensors, STATE: edited_state(tensors, **changes)})
    with pytest.raises(CorruptFileError, match=rf"{STATE} is damaged"):
        list(qexport.open_checkpoint(path).names())
    with pytest.raises(CorruptFileError, match=rf"{STATE} is damaged"):
        qexport.open_checkpoint(path).read("m.weight")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe{}", b"[]", b'"nf4"', b"null", b"[" * 60_000])
def test_a_state_that_is_no_object_is_told(tmp_path: Path, raw: bytes) -> None:
    tensors, _ = four_bit(weights(32, 64))
    state = torch.tensor(list(raw), dtype=torch.uint8)
    path = bnb_file(tmp_path / "file", {**tensors, STATE: state})
    with pytest.raises(CorruptFileError, match=rf"{STATE} is damaged"):
        qexport.open_checkpoint(path).read("m.weight")


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [64, 64]},
        {"shape": [32, 63]},
        {"shape": [1 << 60, 1 << 60]},
        {"blocksize": 32},
        {"blocksize": 1 << 60},
        {"nested_blocksize": 1},
    ],
)
def test_a_state_that_does_not_fit_its_tensors_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors, _ = four_bit(weights(32, 64))
    path = bnb_file(tmp_path / "file", {**tensors, STATE: edited_state(tensors, **changes)})
    with pytest.raises(CorruptFileError, match=r"as its state says|half a byte for each value"):
        qexport.open_checkpoint(path).read("m.weight")


def test_a_block_beyond_all_memory_is_read(tmp_path: Path) -> None:
    """One block holds all values, whatever its size is said to be."""
    tensors, state = four_bit(weights(32, 64), double=False, block=2048)
    path = bnb_file(tmp_path / "file", {**tensors, STATE: edited_state(tensors, blocksize=1 << 60)})
    expected = dequantized(tensors["m.weight"], state)
    torch.testing.assert_close(qexport.open_checkpoint(path).read("m.weight"), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("absmax", None, "m.weight.absmax is missing"),
        ("quant_map", None, "m.weight.quant_map is missing"),
        ("nested_absmax", None, "m.weight.nested_absmax is missing"),
        ("nested_quant_map", None, "m.weight.nested_quant_map is missing"),
        ("quant_state.bitsandbytes__nf4", None, "has 0 quantization states"),
        ("quant_state.bitsandbytes__fp4", torch.zeros(4, dtype=torch.uint8), "has 2 quantization states"),
        ("quant_state.bitsandbytes__nf4", torch.zeros(4), "JSON as bytes"),
        ("quant_state.bitsandbytes__nf4", torch.full((70_000,), 32, dtype=torch.uint8), "JSON as bytes"),
        ("absmax", torch.zeros(31, dtype=torch.uint8), r"absmax is torch.uint8 \[31\]; bytes \[32\]"),
        ("absmax", torch.zeros(32), r"absmax is torch.float32 \[32\]; bytes \[32\]"),
        ("quant_map", torch.zeros(15), r"floats \[16\]"),
        ("quant_map", torch.zeros(16, dtype=torch.int32), r"floats \[16\]"),
        ("nested_quant_map", torch.zeros(255), r"floats \[256\]"),
        ("nested_absmax", torch.zeros(1, 1), r"floats \[1\]"),
    ],
)
def test_damaged_four_bit_layers_are_told(
    tmp_path: Path, part: str, tensor: torch.Tensor | None, match: str
) -> None:
    tensors, _ = four_bit(weights(32, 64))
    path = bnb_file(tmp_path / "file", tensors)
    edit_weights(path, **{f"m.weight.{part}": tensor})
    with pytest.raises(CorruptFileError, match=match):
        list(qexport.open_checkpoint(path).names())
    with pytest.raises(CorruptFileError, match=match):
        qexport.open_checkpoint(path).read("m.weight")


def test_maxima_that_are_quantized_but_not_said_to_be_are_told(tmp_path: Path) -> None:
    tensors, _ = four_bit(weights(32, 64), double=False)
    tensors["m.weight.absmax"] = torch.zeros(32, dtype=torch.uint8)
    with pytest.raises(CorruptFileError, match=r"floats \[32\]"):
        qexport.open_checkpoint(bnb_file(tmp_path / "file", tensors)).read("m.weight")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_codes_that_are_cut_short_are_told(tmp_path: Path, storage: torch.dtype) -> None:
    tensors, _ = four_bit(weights(32, 64), quant_storage=storage)
    tensors["m.weight"] = tensors["m.weight"][:-1].clone()
    with pytest.raises(CorruptFileError, match="half a byte for each value"):
        qexport.open_checkpoint(bnb_file(tmp_path / "file", tensors)).read("m.weight")


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("SCB", None, "m.SCB is missing"),
        ("SCB", torch.ones(5), r"m.SCB is torch.float32 \[5\]; int8 codes"),
        ("SCB", torch.ones(6, 1), r"int8 codes \[out, in\] and floats \[out\]"),
        ("SCB", torch.ones(6, dtype=torch.int32), r"int8 codes \[out, in\] and floats \[out\]"),
        ("weight", torch.ones(6, 40), r"m.weight is torch.float32 \[6, 40\]"),
        ("weight", torch.ones(6, dtype=torch.int8), r"int8 codes \[out, in\] and floats \[out\]"),
        ("weight", None, "m.weight is missing"),
        ("weight_format", torch.zeros(2, dtype=torch.uint8), "one uint8"),
        ("weight_format", torch.tensor(0.0), "one uint8"),
    ],
)
def test_damaged_eight_bit_layers_are_told(
    tmp_path: Path, part: str, tensor: torch.Tensor | None, match: str
) -> None:
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weights(6, 40).half())
    order = torch.tensor(0, dtype=torch.uint8)
    path = bnb_file(tmp_path / "file", {"m.weight": codes, "m.SCB": absmax, "m.weight_format": order})
    edit_weights(path, **{f"m.{part}": tensor})
    with pytest.raises(CorruptFileError, match=match):
        list(qexport.open_checkpoint(path).names())
    with pytest.raises(CorruptFileError, match=match):
        qexport.open_checkpoint(path).read("m.weight")


@pytest.mark.parametrize(
    ("number", "name"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere"), (9, "unknown")]
)
def test_other_orders_of_eight_bit_codes_are_refused(tmp_path: Path, number: int, name: str) -> None:
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weights(6, 40).half())
    order = torch.tensor(number, dtype=torch.uint8)
    path = bnb_file(tmp_path / "file", {"m.weight": codes, "m.SCB": absmax, "m.weight_format": order})
    with pytest.raises(
        UnsupportedModelError, match=rf"m.weight lie in the order {number} \({name}\); 0 \(row\)"
    ):
        list(qexport.open_checkpoint(path).names())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_without_any_scales_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    path = bnb_file(tmp_path / "file", {"m.weight": torch.zeros(6, 40, dtype=dtype)})
    with pytest.raises(CorruptFileError, match=r"m.weight is torch.u?int8 and has no scales"):
        list(qexport.open_checkpoint(path).names())


FOUR_BITS = [Bnb4Grid(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]


def facts(
    grids: dict[str, Any], left: list[str], common: Any = None, dtype: torch.dtype = torch.float16
) -> Facts:
    common = common or next(iter(grids.values()))
    return Facts(grids=grids, left=left, common=common, dtype=dtype, model_type="llama")


def written(source: Path, out: Path, grid: Any, *, left: tuple[str, ...] = ("lm_head",)) -> Path:
    """A checkpoint with all linear layers but `left` as codes of our own."""
    dtype = qexport.open_checkpoint(source).info("model.norm.weight").dtype
    grids: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.ndim != 2 or "embed_tokens" in name or module in left:
            tensors[name] = tensor
            continue
        made = ours_format.encode(module, encode(grid, tensor, grid.fit(tensor)), grid)
        layout = [
            (info.name, info.dtype, info.shape) for info in ours_format.layout(module, tensor.shape, grid)
        ]
        assert layout == [(name, part.dtype, tuple(part.shape)) for name, part in made.items()]
        assert ours_format.obstacle(tensor.shape, grid) is None
        grids[module] = grid
        tensors |= made
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((source / "config.json").read_text())
    edit_json(out / "config.json", **ours_format.config_entries(facts(grids, list(left), dtype=dtype)))
    ours_format.finish(out)
    return out


def plain_model(source: Path, path: Path, names: list[str]) -> Any:
    """transformers' model of `source` with the weights that `path` decodes to, in fp32."""
    model = in_transformers(source, dtype=torch.float32)
    ours = qexport.open_checkpoint(path)
    with torch.no_grad():
        for name in names:
            assert ours.is_quantized(f"{name}.weight")
            model.get_submodule(name).weight.copy_(ours.read(f"{name}.weight"))
    return model


def tolerance(grid: Bnb4Grid | Int8RowGrid) -> float:
    """Of logits: the kernels round activations to bf16 or, for 8 bits, to int8 as well."""
    return 0.03 if isinstance(grid, Bnb4Grid) else 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [*FOUR_BITS, Int8RowGrid()], ids=str)
def test_transformers_loads_what_is_written(
    llama: Path, tmp_path: Path, grid: Bnb4Grid | Int8RowGrid, dtype: torch.dtype
) -> None:
    source = llama if dtype == torch.float16 else tiny_model(tmp_path / "model", dtype=dtype)
    if isinstance(grid, Bnb4Grid):
        grid = Bnb4Grid(grid.kind, grid.double_quant, dtype=dtype)
    path = written(source, tmp_path / "out", grid)
    model = in_transformers(path, device_map="cpu")
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    converted = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    assert len(converted) == 14
    ours = qexport.open_checkpoint(path)
    for name, module in converted.items():
        if isinstance(grid, Bnb4Grid):
            state = module.weight.quant_state
            assert state.dtype == dtype
            assert (state.quant_type, state.nested) == (grid.kind, grid.double_quant)
            assert tuple(state.shape) == ours.info(f"{name}.weight").shape
            expected = dequantized(module.weight.data, state)
        else:
            expected = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        torch.testing.assert_close(ours.read(f"{name}.weight"), expected, rtol=1e-6, atol=0)
        assert ours.info(f"{name}.weight").dtype == dtype
    # anew, for the look at the state has changed it
    found = logits(in_transformers(path, device_map="cpu"), tokens())
    plain = logits(plain_model(source, path, list(converted)), tokens())
    assert (found - plain).norm() < tolerance(grid) * plain.norm()


@pytest.mark.parametrize("grid", [Bnb4Grid(), Int8RowGrid()], ids=str)
@pytest.mark.parametrize("left", [(), ("model.layers.1.mlp.up_proj",)])
def test_a_quantized_head_is_read(
    tmp_path: Path, grid: Bnb4Grid | Int8RowGrid, left: tuple[str, ...]
) -> None:
    source = tiny_model(tmp_path / "model", tied=False)
    path = written(source, tmp_path / "out", grid, left=left)
    model = in_transformers(path, device_map="cpu")
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    converted = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert len(converted) == 15 - len(left)
    assert "lm_head" in converted
    assert not set(left) & set(converted)
    found, plain = logits(model, tokens()), logits(plain_model(source, path, converted), tokens())
    assert (found - plain).norm() < tolerance(grid) * plain.norm()


@pytest.mark.parametrize("grid", [Bnb4Grid("fp4", double_quant=False), Int8RowGrid()], ids=str)
def test_transposed_layers_are_read(tmp_path: Path, grid: Bnb4Grid | Int8RowGrid) -> None:
    """GPT-2's Conv1D is [in, out]; its codes are stored as those of a linear layer."""
    sizes: dict[str, Any] = {"n_embd": 128, "num_hidden_layers": 1, "n_head": 4, "n_positions": 64}
    source = tiny_model(tmp_path / "model", model_type="gpt2", **sizes)
    tensors = load_file(source / "model.safetensors")
    grids: dict[str, Any] = {}
    for name in [name for name in tensors if ".c_" in name and name.endswith(".weight")]:
        module, weight = name.removesuffix(".weight"), tensors.pop(name).T.contiguous()
        tensors |= ours_format.encode(module, encode(grid, weight, grid.fit(weight)), grid)
        grids[module] = grid
    assert len(grids) == 4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(source / "config.json", **ours_format.config_entries(facts(grids, ["lm_head"])))
    model = in_transformers(source, device_map="cpu")
    ours = qexport.open_checkpoint(source)
    for module in grids:
        loaded = model.get_submodule(module)
        if isinstance(grid, Bnb4Grid):
            expected = dequantized(loaded.weight.data, loaded.weight.quant_state)
        else:
            expected = bnb.functional.int8_vectorwise_dequant(loaded.weight.data, loaded.weight.SCB)
        # the checkpoint speaks of [in, out], as the model does
        torch.testing.assert_close(ours.read(f"{module}.weight"), expected.T, rtol=1e-6, atol=0)
    assert bool(logits(in_transformers(source, device_map="cpu"), tokens()).isfinite().all())


@pytest.mark.parametrize("grid", FOUR_BITS, ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (7, 33), (640, 640)])
def test_four_bits_are_named_and_typed_as_bitsandbytes_does(grid: Bnb4Grid, shape: tuple[int, int]) -> None:
    """Ragged shapes too, which `obstacle` keeps from being written."""
    weight = weights(*shape).half()
    expected, state = four_bit(weight, grid.kind, grid.double_quant)
    made = ours_format.encode("m", grid.quantize(weight), grid)
    layout = {info.name: (info.dtype, info.shape) for info in ours_format.layout("m", shape, grid)}
    assert layout == {name: (part.dtype, tuple(part.shape)) for name, part in made.items()}
    told = f"m.weight.quant_state.bitsandbytes__{grid.kind}"
    assert made.keys() == expected.keys()
    for name, part in expected.items():
        if name == told:
            assert json.loads(made[name].numpy().tobytes()) == json.loads(part.numpy().tobytes())
        elif name != "m.weight" or not grid.double_quant:  # where ours are chosen against what is stored
            assert made[name].dtype == part.dtype
            assert torch.equal(made[name], part)
    assert made["m.weight"].shape == expected["m.weight"].shape
    parts = {name.removeprefix("m.weight."): part for name, part in made.items() if name != "m.weight"}
    theirs = bnb.functional.QuantState.from_dict(parts, torch.device("cpu"))
    assert theirs.nested == state.nested == grid.double_quant


def test_config_entries_are_those_of_transformers() -> None:
    from transformers import BitsAndBytesConfig

    kind: Any = BitsAndBytesConfig
    theirs = kind(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["b", "lm_head"],
    ).to_dict()
    made = ours_format.config_entries(facts({"a": Bnb4Grid()}, ["b"], dtype=torch.bfloat16))
    assert made == {"quantization_config": {**theirs, "quant_method": "bitsandbytes"}}
    theirs = kind(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]).to_dict()
    made = ours_format.config_entries(facts({"a": Int8RowGrid()}, ["lm_head"], dtype=torch.float32))
    assert made == {"quantization_config": {**theirs, "quant_method": "bitsandbytes"}}
    fp4 = Bnb4Grid("fp4", double_quant=False)
    made = ours_format.config_entries(facts({}, [], fp4))["quantization_config"]
    assert (made["bnb_4bit_quant_type"], made["bnb_4bit_use_double_quant"]) == ("fp4", False)
    assert ours_format.extra_files({"quantization_config": made}) == {}


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (Int8RowGrid(), "layers of int8 and nf4 with double quantization; one grid for all layers"),
        (Bnb4Grid(double_quant=False), "layers of nf4 and nf4 with double"),
        (Bnb4Grid("fp4"), "layers of fp4 with double quantization and nf4"),
        (IntegerGrid(4, 64), "layers of IntegerGrid and nf4"),
    ],
)
def test_several_grids_are_refused(other: Any, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        ours_format.config_entries(facts({"a": Bnb4Grid(), "b": other}, []))
    ours_format.config_entries(facts({"a": Bnb4Grid(), "b": Bnb4Grid()}, []))


def test_the_grids_of_wishes() -> None:
    half, brain = torch.float16, torch.bfloat16
    assert ours_format.grid_for(Wish(4)) == Bnb4Grid("nf4", True, 64, half)
    assert ours_format.grid_for(Wish(4, 64, True, brain, "fp4", False)) == Bnb4Grid("fp4", False, 64, brain)
    assert ours_format.grid_for(Wish(4, codebook="nf4", double_quant=True)) == Bnb4Grid()
    assert ours_format.grid_for(Wish(8)) == ours_format.grid_for(Wish(8, -1, True, brain)) == Int8RowGrid()


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        (Wish(3), r"bitsandbytes with 3 bits; 4 \(nf4 or fp4\) or 8"),
        (Wish(4, group_size=128), "4 bits in groups of 128; blocks of 64"),
        (Wish(4, group_size=-1), "4 bits in groups of -1; blocks of 64"),
        (Wish(8, group_size=64), "8 bits in groups of 64; one scale a row"),
        (Wish(4, symmetric=False), "zero points; a symmetric grid"),
        (Wish(8, symmetric=False), "zero points; a symmetric grid"),
        (Wish(4, codebook="af4"), "codebook 'af4'; nf4 or fp4"),
        (Wish(8, codebook="nf4"), "with 8 bits; either with 4 bits alone"),
        (Wish(8, double_quant=False), "with 8 bits; either with 4 bits alone"),
    ],
)
def test_other_grids_are_refused(wish: Wish, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        ours_format.grid_for(wish)


def test_obstacles() -> None:
    four, eight = Bnb4Grid(), Int8RowGrid()
    assert ours_format.obstacle((128, 352), eight) is None
    assert ours_format.obstacle((96, 128), four) is None
    reason = "sides that are no multiples of 32 and 64, which bitsandbytes cannot read on a CPU"
    assert ours_format.obstacle((128, 352), four) == reason
    assert ours_format.obstacle((40, 128), four) == reason
