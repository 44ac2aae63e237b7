"""Importance matrices: gathered as llama.cpp gathers them, and its two files read and written."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.checkpoint.checkpoint import open_directory
from qexport.errors import CheckpointNotFoundError, CorruptFileError, NonFiniteError, SpecError
from qexport.events import Event, Noted
from qexport.formats.gguf.container import PlannedTensor, text
from qexport.formats.gguf.imatrix import ImportanceMatrix, Squares, read_imatrix, write_imatrix
from qexport.formats.gguf.tensors import gguf_tensors
from qexport.formats.gguf.whole_file import write_plain
from qexport.grids.ggml.types import TYPES
from qexport.modeling.activations import Activations
from qexport.modeling.calibration import CalibrationData, UsedSource
from qexport.modeling.skeleton import build_skeleton
from qexport.quantization import importance as importance_module
from qexport.quantization.imatrix import make_imatrix
from qexport.quantization.importance import gather_importance, layer_inputs
from qexport.quantization.quantize import quantize
from qexport.specs import spec_of
from tests.adapters import tiny_llama
from tests.conftest import RunCli
from tests.llamacpp_c import BASES, base_gguf, llamacpp_squares, open_by_ggml
from tests.test_staging import content, told_in_one_line
from tests.tiny import edit_weights, tokens
from tests.zoo import VARIANTS, ZOO


def gathered(model: Path, windows: torch.Tensor, *, head: bool = False, **options: Any) -> ImportanceMatrix:
    checkpoint = open_directory(model)
    skeleton = build_skeleton(checkpoint)
    inputs = layer_inputs(gguf_tensors(checkpoint, skeleton))
    if head:
        inputs["output.weight"] = [(skeleton.head_weight, None)]
    data = CalibrationData(windows, (UsedSource("some.txt", 1.0, "", 1, len(windows)),), 0)
    with Activations(1, Path(), torch.float32) as hidden:  # 16 bits cost 3e-4 on few tokens
        return gather_importance(checkpoint, skeleton, data, inputs, hidden, **options)


@pytest.mark.parametrize("architecture", BASES)
def test_sums_are_those_of_llamacpp_itself(architecture: str, tmp_path: Path) -> None:
    """Names, tokens that came to each expert, and squares: what llama.cpp multiplies while it runs."""
    base = BASES[architecture](tmp_path / "base")
    ids = tokens(1, 48)
    tied = architecture in ("llama", "gpt2")  # llama.cpp then has no output.weight
    mine = gathered(base, ids, head=not tied)
    theirs = llamacpp_squares(base_gguf(base, tmp_path / "base.gguf"), ids[0])
    assert set(mine.entries) == set(theirs)
    for name, (sums, counts) in theirs.items():
        assert list(mine.entries[name].counts) == counts, name
        allowed = 1e-2 if architecture == "gpt2" else 1e-4  # ggml's GELU is a table in fp16
        found = mine.entries[name].sums.double().reshape(sums.shape)
        torch.testing.assert_close(found, sums, rtol=allowed, atol=allowed * float(sums.mean()))
    assert (mine.datasets, mine.chunk_count, mine.chunk_size) == (("some.txt",), 1, 48)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_windows_add_up_whatever_the_batches(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BASES[architecture](tmp_path / "base")
    windows = tokens(5, 24)
    whole = gathered(base, windows)
    parts = [gathered(base, window[None]) for window in windows]
    monkeypatch.setattr(importance_module, "_BATCH_TOKENS", 48)
    batched = gathered(base, windows)
    for name, squares in whole.entries.items():
        each = [part.entries[name] for part in parts]
        total = tuple(map(sum, zip(*(part.counts for part in each), strict=True)))
        assert squares.counts == total == batched.entries[name].counts
        torch.testing.assert_close(squares.sums, torch.stack([p.sums for p in each]).sum(dim=0))
        torch.testing.assert_close(squares.sums, batched.entries[name].sums)


def test_experts_that_lie_fused_on_disk(tmp_path: Path) -> None:
    apart = gathered(ZOO["qwen3_moe"](tmp_path / "apart"), tokens())
    fused = gathered(VARIANTS["qwen3_moe_fused"](tmp_path / "fused"), tokens())
    assert set(apart.entries) == set(fused.entries)
    for name, squares in apart.entries.items():
        assert squares.counts == fused.entries[name].counts
        assert torch.equal(squares.sums, fused.entries[name].sums)


def test_experts_without_tokens_count_alike_and_are_told(tmp_path: Path) -> None:
    base = BASES["qwen3_moe"](tmp_path / "base")
    heard: list[Event] = []
    matrix = gathered(base, tokens(1, 1), on_event=heard.append)
    name = "blk.0.ffn_down_exps.weight"
    counts = matrix.entries[name].counts
    assert sorted(counts) == [0, 0, 1, 1]
    values = matrix.importance(name, 48, 4)
    assert values is not None
    assert torch.equal(values[counts.index(0)], torch.ones(48))
    assert torch.equal(values[counts.index(1)], matrix.entries[name].sums[counts.index(1)])
    assert any("no token came to some experts of 6 tensors" in e.text for e in heard if isinstance(e, Noted))


def test_inputs_that_are_not_finite(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    edit_weights(base, **{"model.layers.1.input_layernorm.weight": torch.full((128,), torch.inf).half()})
    with pytest.raises(NonFiniteError, match="self_attn"):
        gathered(base, tokens())


def small_matrix() -> ImportanceMatrix:
    generator = torch.Generator().manual_seed(0)
    entries = {
        "blk.0.attn_q.weight": Squares(torch.rand(64, generator=generator) * 900, (96,)),
        "blk.0.ffn_up_exps.weight": Squares(torch.rand(3, 32, generator=generator) * 70, (50, 0, 46)),
        "blk.1.attn_q.weight": Squares(torch.rand(64, generator=generator), (96,)),
    }
    return ImportanceMatrix(entries, ("first.txt", "größer.jsonl"), 3, 32)


def _means(matrix: ImportanceMatrix) -> dict[str, torch.Tensor]:
    return {name: squares.means() for name, squares in matrix.entries.items()}


def test_the_gguf_form_comes_back(tmp_path: Path) -> None:
    matrix = small_matrix()
    write_imatrix(matrix, tmp_path / "m.gguf")
    back = read_imatrix(tmp_path / "m.gguf")
    assert back == matrix
    for name, squares in matrix.entries.items():
        assert torch.equal(back.entries[name].sums, squares.sums)
    assert open_by_ggml(tmp_path / "m.gguf") == {
        f"{name}.{side}" for name in matrix.entries for side in ("in_sum2", "counts")
    }


def test_the_gguf_form_as_another_reader_sees_it(tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf")
    matrix = small_matrix()
    write_imatrix(matrix, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    told = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert told == {
        "general.type": "imatrix",
        "imatrix.datasets": ["first.txt", "größer.jsonl"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 32,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape.tolist() == [32, 3]
    assert tensors["blk.0.ffn_up_exps.weight.counts"].shape.tolist() == [1, 3]
    assert tensors["blk.0.ffn_up_exps.weight.counts"].data.reshape(-1).tolist() == [50, 0, 46]
    assert (
        tensors["blk.0.attn_q.weight.in_sum2"].data.tolist()
        == matrix.entries["blk.0.attn_q.weight"].sums.tolist()
    )


def test_the_gguf_form_that_another_writer_wrote(tmp_path: Path) -> None:
    """As llama-imatrix writes it: the sums [1, in], and since 2025 the sums of the inputs themselves too."""
    gguf: Any = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "")
    writer.add_string("general.type", "imatrix")
    sums = torch.rand(1, 8)
    writer.add_tensor("blk.0.attn_q.weight.in_sum", sums.numpy() - 0.5)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", sums.numpy())
    writer.add_tensor("blk.0.attn_q.weight.counts", torch.tensor([[4.0]]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    matrix = read_imatrix(tmp_path / "m.gguf")
    values = matrix.importance("blk.0.attn_q.weight", 8)
    assert values is not None
    assert torch.equal(values, sums[0] / 4)
    assert (set(matrix.entries), matrix.chunk_size) == ({"blk.0.attn_q.weight"}, 0)


def legacy_entry(name: str, calls: int, values: list[float]) -> bytes:
    raw = name.encode()
    return struct.pack(f"<i{len(raw)}sii{len(values)}f", len(raw), raw, calls, len(values), *values)


def test_the_old_form_by_hand(tmp_path: Path) -> None:
    """Means times calls; two experts in a row; then the calls of all and the text's name."""
    content = struct.pack("<i", 2)
    content += legacy_entry("blk.0.attn_q.weight", 3, [3.0, 6.0, 0.75, 0.0])
    content += legacy_entry("blk.0.ffn_up_exps.weight", 2, [2.0, 4.0, 1.0, 8.0])
    content += struct.pack("<ii5s", 3, 5, b"a.txt")
    (tmp_path / "m.dat").write_bytes(content)
    matrix = read_imatrix(tmp_path / "m.dat")
    assert (matrix.datasets, matrix.chunk_count) == (("a.txt",), 3)
    dense = matrix.importance("blk.0.attn_q.weight", 4)
    experts = matrix.importance("blk.0.ffn_up_exps.weight", 2, 2)
    assert dense is not None
    assert experts is not None
    assert dense.tolist() == [1.0, 2.0, 0.25, 0.0]
    assert experts.tolist() == [[1.0, 2.0], [0.5, 4.0]]
    (tmp_path / "early.dat").write_bytes(content[:-13])  # the first ones end with the entries
    assert _same(read_imatrix(tmp_path / "early.dat"), matrix)
    write_imatrix(matrix, tmp_path / "m.gguf")
    assert _same(read_imatrix(tmp_path / "m.gguf"), matrix)
    write_imatrix(matrix, tmp_path / "again.dat")
    assert (tmp_path / "again.dat").read_bytes() == content


