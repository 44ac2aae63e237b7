"""The safetensors reader: hostile files are refused in one line, sound ones are what the library says."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qexport.checkpoint.safetensors_file import (
    MAX_HEADER_BYTES,
    header_bytes,
    iter_values,
    read_header,
    read_tensor,
)
from qexport.checkpoint.tensors import DTYPES, TensorInfo
from qexport.errors import CorruptFileError, QexportError, StorageError

NAMES = ["a", "größe.weight", "层.0", 'quote"and\\slash', "new\nline", "😀", "__metadata", " "]


def with_header(header: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    """A file: length field (the true one unless told), header, data."""
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def one(entry: object, data: bytes = b"") -> bytes:
    """A file of one tensor, `x`."""
    return with_header(json.dumps({"x": entry}), data)


def f32(shape: object, offsets: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def several(*ranges: tuple[int, int], data: int) -> bytes:
    """A file of byte tensors that claim `ranges` of `data` bytes."""
    entries = {
        f"t{n}": {"dtype": "U8", "shape": [max(e - b, 0)], "data_offsets": [b, e]}
        for n, (b, e) in enumerate(ranges)
    }
    return with_header(json.dumps(entries), bytes(data))


HUGE = "9" * 4000  # json reads whole numbers of up to 4300 digits

HOSTILE = {
    "empty": b"",
    "seven bytes": b"\1" * 7,
    "length field alone": (2).to_bytes(8, "little"),
    "header length one too many": with_header("{}", length=3),
    "header length 2**63": with_header("{}", length=2**63),
    "header length 2**64-1": with_header("{}", length=2**64 - 1),
    "no header": with_header(""),
    "not UTF-8": with_header(b'{"\xff":1}'),
    "UTF-16": with_header("{}".encode("utf-16")),
    "byte order mark": with_header("\ufeff{}"),
    "not JSON": with_header("safetensors"),
    "cut JSON": with_header('{"x": {"dtype": "F32"'),
    "two objects": with_header("{}{}"),
    "pickle": b"\x80\x04" + b"cos\nsystem\n" * 10,
    "nested lists": with_header("[" * 500_000),
    "nested objects": with_header('{"a":' * 500_000),
    "array": with_header("[]"),
    "number": with_header("1"),
    "a number too long to parse": with_header('{"x": ' + "9" * 100_000 + "}"),
    "same name twice": with_header(
        '{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        '"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "shape twice": with_header('{"x":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', b"\0"),
    "name that is no text": with_header('{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0"),
    "entry null": one(None),
    "entry list": one([]),
    "entry empty": one({}),
    "no offsets": one({"dtype": "F32", "shape": [1]}, bytes(4)),
    "an extra key": one({**f32([1], [0, 4]), "code": "x"}, bytes(4)),
    "unknown dtype": one({"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}, bytes(4)),
    "dtype in lower case": one({"dtype": "f32", "shape": [1], "data_offsets": [0, 4]}, bytes(4)),
    "dtype null": one({"dtype": None, "shape": [1], "data_offsets": [0, 4]}, bytes(4)),
    "dtype list": one({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, bytes(4)),
    "shape negative": one(f32([-1], [0, 4]), bytes(4)),
    "shapes negative twice": one(f32([-1, -1], [0, 4]), bytes(4)),
    "shape bool": one(f32([True], [0, 4]), bytes(4)),
    "shape float": one(f32([1.0], [0, 4]), bytes(4)),
    "shape NaN": one(f32([float("nan")], [0, 4]), bytes(4)),
    "shape text": one(f32(["1"], [0, 4]), bytes(4)),
    "shape number": one(f32(1, [0, 4]), bytes(4)),
    "shape null": one(f32(None, [0, 4]), bytes(4)),
    "shape 2**62": one(f32([2**62], [0, 4]), bytes(4)),
    "shape product over 64 bits": one(f32([2**40, 2**40], [0, 4]), bytes(4)),
    "shape product 0 modulo 2**64": one(f32([2**40, 2**40], [0, 0])),
    "shape and offsets huge": one(f32([2**60], [0, 2**62]), bytes(4)),
    "empty, with sides over 64 bits": one(f32([0, 2**70], [0, 0])),
    "empty, with a product over 64 bits": one(f32([2**40, 2**40, 0], [0, 0])),
    "sides of 4000 digits": with_header(
        f'{{"x":{{"dtype":"F32","shape":[{HUGE},{HUGE}],"data_offsets":[0,4]}}}}', bytes(4)
    ),
    "one byte short of its shape": one(f32([1], [0, 3]), bytes(3)),
    "offsets reversed": one(f32([1], [4, 0]), bytes(4)),
    "offset negative": one(f32([1], [-4, 0]), bytes(4)),
    "offsets bool": one({"dtype": "U8", "shape": [1], "data_offsets": [False, True]}, bytes(1)),
    "offsets float": one(f32([1], [0.0, 4.0]), bytes(4)),
    "one offset": one(f32([1], [4]), bytes(4)),
    "three offsets": one(f32([1], [0, 4, 4]), bytes(4)),
    "offsets text": one(f32([1], "04"), bytes(4)),
    "overlap": several((0, 4), (2, 6), data=6),
    "same bytes twice": several((0, 4), (0, 4), data=4),
    "hole": several((0, 4), (6, 8), data=8),
    "hole at the start": several((2, 4), data=4),
    "beyond the end": several((0, 4), data=3),
    "truncated in the second": several((0, 4), (4, 8), data=7),
    "trailing byte": several((0, 4), data=5),
    "data without tensors": with_header("{}", b"\0"),
    "empty tensor far away": one(f32([0], [10**30, 10**30])),
    "metadata list": with_header('{"__metadata__":[]}'),
    "metadata text": with_header('{"__metadata__":"pt"}'),
    "metadata number inside": with_header('{"__metadata__":{"format":1}}'),
    "metadata object inside": with_header('{"__metadata__":{"format":{}}}'),
    "dtype of a megabyte": one({"dtype": "F" * 10**6, "shape": [1], "data_offsets": [0, 4]}, bytes(4)),
    "shape of a megabyte": one(f32([-1] * 300_000, [0, 4]), bytes(4)),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError) as raised:
        read_header(path)
    message = str(raised.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1000 + len(str(path)), "a line is read by people, whatever the file holds"


def test_a_header_over_the_limit_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFileError, match="claims 100000001 bytes"):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_shape_of_many_sides_costs_no_time(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(one(f32([2**62] * 50_000, [0, 4]), bytes(4)))
    begun = time.process_time()
    with pytest.raises(QexportError):
        read_header(path)
    assert time.process_time() - begun < 2, "the product of all sides is longer than the file"


@pytest.mark.parametrize("seed", range(10))
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, seed: int) -> None:
    """A sound file with one byte changed, and sometimes cut off, is either read or refused."""
    sound = header_bytes([TensorInfo("a", torch.float32, (3,)), TensorInfo("b", torch.int8, (5,))]) + bytes(
        17
    )
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    read = refused = 0
    for _ in range(100):
        raw = bytearray(sound)
        place, byte, end = torch.randint(0, 4 * len(raw), (3,), generator=generator).tolist()
        raw[place % len(raw)] = byte % 256
        path.write_bytes(raw[:end])
        try:
            tensors = read_header(path)[0]
        except CorruptFileError:
            refused += 1
        else:
            read += 1
            assert sum(read_tensor(tensor).nbytes for tensor in tensors.values()) == 17
    assert min(read, refused) > 0
    assert read + refused == 100


def test_a_file_cut_off_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100)}, path)
    tensor = read_header(path)[0]["a"]
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CorruptFileError, match="ends within tensor 'a'"):
        read_tensor(tensor)
    path.unlink()
    with pytest.raises(StorageError, match="No such file"):
        read_tensor(tensor)


def test_a_directory_and_a_missing_file(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "gone.safetensors", "No such file")):
        with pytest.raises(StorageError, match=reason) as raised:
            read_header(path)
        assert str(path) in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4)}, path)
    path.chmod(0)
    with pytest.raises(StorageError, match="Permission denied"):
        read_header(path)


def sample(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Every bit pattern that the dtype allows, NaN and infinity included."""
    count = TensorInfo("", dtype, shape).size
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return bytes(flat)


