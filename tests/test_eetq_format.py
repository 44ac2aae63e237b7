"""EETQ's layout against a transcription of its C++, and of the order in which its kernel reads."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qexport.checkpoint.safetensors_file import read_header
from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.formats import eetq
from qexport.formats.format import Facts, Wish
from qexport.formats.opening import open_checkpoint
from qexport.grids.grid import encode
from qexport.grids.int8_rows import Int8RowCodes, Int8RowGrid
from tests.tiny import edit_json, edit_weights, in_transformers, logits, tiny_model, tokens

GRID = eetq.grid_for(Wish(8))


def preprocessed(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Codes int8 [rows, cols], rows being inputs, through EETQ's own steps.

    Transcribed loop by loop from NetEase-FuXi/EETQ, csrc/cutlass_kernels/cutlass_preprocessors.cc at 465e972,
    `preprocess_weights_for_mixed_gemm`, with the layout of LayoutDetailsB<uint8_t> for sm75 and later:
    rows_per_column_tile = ThreadblockK = 64, columns_interleaved = 2.
    """
    rows, cols = codes.shape
    # permute_B_rows_for_mixed_gemm; a vector is 4 bytes there, and whole rows here
    permuted = np.empty_like(codes)
    for base_row in range(0, rows, 16):
        for tile_row in range(16):
            read = 8 * ((tile_row % 4) // 2) + tile_row % 2 + 2 * (tile_row // 4)
            permuted[base_row + tile_row] = codes[base_row + read]
    # subbyte_transpose
    transposed = np.empty((cols, rows), np.int8)
    for row in range(rows):
        for col in range(cols):
            transposed[col, row] = permuted[row, col]
    # interleave_column_major_tensor, in vectors of 4 bytes
    vectors = transposed.reshape(-1).view(np.uint32)
    interleaved = np.zeros_like(vectors)
    vec_rows, vec_rows_per_tile, interleave = rows // 4, 64 // 4, 2
    for read_col in range(cols):
        write_col = read_col // interleave
        for base in range(0, vec_rows, vec_rows_per_tile):
            for vec_read_row in range(base, min(vec_rows, base + vec_rows_per_tile)):
                vec_write_row = (
                    interleave * base
                    + vec_rows_per_tile * (read_col % interleave)
                    + vec_read_row % vec_rows_per_tile
                )
                read_offset = read_col * vec_rows + vec_read_row
                write_offset = write_col * vec_rows * interleave + vec_write_row
                interleaved[write_offset] = vectors[read_offset]
    # add_bias_and_interleave_int8s_inplace
    found = interleaved.view(np.int8).copy()
    for at in range(len(found)):
        found[at] = np.uint8(int(found[at]) + 128).view(np.int8)
    for base in range(0, len(found), 4):
        found[base + 1], found[base + 2] = found[base + 2], found[base + 1]
    result: np.ndarray[Any, Any] = found.reshape(rows, cols)
    return result


@cache
def read_by_kernel(n: int, k: int) -> torch.Tensor:
    """int64 [n, k]: which byte of the flat weight the kernel multiplies with input k for output n.

    Transcribed from csrc/weightOnlyBatchedGemv/kernel.h, `weight_only_batched_gemv`, Int8b: 16 bytes a
    thread, 4 threads a tile of 64, 2 interleaved rows; NPerBlock 2, BlockSize 256.
    """
    per_thread, per_tile, interleave, per_block, block_size = 16, 4, 2, 2, 256
    found = torch.full((n, k), -1, dtype=torch.int64)
    for bid in range(n // (per_block * interleave)):
        n_start = bid * per_block * interleave
        for tid in range(block_size):
            offset = tid // (per_tile * interleave) * 64 + tid % per_tile * per_thread  # ScaleLoader's
            for local_k in range(tid * per_thread, k * interleave, block_size * per_thread):
                for idx in range(per_block):
                    begin = n_start * k + idx * interleave * k + local_k
                    # the converter: [elt_3 elt_1 elt_2 elt_0] of a register becomes [elt_3 elt_2 elt_1 elt_0]
                    vec = [begin + 4 * i + byte for i in range(4) for byte in (0, 2, 1, 3)]
                    row = n_start + idx * interleave + tid // per_tile % interleave
                    for i in range(2):
                        for j in range(4):
                            for e in range(2):
                                found[row, offset + i * 8 + j * 2 + e] = vec[i * 2 + j * 4 + e]
                offset += block_size * per_thread // interleave
    assert bool((found >= 0).all())
    return found


def as_the_kernel_sees(weight: torch.Tensor) -> torch.Tensor:
    """Codes fp32 [out, in] of a stored weight; a byte is its code + 128."""
    inputs, out = weight.shape
    return weight.reshape(-1).view(torch.uint8).float()[read_by_kernel(out, inputs)] - 128


def random_codes(out: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out * inputs)
    return torch.randint(-128, 128, (out, inputs), generator=generator).to(torch.int8)


SHAPES = [(64, 64), (128, 64), (64, 192), (192, 128)]


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_the_layout_is_that_of_the_source(out: int, inputs: int) -> None:
    codes = random_codes(out, inputs)
    stored = eetq.encode("m", Int8RowCodes(codes, torch.ones(out).half()), GRID)["m.weight"]
    assert stored.shape == (inputs, out)
    assert stored.is_contiguous()
    assert np.array_equal(stored.numpy(), preprocessed(codes.T.contiguous().numpy()))
    assert torch.equal(eetq.plain(stored), codes)


@pytest.mark.parametrize(("out", "inputs"), [*SHAPES, (64, 4096)])
def test_the_kernel_reads_the_codes_back(out: int, inputs: int) -> None:
    """At 4096 inputs every thread comes twice."""
    codes = random_codes(out, inputs)
    assert torch.equal(as_the_kernel_sees(eetq.interleaved(codes)), codes.float())


def test_the_first_bytes_by_hand() -> None:
    """Input i of row 0 has code i, row 1 has 64 more, negative."""
    codes = torch.zeros(64, 64, dtype=torch.int8)
    codes[0], codes[1] = torch.arange(64), -64 - torch.arange(64)
    stored = eetq.interleaved(codes).reshape(-1).view(torch.uint8).tolist()
    assert [byte - 128 for byte in stored[:18]] == [
        0,
        8,
        1,
        9,
        2,
        10,
        3,
        11,
        4,
        12,
        5,
        13,
        6,
        14,
        7,
        15,
        16,
        24,
    ]
    assert [byte - 128 for byte in stored[64:68]] == [-64, -72, -65, -73]


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        (Wish(4), "eetq with 4 bits; 8 bits, symmetric, one scale a row"),
        (Wish(8, group_size=64), "groups of 64"),
        (Wish(8, symmetric=False), "zero points"),
        (Wish(8, codebook="nf4"), "codebook nf4"),
        (Wish(8, double_quant=True), "double_quant True"),
    ],
)
def test_other_grids_are_refused(wish: Wish, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        eetq.grid_for(wish)


def test_the_one_grid() -> None:
    asked = eetq.grid_for(Wish(8, group_size=-1, symmetric=True, dtype=torch.bfloat16))
    assert asked == eetq.grid_for(Wish(8)) == Int8RowGrid(bottom=-128, unit=1, dtype=torch.float16)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (32, 32)])
