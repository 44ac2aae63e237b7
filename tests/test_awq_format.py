"""AWQ's GEMM layout: what AutoAWQ's own arithmetic and packing make is decoded to what it stands for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.formats import awq
from qexport.formats.format import Facts, Format, Wish
from qexport.formats.opening import FORMATS, open_checkpoint
from qexport.grids.integer import IntegerCodes, IntegerGrid, IntegerScales, Zero
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.whole import load_whole
from tests.runtimes import run_in_runtime
from tests.tiny import edit_json, edit_weights, in_transformers, logits, tokens

Q_PROJ = "model.layers.0.self_attn.q_proj"
CONFIG = {
    "quant_method": "awq",
    "version": "gemm",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "modules_to_not_convert": None,
}


def pseudo_quantized(
    weight: torch.Tensor, group: int, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`weight` [out, in] on AWQ's grid, its scales and zeros [out, groups]: `pseudo_quantize_tensor`."""
    grouped = weight.float().reshape(-1, group)
    highest, lowest = grouped.amax(dim=1, keepdim=True), grouped.amin(dim=1, keepdim=True)
    # AutoAWQ computes in fp16, so that the scales are those that the file holds
    scales = ((highest - lowest).clamp(min=1e-5) / 15).to(dtype).float()
    zeros = (-torch.round(lowest / scales)).clamp(0, 15)
    on_grid = (torch.clamp(torch.round(grouped / scales) + zeros, 0, 15) - zeros) * scales
    groups = (len(weight), -1)
    return on_grid.reshape(weight.shape), scales.reshape(groups), zeros.reshape(groups)