def _same(one: ImportanceMatrix, other: ImportanceMatrix) -> bool:
    mine, theirs = _means(one), _means(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_old_form_comes_back(tmp_path: Path) -> None:
    matrix = small_matrix()
    write_imatrix(matrix, tmp_path / "m.dat")
    back = read_imatrix(tmp_path / "m.dat")
    assert (back.datasets, back.chunk_count) == (("größer.jsonl",), 3)
    for name, means in _means(matrix).items():
        torch.testing.assert_close(back.entries[name].means(), means, rtol=3e-7, atol=0)
    experts = back.importance("blk.0.ffn_up_exps.weight", 32, 3)
    assert experts is not None
    assert torch.equal(experts[1], torch.ones(32))  # no token came to it


def test_rows_of_another_length_are_refused() -> None:
    matrix = small_matrix()
    assert matrix.importance("blk.7.attn_q.weight", 64) is None
    for name, inputs, experts in (
        ("blk.0.attn_q.weight", 48, None),
        ("blk.0.attn_q.weight", 128, None),
        ("blk.0.attn_q.weight", 32, 1),
        ("blk.0.ffn_up_exps.weight", 32, 4),
    ):
        with pytest.raises(SpecError, match=f"values for {name}, whose rows have {inputs}"):
            matrix.importance(name, inputs, experts)


def test_an_empty_matrix_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="empty"):
        write_imatrix(ImportanceMatrix({}), tmp_path / "m.gguf")
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        read_imatrix(tmp_path / "m.gguf")
    with pytest.raises(CheckpointNotFoundError, match="is no file"):
        read_imatrix(tmp_path)


