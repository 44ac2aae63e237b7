"""GPTQ's layout: golden words, an independent packing as the oracle, and what others write."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.formats import gptq, gptq_v2
from qexport.formats.format import Facts, Format, Wish
from qexport.formats.opening import open_checkpoint
from qexport.formats.packing import pack, unpack
from qexport.grids.grid import encode
from qexport.grids.integer import IntegerCodes, IntegerGrid, IntegerScales, Zero
from tests.runtimes import run_in_runtime
from tests.tiny import edit_json, edit_weights, in_transformers, logits, tiny_model, tokens

Q_PROJ = "model.layers.0.self_attn.q_proj"
FORMATS: list[Any] = [gptq, gptq_v2]


def weight_of(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """A random matrix [out, in]."""
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


def shuffled(inputs: int, width: int) -> torch.Tensor:
    """Groups of `width` inputs each that are no neighbours."""
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
    group_of = torch.empty(inputs, dtype=torch.int64)
    group_of[order] = torch.arange(inputs) // width
    return group_of


def codes_of(grid: IntegerGrid, weight: torch.Tensor, act_order: bool = False) -> IntegerCodes:
    """The nearest codes; in act-order, under scales fit to groups that are no neighbours."""
    if not act_order:
        return grid.encode(weight, grid.fit(weight))
    group_of = shuffled(weight.shape[1], grid.group_width(weight.shape[1]))
    scales = grid.fit(weight[:, group_of.argsort(stable=True)])
    codes: IntegerCodes = encode(grid, weight, scales, group_of)
    return codes


def facts(grids: Mapping[str, IntegerGrid], common: IntegerGrid, **others: Any) -> Facts:
    """Facts with defaults for all that a test does not ask about."""
    values: dict[str, Any] = {"left": ["lm_head"], "dtype": torch.float16, "model_type": "llama", **others}
    return Facts(grids=grids, common=common, **values)


def write_model(
    source: Path, out: Path, kind: Any, grid: IntegerGrid, act_order: bool = False, head: bool = False
) -> dict[str, torch.Tensor]:
    """Writes `source` with every linear layer of its blocks packed; returns the weights these stand for."""
    shutil.copytree(source, out)
    tensors, expected = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight") or (head and name == "lm_head.weight"):
            codes = codes_of(grid, tensor, act_order)
            tensors.update(kind.encode(name.removesuffix(".weight"), codes, grid))
            expected[name] = grid.decode(codes)
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    grids = {name.removesuffix(".weight"): grid for name in expected}
    entries = kind.config_entries(
        facts(grids, grid, desc_act=act_order, damp=0.01, left=[] if head else ["lm_head"])
    )
    edit_json(out / "config.json", **entries)
    for file, content in kind.extra_files(entries).items():
        (out / file).write_text(json.dumps(content))
    return expected


def autogptq(codes: IntegerCodes, bits: int, middle: int, minus: int) -> dict[str, torch.Tensor]:
    """The layer's tensors by the loops of AutoGPTQ's `QuantLinear.pack` (qlinear_cuda, 0.7.1)."""
    intweight = codes.codes.t().long()
    zeros = torch.full_like(codes.scales, middle) if codes.zeros is None else codes.zeros
    zeros = zeros.t().long() - minus
    group_of = codes.group_of
    if group_of is None:
        width = intweight.shape[0] // len(zeros)
        group_of = torch.tensor([i // width for i in range(intweight.shape[0])])
    return {
        "qweight": _autogptq_rows(intweight, bits),
        "qzeros": _autogptq_rows(zeros.t(), bits).t(),
        "scales": codes.scales.t(),
        "g_idx": group_of.int(),
    }


def _autogptq_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs rows as `pack` does, 3 bits by its three cases."""
    words = torch.zeros(values.shape[0] * bits // 32, values.shape[1], dtype=torch.int64)
    i = row = 0
    while row < len(words):
        if bits in (2, 4, 8):
            for j in range(i, i + (32 // bits)):
                words[row] |= values[j] << (bits * (j - i))
            i += 32 // bits
            row += 1
            continue
        for j in range(i, i + 10):
            words[row] |= values[j] << (3 * (j - i))
        i += 10
        words[row] |= values[i] << 30
        row += 1
        words[row] |= (values[i] >> 2) & 1
        i += 1
        for j in range(i, i + 10):
            words[row] |= values[j] << (3 * (j - i) + 1)
        i += 10
        words[row] |= values[i] << 31
        row += 1
        words[row] |= (values[i] >> 1) & 0x3
        i += 1
        for j in range(i, i + 10):
            words[row] |= values[j] << (3 * (j - i) + 2)
        i += 10
        row += 1
    words &= 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def test_three_bit_codes_straddle_words_as_in_autogptq() -> None:
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10], codes[21] = 0b101, 0b110
    words = [word & 0xFFFFFFFF for word in pack(codes, 3)[:, 0].tolist()]
    # code 10: its low two bits end word 0, its high bit opens word 1; code 21: one bit ends word 1
    assert words == [0b01 << 30, 0b1 | (0b0 << 31), 0b11]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["middle", "integer"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("out", "inputs", "group"), [(32, 64, 32), (64, 96, -1), (96, 32, 16)])
def test_a_layer_is_packed_as_autogptq_packs_it(
    bits: int, zero: Zero, kind: Any, act_order: bool, out: int, inputs: int, group: int
) -> None:
    grid = IntegerGrid(bits, group, zero)
    codes = codes_of(grid, weight_of(out, inputs), act_order)
    tensors = kind.encode("m", codes, grid)
    minus = 1 if kind is gptq and zero == "middle" else 0
    expected = autogptq(codes, bits, grid.middle, minus)
    assert tensors.keys() == {f"m.{part}" for part in expected}
    for part, tensor in expected.items():
        assert torch.equal(tensors[f"m.{part}"], tensor), part
        assert tensors[f"m.{part}"].is_contiguous()
    assert {i.name: (i.dtype, i.shape) for i in kind.layout("m", (out, inputs), grid)} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("kind", "bits", "words"),
    [
        # Version 1 stores 2^(b-1) - 1: AutoGPTQ's symmetric checkpoints on the Hub hold 0x77777777.
        (gptq, 2, [0x55555555]),
        (gptq, 3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (gptq, 4, [0x77777777]),
        (gptq, 8, [0x7F7F7F7F]),
        (gptq_v2, 2, [0xAAAAAAAA]),
        (gptq_v2, 3, [0x24924924, 0x49249249, 0x92492492]),
        (gptq_v2, 4, [0x88888888]),
        (gptq_v2, 8, [0x80808080]),
    ],
)
def test_symmetric_zero_points(kind: Any, bits: int, words: list[int]) -> None:
    grid = IntegerGrid(bits, 32)
    tensors = kind.encode("m", codes_of(grid, weight_of(32, 64)), grid)
    row = (tensors["m.qzeros"].long() & 0xFFFFFFFF)[0].tolist()
    assert row == words * (len(row) // len(words))


def test_asymmetric_zero_points_are_stored_as_they_are() -> None:
    """Eight outputs of zero points 0 to 7; version 1 would have to store -1 for the first."""
    grid = IntegerGrid(4, 32, "integer")
    scales = IntegerScales(torch.ones(32, 1).half(), (torch.arange(32) % 8).to(torch.uint8)[:, None])
    codes = grid.assemble(torch.zeros(32, 32), scales)
    assert gptq.encode("m", codes, grid)["m.qzeros"].tolist() == [[0x76543210] * 4]
    with pytest.raises(ValueError, match="m has a zero point of 0"):
        gptq.encode_as("gptq", "m", codes, grid)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["middle", "integer"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_decodes_to_the_weights_on_the_grid(
    llama: Path, tmp_path: Path, bits: int, zero: Zero, act_order: bool, kind: Any
) -> None:
    expected = write_model(llama, tmp_path / "m", kind, IntegerGrid(bits, 32, zero), act_order)
    assert len(expected) == 14
    full, ours = open_checkpoint(llama), open_checkpoint(tmp_path / "m")
    assert set(ours.names()) == set(full.names())
    for name in full.names():
        assert ours.info(name) == full.info(name)
        assert ours.is_quantized(name) == (name in expected)
        assert torch.equal(ours.read(name), expected.get(name, full.read(name)))


def test_grids() -> None:
    assert gptq.grid_for(Wish(4)) == IntegerGrid(4, 128, "middle", torch.float16)
    assert gptq.grid_for(Wish(3, 16, True)) == IntegerGrid(3, 16, "middle")
    assert gptq.grid_for(Wish(8, -1, False, torch.bfloat16)) == IntegerGrid(8, -1, "integer", torch.float16)
    for bits in (1, 5, 6, 7, 16):
        with pytest.raises(SpecError, match=f"{bits} bits in the GPTQ layout; 2, 3, 4 or 8"):
            gptq.grid_for(Wish(bits))
    with pytest.raises(SpecError, match="which GPTQModel misreads on a CPU; a group size"):
        gptq.grid_for(Wish(4, -1, False))
    for group in (0, 8, 48, 2048, -2):
        with pytest.raises(SpecError, match=f"a group size of {group} in the GPTQ layout; one of 16, 32"):
            gptq.grid_for(Wish(4, group))


@pytest.mark.parametrize(
    ("shape", "group", "found"),
    [
        ((32, 64), 64, None),
        ((32, 96), -1, None),
        ((48, 64), 16, "sides that are no multiples of 32"),
        ((32, 48), 16, "sides that are no multiples of 32"),
    ],
)
def test_obstacles(shape: tuple[int, int], group: int, found: str | None) -> None:
    assert gptq.obstacle(shape, IntegerGrid(4, group)) == found


def test_the_config() -> None:
    grid = IntegerGrid(4, 32)
    entries = gptq.config_entries(facts({Q_PROJ: grid}, grid, damp=0.05))
    assert entries == {
        "quantization_config": {
            "bits": 4,
            "group_size": 32,
            "desc_act": False,
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
            "lm_head": False,
            "damp_percent": 0.05,
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
        }
    }
    assert gptq.extra_files(entries) == {"quantize_config.json": entries["quantization_config"]}


@pytest.mark.parametrize(
    ("kind", "zero", "version"),
    [
        (gptq, "middle", "gptq"),
        (gptq, "integer", "gptq_v2"),
        (gptq_v2, "middle", "gptq_v2"),
        (gptq_v2, "integer", "gptq_v2"),
    ],
)
def test_the_version_is_told(kind: Any, zero: Zero, version: str) -> None:
    grid = IntegerGrid(4, 32, zero)
    config = kind.config_entries(facts({Q_PROJ: grid}, grid))["quantization_config"]
    assert (config["checkpoint_format"], config["sym"]) == (version, zero == "middle")


def test_act_order_is_told_where_groups_are_no_neighbours() -> None:
    grid = IntegerGrid(4, 32)
    for static in (False, True):
        config = gptq.config_entries(facts({Q_PROJ: grid}, grid, desc_act=True, static_groups=static))
        told = config["quantization_config"]
        assert (told["desc_act"], told["static_groups"]) == (not static, static)


def test_layers_of_their_own_kind_are_told_by_their_names_and_by_their_fused_ones() -> None:
    """Which rule a name gets, by the reading of vLLM's `get_dynamic_override` and of GPTQModel."""
    common, own = IntegerGrid(4, 128), IntegerGrid(8, 32)
    block = "model.layers.{}.{}"
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    grids = {block.format(n, name): common for n in (1, 11) for name in names}
    grids |= {block.format(1, f"self_attn.{p}_proj"): own for p in "qkv"}
    grids[block.format(1, "mlp.up_proj")] = own
    left = [block.format(11, "mlp.gate_proj"), block.format(11, "mlp.up_proj")]
    for name in left:
        del grids[name]
    entries = gptq.config_entries(facts(grids, common, left=[*left, "lm_head"]))
    dynamic = entries["quantization_config"]["dynamic"]

    def rule(name: str) -> dict[str, Any] | bool | None:
        for pattern, values in dynamic.items():
            if re.match(pattern[2:], name):
                return False if pattern.startswith("-:") else values
        return None

    told = {"bits": 8, "group_size": 32, "sym": True}
    for name in (*grids, *left):
        assert rule(name) == (False if name in left else told if grids[name] == own else None)
    assert rule(block.format(1, "self_attn.qkv_proj")) == told
    assert rule(block.format(11, "self_attn.qkv_proj")) is None
    assert rule(block.format(1, "mlp.gate_up_proj")) is None  # its parts differ: no rule is right
    assert rule(block.format(11, "mlp.gate_up_proj")) is False
    assert rule("lm_head") is None


def test_experts_of_one_kind_are_told_as_one() -> None:
    common, own = IntegerGrid(4, 128), IntegerGrid(8, 128)
    grids = {f"model.layers.0.mlp.experts.{n}.up_proj": own for n in range(2)}
    dynamic = gptq.config_entries(facts(grids, common))["quantization_config"]["dynamic"]
    assert r"+:^model\.layers\.0\.mlp\.experts$" in dynamic


@pytest.mark.parametrize(
    ("converted", "left", "told"),
    [
        # the same in every block: names within a block
        (["m.layers.0.fc1", "m.layers.1.fc1"], ["m.layers.0.fc2", "m.layers.1.fc2"], ["fc1"]),
        (["m.layers.0.mlp.gate_proj"], ["m.layers.0.mlp.gate"], ["mlp.gate_proj"]),
        # not the same: in full
        (["m.layers.0.fc1", "m.layers.1.fc2"], ["m.layers.1.fc1"], ["m.layers.0.fc1", "m.layers.1.fc2"]),
        # a name that is another's end, or its beginning
        (["m.layers.0.k"], ["m.layers.0.block.k"], ["m.layers.0.k"]),
        (["m.layers.0.up"], ["m.layers.0.up2"], ["m.layers.0.up"]),
    ],
)
def test_names_that_tell_layers_apart(converted: list[str], left: list[str], told: list[str]) -> None:
    assert gptq.told_by(converted, left) == told
    grids = {name: IntegerGrid(4, 32) for name in converted}
    config = gptq.config_entries(facts(grids, IntegerGrid(4, 32), left=left))["quantization_config"]
    assert config["modules_in_block_to_quantize"] == [told]


def test_kinds_that_version_1_cannot_mix() -> None:
    mixed = {"a.0.q": IntegerGrid(4, 32), "a.0.k": IntegerGrid(4, 32, "integer")}
    with pytest.raises(SpecError, match="symmetric and asymmetric layers"):
        gptq.config_entries(facts(mixed, IntegerGrid(4, 32)))
    config = gptq_v2.config_entries(facts(mixed, IntegerGrid(4, 32)))["quantization_config"]
    assert config["dynamic"] == {r"+:^a\.0\.k$": {"bits": 4, "group_size": 32, "sym": False}}


@pytest.fixture
def written(llama: Path, tmp_path: Path) -> Path:
    write_model(llama, tmp_path / "written", gptq, IntegerGrid(4, 32))
    return tmp_path / "written"


def test_layers_of_other_bits_and_groups_are_read_off_their_shapes(written: Path) -> None:
    """Whatever the config says of them: here nothing."""
    weight = weight_of(128, 128)
    for bits in (2, 3, 8):
        grid = IntegerGrid(bits, 64)
        codes = codes_of(grid, weight)
        edit_weights(written, **gptq.encode(Q_PROJ, codes, grid))
        assert torch.equal(open_checkpoint(written).read(f"{Q_PROJ}.weight"), grid.decode(codes))


def test_asymmetric_zero_points_of_version_1_are_read(written: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    zeros = torch.randint(1, 16, (4, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    edit_weights(written, **{f"{Q_PROJ}.qzeros": pack((zeros - 1).t().contiguous(), 4).t().contiguous()})
    codes = unpack(tensors[f"{Q_PROJ}.qweight"], 4).float()
    scales = tensors[f"{Q_PROJ}.scales"].float()
    expected = (codes - zeros.float().repeat_interleave(32, dim=0)) * scales.repeat_interleave(32, dim=0)
    assert torch.equal(open_checkpoint(written).read(f"{Q_PROJ}.weight"), expected.t())


@pytest.mark.parametrize(("out", "inputs"), [(124, 128), (127, 128), (128, 127), (125, 124)])
def test_last_words_may_be_filled_up(written: Path, out: int, inputs: int) -> None:
    """As GPTQModel 7.7 fills them up for sides that are no multiples of a word's eight codes."""
    whole = load_file(written / "model.safetensors")
    cut = {part: whole[f"{Q_PROJ}.{part}"][:, :out].contiguous() for part in ("qweight", "scales")}
    cut["g_idx"] = whole[f"{Q_PROJ}.g_idx"][:inputs].contiguous()
    expected = open_checkpoint(written).read(f"{Q_PROJ}.weight")[:out, :inputs]
    edit_weights(written, **{f"{Q_PROJ}.{part}": tensor for part, tensor in cut.items()})
    ours = open_checkpoint(written)
    assert ours.info(f"{Q_PROJ}.weight").shape == (out, inputs)
    assert torch.equal(ours.read(f"{Q_PROJ}.weight"), expected)


def test_a_bias_and_other_tensors_stay(written: Path) -> None:
    edit_weights(written, **{f"{Q_PROJ}.bias": torch.ones(128), "act.scales": torch.ones(4)})
    ours = open_checkpoint(written)
    for name in (f"{Q_PROJ}.bias", "act.scales"):
        assert not ours.is_quantized(name)
        assert torch.equal(ours.read(name), torch.ones(ours.info(name).shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes_are_read(written: Path, dtype: torch.dtype) -> None:
    before = open_checkpoint(written).read(f"{Q_PROJ}.weight")
    scales = load_file(written / "model.safetensors")[f"{Q_PROJ}.scales"].to(dtype)
    edit_weights(written, **{f"{Q_PROJ}.scales": scales})
    ours = open_checkpoint(written)
    assert ours.info(f"{Q_PROJ}.weight").dtype == dtype
    torch.testing.assert_close(ours.read(f"{Q_PROJ}.weight"), before, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("scales", None, "has no scales"),
        ("qzeros", None, "has no qzeros"),
        ("g_idx", None, "has no g_idx"),
        ("qweight", None, "has qzeros, but no qweight"),
        ("weight", torch.zeros(128, 128), "both weight and qweight"),
        ("scales", torch.ones(4, 120), "do not fit together"),
        ("scales", torch.ones(5, 128), "do not fit together"),
        ("scales", torch.ones(4, 128, dtype=torch.int32), r"scales is torch.int32 \[4, 128\]"),
        ("scales", torch.ones(512), r"scales is torch.float32 \[512\]"),
        ("scales", torch.ones(0, 128), r"scales is torch.float32 \[0, 128\]"),
        ("qzeros", torch.zeros(4, 12, dtype=torch.int32), "do not fit together"),
        ("qzeros", torch.zeros(4, 16, dtype=torch.int64), r"qzeros is torch.int64"),
        ("qweight", torch.zeros(16, 128), r"qweight is torch.float32"),
        ("qweight", torch.zeros(15, 128, dtype=torch.int32), "do not fit together"),
        ("qweight", torch.zeros(16, 64, dtype=torch.int32), "do not fit together"),
        ("qweight", torch.zeros(0, 128, dtype=torch.int32), r"qweight is torch.int32 \[0, 128\]"),
        ("qweight", torch.zeros(2048, dtype=torch.int32), r"qweight is torch.int32 \[2048\]"),
        ("g_idx", torch.zeros(120, dtype=torch.int32), "do not fit together"),
        ("g_idx", torch.zeros(128, dtype=torch.int64), r"g_idx is torch.int64 \[128\]"),
        ("g_idx", torch.zeros(0, dtype=torch.int32), r"g_idx is torch.int32 \[0\]"),
        ("g_idx", torch.zeros(1 << 20, dtype=torch.int32), "do not fit together"),
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


@pytest.mark.parametrize("group", [4, -1])
def test_inputs_of_no_group_are_told(written: Path, group: int) -> None:
    edit_weights(written, **{f"{Q_PROJ}.g_idx": torch.full((128,), group, dtype=torch.int32)})
    with pytest.raises(CorruptFileError, match=f"g_idx names groups from {group} to {group}; 0 to 3"):
        open_checkpoint(written).read(f"{Q_PROJ}.weight")


def test_five_bits_are_another_layout(written: Path) -> None:
    words = {"qweight": torch.zeros(20, 128), "qzeros": torch.zeros(4, 20)}
    edit_weights(written, **{f"{Q_PROJ}.{part}": tensor.int() for part, tensor in words.items()})
    with pytest.raises(UnsupportedModelError, match="has 5 bits in the GPTQ layout"):
        list(open_checkpoint(written).names())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"checkpoint_format": "marlin"}, "in the form marlin; gptq or gptq_v2"),
        ({"checkpoint_format": "gptq_p"}, "in the form gptq_p"),
        ({"format": "gptq_v2"}, "in the form gptq, gptq_v2"),
        ({"checkpoint_format": None, "format": ["gptq"]}, "in the form"),
    ],
)
def test_other_forms_are_refused(written: Path, changes: dict[str, Any], match: str) -> None:
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    edit_json(written / "config.json", quantization_config={**config, **changes})
    with pytest.raises(UnsupportedModelError, match=match):
        open_checkpoint(written)


@pytest.mark.parametrize("changes", [{"checkpoint_format": None}, {"checkpoint_format": "GPTQ"}])
def test_other_names_of_version_1_are_read(written: Path, changes: dict[str, Any]) -> None:
    before = open_checkpoint(written).read(f"{Q_PROJ}.weight")
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    edit_json(written / "config.json", quantization_config={**config, **changes})
    assert torch.equal(open_checkpoint(written).read(f"{Q_PROJ}.weight"), before)


def test_both_are_formats() -> None:
    kinds: list[Format] = [gptq, gptq_v2]
    assert [kind.NAME for kind in kinds] == ["gptq", "gptq_v2"]
    assert {kind.METHOD for kind in kinds} == {"gptq"}


@pytest.mark.slow
def test_gptqmodel_computes_what_we_decode(llama: Path, tmp_path: Path) -> None:
    """Through transformers, on the CPU: both versions, zero points, act-order, a quantized head."""
    untied = tiny_model(tmp_path / "untied", tied=False)
    middle, integer = IntegerGrid(4, 32), IntegerGrid(4, 32, "integer")
    rows: list[tuple[Any, IntegerGrid, bool, bool]] = [
        (gptq, middle, False, False),
        (gptq, integer, False, False),
        (gptq, IntegerGrid(3, 16, "integer"), True, False),
        (gptq_v2, IntegerGrid(8, -1), False, False),
        (gptq, middle, False, True),
    ]
    made: list[tuple[Path, dict[str, torch.Tensor], Path]] = []
    for number, (kind, grid, act_order, head) in enumerate(rows):
        source, out = (untied if head else llama), tmp_path / str(number)
        made.append((out, write_model(source, out, kind, grid, act_order, head), source))
    outcomes = run_in_runtime("gptqmodel", [out for out, _, _ in made], tokens(), tmp_path / "logits")
    for (_, expected, source), (outcome, theirs) in zip(made, outcomes, strict=True):
        assert not outcome["missing"] + outcome["unexpected"] + outcome["mismatched"]
        assert sum(outcome["layers"].values()) == len(expected)
        reference = in_transformers(source, dtype=torch.float32)
        for name, weight in expected.items():
            reference.get_parameter(name).data = weight
        ours = logits(reference, tokens())
        assert theirs is not None
        assert (theirs - ours).norm() < 0.005 * ours.norm()  # GPTQModel dequantizes to fp16
