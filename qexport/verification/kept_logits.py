"""The full-precision model's predictions, computed once and kept in a file for every variant to be held
against.

Of each scored token: the lowest kept log-probability and the step, fp32; the likeliest token's id, int32;
where not all are kept, the ids of those that are, int32; and their log-probabilities as whole steps above
the lowest, uint16. Steps are below 0.001 nats: a model's
divergence from itself comes out below 1e-6.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch

from qexport.calibrate.windows import ScoredWindow
from qexport.checkpoint.disk import read_errors, write_errors
from qexport.checkpoint.staging import require_space, whole_file
from qexport.errors import CalibrationError
from qexport.verification.divergence import chunks, token_divergence

_MAGIC = b"qexport logits 1\n"
_LEVELS = 65535
_LEAST = -60.0  # nats; what is less likely (e^-60) adds nothing
_FEWEST = 64  # values that are kept of a token whatever the budget


@dataclass(frozen=True)
class Layout:
    """What the file holds: `kept` of `vocabulary` values of each token, `counts` tokens of each window.

    `key` tells which model and which options, `tokens` which text: the hash of all windows' ids.
    """

    key: str
    tokens: str
    vocabulary: int
    kept: int
    counts: tuple[int, ...]

    @property
    def record(self) -> np.dtype[Any]:
        """One token's bytes."""
        ids = [] if self.kept == self.vocabulary else [("ids", "<i4", (self.kept,))]
        return np.dtype(
            [("low", "<f4"), ("step", "<f4"), ("top", "<i4"), *ids, ("levels", "<u2", (self.kept,))]
        )

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return sum(self.counts) * self.record.itemsize


def hash_of_tokens(windows: Sequence[ScoredWindow]) -> str:
    """Hash of all that the model sees and of what is scored."""
    told = json.dumps([(window.tokens, window.first) for window in windows], separators=(",", ":"))
    return hashlib.sha256(told.encode()).hexdigest()


def plan_logits(key: str, windows: Sequence[ScoredWindow], vocabulary: int, budget: int) -> Layout:
    """All values where they fit into `budget` bytes, else as many of the likeliest as do."""
    counts = tuple(window.scored for window in windows)
    whole = Layout(key, hash_of_tokens(windows), vocabulary, vocabulary, counts)
    if whole.size <= budget:
        return whole
    room = budget // max(sum(counts), 1) - 12
    kept = min(max(room // 6, _FEWEST), vocabulary)
    return Layout(whole.key, whole.tokens, vocabulary, kept, counts)


class KeptLogitsWriter:
    """`with KeptLogitsWriter(path, layout) as kept: kept.add(window, logits)`; whole, or not there."""

    def __init__(self, path: Path, layout: Layout) -> None:
        require_space(path, layout.size)
        self._path, self._layout = path, layout
        self._starts = np.concatenate(([0], np.cumsum(layout.counts)))
        self._staged = whole_file(path)
        self._file: BinaryIO | None = None
        self._begin = 0

    def __enter__(self) -> KeptLogitsWriter:
        with write_errors(self._path):
            self._file = self._staged.__enter__()
            header = _MAGIC + json.dumps(asdict(self._layout)).encode() + b"\n"
            self._file.write(header)
            self._begin = len(header)
            self._file.truncate(self._begin + self._layout.size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staged.__exit__(kind, error, trace)

    def add(self, window: int, logits: torch.Tensor) -> None:
        """The logits [scored, vocabulary] of a window's scored tokens. They are not changed."""
        assert self._file is not None  # noqa: S101 - entered
        layout = self._layout
        records = np.zeros(len(logits), layout.record)
        for part in chunks(len(logits), logits.shape[1]):
            values = torch.log_softmax(logits[part].float(), dim=-1).clamp_(min=_LEAST)
            records["top"][part] = values.argmax(dim=-1).numpy()
            if layout.kept < layout.vocabulary:
                values, ids = values.topk(layout.kept, dim=-1)
                records["ids"][part] = ids.numpy()
            low, high = values.aminmax(dim=-1, keepdim=True)
            step = ((high - low) / _LEVELS).clamp(min=1e-12)
            levels = ((values - low) / step).round().clamp(0, _LEVELS)
            records["low"][part], records["step"][part] = low[:, 0].numpy(), step[:, 0].numpy()
            records["levels"][part] = levels.to(torch.int32).numpy().astype(np.uint16)
        with write_errors(self._path):
            self._file.seek(self._begin + int(self._starts[window]) * layout.record.itemsize)
            self._file.write(records.tobytes())


class KeptLogits:
    """Reads such a file, a window at a time; `close` lets it go."""

    def __init__(self, path: Path, layout: Layout, begin: int) -> None:
        self.path, self.layout, self._begin = path, layout, begin
        with read_errors(path):
            self._file = os.open(path, os.O_RDONLY)  # another run may put other logits there meanwhile
        self.close = weakref.finalize(self, os.close, self._file)
        self._starts = np.concatenate(([0], np.cumsum(layout.counts)))

    def divergence(self, window: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(kept || logits) fp64 [scored], and whether the likeliest token is the same, bool [scored].

        Raises CalibrationError for logits of another vocabulary.
        """
        layout = self.layout
        if logits.shape[1] != layout.vocabulary:
            raise CalibrationError(
                f"the model foretells {logits.shape[1]} tokens, its reference {layout.vocabulary}",
                expected="the same vocabulary in both",
            )
        records = self._read(window)
        found = torch.empty(len(logits), dtype=torch.float64)
        same = torch.empty(len(logits), dtype=torch.bool)
        for part in chunks(len(logits), logits.shape[1]):
            ours = torch.log_softmax(logits[part].float(), dim=-1).clamp_(min=_LEAST)
            same[part] = ours.argmax(dim=-1) == torch.from_numpy(records["top"][part].astype(np.int64))
            levels = torch.from_numpy(records["levels"][part].astype(np.float32))
            low, step = (torch.from_numpy(records[name][part].copy())[:, None] for name in ("low", "step"))
            theirs = levels * step + low
            if layout.kept < layout.vocabulary:
                ours = ours.gather(-1, torch.from_numpy(records["ids"][part].astype(np.int64)))
            else:
                theirs -= theirs.logsumexp(dim=-1, keepdim=True)
            found[part] = token_divergence(theirs, ours)
        return found, same

    def _read(self, window: int) -> Any:
        layout = self.layout
        size = layout.counts[window] * layout.record.itemsize
        begin = self._begin + int(self._starts[window]) * layout.record.itemsize
        with read_errors(self.path):
            return np.frombuffer(os.pread(self._file, size, begin), layout.record)


def open_logits(path: Path, key: str) -> KeptLogits | None:
    """The kept logits of that key; None where there are none, or others."""
    if not path.is_file():
        return None
    with read_errors(path), path.open("rb") as file:
        if file.readline(len(_MAGIC)) != _MAGIC:
            return None
        line = file.readline(1 << 24)
        size = file.seek(0, os.SEEK_END)
    try:
        told = json.loads(line)
        layout = Layout(**{**told, "counts": tuple(told["counts"])})
        begin = len(_MAGIC) + len(line)
        whole = layout.key == key and size == begin + layout.size
    except (ValueError, TypeError, KeyError):
        return None
    return KeptLogits(path, layout, begin) if whole else None
