"""GGUF's bytes: gguf-py reads what is written here and the other way round; hostile files are refused."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from qexport.checkpoint import hashing
from qexport.checkpoint.weights_files import LastOpened
from qexport.errors import CorruptFileError, SpecError, StorageError
from qexport.formats.gguf.container import (
    MAX_ENTRIES,
    READABLE,
    Header,
    Metadata,
    PlannedTensor,
    Typed,
    array,
    boolean,
    f32,
    read_header,
    text,
    u32,
)
from qexport.formats.gguf.splitting import plan_split, read_model
from qexport.formats.gguf.values import MAX_HEADER_BYTES, MAX_ITEMS
from qexport.formats.gguf.writing import GgufFile, header_bytes, tensor_offsets
from qexport.grids.ggml.types import TYPES
from tests.conftest import shared

gguf = pytest.importorskip("gguf")

NUMBERS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7}
NUMBERS |= {"str": 8, "u64": 10, "i64": 11, "f64": 12}
EVERY: Metadata = {
    "general.architecture": text("llama"),
    "a.u8": Typed("u8", 255),
    "a.i8": Typed("i8", -128),
    "a.u16": Typed("u16", 65_535),
    "a.i16": Typed("i16", -32_768),
    "a.u32": u32(2**32 - 1),
    "a.i32": Typed("i32", -(2**31)),
    "a.f32": f32(0.5),
    "a.yes": boolean(True),
    "a.no": boolean(False),
    "a.text": text("größe 层 😀 \n\0 end"),
    "a.nothing": text(""),
    "a.u64": Typed("u64", 2**64 - 1),
    "a.i64": Typed("i64", -(2**63)),
    "a.f64": Typed("f64", 0.1),
    "l.u8": array("u8", [0, 255]),
    "l.i8": array("i8", [-1]),
    "l.u16": array("u16", [1, 2, 3]),
    "l.i16": array("i16", [-1, 2]),
    "l.u32": array("u32", [7]),
    "l.i32": array("i32", [1, -1]),
    "l.f32": array("f32", [-1000.0, 0.25]),
    "l.bool": array("bool", [True, False, True]),
    "l.str": array("str", ["<s>", "", "▁the", "\U0001f600"]),
    "l.u64": array("u64", [2**63]),
    "l.i64": array("i64", [-5]),
    "l.f64": array("f64", [1e300]),
}
# every type that stands in files: name, sides in torch's order
PLANNED = [
    PlannedTensor("blk.0.attn_q.weight", TYPES["q4_k"], (3, 512)),
    PlannedTensor("output_norm.weight", TYPES["f32"], (5,)),
    PlannedTensor("token_embd.weight", TYPES["bf16"], (7, 3)),
    PlannedTensor("blk.0.ffn_gate_exps.weight", TYPES["q8_0"], (2, 3, 64)),
    PlannedTensor("scale", TYPES["f16"], (1,)),
    PlannedTensor("numbers", READABLE[26], (4, 1)),
]


def content(tensor: PlannedTensor) -> bytes:
    """Bytes of its own for every tensor."""
    return random.Random(tensor.name).randbytes(tensor.size)


def write(
    path: Path, metadata: Metadata, tensors: Sequence[PlannedTensor] = PLANNED, alignment: int = 32
) -> Path:
    """A file of ours, the tensors' pieces in the order in which they lie."""
    opened = LastOpened()
    file = GgufFile(path, metadata, tensors, opened, alignment)
    for tensor in tensors:
        raw = content(tensor)
        for begin in range(0, len(raw), 100):
            file.write(tensor.name, begin, memoryview(raw[begin : begin + 100]))
    file.close()
    opened.close()
    return path