@pytest.mark.parametrize("form", ["m.dat", "m.gguf"])
def test_a_file_that_is_cut_short(form: str, tmp_path: Path) -> None:
    write_imatrix(small_matrix(), tmp_path / form)
    content = (tmp_path / form).read_bytes()
    # the old form's last numbers and text need not be there, nor the last zeros of the new one
    needed = len(content) - (22 if form == "m.dat" else 28)
    for length in [*range(0, needed, 37), needed - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(CorruptFileError, match="cut"):
            read_imatrix(tmp_path / "cut")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (struct.pack("<i", 0), "is no importance matrix"),
        (struct.pack("<i", -1), "is no importance matrix"),
        (struct.pack("<ii", 1, 1 << 30), "should take 1073741824 bytes"),
        (struct.pack("<ii", 1, -5), "should take -5 bytes"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, (1 << 31) - 1), "should take 8589934588 bytes"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, -1), "has -1 values"),
        (struct.pack("<ii2sii", 1, 2, b"\xff\xfe", 1, 1), "is no text"),
        (struct.pack("<i", 1) + legacy_entry("a", -2, [1.0]), "of -2 calls"),
        (struct.pack("<i", 1) + legacy_entry("a", 1, [-1.0]), "negative, NaN or infinite"),
        (struct.pack("<i", 1) + legacy_entry("a", 1, [float("nan")]), "negative, NaN or infinite"),
        (struct.pack("<i", 1) + legacy_entry("a", 1, [float("inf")]), "negative, NaN or infinite"),
        (struct.pack("<i", 2) + 2 * legacy_entry("a", 1, [1.0]), "a stands twice"),
    ],
)
def test_hostile_old_files(content: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_bytes(content)
    with pytest.raises(CorruptFileError, match=found):
        read_imatrix(tmp_path / "m.dat")


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"a.in_sum2": torch.ones(4)}, "it has no a.counts"),
        ({"a.in_sum2": torch.ones(4), "a.counts": torch.ones(1), "b.counts": torch.ones(1)}, "no b.in_sum2"),
        ({"a.in_sum2": torch.ones(4), "a.counts": torch.ones(3)}, "a has 4 sums and 3 counts"),
        ({"a.in_sum2": torch.ones(4), "a.counts": torch.ones(0)}, "a.counts is"),
        ({"a.in_sum2": torch.ones(4).half(), "a.counts": torch.ones(1)}, "of f16, expected f32"),
        ({"a.in_sum2": -torch.ones(4), "a.counts": torch.ones(1)}, "negative, NaN or infinite for a"),
        ({"a.in_sum2": torch.ones(4), "a.counts": torch.tensor([torch.nan])}, "infinite for a.counts"),
        ({"token_embd.weight": torch.ones(4)}, "no tensor is called"),
    ],
)
def test_hostile_gguf_files(tensors: dict[str, torch.Tensor], found: str, tmp_path: Path) -> None:
    kinds = {torch.float32: TYPES["f32"], torch.float16: TYPES["f16"]}
    planned = [PlannedTensor(name, kinds[value.dtype], tuple(value.shape)) for name, value in tensors.items()]
    write_plain(tmp_path / "m.gguf", {"general.type": text("imatrix")}, planned, tensors.values())
    with pytest.raises(CorruptFileError, match=found):
        read_imatrix(tmp_path / "m.gguf")


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    base = base_gguf(tiny_llama(tmp_path / "base"), tmp_path / "base.gguf")
    with pytest.raises(CorruptFileError, match="is no importance matrix"):
        read_imatrix(base)


