"""BLAKE3 of files: the algorithm's own test vectors, and no file is taken for what it no longer is."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from qexport.checkpoint import hashing
from qexport.checkpoint.hashing import ALGORITHM, PassingHash, file_hash
from qexport.errors import StorageError

# https://github.com/BLAKE3-team/BLAKE3/blob/master/test_vectors/test_vectors.json, first 32 bytes of `hash`:
# of so many bytes 0, 1, ... 250, 0, 1, ...
VECTORS = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    2: "7b7015bb92cf0b318037702a6cdd81dee41224f734684c2c122cd6359cb1ee63",
    3: "e1be4d7a8ab5560aa4199eea339849ba8e293d55ca0a81006726d184519e647f",
    1023: "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    1025: "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
    2048: "e776b6028c7cd22a4d0ba182a8bf62205d2ef576467e838ed6f2529b85fba24a",
    102400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
}


def write(path: Path, size: int, seed: int = 0) -> bytes:
    raw = random.Random(seed).randbytes(size)
    path.write_bytes(raw)
    return raw


_opened: list[str] | None = None


def _audit(event: str, arguments: Any) -> None:
    """Python itself tells of every file that is opened; a hook stays for good, and mostly does nothing."""
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_audit)


def opened(path: Path) -> tuple[str, list[str]]:
    """The hash, and the files that were opened for it."""
    global _opened
    found: list[str] = []
    _opened = found
    try:
        return file_hash(path), found
    finally:
        _opened = None


@pytest.mark.parametrize("size", VECTORS)
def test_published_vectors(tmp_path: Path, size: int) -> None:
    assert ALGORITHM == "blake3"
    raw = bytes(n % 251 for n in range(size))
    (tmp_path / "file").write_bytes(raw)
    assert file_hash(tmp_path / "file") == VECTORS[size]
    (tmp_path / "other").write_bytes(raw)
    passing = PassingHash(tmp_path / "other")
    for begin in range(0, size, 1000):
        passing.add(begin, raw[begin : begin + 1000])
    passing.remember()
    assert file_hash(tmp_path / "other") == VECTORS[size]


def test_a_file_longer_than_one_read(tmp_path: Path) -> None:
    raw = write(tmp_path / "file", (1 << 22) * 2 + 17)
    assert file_hash(tmp_path / "file") == blake3(raw).hexdigest()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_went_by_is_not_read_again(tmp_path: Path, kind: type[bytes]) -> None:
    raw = write(tmp_path / "file", 100_000)
    passing, begin = PassingHash(tmp_path / "file"), 0
    for size in (0, 1, 7, 50_000, 0, 49_992):
        passing.add(begin, kind(raw[begin : begin + size]))
        begin += size
    passing.remember()
    assert opened(tmp_path / "file") == (blake3(raw).hexdigest(), [])


GONE_BY: dict[str, list[tuple[int, int]]] = {
    "nothing": [],
    "no end": [(0, 900)],
    "no beginning": [(1, 1000)],
    "a gap": [(0, 300), (400, 1000)],
    "backwards": [(500, 1000), (0, 500)],
    "a repeat": [(0, 500), (0, 500), (500, 1000)],
    "all twice": [(0, 1000), (0, 1000)],
    "an overlap": [(0, 600), (500, 1000)],
    "a gap that is filled": [(0, 300), (400, 1000), (300, 400), (400, 1000)],
    "a gap that is filled too late": [(0, 300), (400, 1000), (300, 400)],
}


@pytest.mark.parametrize("order", GONE_BY)
def test_gaps_and_repeats_make_no_wrong_hash(tmp_path: Path, order: str) -> None:
    raw = write(tmp_path / "file", 1000)
    passing = PassingHash(tmp_path / "file")
    for begin, end in GONE_BY[order]:
        passing.add(begin, raw[begin:end])
    passing.remember()
    assert file_hash(tmp_path / "file") == blake3(raw).hexdigest()


def test_more_went_by_than_the_file_holds(tmp_path: Path) -> None:
    raw = write(tmp_path / "file", 1000)
    passing = PassingHash(tmp_path / "file")
    passing.add(0, raw)
    passing.add(1000, b"more")
    passing.remember()
    assert file_hash(tmp_path / "file") == blake3(raw).hexdigest()


def test_a_file_that_grows_after_it_went_by(tmp_path: Path) -> None:
    raw = write(tmp_path / "file", 1000)
    passing = PassingHash(tmp_path / "file")
    passing.add(0, raw)
    with (tmp_path / "file").open("ab") as file:
        file.write(b"more")
    passing.remember()
    assert file_hash(tmp_path / "file") == blake3(raw + b"more").hexdigest()


@pytest.mark.parametrize("passing", [True, False])
@pytest.mark.parametrize("how", ["longer", "same size", "time set back", "replaced, time set back"])
def test_a_file_that_changes_is_hashed_anew(tmp_path: Path, how: str, passing: bool) -> None:
    file = tmp_path / "file"
    raw = write(file, 1000)
    if passing:
        went = PassingHash(file)
        went.add(0, raw)
        went.remember()
    assert file_hash(file) == blake3(raw).hexdigest()
    state = file.stat()
    if how.startswith("replaced"):
        raw = write(tmp_path / "other", 1000, seed=1)
        (tmp_path / "other").replace(file)
    else:
        raw = write(file, 1001 if how == "longer" else 1000, seed=1)
    if how.endswith("time set back"):
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    else:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert file_hash(file) == blake3(raw).hexdigest()


def test_an_unchanged_file_is_read_once(tmp_path: Path) -> None:
    raw = write(tmp_path / "file", 1000)
    assert opened(tmp_path / "file") == (blake3(raw).hexdigest(), [str(tmp_path / "file")])
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link", "../" + tmp_path.name + "/file"):
        assert opened(tmp_path / name) == (blake3(raw).hexdigest(), [])


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*gone: No such file"):
        file_hash(tmp_path / "gone")
    with pytest.raises(StorageError, match=r"cannot read .*gone: No such file"):
        PassingHash(tmp_path / "gone").remember()
    with pytest.raises(StorageError, match="Is a directory"):
        file_hash(tmp_path)
    assert not any(str(tmp_path) in key[0] for key in hashing._known)