def their_writer(path: Path, metadata: Metadata, tensors: Sequence[PlannedTensor], **options: Any) -> None:
    """The same file by gguf-py."""
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, typed in metadata.items():
        if typed.kind.startswith("["):
            inner = kinds(NUMBERS[typed.kind[1:-1]])
            writer.add_key_value(key, typed.value, kinds.ARRAY, sub_type=inner)
        elif key != "general.architecture":
            writer.add_key_value(key, typed.value, kinds(NUMBERS[typed.kind]))
    if "general.alignment" in metadata:
        writer.data_alignment = metadata["general.alignment"].value
    for tensor in tensors:
        flat: Any = np.frombuffer(content(tensor), dtype=np.uint8)
        rows = flat.reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(tensor.name, rows, raw_dtype=gguf.GGMLQuantizationType(tensor.type.number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_bytes(header: Header, name: str) -> bytes:
    tensor = header.tensors[name]
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.size)


@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_gguf_py_reads_what_is_written(tmp_path: Path, alignment: int) -> None:
    path = write(tmp_path / "x.gguf", {**EVERY, "l.none": array("u32", [])}, PLANNED, alignment)
    theirs = gguf.GGUFReader(path)
    assert theirs.alignment == alignment
    for key, typed in EVERY.items():
        found = theirs.fields[key].contents()
        assert found == typed.value, key
        kind = [NUMBERS[typed.kind.strip("[]")]]
        assert [int(number) for number in theirs.fields[key].types] == (
            [9, *kind] if typed.kind[0] == "[" else kind
        )
    assert [tensor.name for tensor in theirs.tensors] == [tensor.name for tensor in PLANNED]
    for found, planned in zip(theirs.tensors, PLANNED, strict=True):
        assert found.shape.tolist() == list(reversed(planned.shape))
        assert found.tensor_type == planned.type.number
        assert found.data.tobytes() == content(planned)
        assert found.data_offset % alignment == 0
    assert path.stat().st_size % alignment == 0


@pytest.mark.parametrize("alignment", [32, 64])
def test_what_gguf_py_writes_is_read_and_is_the_same_file(tmp_path: Path, alignment: int) -> None:
    metadata = EVERY if alignment == 32 else {**EVERY, "general.alignment": u32(alignment)}
    their_writer(tmp_path / "theirs.gguf", metadata, PLANNED)
    header = read_header(tmp_path / "theirs.gguf")
    assert header.metadata == metadata
    assert header.alignment == alignment
    assert [(t.name, t.type, t.shape) for t in header.tensors.values()] == [
        (t.name, t.type, t.shape) for t in PLANNED
    ]
    assert [stored_bytes(header, t.name) for t in PLANNED] == [content(t) for t in PLANNED]
    ours = write(tmp_path / "ours.gguf", metadata, PLANNED, alignment)
    assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    metadata = {**EVERY, "l.none": array("str", []), "l.none too": array("f64", [])}
    header = read_header(write(tmp_path / "x.gguf", metadata))
    assert header.metadata == metadata
    assert header.plain()["l.str"] == ["<s>", "", "▁the", "\U0001f600"]
    rows = header.tensors["blk.0.ffn_gate_exps.weight"].read_rows(3, 6)
    assert rows.numpy().tobytes() == content(PLANNED[3])[3 * 68 :]
    assert header.tensors["token_embd.weight"].read_rows(2, 4).shape == (2, 3)


def test_a_files_types_are_those_of_gguf_py() -> None:
    theirs = {t: sizes for t, sizes in gguf.GGML_QUANT_SIZES.items() if t.name not in ("Q8_1", "Q8_K")}
    assert {row.name: (row.number, row.values, row.size) for row in READABLE.values()} == {
        t.name.lower(): (int(t), *sizes) for t, sizes in theirs.items()
    }


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_pieces_come_in_any_order_and_the_hash_is_known(
    tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(tmp_path / "expected.gguf", EVERY).read_bytes()
    path, opened = tmp_path / "x.gguf", LastOpened()
    file = GgufFile(path, EVERY, PLANNED, opened)
    pieces = [
        (tensor.name, begin, content(tensor)[begin : begin + 60])
        for tensor in PLANNED
        for begin in range(0, tensor.size, 60)
    ]
    for name, begin, raw in pieces if order == "forwards" else reversed(pieces):
        file.write(name, begin, memoryview(raw))
    with pytest.raises(ValueError, match="1 bytes too many for scale"):
        file.write("scale", 1, memoryview(b"ab"))
    file.close()
    opened.close()
    assert path.read_bytes() == expected
    truth = blake3(expected).hexdigest()
    if order == "forwards":  # all went by: the file is not read again
        monkeypatch.setattr(hashing, "blake3", None)
    assert hashing.file_hash(path) == truth


def test_what_ggml_cannot_hold_is_not_written() -> None:
    q4 = TYPES["q4_0"]
    for tensors in (
        [PlannedTensor("n" * 64, q4, (32,))],
        [PlannedTensor("n", q4, (1, 1, 1, 1, 32))],
        [PlannedTensor("n", q4, (32, 33))],
        [PlannedTensor("n", q4, (32,)), PlannedTensor("n", q4, (32,))],
    ):
        with pytest.raises(ValueError, match="n"):
            header_bytes({}, tensors)
    with pytest.raises(ValueError, match="alignment"):
        header_bytes({"general.alignment": u32(64)}, [])
    with pytest.raises(ValueError, match="'u33'"):
        header_bytes({"x": Typed("u33", 1)}, [])
    with pytest.raises(ValueError, match="arrays of arrays"):
        header_bytes({"x": Typed("[[i32]]", [[1]])}, [])


def test_a_quarter_of_a_million_tokens_are_read_at_once(tmp_path: Path) -> None:
    tokens = [f"token{n}" * (1 + n % 3) for n in range(262_144)]
    metadata = {"tokens": array("str", tokens), "scores": array("f32", [0.5] * len(tokens))}
    path = write(tmp_path / "x.gguf", {**metadata, "merges": array("str", tokens)}, [])
    begun = time.process_time()
    header = read_header(path)
    assert time.process_time() - begun < 1
    assert header.metadata["tokens"].value == tokens


# --- hostile files ---------------------------------------------------------------------------------


def name(raw: bytes | str, length: int | None = None) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def setting(key: bytes | str, kind: int, value: bytes) -> bytes:
    return name(key) + struct.pack("<I", kind) + value


def items(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


def info(of: bytes | str, sides: Sequence[int], kind: int = 0, offset: int = 0, count: int = -1) -> bytes:
    count = len(sides) if count < 0 else count
    return name(of) + struct.pack(f"<I{len(sides)}QIQ", count, *sides, kind, offset)


def whole(
    settings: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: int = 0,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A file made by hand."""
    tensors, keys = counts or (len(infos), len(settings))
    raw = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join([*settings, *infos])
    return raw + bytes(-len(raw) % alignment) + bytes(data)


def deep(depth: int) -> bytes:
    return setting("x", 9, b"".join(items(9, 1) for _ in range(depth)) + items(0, 1, b"\0"))


def aligned(value: int, kind: int = 4) -> bytes:
    return setting("general.alignment", kind, struct.pack({4: "<I", 10: "<Q", 5: "<i"}[kind], value))


Q4_0 = 2
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file has 0"),
    "magic alone": (b"GGUF", "the file has 4"),
    "another file": (b"PK\3\4" + bytes(100), "no GGUF file"),
    "safetensors": ((2).to_bytes(8, "little") + b"{}" + bytes(50), "no GGUF file"),
    "ggjt": (b"tjgg" + bytes(100), "older form of ggml"),
    "version 0": (whole(version=0), "version 0"),
    "version 1": (whole(version=1), "newer llama.cpp"),
    "version 4": (whole(version=4), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "header cut": (whole()[:20], "ends at|needs"),
    "settings 2**64-1": (whole(counts=(0, 2**64 - 1)), "settings, it may have 65536"),
    "settings one over": (whole(counts=(0, 65_537)), "65537 settings, it may have 65536"),
    "settings without room": (whole(counts=(0, 65_536)), "65536 settings in"),
    "settings one too many": (whole([setting("a", 0, b"\0")] * 1, counts=(0, 2)), "stands twice|needs|name"),
    "tensors 2**63": (whole(counts=(2**63, 0)), "tensors, it may have 65536"),
    "tensors one over": (whole(counts=(65_537, 0)), "65537 tensors, it may have 65536"),
    "tensors without room": (whole(counts=(65_536, 0)), "65536 tensors in"),
    "tensors one too many": (whole(infos=[info("t", [1])], counts=(3, 0)), "stands twice|needs|tensors in"),
    "key length 2**64-1": (whole([name("a", 2**64 - 1) + bytes(20)]), "claims 18446744073709551615"),
    "key length beyond": (whole([name("a", 60_000) + bytes(40)]), "the file has"),
    "key too long": (whole([setting("a" * 70_000, 0, b"\0")]), "it may have 65535"),
    "key empty": (whole([setting("", 0, b"\0")]), "no name"),
    "key no UTF-8": (whole([setting(b"\xff\xfe", 0, b"\0")]), "no UTF-8"),
    "key twice": (whole([setting("a", 0, b"\0"), setting("a", 0, b"\1")]), "'a' stands twice"),
    "kind 13": (whole([setting("a", 13, bytes(8))]), "kind 13"),
    "kind 2**32-1": (whole([setting("a", 2**32 - 1, bytes(8))]), "kind 4294967295"),
    "value cut": (whole([setting("a", 12, b"")])[:40], "needs 8 bytes"),
    "string beyond": (whole([setting("a", 8, name("x", 2**40))]), "claims 1099511627776"),
    "string one beyond": (whole([setting("a", 8, name("x", 100))]), "needs 100 bytes"),
    "string no UTF-8": (whole([setting("a", 8, name(b"\xc3\x28"))]), "no UTF-8"),
    "string half a character": (whole([setting("a", 8, name("ä".encode()[:1]))]), "no UTF-8"),
    "string a surrogate": (whole([setting("a", 8, name(b"\xed\xa0\x80"))]), "no UTF-8"),
    "array of kind 13": (whole([setting("a", 9, items(13, 1, bytes(8)))]), "array of kind 13"),
    "array 2**64-1": (whole([setting("a", 9, items(0, 2**64 - 1))]), "items"),
    "array 2**61 of 8 bytes": (whole([setting("a", 9, items(10, 2**61))]), "items"),
    "array beyond": (whole([setting("a", 9, items(12, MAX_ITEMS))]), f"needs {8 * MAX_ITEMS} bytes"),
    "array too many": (whole([setting("a", 9, items(0, MAX_ITEMS + 1))]), f"may have {MAX_ITEMS}"),
    "strings 2**60": (whole([setting("a", 9, items(8, 2**60))]), "items"),
    "strings beyond": (whole([setting("a", 9, items(8, 1000))]), "needs 8000 bytes"),
    "string in an array beyond": (
        whole([setting("a", 9, items(8, 2, name("x") + name("y", 2**63)))]),
        "needs 9223372036854775808 bytes",
    ),
    "token no UTF-8": (whole([setting("a", 9, items(8, 2, name("x") + name(b"\x80")))]), "no UTF-8"),
    "arrays in an array": (whole([deep(1)]), "'x' is an array of arrays"),
    "arrays very deep": (whole([deep(100_000)]), "is an array of arrays"),
    "no array in an array": (whole([setting("a", 9, items(9, 0))]), "is an array of arrays"),
    "alignment 0": (whole([aligned(0)]), "no power of two"),
    "alignment 33": (whole([aligned(33)]), "no power of two"),
    "alignment 2**31": (whole([aligned(2**31)]), "no power of two"),
    "alignment u64": (whole([aligned(32, 10)]), "no power of two"),
    "alignment negative": (whole([aligned(-32, 5)]), "no power of two"),
    "alignment text": (whole([setting("general.alignment", 8, name("32"))]), "no power of two"),
    "alignment list": (whole([setting("general.alignment", 9, items(4, 0))]), "no power of two"),
    "tensor name no UTF-8": (whole(infos=[info(b"\xff", [1])], data=32), "no UTF-8"),
    "tensor twice": (whole(infos=[info("t", [1]), info("t", [1], offset=32)], data=64), "'t' stands twice"),
    "five sides": (whole(infos=[info("t", [1, 1, 1, 1, 1])], data=32), "5 sides"),
    "sides 2**32-1": (whole(infos=[info("t", [1], count=2**32 - 1)], data=32), "4294967295 sides"),
    "type 4, given up": (whole(infos=[info("t", [32], 4)], data=32), "type 4; one of f32"),
    "type 2**32-1": (whole(infos=[info("t", [32], 2**32 - 1)], data=32), "needs a newer one"),
    "side 2**64-1": (whole(infos=[info("t", [2**64 - 1])], data=32), "impossible shape"),
    "product over 64 bits": (whole(infos=[info("t", [2**40, 2**40])], data=32), "impossible shape"),
    "product 0 modulo 2**64": (whole(infos=[info("t", [2**32, 2**32])], data=32), "impossible shape"),
    "empty, product over 64 bits": (whole(infos=[info("t", [2**40, 2**40, 0])]), "impossible shape"),
    "row of half a block": (whole(infos=[info("t", [16, 2], Q4_0)], data=32), "blocks of 32"),
    "a scalar in blocks": (whole(infos=[info("t", [], Q4_0)], data=32), "blocks of 32"),
    "one byte short": (whole(infos=[info("t", [8])], data=31), "ends at byte"),
    "no data": (whole(infos=[info("t", [8])]), "ends at byte"),
    "offset not aligned": (whole(infos=[info("t", [1], offset=4)], data=32), "not aligned"),
    "offset beyond": (whole(infos=[info("t", [1], offset=64)], data=32), "ends at byte"),
    "offset 2**64-32": (whole(infos=[info("t", [1], offset=2**64 - 32)], data=32), "ends at byte"),
    "an empty tensor beyond": (whole(infos=[info("t", [0], offset=2**63)], data=32), "ends at byte"),
    "overlap": (whole(infos=[info("a", [16]), info("b", [8], offset=32)], data=64), "within another"),
    "the same bytes": (whole(infos=[info("a", [8]), info("b", [8])], data=32), "within another"),
    "large alignment, no room": (whole([aligned(2**20)], [info("t", [1])], data=32), "ends at byte"),
    "a name of a megabyte": (whole(infos=[info("t" * 2**20, [1])], data=32), "it may have 65535"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    raw, said = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(CorruptFileError, match=said) as raised:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000 + 2 * len(raw), "what a file claims is no reason to take memory"
    assert time.process_time() - begun < 1
    message = str(raised.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1000 + len(str(path)), "a line is read by people, whatever the file holds"


def test_sound_files_made_by_hand_are_read(tmp_path: Path) -> None:
    """The builder of hostile files makes sound ones too: what refuses them is their one fault."""
    path = tmp_path / "x.gguf"
    path.write_bytes(whole([deep(0)], [info("t", [8]), info("u", [], offset=32), info("e", [0])], data=36))
    header = read_header(path)
    assert {tensor.name: tensor.shape for tensor in header.tensors.values()} == {
        "t": (8,),
        "u": (),
        "e": (0,),
    }
    assert header.metadata == {"x": array("u8", [0])}
    path.write_bytes(whole([setting("a", 7, b"\1")], version=2))
    assert read_header(path).metadata == {"a": boolean(True)}


def test_a_large_sparse_file_does_not_become_memory(tmp_path: Path) -> None:
    """The claimed bytes are there, as zeros: a header is still no longer than headers are."""
    path = tmp_path / "x.gguf"
    for claimed, said in ((2**40, "claims 1099511627776 bytes"), (MAX_HEADER_BYTES, "a header has at most")):
        with path.open("wb") as file:
            file.write(whole([setting("a", 8, name("", claimed))]))
            file.truncate(2**41)
        tracemalloc.start()
        try:
            with pytest.raises(CorruptFileError, match=said):
                read_header(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4_000_000


LYING: dict[str, tuple[Callable[[], bytes], int | None]] = {
    "tensors": (lambda: whole(infos=[info("", [])] * (MAX_ENTRIES + 1)), 200_000_000 // 24),
    "settings": (lambda: whole([setting("", 0, b"\0")] * (MAX_ENTRIES + 1)), 200_000_000 // 13),
    "strings": (lambda: whole([setting("a", 9, items(8, MAX_ITEMS + 1))]), None),
    "arrays": (lambda: whole([setting("a", 9, items(9, 10_000_000))]), None),
}


@pytest.mark.parametrize("case", LYING)
def test_large_files_of_small_things_are_refused_at_once(tmp_path: Path, case: str) -> None:
    """Their bytes are there: each would be an object of some hundred bytes."""
    path = tmp_path / "x.gguf"
    make, count = LYING[case]
    raw = bytearray(make())
    if count is not None:
        struct.pack_into("<Q", raw, 8 if case == "tensors" else 16, count)
    path.write_bytes(raw)
    os.truncate(path, 300_000_000)
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(CorruptFileError, match=r"may have|array of arrays"):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun < 0.5
    assert peak < 4_000_000


def test_arrays_are_counted_together(tmp_path: Path) -> None:
    path, half = tmp_path / "x.gguf", MAX_ITEMS // 2
    path.write_bytes(whole([setting(key, 9, items(0, half, bytes(half))) for key in "abc"]))
    with pytest.raises(CorruptFileError, match=f"'c' claims {half} items, all arrays .* have {MAX_ITEMS}"):
        read_header(path)


def test_as_many_tensors_as_a_file_may_have(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(whole(infos=[info(str(n), [0]) for n in range(MAX_ENTRIES)]))
    assert len(read_header(path).tensors) == MAX_ENTRIES


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.gguf"):
        with pytest.raises(StorageError, match="cannot read"):
            read_header(path)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, seed: int) -> None:
    sound = write(tmp_path / "sound.gguf", EVERY).read_bytes()
    end = len(header_bytes(EVERY, PLANNED))
    path, chance = tmp_path / "x.gguf", random.Random(seed)
    refused = 0
    for _ in range(100):
        raw = bytearray(sound)
        for _ in range(chance.choice((1, 1, 4))):
            raw[chance.randrange(end)] = chance.randrange(256)
        path.write_bytes(raw[: chance.choice((len(raw), chance.randrange(len(raw))))])
        try:
            header = read_header(path)
        except CorruptFileError:
            refused += 1
        else:
            for tensor in header.tensors.values():
                assert len(stored_bytes(header, tensor.name)) == tensor.size
    assert 30 < refused < 100


# --- several files ---------------------------------------------------------------------------------

ROWS = [PlannedTensor(f"blk.{n}.attn_q.weight", TYPES["q8_0"], (n % 5 + 1, 1024)) for n in range(12)]


def split(directory: Path, max_size: int | None, tensors: Sequence[PlannedTensor] = ROWS) -> list[Path]:
    directory.mkdir()
    parts = plan_split("model", EVERY, tensors, max_size)
    return [write(directory / part.name, part.metadata, part.tensors) for part in parts]


@pytest.mark.parametrize("size", [3000, 5440, 6000, 12_000, 10**6])
def test_a_split_is_the_one_that_gguf_py_makes(tmp_path: Path, size: int) -> None:
    ours = split(tmp_path / "ours", size)
    (tmp_path / "theirs").mkdir()
    their_writer(tmp_path / "theirs" / "model.gguf", EVERY, ROWS, split_max_size=size)
    theirs = sorted((tmp_path / "theirs").iterdir())
    assert [file.name for file in ours] == [file.name for file in theirs]
    assert (len(theirs) == 1) == (size == 10**6)
    for one, other in zip(ours, theirs, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_padding_counts_as_gguf_split_has_it() -> None:
    """gguf-py leaves it aside; llama.cpp's own tool does not."""
    tensors = [PlannedTensor(f"t{n}", TYPES["q8_0"], (1, 256)) for n in range(4)]  # 272 bytes, padded 288
    assert [len(part.tensors) for part in plan_split("m", {}, tensors, 575)] == [1, 1, 1, 1]
    assert [len(part.tensors) for part in plan_split("m", {}, tensors, 576)] == [2, 2]


def test_any_file_of_a_split_opens_all(tmp_path: Path) -> None:
    files = split(tmp_path / "parts", 6000)
    whole_file = read_model(split(tmp_path / "whole", None)[0])
    for file in files:
        header = read_model(file)
        assert header.files == tuple(files)
        assert header.path == files[0]
        assert header.metadata == EVERY
        assert list(header.tensors) == list(whole_file.tensors)
        assert [stored_bytes(header, t.name) for t in ROWS] == [content(t) for t in ROWS]


def test_a_split_that_is_not_whole_is_told_by_name(tmp_path: Path) -> None:
    files = split(tmp_path / "parts", 6000)
    count = len(files)
    assert count > 3
    spare = tmp_path / files[1].name
    files[1].rename(spare)
    with pytest.raises(CorruptFileError, match=f"model-00002-of-{count:05d}.gguf is not beside it"):
        read_model(files[0])
    files[2].rename(files[1])  # a file under another's name
    with pytest.raises(CorruptFileError, match="is not beside it"):
        read_model(files[0])
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(CorruptFileError, match=f"says that it is file 3 of {count}"):
        read_model(files[0])
    with pytest.raises(CorruptFileError, match=f"is file 3 of {count} of a split model; the name NAME-00003"):
        read_model(files[1])
    renamed = files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CorruptFileError, match=f"is file 1 of {count} of a split model"):
        read_model(renamed)


def test_files_of_two_splits_are_no_model(tmp_path: Path) -> None:
    files = split(tmp_path / "parts", 6000)
    parts = plan_split("model", EVERY, ROWS, 6000)
    write(files[-1], parts[-1].metadata, ROWS[:1])
    with pytest.raises(CorruptFileError, match="hold a tensor twice"):
        read_model(files[0])
    write(files[-1], parts[-1].metadata, [PlannedTensor(f"x{n}", TYPES["f32"], (1,)) for n in range(9)])
    with pytest.raises(CorruptFileError, match="tensors, the first says 12"):
        read_model(files[0])


def test_more_files_than_can_be_numbered() -> None:
    tensors = [PlannedTensor(f"t{n}", TYPES["f32"], (8,)) for n in range(65_536)]
    with pytest.raises(SpecError, match="at most 65535"):
        plan_split("model", {}, tensors, 1)


def test_offsets_are_aligned_and_without_holes() -> None:
    offsets = tensor_offsets(PLANNED, 64)
    assert all(offset % 64 == 0 for offset in offsets.values())
    for one, other in pairwise(PLANNED):
        assert 0 <= offsets[other.name] - offsets[one.name] - one.size < 64


def test_a_file_of_llama_cpps_own() -> None:
    path = shared("gguf", "llama-2-tiny-random.gguf")
    header = read_header(path)
    theirs = gguf.GGUFReader(path)
    assert header.plain() == {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert {t.name: (t.offset, t.size) for t in header.tensors.values()} == {
        t.name: (t.data_offset, t.n_bytes) for t in theirs.tensors
    }
