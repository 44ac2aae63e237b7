"""GPTQ's layout: golden words, and a reader for what others write (version 2, act-order, zero points)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qexport
from qexport.errors import CorruptFileError, UnsupportedModelError
from qexport.formats import gptq
from qexport.formats.packing import pack, unpack
from qexport.grids.integer import IntegerCodes, IntegerGrid
from qexport.specs import RtnSpec
from tests.tiny import edit_json, edit_weights

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_packing_is_one_stream_of_bits(bits: int) -> None:
    codes = torch.randint(
        0, 1 << bits, (64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (64 * bits // 32, 3)
    for column in range(3):
        number = sum(int(code) << (bits * place) for place, code in enumerate(codes[:, column].tolist()))
        expected = [number >> (32 * place) & 0xFFFFFFFF for place in range(len(words))]
        assert [word & 0xFFFFFFFF for word in words[:, column].tolist()] == expected
    assert torch.equal(unpack(words, bits), codes)


def test_three_bit_codes_straddle_words_as_in_autogptq() -> None:
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10], codes[21] = 0b101, 0b110
    words = [word & 0xFFFFFFFF for word in pack(codes, 3)[:, 0].tolist()]
    # code 10: its low two bits end word 0, its high bit opens word 1; code 21: one bit ends word 1
    assert words == [0b01 << 30, 0b1 | (0b0 << 31), 0b11]


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zero_points_are_stored_minus_one(bits: int, word: int) -> None:
    grid = IntegerGrid(bits, 32)
    tensors = gptq.encode("m", grid.quantize(torch.randn(32, 64)), grid)
    assert set((tensors["m.qzeros"] & 0xFFFFFFFF).flatten().tolist()) == {word}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("out", "inputs", "group"), [(32, 64, 32), (64, 96, 96), (96, 32, 16), (352, 64, -1)]
)
def test_layout_says_what_encode_makes(bits: int, out: int, inputs: int, group: int) -> None:
    grid = IntegerGrid(bits, group)
    codes = grid.quantize(torch.randn(out, inputs, generator=torch.Generator().manual_seed(0)))
    tensors = gptq.encode("m", codes, grid)
    planned = gptq.layout("m", (out, inputs), grid)
    assert {i.name: (i.dtype, i.shape) for i in planned} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }


@pytest.fixture
def written(llama: Path, tmp_path: Path) -> Path:
    qexport.quantize(llama, tmp_path / "written", RtnSpec(bits=4, group_size=32))
    return tmp_path / "written"


def test_version_2_and_act_order_of_others_are_read(written: Path, tmp_path: Path) -> None:
    before = qexport.open_checkpoint(written).read(f"{Q_PROJ}.weight")
    other = shutil.copytree(written, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"].update(checkpoint_format="gptq_v2", desc_act=True)
    (other / "config.json").write_text(json.dumps(config))
    tensors = load_file(other / "model.safetensors")
    for name in list(tensors):
        if name.endswith(".qzeros"):  # version 2 stores the zero itself: 8 in every nibble
            tensors[name] = torch.full_like(tensors[name], -0x77777778)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    codes = unpack(tensors[f"{Q_PROJ}.qweight"], 4)
    tensors[f"{Q_PROJ}.qweight"] = pack(codes[order], 4)
    tensors[f"{Q_PROJ}.g_idx"] = tensors[f"{Q_PROJ}.g_idx"][order]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(qexport.open_checkpoint(other).read(f"{Q_PROJ}.weight"), before[:, order])


def test_asymmetric_zero_points_are_read(written: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    zeros = torch.randint(1, 16, (4, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    edit_weights(written, **{f"{Q_PROJ}.qzeros": pack((zeros - 1).t().contiguous(), 4).t().contiguous()})
    codes = unpack(tensors[f"{Q_PROJ}.qweight"], 4).float()
    scales = tensors[f"{Q_PROJ}.scales"].float()
    expected = (codes - zeros.float().repeat_interleave(32, dim=0)) * scales.repeat_interleave(32, dim=0)
    assert torch.equal(qexport.open_checkpoint(written).read(f"{Q_PROJ}.weight"), expected.t())


def test_damaged_tensors_are_told(written: Path) -> None:
    edit_weights(written, **{f"{Q_PROJ}.g_idx": torch.full((128,), 9, dtype=torch.int32)})
    with pytest.raises(CorruptFileError, match="do not fit together"):
        qexport.open_checkpoint(written).read(f"{Q_PROJ}.weight")
    edit_weights(written, **{f"{Q_PROJ}.g_idx": None})
    with pytest.raises(CorruptFileError, match="has no g_idx"):
        qexport.open_checkpoint(written).read(f"{Q_PROJ}.weight")


def test_unknown_forms_are_refused(written: Path) -> None:
    edit_json(written / "config.json", quantization_config={"quant_method": "gptq", "bits": 5})
    with pytest.raises(UnsupportedModelError, match="of 5 bits"):
        qexport.open_checkpoint(written)
    edit_json(written / "config.json", quantization_config={"quant_method": "magic"})
    with pytest.raises(UnsupportedModelError, match="quantized by 'magic'"):
        qexport.open_checkpoint(written)


def test_codes_survive_the_file() -> None:
    grid = IntegerGrid(3, 32)
    codes = torch.randint(0, 8, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    scales = torch.rand(32, 2, generator=torch.Generator().manual_seed(3)).half()
    tensors = gptq.encode("m", IntegerCodes(codes, scales), grid)
    assert torch.equal(unpack(tensors["m.qweight"], 3).t(), codes)
    assert torch.equal(tensors["m.scales"].t(), scales)
