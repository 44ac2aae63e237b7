"""The values of a GGUF header as bytes: numbers, strings and arrays of them, little endian.

Source: ggml/docs/gguf.md, `gguf_metadata_value_type`. Reading trusts nothing: what a file claims to hold is
held against its size before any memory is taken for it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

from qexport.errors import CorruptFileError

# Read values take up to ten times their bytes in the file, so the bytes are no bound for memory. Real headers
# have up to some tens of megabytes (a whole tokenizer.json among the settings) and 1.3 million items (262 144
# tokens with scores and types, twice as many merges): these limits are a second and 300 MB.
MAX_HEADER_BYTES = 1 << 27
MAX_ITEMS = 1 << 21  # of all arrays together
MAX_NAME_BYTES = 65_535
_CHUNK = 1 << 20

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
_BY_NUMBER = {number: (kind, code) for kind, (number, code) in _NUMBERS.items()}
_LENGTH = struct.Struct("<Q")


class Cursor:
    """Reads a header from its start on. Raises CorruptFileError, which `corrupt` makes of a few words."""

    def __init__(self, descriptor: int, file_size: int, corrupt: Callable[[str], CorruptFileError]) -> None:
        self.place, self.file_size, self.corrupt = 0, file_size, corrupt
        self._descriptor, self._held, self._items = descriptor, bytearray(), 0

    def need(self, count: int, what: str) -> None:
        """Has the next `count` bytes in memory, or refuses to take memory for them."""
        end = self.place + count
        if end > self.file_size:
            raise self.corrupt(
                f"{what} needs {count} bytes at byte {self.place}, the file has {self.file_size}"
            )
        if end > MAX_HEADER_BYTES:
            raise self.corrupt(f"{what} ends at byte {end}, a header has at most {MAX_HEADER_BYTES}")
        while len(self._held) < end:
            part = os.pread(self._descriptor, _CHUNK, len(self._held))
            if not part:
                raise self.corrupt(f"it ends within {what}")
            self._held += part

    def number(self, kind: str, what: str) -> Any:
        """One number of that kind."""
        return self._numbers(_NUMBERS[kind][1], 1, what)[0]

    def _numbers(self, code: str, count: int, what: str) -> list[Any]:
        layout = struct.Struct(f"<{count}{code}")
        self.need(layout.size, what)
        found = list(layout.unpack_from(self._held, self.place))
        self.place += layout.size
        return found

    def string(self, what: str, longest: int = MAX_HEADER_BYTES) -> str:
        """One string: its length, then UTF-8."""
        self.need(8, what)
        (length,) = _LENGTH.unpack_from(self._held, self.place)
        if length > longest:
            raise self.corrupt(f"{what} claims {length} bytes, it may have {longest}")
        return self._strings(1, what)[0]

    def _strings(self, count: int, what: str) -> list[str]:
        self.need(8 * count, what)
        found: list[str] = []
        held, place = self._held, self.place  # a quarter of a million tokens pass through here
        try:
            for _ in range(count):
                begin = place + 8
                if begin > len(held):
                    self.place = place
                    self.need(8, what)
                place = begin + _LENGTH.unpack_from(held, place)[0]
                if place > len(held):
                    self.place = begin
                    self.need(place - begin, what)
                found.append(held[begin:place].decode())
        except UnicodeDecodeError as error:
            raise self.corrupt(f"{what} is no UTF-8 ({error.reason})") from None
        self.place = place
        return found

    def value(self, what: str) -> tuple[str, Any]:
        """A value behind the number of its kind, and that kind."""
        number = self.number("u32", what)
        if number in _BY_NUMBER:
            kind, code = _BY_NUMBER[number]
            return kind, self._numbers(code, 1, what)[0]
        if number == _STRING:
            return "str", self.string(what)
        if number != _ARRAY:
            raise self.corrupt(f"{what} is of kind {number}, known are 0 to 12")
        return self._array(what)

    def _array(self, what: str) -> tuple[str, list[Any]]:
        inner, count = self.number("u32", what), self.number("u64", what)
        if inner == _ARRAY:
            raise self.corrupt(f"{what} is an array of arrays, which llama.cpp does not read either")
        self._items += count
        if self._items > MAX_ITEMS:
            raise self.corrupt(f"{what} claims {count} items, all arrays together may have {MAX_ITEMS}")
        if inner in _BY_NUMBER:
            kind, code = _BY_NUMBER[inner]
            return f"[{kind}]", self._numbers(code, count, what)
        if inner == _STRING:
            return "[str]", self._strings(count, what)
        raise self.corrupt(f"{what} is an array of kind {inner}, known are 0 to 8 and 10 to 12")


def string_bytes(value: str | bytes) -> bytes:
    """Length and UTF-8; bytes stand for themselves (tokens that are no text)."""
    raw = value if isinstance(value, bytes) else value.encode("utf-8")
    return _LENGTH.pack(len(raw)) + raw


def value_bytes(kind: str, value: Any) -> bytes:
    """The number of the kind and the value. Raises ValueError for a kind that there is not."""
    return struct.pack("<I", _number_of(kind)) + _content_bytes(kind, value)


def _number_of(kind: str) -> int:
    if kind in _NUMBERS:
        return _NUMBERS[kind][0]
    if kind == "str":
        return _STRING
    if kind.startswith("[") and kind.endswith("]"):
        return _ARRAY
    raise ValueError(f"no kind of value is called {kind!r}")


def _content_bytes(kind: str, value: Any) -> bytes:
    if kind in _NUMBERS:
        return struct.pack(f"<{_NUMBERS[kind][1]}", value)
    return string_bytes(value) if kind == "str" else _array_bytes(kind[1:-1], value)


def _array_bytes(kind: str, values: Sequence[Any]) -> bytes:
    head = struct.pack("<IQ", _number_of(kind), len(values))
    if kind in _NUMBERS:
        return head + struct.pack(f"<{len(values)}{_NUMBERS[kind][1]}", *values)
    if kind != "str":
        raise ValueError("arrays of arrays are not read by llama.cpp")
    return head + b"".join(map(string_bytes, values))
