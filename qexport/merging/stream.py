"""Runs planned tensors through read, change and write, all three at once, a piece of rows at a time.

A piece is read, brought to fp32 a tile at a time that fits in a core's cache, changed, rounded once and
written; what no adapter touches keeps its bytes. Memory is that of a few pieces, whatever the model.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import NoReturn

import torch

from qexport.checkpoint.finiteness import is_finite
from qexport.checkpoint.overlap import Overlap
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.writer import CheckpointWriter
from qexport.events import Advanced, OnEvent
from qexport.merging.edits import Change, Edit, Loading, forget_shared, in_one
from qexport.merging.sources import Source, StoredSource

PIECE_BYTES = 1 << 23
_TILE_VALUES = 1 << 18  # 1 MiB of fp32: half of a usual second-level cache
_MAX_WORKERS = 4
_SAFE_SQUARE = 1e60  # sums of squares below it hold no value near the end of fp32's and bf16's range
_WHOLE_WIDTH = 16  # bytes a value of a tensor that is held whole: itself, its change and its copies


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: where its values come from, and what changes them, in order.

    `adapters` are the numbers, from 1, of those that take part.
    """

    info: TensorInfo
    source: Source
    edits: tuple[Edit, ...] = ()
    adapters: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it has to be in memory as a whole."""
        return self.source.whole or any(edit.whole for edit in self.edits)

    @property
    def rows(self) -> int:
        """Its first side; a scalar has one row."""
        return self.info.shape[0] if self.info.shape else 1

    @property
    def row_values(self) -> int:
        """Values a row."""
        return math.prod(self.info.shape[1:])


@dataclass
class Changed:
    """How much a tensor changed: squared norms, and the adapters that did it."""

    base_square: float = 0.0
    delta_square: float = 0.0
    adapters: tuple[int, ...] = ()

    @property
    def relative(self) -> float:
        """|W' - W| / |W|."""
        if not self.base_square:
            return math.inf if self.delta_square else 0.0
        return math.sqrt(self.delta_square / self.base_square)


@dataclass
class _Job:
    """A tensor on its way: its edits, loaded by whoever changes a piece of it first."""

    planned: PlannedTensor
    lock: threading.Lock = field(default_factory=threading.Lock)
    changes: tuple[Change, ...] | None = None

    def loaded(self, device: torch.device) -> tuple[Change, ...]:
        """Its edits, ready to be applied."""
        with self.lock:
            if self.changes is None:
                changes: list[Change] = []
                for edit in self.planned.edits:
                    rows = partial(self._rows, device, tuple(changes))
                    changes.append(edit.load(Loading(device, rows)))
                self.changes = in_one(changes)
            return self.changes

    def _rows(self, device: torch.device, changes: Sequence[Change]) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensor's rows with some of its changes, from the front to the end."""
        planned = self.planned
        for begin, end in _ranges(planned):
            rows = planned.source.silent_rows(begin, end).to(device, torch.float32, copy=True)
            for change in changes:
                rows = change.apply(rows, begin)
            yield begin, rows


