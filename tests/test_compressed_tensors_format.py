"""compressed-tensors' pack-quantized: the library's compressor is the oracle, and transformers loads it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.formats import compressed_tensors as pack_quantized
from qexport.formats.format import Facts, Wish
from qexport.grids.grid import encode
from qexport.grids.integer import IntegerCodes, IntegerGrid, Zero
from tests.encoded import Written, require_decoded, write_encoded
from tests.tiny import edit_json, edit_weights, in_transformers, logits, tiny_model, tokens

Q_PROJ = "model.layers.0.self_attn.q_proj"
KINDS: Sequence[Zero] = ("middle", "integer")


def random_weight(out: int, inputs: int) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(out + inputs))


def scheme_of(grid: IntegerGrid) -> Any:
    """The library's own view of what config.json says of a grid."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    facts = Facts({"m": grid}, [], grid, grid.dtype, "llama")
    config = pack_quantized.config_entries(facts)["quantization_config"]
    return quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]


def parts_of(grid: IntegerGrid, weight: torch.Tensor) -> tuple[IntegerCodes, dict[str, torch.Tensor]]:
    codes = encode(grid, weight, grid.fit(weight))
    made = pack_quantized.encode("m", codes, grid)
    return codes, {name.removeprefix("m."): tensor for name, tensor in made.items()}