@pytest.fixture
def gather(cli: RunCli, text: Path) -> Callable[..., tuple[int, str, str]]:
    def call(model: Path, out: Path, *options: str) -> tuple[int, str, str]:
        small = ("--calibration", text, "--samples", "2", "--sequence-length", "16")
        return cli("imatrix", model, "-o", out, *small, *options)

    return call


def test_an_output_that_is_an_input_or_another_file(
    llama: Path, tmp_path: Path, gather: Callable[..., tuple[int, str, str]]
) -> None:
    """Nothing of a model is replaced by an importance matrix, whatever --overwrite says."""
    model = shutil.copytree(llama, tmp_path / "model")
    alias, linked, dangling = tmp_path / "alias", tmp_path / "linked.gguf", tmp_path / "dangling"
    alias.symlink_to(model)
    dangling.symlink_to("nowhere")
    write_imatrix(small_matrix(), tmp_path / "other.gguf")
    linked.symlink_to("other.gguf")
    whole = base_gguf(llama, tmp_path / "model.gguf")
    notes, pipe = tmp_path / "notes.dat", tmp_path / "pipe"
    os.mkfifo(pipe)
    notes.write_text("years of work")
    before = content(tmp_path)
    for out, reason in (
        (model, f"the output {model} is the input {model}; choose another name with -o"),
        (model / "config.json", f"is a file of the input {model}"),
        (model / "model.safetensors", f"is a file of the input {model}"),
        (model / "new.gguf", f"lies within the input {model}"),
        (alias / "config.json", f"is a file of the input {model}"),
        (tmp_path, "is a directory; a name for one file, the importance matrix"),
        (notes, "is no importance matrix; a file is replaced only by one of its kind"),
        (whole, "is no importance matrix"),
        (linked, "is there already and is a link"),
        (dangling, "is there already and is a link"),
        (pipe, "is there already and is no regular file"),
        (notes / "m.gguf", "cannot write"),
        (tmp_path / ("n" * 300), "cannot write"),
    ):
        err = told_in_one_line(gather(model, out, "--overwrite"))
        assert reason in err, out
        assert str(out) in err
        assert content(tmp_path) == before
    assert linked.is_symlink()
    err = told_in_one_line(gather(alias, model / "config.json", "--overwrite"))
    assert f"is a file of the input {alias}" in err
    assert content(tmp_path) == before