def samples() -> dict[str, torch.Tensor]:
    """Every dtype in several shapes, then every name."""
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (7, 3), (2, 3, 5)]
    tensors = {
        f"{name}.{number}": sample(dtype, shape, number)
        for name, dtype in DTYPES.items()
        for number, shape in enumerate(shapes)
    }
    return tensors | {name: sample(torch.float16, (2,), n) for n, name in enumerate(NAMES)}


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (found.dtype, found.shape, raw_bytes(found)) == (
        expected.dtype,
        expected.shape,
        raw_bytes(expected),
    )


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    expected = samples()
    save_file(expected, tmp_path / "theirs.safetensors", metadata={"format": "pt", "größe": "ja"})
    tensors, metadata = read_header(tmp_path / "theirs.safetensors")
    assert metadata == {"format": "pt", "größe": "ja"}
    assert set(tensors) == set(expected)
    assert [name for name, tensor in expected.items() if not same(read_tensor(tensors[name]), tensor)] == []
    offsets = [tensor.offset for tensor in tensors.values()]
    assert offsets == sorted(offsets), "tensors come in file order"


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    expected = samples()
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()]
    header = header_bytes(infos)
    assert len(header) % 8 == 0
    path = tmp_path / "ours.safetensors"
    path.write_bytes(header + b"".join(map(raw_bytes, expected.values())))
    theirs = load_file(path)
    assert set(theirs) == set(expected)
    assert [name for name, tensor in expected.items() if not same(theirs[name], tensor)] == []
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses files that do not tell
    ours = read_header(path)[0]
    assert list(ours) == list(expected), "the order of writing, empty tensors included"


def test_files_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "theirs.safetensors")
    assert read_header(tmp_path / "theirs.safetensors") == ({}, {})
    (tmp_path / "ours.safetensors").write_bytes(header_bytes([]))
    assert load_file(tmp_path / "ours.safetensors") == {}


@pytest.mark.parametrize("chunk", [1, 8, 24, 1 << 24])
def test_values_in_pieces_are_the_values(tmp_path: Path, chunk: int) -> None:
    tensor = sample(torch.float64, (5, 7), 1)
    path = tmp_path / "model.safetensors"
    save_file({"before": torch.zeros(3), "x": tensor, "empty": torch.zeros(0, 4)}, path)
    stored = read_header(path)[0]
    parts = list(iter_values(stored["x"], chunk))
    assert max(part.nbytes for part in parts) <= max(chunk, 8)
    assert raw_bytes(torch.cat(parts)) == raw_bytes(tensor)
    assert list(iter_values(stored["empty"], chunk)) == []


def test_a_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(4)}, path)
    stored = read_header(path)[0]["x"]
    before = path.read_bytes()
    read_tensor(stored).zero_()
    assert path.read_bytes() == before
    assert read_tensor(stored).tolist() == [1.0] * 4