@pytest.mark.parametrize("zero", KINDS)
@pytest.mark.parametrize("bits", pack_quantized.BITS)
@pytest.mark.parametrize(("group", "out", "inputs"), [(32, 40, 96), (128, 16, 256), (-1, 24, 72)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_librarys_compressor_makes_the_same_bytes(
    zero: Zero, bits: int, group: int, out: int, inputs: int, dtype: torch.dtype
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    grid = IntegerGrid(bits, group, zero, dtype)
    codes, ours = parts_of(grid, random_weight(out, inputs).to(dtype))
    weight = grid.decode(codes)  # on the grid, so that the library finds the same codes again
    state = {"weight": weight, "weight_scale": codes.scales.float()}
    if codes.zeros is not None:
        state["weight_zero_point"] = (codes.zeros.int() - grid.middle).to(torch.int8)
    kind: Any = compressors.PackedQuantizationCompressor
    theirs = kind.compress(state, scheme_of(grid))
    theirs["weight_scale"] = theirs["weight_scale"].to(dtype)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[name], tensor), name
    back = kind.decompress({**ours, "weight_scale": codes.scales.float()}, scheme_of(grid))["weight"]
    torch.testing.assert_close(back, weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("zero", KINDS)
def test_words_by_hand(zero: Zero) -> None:
    grid = IntegerGrid(4, -1, zero)
    zeros = torch.arange(8, dtype=torch.uint8)[:, None] if zero == "integer" else None
    codes = IntegerCodes(torch.arange(8, dtype=torch.uint8).expand(8, 8), torch.ones(8, 1).half(), zeros)
    made = pack_quantized.encode("m", codes, grid)
    assert made["m.weight_packed"].tolist() == [[0x76543210]] * 8
    assert made["m.weight_shape"].tolist() == [8, 8]
    if zero == "integer":
        assert made["m.weight_zero_point"].tolist() == [[0x76543210]]


@pytest.mark.parametrize("zero", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_is_read_back_by_us_and_by_transformers(
    tmp_path: Path, zero: Zero, tied: bool, dtype: torch.dtype
) -> None:
    """One layer left, the head where it is one of its own, and three grids.

    The asymmetric model has one: transformers decompresses all layers by the first group of the config.
    """
    pytest.importorskip("compressed_tensors")
    source = tiny_model(tmp_path / "full", tied=tied, dtype=dtype)
    written = write_encoded(
        source,
        tmp_path / "out",
        pack_quantized,
        IntegerGrid(4, 32, zero, dtype),
        others={
            r"layers\.1.*down_proj": IntegerGrid(8, 128, zero, dtype),
            "k_proj": IntegerGrid(8, -1, zero, dtype),
        }
        if zero == "middle"
        else {},
        left=["model.layers.1.self_attn.o_proj"],
        more=[] if tied else ["lm_head"],
    )
    require_decoded(source, written)
    assert ("lm_head.weight" in written.weights) != tied
    options: dict[str, Any] = {}
    if zero == "integer":  # else refused, as are the library's own: its model has zero points unpacked
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the model has a config already
        theirs = in_transformers(written.path, dtype=torch.float32, **options)
    reference = in_transformers(source, dtype=torch.float32)
    for name, weight in written.weights.items():
        # where asked to, transformers rounds the product to the dtype of the scales
        reference.get_parameter(name).data = weight.to(dtype).float() if options else weight
    if not options:
        assert theirs.get_submodule(Q_PROJ).weight_packed.dtype == torch.int32
    torch.testing.assert_close(logits(theirs, tokens()), logits(reference, tokens()), rtol=1e-4, atol=1e-4)


def test_grids_of_both_kinds_side_by_side(llama: Path, tmp_path: Path) -> None:
    others = {"k_proj": IntegerGrid(8, -1), "down_proj": IntegerGrid(4, 128)}
    grid = IntegerGrid(8, 32)
    require_decoded(llama, write_encoded(llama, tmp_path / "out", pack_quantized, grid, others=others))


def test_the_config_is_what_the_library_serializes() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    common, other = IntegerGrid(4, 128), IntegerGrid(8, -1)
    facts = Facts({"a": common, "b": other}, ["c", "lm_head"], common, torch.float16, "llama")
    ours = pack_quantized.config_entries(facts)["quantization_config"]
    theirs = json.loads(quantization.QuantizationConfig.model_validate(ours).model_dump_json())
    extra = {"sparsity_config": {}, "transform_config": {}, "version": ours["version"]}
    assert ours == {**theirs, **extra}
    assert ours["ignore"] == ["c", "lm_head"]
    assert [group["targets"] for group in ours["config_groups"].values()] == [["b"], ["Linear"]]


def test_zero_points_are_decoded_at_load_and_of_one_kind() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    grid = IntegerGrid(4, 32, "integer")
    facts = Facts({"a": grid}, [], grid, torch.float16, "llama")
    ours = pack_quantized.config_entries(facts)["quantization_config"]
    assert ours["dequantize"] is True  # transformers 5.23 fails over them otherwise
    theirs = quantization.QuantizationConfig.model_validate(ours)
    assert theirs.config_groups["group_0"].weights.symmetric is False
    mixed = Facts({"a": grid, "b": IntegerGrid(8, -1)}, [], grid, torch.float16, "llama")
    with pytest.raises(SpecError, match="asymmetric codes of several kinds"):
        pack_quantized.config_entries(mixed)
    experts = Facts({"m.experts.0.w1": grid}, [], grid, torch.float16, "mixtral")
    with pytest.raises(SpecError, match="asymmetric experts"):
        pack_quantized.config_entries(experts)
    own = {"m.experts.0.w1": IntegerGrid(8, 32), "a": IntegerGrid(4, 32)}
    with pytest.raises(SpecError, match="experts on grids of their own"):
        pack_quantized.config_entries(Facts(own, [], own["a"], torch.float16, "mixtral"))


def test_a_head_that_nobody_names_is_left() -> None:
    grid = IntegerGrid(4, 128)
    config = pack_quantized.config_entries(Facts({"a": grid}, [], grid, torch.float16, "llama"))
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    config = pack_quantized.config_entries(Facts({"lm_head": grid}, [], grid, torch.float16, "llama"))
    assert config["quantization_config"]["ignore"] == []


def test_act_order_is_read_but_not_written(tmp_path: Path) -> None:
    grid = IntegerGrid(4, 32, "integer")
    with pytest.raises(SpecError, match="act-order"):
        pack_quantized.config_entries(Facts({"m": grid}, [], grid, torch.float16, "llama", desc_act=True))
    weight = random_weight(128, 128)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0)) % 4
    codes = encode(grid, weight, grid.fit(weight), order)
    with pytest.raises(ValueError, match="no neighbours"):
        pack_quantized.encode("m", codes, grid)
    source = tiny_model(tmp_path / "full")
    written = write_encoded(source, tmp_path / "out", pack_quantized, grid)
    made = pack_quantized.encode(Q_PROJ, IntegerCodes(codes.codes, codes.scales, codes.zeros), grid)
    edit_weights(written.path, **made, **{f"{Q_PROJ}.weight_g_idx": order.int()})
    assert torch.equal(written.open().read(f"{Q_PROJ}.weight"), grid.decode(codes))
    edit_weights(written.path, **{f"{Q_PROJ}.weight_g_idx": order.int() + 1})
    with pytest.raises(CorruptFileError, match="groups that are not there"):
        written.open().read(f"{Q_PROJ}.weight")


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish(4), IntegerGrid(4, 128)),
        (Wish(8, -1, True, torch.bfloat16), IntegerGrid(8, -1, "middle", torch.bfloat16)),
        (Wish(4, 32, False), IntegerGrid(4, 32, "integer")),
    ],
)
def test_grids(wish: Wish, expected: IntegerGrid) -> None:
    assert pack_quantized.grid_for(wish) == expected