def test_a_gguf_model_is_not_replaced_by_its_own_importance(
    llama: Path, tmp_path: Path, gather: Callable[..., tuple[int, str, str]]
) -> None:
    """A GGUF file is unpacked into a directory of links; the file behind them is the input all the same."""
    spec = spec_of("gguf", type="f16", max_shard_size=200_000)
    quantize(llama, tmp_path / "split", spec)
    first, *others = sorted((tmp_path / "split").glob("*.gguf"))
    assert others, "the model lies in several files"
    before = content(tmp_path)
    for out, reason in (
        (first, f"the output {first} is the input {first}"),
        (others[-1], f"the output {others[-1]} is a file of the input {first}"),
    ):
        assert reason in told_in_one_line(gather(first, out, "--overwrite"))
        assert content(tmp_path) == before
    assert "lies within" in told_in_one_line(gather(first.parent, first.parent / "new.gguf"))
    assert content(tmp_path) == before
    assert gather(first, first.parent / "new.gguf", "-q") == (0, "", "")  # beside the file that was named
    assert read_imatrix(first.parent / "new.gguf").entries


@pytest.mark.parametrize("form", ["m.gguf", "m.dat"])
def test_an_importance_matrix_may_be_replaced(
    llama: Path, tmp_path: Path, gather: Callable[..., tuple[int, str, str]], form: str
) -> None:
    out = tmp_path / "deep" / "er" / form
    assert gather(llama, out, "-q") == (0, "", "")
    assert read_imatrix(out).datasets == ("text.txt",)  # not where the text lies
    made = out.read_bytes()
    err = told_in_one_line(gather(llama, out))
    assert err == f"error: {out} is there already; add --overwrite, or choose another name with -o\n"
    write_imatrix(small_matrix(), out)
    assert gather(llama, out, "-q", "--overwrite") == (0, "", "")
    assert out.read_bytes() == made
    out.write_bytes(b"")
    assert gather(llama, out, "-q", "--overwrite") == (0, "", "")
    assert [file.read_bytes() for file in out.parent.iterdir()] == [made]


def test_the_verb_in_python() -> None:
    assert qexport.imatrix is make_imatrix
