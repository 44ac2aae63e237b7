"""The .bin writer: torch itself reads it in every way it has, and would have written the same bytes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qexport.checkpoint.sharding import plan_shards
from qexport.checkpoint.tensors import DTYPES, TensorInfo
from qexport.checkpoint.torch_file import TorchFile, directory_bytes, file_size, plan_records
from tests.tiny import in_transformers, logits, tiny_model, tokens

SHAPES = ((3, 5), (), (0,), (2, 0, 3), (7,), (1, 2, 3, 4), (129,))


def samples() -> dict[str, torch.Tensor]:
    """Every dtype in every shape, of random bytes, under names that need care."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for dtype_name, dtype in DTYPES.items():
        for shape in SHAPES:
            count = torch.Size(shape).numel() * dtype.itemsize
            high = 2 if dtype is torch.bool else 256
            raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
            made[f"model.größe.层.{dtype_name}.{list(shape)}\n"] = raw.view(dtype).reshape(shape)
    return made


def info_of(tensors: Mapping[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """All at once, a tensor a piece."""
    file = TorchFile(path, info_of(tensors))
    for tensor in tensors.values():
        file.write(raw_bytes(tensor))
    file.close()
    return path


def differing(theirs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that differ in dtype, shape, strides or a single bit; NaN equals itself."""
    assert list(theirs) == list(expected)
    return [
        name
        for name, tensor in expected.items()
        if (theirs[name].dtype, theirs[name].shape, theirs[name].stride())
        != (tensor.dtype, tensor.shape, tensor.stride())
        or raw_bytes(theirs[name]) != raw_bytes(tensor)
    ]


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_every_dtype_and_shape(tmp_path: Path, mmap: bool) -> None:
    path = write(tmp_path / "model.bin", samples())
    assert differing(torch.load(path, weights_only=True, mmap=mmap), samples()) == []


def test_torch_would_have_written_the_same_bytes(tmp_path: Path) -> None:
    """All of them up to torch's hash of the archive, which it reports to a log and nobody needs."""
    expected = samples()
    theirs = io.BytesIO()
    torch.save(expected, theirs)
    with zipfile.ZipFile(theirs) as archive:
        records = archive.infolist()
    assert records[-1].filename == "archive/.data/serialization_id"
    ours = write(tmp_path / "model.bin", expected).read_bytes()
    own = records[-1].header_offset
    assert ours[:own] == theirs.getvalue()[:own]
    assert zipfile.ZipFile(io.BytesIO(ours)).namelist() == [r.filename for r in records[:-1]]


def test_the_offsets_that_torch_computes_are_right(tmp_path: Path) -> None:
    """torch's reader asserts each computed offset against the archive's when its debug variable is set."""
    path = write(tmp_path / "model.bin", samples())
    code = (
        "import sys, torch\n"
        "from torch.utils.serialization import config\n"
        "config.load.calculate_storage_offsets = True\n"
        "torch.load(sys.argv[1], weights_only=True, mmap=True)\n"
        "torch.load(sys.argv[1], weights_only=True)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    ran = subprocess.run(command, env={"TORCH_SERIALIZATION_DEBUG": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_mapped_storages_are_aligned(tmp_path: Path) -> None:
    path = write(tmp_path / "model.bin", samples())
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert {t.data_ptr() % 64 for t in loaded.values() if t.numel()} == {0}


def test_the_archive_is_whole_to_other_readers(tmp_path: Path) -> None:
    """Python's zipfile checks every checksum."""
    with zipfile.ZipFile(write(tmp_path / "model.bin", samples())) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("sizes", [(1,), (1000,), (3, 1, 0, 77, 2), (1 << 20,)])
def test_pieces_of_any_size(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    expected = samples()
    whole = write(tmp_path / "whole.bin", expected).read_bytes()
    everything = b"".join(map(raw_bytes, expected.values()))
    path = tmp_path / "pieces.bin"
    file = TorchFile(path, info_of(expected))
    begin = 0
    for size in cycle(sizes):
        file.write(memoryview(everything)[begin : begin + size])
        begin += size
        if begin >= len(everything):
            break
    file.close()
    assert path.read_bytes() == whole


def test_a_piece_may_be_a_view_of_any_item_size(tmp_path: Path) -> None:
    def view(tensor: torch.Tensor) -> memoryview:
        array: Any = tensor.numpy()
        return memoryview(array)

    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    file = TorchFile(tmp_path / "x.bin", info_of({"x": tensor, "y": tensor[:0]}))
    file.write(view(tensor))
    file.write(view(tensor[:0]))
    file.close()
    assert torch.equal(torch.load(tmp_path / "x.bin", weights_only=True)["x"], tensor)


def test_the_planned_size_is_the_files(tmp_path: Path) -> None:
    for tensors in (samples(), {}, {"x": torch.zeros(())}):
        path = write(tmp_path / "model.bin", tensors)
        assert path.stat().st_size == file_size(info_of(tensors))
        assert differing(torch.load(path, weights_only=True), tensors) == []


@pytest.mark.slow
def test_more_records_than_sixteen_bits_count(tmp_path: Path) -> None:
    tensors = dict.fromkeys((f"t{n}" for n in range(65_540)), torch.ones(1, dtype=torch.int8))
    path = write(tmp_path / "model.bin", tensors)
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(tensors)
    assert sum(int(t) for t in loaded.values()) == len(tensors)


def test_beyond_4_gib_headers_are_torchs(tmp_path: Path) -> None:
    """torch's own writer, told to skip the data, leaves a sparse file of 20 GiB that takes no space.

    In it: storages on both sides of the limit of 32 bits, and small and empty ones far behind it.
    """
    sizes = [3, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 32, 5, 0, (1 << 32) + 77, 1]
    infos = [TensorInfo(f"t{n}", torch.int8, (size,)) for n, size in enumerate(sizes)]
    tensors = {t.name: torch.empty(0, dtype=t.dtype) for t in infos}
    for t in infos:
        if t.size:  # mapped sparse files: no memory either
            file_name = str(tmp_path / t.name)
            tensors[t.name] = torch.from_file(file_name, shared=True, size=t.size, dtype=t.dtype)
    path = tmp_path / "archive.bin"  # torch names the archive's folder after the file
    with torch.serialization.skip_data():
        torch.save(tensors, path)
    records = plan_records(infos)
    with path.open("rb") as file:
        for record in records:
            file.seek(record.offset)
            assert file.read(len(record.header)) == record.header, record.name
            # skipped data has the checksum 0 with torch
            checksum = zlib.crc32(record.content) if record.content is not None else 0
            file.seek(record.end - len(record.trailer(0)))
            assert file.read(len(record.trailer(0))) == record.trailer(checksum), record.name
    checksums = [zlib.crc32(record.content or b"") for record in records]
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        *theirs, own = archive.infolist()  # torch adds a hash of the archive, which nobody needs
        file.seek(archive.start_dir)
        entries = b"".join(r.entry(c) for r, c in zip(records, checksums, strict=True))
        assert file.read(len(entries)) == entries
    assert own.header_offset == records[-1].end
    assert [(r.filename, r.file_size) for r in theirs] == [(r.name.decode(), r.size) for r in records]

    # our end in place of theirs
    with path.open("rb+") as file:
        file.truncate(records[-1].end)
        file.seek(records[-1].end)
        file.write(directory_bytes(records, checksums))
    assert path.stat().st_size == file_size(infos)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert [tuple(t.shape) for t in loaded.values()] == [t.shape for t in infos]
    with zipfile.ZipFile(path) as archive:
        assert [r.header_offset for r in archive.infolist()] == [r.offset for r in records]


def test_memory_is_that_of_a_piece(tmp_path: Path) -> None:
    piece = bytes(1 << 20)
    infos = [TensorInfo(f"t{n}", torch.int8, (16 << 20,)) for n in range(4)]
    tracemalloc.start()
    file = TorchFile(tmp_path / "model.bin", infos)
    for _ in range(64):
        file.write(piece)
    file.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, "the piece itself was there before"


@pytest.mark.parametrize("count", [0, 1, 23, 24, 25, 35])
def test_missing_bytes_are_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "model.bin"
    file = TorchFile(path, [TensorInfo("a", torch.float32, (6,)), TensorInfo("b", torch.int32, (3,))])
    file.write(bytes(count))
    missing = 24 - count if count < 24 else 36 - count
    with pytest.raises(RuntimeError, match=rf"lacks {missing} of the \d+ bytes of archive/data/[01]"):
        file.close()
    assert not zipfile.is_zipfile(path), "half a file does not look like a whole one"


def test_bytes_too_many_are_refused(tmp_path: Path) -> None:
    file = TorchFile(tmp_path / "model.bin", [TensorInfo("a", torch.int8, (6,))])
    with pytest.raises(ValueError, match="2 more came"):
        file.write(bytes(8))


def test_what_a_checkpoint_cannot_hold_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    one = TensorInfo("a", torch.int8, (6,))
    path = tmp_path / "model.bin"
    with pytest.raises(ValueError, match="twice"):
        TorchFile(path, [one, one])
    with pytest.raises(ValueError, match=r"a is torch\.qint8"):
        TorchFile(path, [TensorInfo("a", torch.qint8, (6,))])
    assert not path.exists()


@pytest.mark.parametrize("max_shard_size", [1 << 40, 200_000])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_model(tmp_path: Path, max_shard_size: int, tied: bool) -> None:
    """One file, or shards with their index, in place of the safetensors that transformers itself wrote."""
    model = tiny_model(tmp_path / "model", dtype=torch.bfloat16, tied=tied)
    expected = logits(in_transformers(model, dtype=torch.bfloat16), tokens())
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    plan = plan_shards(info_of(tensors), max_shard_size)
    weight_map: dict[str, str] = {}
    for shard in plan.shards:
        name = shard.file.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        write(model / name, {t.name: tensors[t.name] for t in shard.tensors})
        weight_map |= {t.name: name for t in shard.tensors}
    assert (len(plan.shards) > 1) == (max_shard_size < 1 << 40)
    if len(plan.shards) > 1:
        index = {"metadata": {"total_size": plan.size}, "weight_map": weight_map}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(in_transformers(model, dtype=torch.bfloat16), tokens()), expected)