def test_ragged_sides_are_an_obstacle(shape: tuple[int, int]) -> None:
    assert eetq.obstacle(shape, GRID) == "sides that are no multiples of 64, the tile of EETQ's kernels"
    assert eetq.obstacle((128, 192), GRID) is None


def facts(grids: dict[str, Any], left: list[str], dtype: torch.dtype = torch.float16) -> Facts:
    return Facts(grids=grids, left=left, common=GRID, dtype=dtype, model_type="llama")


def test_config_entries() -> None:
    """As transformers serializes its own; a head that no layer tells of is tied, and stays."""
    from transformers import EetqConfig

    entries = eetq.config_entries(facts({"a": GRID}, ["b"], torch.bfloat16))
    config: Any = EetqConfig
    theirs = config(modules_to_not_convert=["b", "lm_head"]).to_dict()
    assert json.loads(json.dumps(entries)) == {"quantization_config": theirs, "dtype": "float16"}
    with_head = eetq.config_entries(facts({"lm_head": GRID}, []))["quantization_config"]
    assert with_head["modules_to_not_convert"] == []
    assert eetq.extra_files(entries) == {}


def written(source: Path, out: Path, *, head: bool) -> Path:
    """A checkpoint with every layer of blocks, and the head if so, in EETQ's layout."""
    grids: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") and not (head and module == "lm_head"):
            tensors[name] = tensor
            continue
        codes = encode(GRID, tensor, GRID.fit(tensor))
        made = eetq.encode(module, codes, GRID)
        described = [(info.name, info.dtype, info.shape) for info in eetq.layout(module, tensor.shape, GRID)]
        assert described == [(name, part.dtype, tuple(part.shape)) for name, part in made.items()]
        grids[module] = GRID
        tensors |= made
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((source / "config.json").read_text())
    edit_json(out / "config.json", **eetq.config_entries(facts(grids, [] if head else ["lm_head"])))
    eetq.finish(out)
    return out


