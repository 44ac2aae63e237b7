"""Importance matrices in llama.cpp's two forms: how much each input of each tensor matters.

The one since July 2025 is a GGUF file without a model: two tensors an entry, `NAME.in_sum2` (sums of squared
inputs, [in] or [experts, in]) and `NAME.counts` (tokens, one number or one an expert). The one before is a
list of entries, little-endian: length and bytes of the name, calls, number of values, the values, each the
mean square times the calls; then the calls of all, and the name of the text (llama.cpp,
tools/imatrix/imatrix.cpp; as it is used, tools/quantize/quantize.cpp).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qexport.checkpoint.disk import exists, read_errors
from qexport.errors import CheckpointNotFoundError, CorruptFileError, SpecError
from qexport.formats.gguf.container import MAGIC
from qexport.formats.gguf.imatrix_gguf import read_entries, write_entries
from qexport.formats.gguf.whole_file import whole_file

LEGACY_SUFFIX = ".dat"
# tokens of a call where a file does not tell: llama-imatrix's default; as a power of two it costs no digit
_CALL_TOKENS = 512
_MAX_BYTES = 1 << 34
_SHOWN_NAME = 80
_MAX_ENTRIES = 1 << 20  # real ones have some thousands; the first bytes of a text would be more


@dataclass(frozen=True)
class Squares:
    """What one tensor's inputs were: `sums` of x^2, fp32 [in] or [experts, in], over `counts` tokens.

    `counts` has one number, or one an expert. The old form tells no experts apart: theirs lie in a row.
    """

    sums: torch.Tensor = field(compare=False, repr=False)
    counts: tuple[int, ...]

    def means(self) -> torch.Tensor:
        """Mean squares, fp32 and flat. 1 for an expert that no token chose, as llama.cpp has it."""
        rows = self.sums.float().reshape(len(self.counts), -1)
        counts = torch.tensor(self.counts, dtype=torch.float32)[:, None]
        return torch.where(counts > 0, rows / counts.clamp(min=1), 1.0).reshape(-1)


@dataclass(frozen=True)
class ImportanceMatrix:
    """Squares by GGUF tensor name (`blk.0.attn_q.weight`), and what text they come from.

    `chunk_count` chunks of `chunk_size` tokens.
    """

    entries: Mapping[str, Squares]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = _CALL_TOKENS

    def importance(self, name: str, inputs: int, experts: int | None = None) -> torch.Tensor | None:
        """What each of a tensor's `inputs` weighs, fp32 [in], or [experts, in] where it has several.

        Mean squares, as llama.cpp takes them; None for a tensor of which nothing is known. Raises SpecError
        when the entry is one for rows of another length, or for another number of `experts`.
        """
        found = self.entries.get(name)
        if found is None:
            return None
        values = found.means()
        rows, rest = divmod(len(values), inputs)
        if rest or not rows or (experts is not None and rows != experts):
            wanted = f"{experts or 1} x {inputs}" if (experts or 1) > 1 else str(inputs)
            raise SpecError(
                f"the importance matrix has {len(values)} values for {name}, whose rows have {inputs}",
                expected=f"{wanted} values: a matrix gathered with this very model",
                remedy="gather it anew from the model and a calibration text",
            )
        return values if rows == 1 and (experts or 1) == 1 else values.reshape(rows, inputs)

    @property
    def unseen(self) -> list[str]:
        """Names of the tensors of experts of which no token chose some."""
        return [name for name, squares in self.entries.items() if 0 in squares.counts]


def read_imatrix(path: Path) -> ImportanceMatrix:
    """An importance matrix in either form; which it is, its first bytes tell.

    Every length is checked against the file's before anything is allocated. Raises CheckpointNotFoundError,
    CorruptFileError (cut short, contradictory, or numbers that are negative, NaN or infinite), StorageError.
    """
    if not exists(path) or not path.is_file():
        raise CheckpointNotFoundError(
            f"importance matrix {path} " + ("is no file" if exists(path) else "does not exist"),
            expected="a file that llama-imatrix or qexport wrote",
        )
    with read_errors(path), path.open("rb") as file:
        is_gguf = file.read(4) == MAGIC
        if not is_gguf and (size := path.stat().st_size) > _MAX_BYTES:
            raise CorruptFileError(f"{path} has {size} bytes, too many for an importance matrix")
    if not is_gguf:
        return _read_legacy(path)
    stored = read_entries(path)
    entries = {
        name: _squares(path, name, sums, counts) for name, (sums, counts) in sorted(stored.tensors.items())
    }
    return ImportanceMatrix(entries, stored.datasets, stored.chunk_count, stored.chunk_size)


def _squares(path: Path, name: str, sums: torch.Tensor, counts: torch.Tensor) -> Squares:
    if sums.numel() % counts.numel():
        raise CorruptFileError(
            f"{path} is no importance matrix: {name} has {sums.numel()} sums and {counts.numel()} counts",
            expected="as many sums for each count",
        )
    _require_squares(path, name, sums)
    _require_squares(path, f"{name}.counts", counts)
    numbers = tuple(int(count) for count in counts.reshape(-1).double().round().tolist())
    return Squares(sums.reshape(-1) if len(numbers) == 1 else sums.reshape(len(numbers), -1), numbers)


def _require_squares(path: Path, name: str, values: torch.Tensor) -> None:
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise CorruptFileError(
            f"{path} holds numbers that are negative, NaN or infinite for {name[:_SHOWN_NAME]}",
            expected="sums of squares",
            remedy="gather the importance matrix anew",
        )


class _Bytes:
    """The old form's bytes, taken from the front; nothing is made of a length that they do not hold."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self._content, self._at = path, content, 0

    @property
    def left(self) -> int:
        return len(self._content) - self._at

    def corrupt(self, found: str) -> CorruptFileError:
        return CorruptFileError(
            f"{self.path} is no importance matrix: {found}", remedy="download or gather it again"
        )

    def take(self, size: int, what: str) -> bytes:
        if not 0 <= size <= self.left:
            raise self.corrupt(f"{what} should take {size} bytes at byte {self._at}, {self.left} are left")
        self._at += size
        return self._content[self._at - size : self._at]

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def text(self, what: str) -> str:
        raw = self.take(self.number(f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"{what} is no text") from error


def _read_legacy(path: Path) -> ImportanceMatrix:
    with read_errors(path):
        content = _Bytes(path, path.read_bytes())
    count = content.number("the number of entries")
    if not 0 < count <= _MAX_ENTRIES:
        raise CorruptFileError(
            f"{path} is no importance matrix",
            expected="a file that llama-imatrix or `qexport imatrix` wrote",
            remedy="a text is calibrated on by --calibration",
        )
    entries: dict[str, Squares] = {}
    for number in range(1, count + 1):
        name = content.text(f"the name of entry {number} of {count}")
        calls = content.number(f"the calls of {name[:_SHOWN_NAME]}")
        values = content.number(f"the number of values of {name[:_SHOWN_NAME]}")
        if values < 1 or calls < 0 or name in entries:
            what = "stands twice" if name in entries else f"has {values} values of {calls} calls"
            raise content.corrupt(f"{name[:_SHOWN_NAME]} {what}")
        raw = content.take(4 * values, f"{values} values of {name[:_SHOWN_NAME]}")
        means = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        _require_squares(path, name, means)
        # no calls: llama.cpp takes the values for the means themselves
        entries[name] = Squares(means * _CALL_TOKENS, (max(calls, 1) * _CALL_TOKENS,))
    chunks = content.number("the number of calls") if content.left else 0  # early files end here
    dataset = content.text("the text's name") if content.left else ""
    return ImportanceMatrix(entries, (dataset,) if dataset else (), max(chunks, 0))


def write_imatrix(matrix: ImportanceMatrix, path: Path) -> None:
    """Writes the file whole or not at all: the old form for a name that ends in .dat, else GGUF.

    Raises SpecError for a matrix without entries, which llama.cpp refuses to read, StorageError.
    """
    if not matrix.entries:
        raise SpecError("the importance matrix is empty", expected="at least one tensor's inputs")
    if path.suffix == LEGACY_SUFFIX:
        with whole_file(path) as file:
            for piece in _legacy_bytes(matrix):
                file.write(piece)
        return
    tensors = {
        name: (matrix.entries[name].sums, torch.tensor(matrix.entries[name].counts, dtype=torch.float32))
        for name in sorted(matrix.entries)
    }
    write_entries(path, tensors, matrix.datasets, matrix.chunk_count, matrix.chunk_size)


def _legacy_bytes(matrix: ImportanceMatrix) -> Iterator[bytes]:
    names = sorted(name for name, squares in matrix.entries.items() if any(squares.counts))
    yield struct.pack("<i", len(names))
    chunk = max(matrix.chunk_size, 1)
    for name in names:
        squares = matrix.entries[name]
        calls = -(-max(squares.counts) // chunk)  # rounded up, lest a few tokens be none
        values = squares.means() * calls
        yield _legacy_text(name)
        yield struct.pack("<ii", calls, len(values))
        yield values.numpy().astype("<f4").tobytes()
    yield struct.pack("<i", matrix.chunk_count)
    yield _legacy_text(_last(matrix.datasets))


def _legacy_text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<i", len(raw)) + raw


def _last(names: Sequence[str]) -> str:
    return names[-1] if names else ""