def packed(columns: torch.Tensor) -> torch.Tensor:
    """Codes [n, out] -> int32 [n, out / 8]; the loop of AutoAWQ's `WQLinear_GEMM.from_linear`."""
    order_map = [0, 2, 4, 6, 1, 3, 5, 7]
    words = torch.zeros((columns.shape[0], columns.shape[1] // 8), dtype=torch.int32)
    for column in range(columns.shape[1] // 8):
        for place in range(8):
            words[:, column] |= columns[:, column * 8 + order_map[place]].int() << (place * 4)
    return words


def awq_tensors(
    module: str, weight: torch.Tensor, group: int, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The layer's tensors, made as `WQLinear_GEMM.from_linear` makes them, and the weight they stand for."""
    on_grid, scales, zeros = pseudo_quantized(weight, group, dtype)
    spread = scales.repeat_interleave(group, dim=1)
    codes = torch.round((on_grid + zeros.repeat_interleave(group, dim=1) * spread) / spread)
    tensors = {
        f"{module}.qweight": packed(codes.t()),
        f"{module}.qzeros": packed(zeros.t()),
        f"{module}.scales": scales.t().contiguous().to(dtype),
    }
    return tensors, on_grid


def awq_model(source: Path, out: Path, group: int = 32) -> dict[str, torch.Tensor]:
    """Writes `source` with every linear layer of its blocks packed; returns their weights on the grid."""
    shutil.copytree(source, out)
    tensors, expected = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            made, expected[name] = awq_tensors(name.removesuffix(".weight"), tensor, group)
            tensors.update(made)
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    edit_json(out / "config.json", quantization_config={**CONFIG, "group_size": group})
    return expected


def awq_file(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A checkpoint of these tensors alone."""
    directory.mkdir()
    content = {"quantization_config": {**CONFIG, **config}}
    (directory / "config.json").write_text(json.dumps(content))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def written(llama: Path, tmp_path: Path) -> Path:
    awq_model(llama, tmp_path / "awq")
    return tmp_path / "awq"


@pytest.mark.parametrize("group", [32, 128])
def test_a_model_decodes_to_the_weights_on_the_grid(llama: Path, tmp_path: Path, group: int) -> None:
    expected = awq_model(llama, tmp_path / "awq", group)
    assert len(expected) == 14
    full, ours = open_checkpoint(llama), open_checkpoint(tmp_path / "awq")
    assert set(ours.names()) == set(full.names())
    for name in full.names():
        assert ours.info(name) == full.info(name)
        assert ours.is_quantized(name) == (name in expected)
        assert torch.equal(ours.read(name), expected.get(name, full.read(name)))
    reference = in_transformers(llama, dtype=torch.float32)
    for name, weight in expected.items():
        reference.get_parameter(name).data = weight
    found = logits(load_whole(build_skeleton(tmp_path / "awq"), ours), tokens())
    torch.testing.assert_close(found, logits(reference, tokens()))


def test_a_word_by_hand(tmp_path: Path) -> None:
    """Outputs 0 to 7 hold their own number; the word reads 0, 2, 4, 6, 1, 3, 5, 7 from its low end."""
    tensors = {
        "m.qweight": torch.tensor([[0x75316420], [-1]], dtype=torch.int32),
        "m.qzeros": torch.tensor([[0x11111110], [0x00000021]], dtype=torch.int32),
        "m.scales": torch.tensor([[1.0] * 8, [0.5] * 8], dtype=torch.float16),
    }
    read = open_checkpoint(awq_file(tmp_path / "file", tensors)).read("m.weight")
    assert read.dtype == torch.float32
    assert read[:, 0].tolist() == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert read[:, 1].tolist() == [7.0, 7.5, 6.5, 7.5, 7.5, 7.5, 7.5, 7.5]


@pytest.mark.parametrize(("out", "inputs", "group"), [(8, 7, 7), (24, 20, 4), (40, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sides_that_are_no_multiples_of_32(
    tmp_path: Path, out: int, inputs: int, group: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(out))
    tensors, expected = awq_tensors("m", weight, group, dtype)
    ours = open_checkpoint(awq_file(tmp_path / "file", tensors, group_size=group))
    assert (ours.info("m.weight").dtype, ours.info("m.weight").shape) == (dtype, (out, inputs))
    assert torch.equal(ours.read("m.weight"), expected)


def test_plain_tensors_beside_packed_ones_are_left_alone(tmp_path: Path) -> None:
    """A bias, and the scales that AutoAWQ puts behind an activation."""
    tensors, _ = awq_tensors("m", torch.ones(8, 4), 4)
    plain = {"m.bias": torch.ones(8), "act.scales": torch.ones(4), "norm.weight": torch.ones(2)}
    ours = open_checkpoint(awq_file(tmp_path / "file", {**tensors, **plain}))
    assert set(ours.names()) == {"m.weight", *plain}
    for name, tensor in plain.items():
        assert not ours.is_quantized(name)
        assert torch.equal(ours.read(name), tensor)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": "gemv"}, "of version gemv; gemm"),
        ({"version": "gemv_fast"}, "of version gemv_fast"),
        ({"version": "marlin"}, "of version marlin"),
        ({"version": "exllama"}, "of version exllama"),
        ({"version": None, "checkpoint_format": "gemv"}, "of version gemv"),
        ({"version": ["gemm"]}, "of version"),
        ({"backend": "llm-awq"}, "of version llm-awq"),
        ({"bits": 8}, "of 8 bits; 4"),
        ({"bits": None}, "of None bits"),
        ({"bits": "4"}, "of '4' bits"),
        ({"zero_point": False}, "without zero points"),
    ],
)
def test_other_forms_are_refused(written: Path, changes: dict[str, Any], match: str) -> None:
    edit_json(written / "config.json", quantization_config={**CONFIG, **changes})
    with pytest.raises(UnsupportedModelError, match=match):
        open_checkpoint(written)


@pytest.mark.parametrize(
    "changes", [{"version": "GEMM"}, {"version": None}, {"version": None, "format": "gemm"}]
)
def test_other_names_of_the_same_form_are_read(written: Path, changes: dict[str, Any]) -> None:
    before = open_checkpoint(written).read(f"{Q_PROJ}.weight")
    edit_json(written / "config.json", quantization_config={**CONFIG, **changes})
    assert torch.equal(open_checkpoint(written).read(f"{Q_PROJ}.weight"), before)


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("scales", None, "has no scales"),
        ("qzeros", None, "has no qzeros"),
        ("qweight", None, "has qzeros, but no qweight"),
        ("weight", torch.zeros(128, 128), "both weight and qweight"),
        ("scales", torch.ones(4, 120), "do not fit together"),
        ("scales", torch.ones(4, 128, dtype=torch.int32), r"scales is torch.int32 \[4, 128\]"),
        ("scales", torch.ones(512), r"scales is torch.float32 \[512\]"),
        ("scales", torch.ones(0, 128), r"scales is torch.float32 \[0, 128\]"),
        ("qzeros", torch.zeros(2, 16, dtype=torch.int32), "do not fit together"),
        ("qzeros", torch.zeros(4, 16, dtype=torch.int64), r"qzeros is torch.int64"),
        ("qweight", torch.zeros(128, 16), r"qweight is torch.float32"),
        ("qweight", torch.zeros(126, 16, dtype=torch.int32), "groups that divide in"),
        ("qweight", torch.zeros(16, 128, dtype=torch.int32), "do not fit together"),
        ("qweight", torch.zeros(0, 16, dtype=torch.int32), r"qweight is torch.int32 \[0, 16\]"),
    ],
)
def test_damaged_layers_are_told(written: Path, part: str, tensor: torch.Tensor | None, match: str) -> None:
    edit_weights(written, **{f"{Q_PROJ}.{part}": tensor})
    opened = open_checkpoint(written)
    with pytest.raises(CorruptFileError, match=match):
        list(opened.names())
    if part != "qweight" or tensor is not None:
        with pytest.raises(CorruptFileError, match=match):
            opened.read(f"{Q_PROJ}.weight")


def test_what_can_be_opened_is_told(written: Path) -> None:
    edit_json(written / "config.json", quantization_config={"quant_method": "magic"})
    with pytest.raises(UnsupportedModelError, match=r"gptq, awq, bitsandbytes.* can be read so far"):
        open_checkpoint(written)
    assert all(method == reader.METHOD for method, reader in FORMATS.items())


def facts(grids: dict[str, IntegerGrid], **others: Any) -> Facts:
    """Facts of a model with 4-bit groups of 32."""
    values = {"left": ["lm_head"], "dtype": torch.float16, "model_type": "llama", **others}
    return Facts(grids=grids, common=IntegerGrid(4, 32, "integer"), **values)


@pytest.mark.parametrize(("out", "inputs", "group"), [(32, 64, 32), (64, 96, -1), (96, 32, 16), (8, 20, 4)])
@pytest.mark.parametrize("zero", ["middle", "integer"])
def test_a_layer_is_packed_as_autoawq_packs_it(out: int, inputs: int, group: int, zero: Zero) -> None:
    grid = IntegerGrid(4, group, zero)
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(out))
    codes = grid.encode(weight, grid.fit(weight))
    zeros = torch.full(codes.scales.shape, 8) if codes.zeros is None else codes.zeros
    tensors = awq.encode("m", codes, grid)
    assert tensors.keys() == {"m.qweight", "m.qzeros", "m.scales"}
    assert torch.equal(tensors["m.qweight"], packed(codes.codes.t()))
    assert torch.equal(tensors["m.qzeros"], packed(zeros.t()))
    assert torch.equal(tensors["m.scales"], codes.scales.t())
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert {i.name: (i.dtype, i.shape) for i in awq.layout("m", (out, inputs), grid)} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }


def test_a_written_word_by_hand() -> None:
    """Outputs 0 to 7 of codes 0 to 7: nibbles, lowest first, hold outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    grid = IntegerGrid(4, 1, "integer")
    eight = torch.arange(8, dtype=torch.uint8)[:, None]
    codes = grid.assemble(eight, IntegerScales(torch.ones(8, 1).half(), 15 - eight))
    tensors = awq.encode("m", codes, grid)
    assert tensors["m.qweight"].tolist() == [[0x75316420]]
    assert [word & 0xFFFFFFFF for word in tensors["m.qzeros"][0].tolist()] == [0x8ACE9BDF]


@pytest.mark.parametrize("group", [16, 32, 128, -1])
@pytest.mark.parametrize("zero", ["middle", "integer"])
def test_what_is_written_decodes_to_the_weights_on_the_grid(tmp_path: Path, group: int, zero: Zero) -> None:
    grid = IntegerGrid(4, group, zero)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(group))
    codes = grid.encode(weight, grid.fit(weight))
    file = awq_file(tmp_path / "file", awq.encode("m", codes, grid), group_size=group)
    assert torch.equal(open_checkpoint(file).read("m.weight"), grid.decode(codes))


def test_groups_that_are_no_neighbours_are_refused() -> None:
    grid = IntegerGrid(4, 32)
    codes = IntegerCodes(
        torch.zeros(32, 32, dtype=torch.uint8),
        torch.ones(32, 1).half(),
        group_of=torch.zeros(32, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match="groups that are no neighbours"):
        awq.encode("m", codes, grid)


def test_grids() -> None:
    assert awq.grid_for(Wish(4)) == IntegerGrid(4, 128, "integer", torch.float16)
    assert awq.grid_for(Wish(4, 32, False, torch.bfloat16)) == IntegerGrid(4, 32, "integer")
    assert awq.grid_for(Wish(4, -1, True)) == IntegerGrid(4, -1, "middle")
    for bits in (2, 3, 8):
        with pytest.raises(
            SpecError, match=f"{bits} bits in the AWQ layout; 4; the formats gptq and gptq_v2"
        ):
            awq.grid_for(Wish(bits))
    for group in (0, 8, 48, 256, -2):
        with pytest.raises(SpecError, match=f"a group size of {group} in the AWQ layout; one of 16, 32"):
            awq.grid_for(Wish(4, group))


def test_obstacles() -> None:
    grid = IntegerGrid(4, 16, "integer")
    assert awq.obstacle((64, 48), grid) is None
    assert awq.obstacle((272, 128), grid) == "outputs that are no multiple of 32"


def test_the_config_is_autoawqs() -> None:
    grid = IntegerGrid(4, 32, "integer")
    entries = awq.config_entries(facts({"model.layers.0.fc": grid}))
    assert entries == {"quantization_config": {**CONFIG, "modules_to_not_convert": ["lm_head"]}}
    assert set(awq.extra_files(entries)) == {"quant_config.json", "quantize_config.json"}
    assert all(content == entries["quantization_config"] for content in awq.extra_files(entries).values())
    none_left = awq.config_entries(facts({"model.layers.0.fc": grid}, left=[]))
    assert none_left == {"quantization_config": CONFIG}


def test_names_left_out_hit_no_other_layer() -> None:
    """By all readings: transformers' `should_convert_module`, vLLM's substrings, GPTQModel's `dynamic`."""
    left = ["model.layers.1.mlp.down_proj", "lm_head"]
    entries = awq.config_entries(facts({}, left=left))
    patterns = entries["quantization_config"]["modules_to_not_convert"]
    names = [f"model.layers.{n}.mlp.{p}_proj" for n in (0, 1, 10, 11, 21, 111) for p in ("up", "down")]

    def in_transformers_words(name: str) -> bool:
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        return any(re.match(rf"(?:{key}){boundary}", name) or name.endswith(key) for key in patterns)

    for hits in (in_transformers_words, lambda name: any(key in name for key in patterns)):
        assert [name for name in [*names, "lm_head"] if hits(name)] == left
    # GPTQModel's own loader goes by `dynamic` alone, and leaves the head out by itself
    (pattern,) = entries["quantization_config"]["dynamic"]
    assert [name for name in names if re.match(pattern.removeprefix("-:"), name)] == left[:1]


@pytest.mark.parametrize("own", [IntegerGrid(8, 32, "integer"), IntegerGrid(4, 64, "integer")])
def test_one_grid_for_all_layers(own: IntegerGrid) -> None:
    with pytest.raises(
        SpecError, match=r"for model\.layers\.0\.fc, in an AWQ checkpoint of 4 bits in groups of 32"
    ):
        awq.config_entries(facts({"model.layers.0.fc": own}))


def test_models_with_scaled_activations_are_refused() -> None:
    with pytest.raises(SpecError, match="gpt_neox in the AWQ layout"):
        awq.config_entries(facts({}, model_type="gpt_neox"))


def test_it_is_a_format() -> None:
    kind: Format = awq
    assert (kind.NAME, kind.METHOD, kind.HOLDS_HEAD, kind.HOLDS_GROUP_ORDER) == ("awq", "awq", False, False)


@pytest.mark.slow
def test_gptqmodel_computes_what_we_decode(llama: Path, tmp_path: Path) -> None:
    """Through transformers, on the CPU: written by us, with and without stored zeros, one layer left."""
    reference = in_transformers(llama, dtype=torch.float32)
    left = "model.layers.1.mlp.down_proj"
    made: list[tuple[Path, torch.Tensor]] = []
    for number, grid in enumerate((IntegerGrid(4, 32, "integer"), IntegerGrid(4, 128))):
        out = shutil.copytree(llama, tmp_path / str(number))
        tensors, grids = {}, {}
        for name, tensor in load_file(llama / "model.safetensors").items():
            module = name.removesuffix(".weight")
            if not name.endswith("_proj.weight") or module == left:
                tensors[name] = tensor
                continue
            codes = grid.encode(tensor, grid.fit(tensor))
            tensors.update(awq.encode(module, codes, grid))
            grids[module] = grid
            reference.get_parameter(name).data = grid.decode(codes)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        told = Facts(grids, [left, "lm_head"], grid, torch.float16, "llama")
        edit_json(out / "config.json", **awq.config_entries(told))
        made.append((out, logits(reference, tokens())))
    outcomes = run_in_runtime("gptqmodel", [out for out, _ in made], tokens(), tmp_path / "logits")
    for (_, ours), (outcome, theirs) in zip(made, outcomes, strict=True):
        assert not outcome["missing"] + outcome["unexpected"] + outcome["mismatched"]
        assert sum(outcome["layers"].values()) == 13
        assert theirs is not None
        assert (theirs - ours).norm() < 0.005 * ours.norm()