class FakeKernel:
    """EETQ's kernel on a CPU, in the order in which the small-batch one reads."""

    @staticmethod
    def w8_a16_gemm(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        assert x.dtype == scales.dtype == torch.float16
        assert weight.dtype == torch.int8
        full = as_the_kernel_sees(weight) * scales.float()[:, None]
        return (x.float() @ full.T).half()


@pytest.mark.parametrize(("tied", "head"), [(True, False), (False, False), (False, True)])
def test_transformers_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, head: bool
) -> None:
    """All but the kernel is transformers' own."""
    from transformers.integrations import hub_kernels
    from transformers.integrations.eetq import EetqLinear
    from transformers.quantizers.quantizer_eetq import EetqHfQuantizer

    monkeypatch.setattr(EetqHfQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: FakeKernel)
    # a bf16 model: the config must have it run in fp16
    source = tiny_model(tmp_path / "model", tied=tied, dtype=torch.bfloat16)
    out = written(source, tmp_path / "out", head=head)
    model = in_transformers(out)
    converted = [name for name, module in model.named_modules() if isinstance(module, EetqLinear)]
    assert len(converted) == 14 + head
    ours = open_checkpoint(out)
    plain = in_transformers(source, dtype=torch.float16)
    with torch.no_grad():
        for name in converted:
            assert ours.is_quantized(f"{name}.weight")
            plain.get_submodule(name).weight.copy_(ours.read(f"{name}.weight"))
    found, expected = logits(model, tokens()), logits(plain, tokens())
    assert (found - expected).norm() < 5e-3 * expected.norm()


def test_what_was_written_opens(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", tied=False)
    ours, full = open_checkpoint(written(source, tmp_path / "out", head=False)), open_checkpoint(source)
    assert {name: ours.info(name) for name in ours.names()} == {n: full.info(n) for n in full.names()}
    for name in full.names():
        if not ours.is_quantized(name):
            assert torch.equal(ours.read(name), full.read(name))
            continue
        weight, decoded = full.read(name).float(), ours.read(name)
        assert decoded.dtype == torch.float32
        step = load_file(ours.path / "model.safetensors")[f"{name}_scales"].float()[:, None]
        assert bool(((decoded - weight).abs() <= 0.5626 * step).all())
    assert sum(map(ours.is_quantized, full.names())) == 14


def eetq_file(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A checkpoint of these tensors alone."""
    directory.mkdir()
    content = {"quantization_config": {"quant_method": "eetq", "weights": "int8", **config}}
    (directory / "config.json").write_text(json.dumps(content))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_of_any_float_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    codes, scales = random_codes(64, 128), torch.linspace(0.5, 2, 64).to(dtype)
    path = eetq_file(tmp_path / "file", {"m.weight": eetq.interleaved(codes), "m.weight_scales": scales})
    assert torch.equal(open_checkpoint(path).read("m.weight"), codes.float() * scales.float()[:, None])


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("weight_scales", None, "m.weight is torch.int8 and has no scales"),
        ("weight", None, "m.weight is missing"),
        ("weight_scales", torch.ones(128).half(), r"m.weight_scales is torch.float16 \[128\]"),
        ("weight_scales", torch.ones(64, 1).half(), r"\[64, 1\]; int8 codes"),
        ("weight_scales", torch.ones(64, dtype=torch.int32), r"int32 \[64\]; int8 codes"),
        ("weight", torch.ones(128, 64), r"m.weight is torch.float32 \[128, 64\]"),
        ("weight", torch.zeros(128, 64, dtype=torch.uint8), r"m.weight is torch.uint8 \[128, 64\]"),
        ("weight", torch.zeros(96, 64, dtype=torch.int8), "multiples of 64"),
        ("weight", torch.zeros(0, 64, dtype=torch.int8), "multiples of 64"),
        ("weight", torch.zeros(64, dtype=torch.int8), r"m.weight is torch.int8 \[64\]"),
        ("weight", torch.zeros(64, 128, dtype=torch.int8), r"and floats \[out\]"),
    ],
)
def test_damaged_layers_are_told(tmp_path: Path, part: str, tensor: torch.Tensor | None, match: str) -> None:
    codes = eetq.interleaved(random_codes(64, 128))
    path = eetq_file(tmp_path / "file", {"m.weight": codes, "m.weight_scales": torch.ones(64).half()})
    edit_weights(path, **{f"m.{part}": tensor})
    with pytest.raises(CorruptFileError, match=match):
        list(open_checkpoint(path).names())
    stored, _ = read_header(path / "model.safetensors")
    if "m.weight_scales" in stored:
        with pytest.raises(CorruptFileError, match=match):
            eetq.decoder({}, stored, torch.float16).read("m.weight")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = eetq_file(tmp_path / "file", {"m.weight": torch.zeros(2, 2)}, weights="int4")
    with pytest.raises(UnsupportedModelError, match="EETQ weights of 'int4'; int8"):
        open_checkpoint(path)