@dataclass(frozen=True)
class _Piece:
    job: _Job
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Memory that it takes on its way, roughly."""
        planned = self.job.planned
        values = (self.end - self.begin) * planned.row_values
        width = planned.source.dtype.itemsize
        return values * (_WHOLE_WIDTH if planned.whole else width)


@dataclass(frozen=True)
class _Read:
    """A piece as it was read; `buffer` is the memory it lies in, where that is to be used again."""

    values: torch.Tensor
    buffer: torch.Tensor | None = None


@dataclass
class _Outcome:
    values: torch.Tensor
    buffer: torch.Tensor | None = None
    base_square: float = 0.0
    delta_square: float = 0.0
    bad: str = ""


class _Buffers:
    """Memory that is used again: the kernel clears every fresh page, which takes longer than reading it."""

    def __init__(self) -> None:
        self._free: SimpleQueue[torch.Tensor] = SimpleQueue()

    def take(self, size: int) -> torch.Tensor:
        """At least `size` bytes."""
        if size > PIECE_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        try:
            return self._free.get_nowait()
        except Empty:
            return torch.empty(PIECE_BYTES, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor | None) -> None:
        """It is free again."""
        if buffer is not None and len(buffer) == PIECE_BYTES:
            self._free.put(buffer)


@dataclass
class MergeStream:
    """Writes planned tensors; `changed` then tells of each that an adapter touched.

    `on_broken` hears of a tensor with NaN or infinity, and whether it is the base's or the merged one's;
    it raises.
    """

    writer: CheckpointWriter
    device: torch.device
    on_event: OnEvent
    on_broken: Callable[[str, PlannedTensor], NoReturn]
    changed: dict[str, Changed] = field(default_factory=dict)
    _buffers: _Buffers = field(default_factory=_Buffers)

    def run(self, tensors: Sequence[PlannedTensor]) -> None:
        """Takes all of them through."""
        workers = max(1, min(_MAX_WORKERS, (os.cpu_count() or 1) - 1))
        try:
            Overlap(
                self._read,
                self._change,
                self._write,
                size=lambda piece: piece.bytes,
                room=PIECE_BYTES * (workers + 3),  # one read, one written, one more to wait
                workers=workers,
            ).run(_pieces(tensors))
        finally:
            forget_shared()

    def _read(self, piece: _Piece) -> _Read:
        planned, source = piece.job.planned, piece.job.planned.source
        if not isinstance(source, StoredSource) or planned.whole or not source.shape:
            return _Read(source.rows(piece.begin, piece.end))
        buffer = self._buffers.take(piece.bytes)
        return _Read(source.rows_in(buffer, piece.begin, piece.end), buffer)

    def _change(self, piece: _Piece, read: _Read) -> _Outcome:
        planned, raw = piece.job.planned, read.values
        dtype = planned.info.dtype
        # what keeps its dtype is changed where it lies
        outcome = _Outcome(raw, read.buffer)
        if raw.dtype != dtype:
            outcome = _Outcome(torch.empty(raw.shape, dtype=dtype))
        if planned.edits:
            _apply(piece, raw, outcome, self.device)
        else:
            outcome.bad = "" if is_finite(raw) else "base"
            if raw.dtype != dtype:
                outcome.values.copy_(raw)
                outcome.bad = outcome.bad or ("" if is_finite(outcome.values) else "merged")
        if outcome.buffer is None:
            self._buffers.give(read.buffer)
        return outcome

    def _write(self, piece: _Piece, outcome: _Outcome) -> None:
        planned = piece.job.planned
        name = planned.info.name
        if outcome.bad:
            self.on_broken(outcome.bad, planned)
        self.writer.write_piece(
            name, piece.begin * planned.row_values * planned.info.dtype.itemsize, outcome.values
        )
        if planned.edits:
            told = self.changed.setdefault(name, Changed(adapters=planned.adapters))
            told.base_square += outcome.base_square
            told.delta_square += outcome.delta_square
        self.on_event(Advanced(outcome.values.nbytes, name))
        self._buffers.give(outcome.buffer)
        if piece.end == planned.rows:
            piece.job.changes = ()  # the adapter's factors are free


def _pieces(tensors: Sequence[PlannedTensor]) -> Iterator[_Piece]:
    for planned in tensors:
        job = _Job(planned)
        for begin, end in _ranges(planned):
            yield _Piece(job, begin, end)


def _ranges(planned: PlannedTensor) -> Iterator[tuple[int, int]]:
    """The rows of each piece: all of them where it must be so."""
    width = planned.row_values * planned.source.dtype.itemsize
    step = planned.rows if planned.whole else max(PIECE_BYTES // max(width, 1), 1)
    for begin in range(0, planned.rows, max(step, 1)):
        yield begin, min(begin + step, planned.rows)


def stream_bytes(tensors: Sequence[PlannedTensor]) -> int:
    """Memory that the stream takes at most, roughly: the pieces under way, or a whole tensor alone."""
    whole = max((t.rows * t.row_values * _WHOLE_WIDTH for t in tensors if t.whole), default=0)
    return PIECE_BYTES * (_MAX_WORKERS + 3) * 2 + whole


_scratch = threading.local()


def _tile(size: int, device: torch.device) -> torch.Tensor:
    """fp32 memory of this thread, used again and again."""
    held: dict[torch.device, torch.Tensor] = _scratch.__dict__.setdefault("tiles", {})
    if device not in held or len(held[device]) < size:
        held[device] = torch.empty(max(size, _TILE_VALUES), device=device)
    return held[device][:size]


def _apply(piece: _Piece, raw: torch.Tensor, outcome: _Outcome, device: torch.device) -> None:
    """Changes the rows of a piece into the outcome's, which may be the same memory, and measures it."""
    planned, changes = piece.job.planned, piece.job.loaded(device)
    known = _known_delta(changes)
    rows, written = raw.reshape(-1, *raw.shape[1:]), outcome.values.reshape(-1, *raw.shape[1:])
    step = len(rows) if planned.whole else max(_TILE_VALUES // max(planned.row_values, 1), 1)
    for begin in range(0, len(rows), max(step, 1)):
        part = rows[begin : begin + step]
        if planned.whole:
            tile = part.to(device, torch.float32, copy=True)
        else:
            tile = _tile(part.numel(), device).view(part.shape).copy_(part)
        square = _square(tile)
        if not math.isfinite(square) and not is_finite(part.contiguous()):
            outcome.bad = "base"
        outcome.base_square += square
        before = None if known is not None else tile.clone()
        for change in changes:
            tile = change.apply(tile, piece.begin + begin)
        if before is not None:
            outcome.delta_square += _square(before.sub_(tile))
        written[begin : begin + step].copy_(tile)
    if known is not None and piece.begin == 0:
        outcome.delta_square = known
    narrow = planned.info.dtype == torch.float16  # a finite fp32 may not be one in fp16
    small = outcome.base_square < _SAFE_SQUARE and (known or outcome.delta_square) < _SAFE_SQUARE
    if not outcome.bad and (narrow or not small):
        outcome.bad = "" if is_finite(outcome.values) else "merged"


def _known_delta(changes: Sequence[Change]) -> float | None:
    return changes[0].delta_square if len(changes) == 1 else None


def _square(values: torch.Tensor) -> float:
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))