@pytest.mark.parametrize(
    ("wish", "match"),
    [(Wish(3), "3 bits.*4 or 8"), (Wish(4, 256), "group size of 256"), (Wish(4, 0), "of 0")],
)
def test_impossible_grids(wish: Wish, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        pack_quantized.grid_for(wish)


@pytest.mark.parametrize(
    ("shape", "grid", "match"),
    [
        ((8, 100), IntegerGrid(4, 32), "whole number of groups"),
        ((8, 36), IntegerGrid(4, -1), "multiples of 8"),
        ((12, 64), IntegerGrid(4, 32, "integer"), "multiples of 8"),
        ((12, 64), IntegerGrid(4, 32), None),
        ((12, 64), IntegerGrid(8, 32, "integer"), None),
    ],
)
def test_obstacles(shape: tuple[int, int], grid: IntegerGrid, match: str | None) -> None:
    found = pack_quantized.obstacle(shape, grid)
    assert (found is None) == (match is None)
    assert match is None or match in str(found)


@pytest.fixture
def written(llama: Path, tmp_path: Path) -> Written:
    return write_encoded(llama, tmp_path / "out", pack_quantized, IntegerGrid(4, 32, "integer"))


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("weight_scale", None, "has no weight_scale"),
        ("weight_shape", None, "has no weight_shape"),
        ("weight_zero_point", None, "has no weight_zero_point"),
        ("weight_packed", None, "but no weight_packed"),
        ("weight", torch.zeros(128, 128), "both weight and weight_packed"),
        ("weight_packed", torch.zeros(128, 16), "weight_packed is torch.float32"),
        ("weight_packed", torch.zeros(128, 32, dtype=torch.int32), "do not fit together"),
        ("weight_packed", torch.zeros(2, 64, 16, dtype=torch.int32), r"\[2, 64, 16\]; 2 dimensions"),
        ("weight_scale", torch.ones(128, 5), "do not fit together"),
        ("weight_scale", torch.ones(64, 4), "do not fit together"),
        ("weight_scale", torch.ones(128, 4, dtype=torch.int32), "weight_scale is torch.int32"),
        ("weight_zero_point", torch.zeros(128, 4, dtype=torch.int32), "do not fit together"),
        ("weight_zero_point", torch.zeros(16, 4, dtype=torch.int8), "weight_zero_point is torch.int8"),
        ("weight_shape", torch.tensor([128, 1 << 60]), "weight_shape is"),
        ("weight_shape", torch.tensor([128, -128]), "weight_shape is"),
        ("weight_shape", torch.tensor([64, 128]), "weight_shape is"),
        ("weight_shape", torch.tensor([128, 128, 1]), "do not fit together"),
        ("weight_shape", torch.tensor([128.0, 128.0]), "weight_shape is torch.float32"),
        ("weight_g_idx", torch.zeros(3, dtype=torch.int32), "do not fit together"),
    ],
)
def test_damaged_layers_are_told(
    written: Written, part: str, tensor: torch.Tensor | None, match: str
) -> None:
    edit_weights(written.path, **{f"{Q_PROJ}.{part}": tensor})
    opened = qexport.open_checkpoint(written.path)
    with pytest.raises(CorruptFileError, match=match):
        list(opened.names())


@pytest.mark.parametrize(
    ("changes", "group", "match"),
    [
        ({"format": "nvfp4-pack-quantized"}, {"format": None}, "'nvfp4-pack-quantized'"),
        ({}, {"format": "marlin-24"}, "'marlin-24'"),
        ({}, {"weights": {"num_bits": 3}}, "of 3 bits; 4 or 8"),
        ({}, {"weights": {"num_bits": "4"}}, "of '4' bits"),
        ({}, {"weights": {"num_bits": 4, "type": "float"}}, "of 'float'"),
        ({}, {"weights": {"num_bits": 4, "strategy": "block", "group_size": 32}}, "by 'block'"),
        ({}, {"weights": {"num_bits": 4, "group_size": 0}}, "of 0"),
        ({}, {"weights": {"num_bits": 4, "group_size": [1]}}, r"of \[1\]"),
        ({}, {"weights": None}, "'group_0'"),
        ({"config_groups": {"W4A16": ["Linear"]}}, {}, "'W4A16'.* is list"),
        ({"config_groups": {}}, {}, "without config_groups"),
    ],
)
def test_other_forms_are_refused(
    written: Written, changes: dict[str, Any], group: dict[str, Any], match: str
) -> None:
    config = json.loads((written.path / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"].update(group)
    edit_json(written.path / "config.json", quantization_config={**config, **changes})
    with pytest.raises(UnsupportedModelError, match=match):
        qexport.open_checkpoint(written.path)


def test_rows_that_fill_no_whole_word(tmp_path: Path) -> None:
    """The library pads; we read that, though we do not write it."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    signed = torch.randint(-8, 8, (5, 11), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    zeros = torch.randint(-8, 8, (5, 1), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    source = tiny_model(tmp_path / "full")
    written = write_encoded(
        source, tmp_path / "out", pack_quantized, IntegerGrid(4, -1, "integer"), left=[Q_PROJ]
    )
    edit_weights(
        written.path,
        **{
            "odd.weight_packed": helpers.pack_to_int32(signed, 4),
            "odd.weight_zero_point": helpers.pack_to_int32(zeros, 4, packed_dim=0),
            "odd.weight_scale": torch.full((5, 1), 0.5),
            "odd.weight_shape": torch.tensor([5, 11]),
        },
    )
    found = written.open().read("odd.weight")
    assert torch.equal(found, (signed.float() - zeros.float()) * 0.5)
