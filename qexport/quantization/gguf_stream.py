"""A plan's tensors, a slab of rows at a time: read once, encoded for every file, on all cores."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.finiteness import is_finite, non_finite_error
from qexport.checkpoint.overlap import Overlap
from qexport.checkpoint.safetensors_file import byte_view
from qexport.errors import SpecError
from qexport.events import Advanced, OnEvent
from qexport.formats.gguf.imatrix import ImportanceMatrix
from qexport.formats.gguf.output import GgufOutput
from qexport.formats.gguf.tensors import GgufTensor
from qexport.grids.ggml.grid import GgmlGrid
from qexport.grids.ggml.types import BlockType
from qexport.quantization.gguf_plan import is_coded
from qexport.results import TensorError

_SLAB = 1 << 20  # values that one core works on at a time: 4 MiB in fp32
_MAX_WORKERS = 16
_LARGEST_SCALE = 65504  # in fp16


@dataclass(frozen=True)
class _Slab:
    """Rows `begin` to `end` of a tensor, its experts one below the other."""

    tensor: GgufTensor
    begin: int
    end: int
    expert: int | None


@dataclass
class _Loss:
    """Sums over the slabs of one matrix: of squares, and of squared errors, plain and weighed."""

    square: float = 0.0
    lost: float = 0.0
    weighted_square: float = 0.0
    weighted_lost: float = 0.0


@dataclass(frozen=True)
class _Encoded:
    """A slab in one type, and what it lost."""

    blocks: torch.Tensor
    loss: _Loss | None


@dataclass
class TensorStream:
    """Encodes tensors into the files of an output; `files` tells the type of each tensor in each file."""

    checkpoint: Checkpoint
    output: GgufOutput
    files: Mapping[int, Mapping[str, BlockType]]
    importance: ImportanceMatrix | None
    on_event: OnEvent
    _losses: dict[tuple[int, str], _Loss] = field(default_factory=dict)
    _pieces: Iterator[torch.Tensor] = field(default_factory=lambda: iter(()))

    def run(self, tensors: Sequence[GgufTensor]) -> None:
        """Reads, encodes and writes `tensors`. Raises NonFiniteError that names what is not finite."""
        workers = max(1, min(_MAX_WORKERS, os.cpu_count() or 1))
        largest = max((_width(tensor) * 4 for tensor in tensors), default=0)
        room = 2 * workers * max(_SLAB * 4, largest)
        Overlap(self._read, self._encode, self._write, size=_bytes, room=room, workers=workers).run(
            slab for tensor in tensors for slab in _slabs(tensor)
        )

    def errors(self, number: int) -> list[TensorError]:
        """What each matrix of a file lost."""
        return [
            TensorError(
                name,
                GgmlGrid(self.files[number][name]).bits,
                _share(loss.lost, loss.square),
                _share(loss.weighted_lost, loss.weighted_square) if loss.weighted_square else None,
            )
            for (file, name), loss in self._losses.items()
            if file == number
        ]

    def _read(self, slab: _Slab) -> torch.Tensor:
        if slab.begin == 0:
            self._pieces = slab.tensor.slabs(self.checkpoint, _SLAB)
        return next(self._pieces)

    def _encode(self, slab: _Slab, values: torch.Tensor) -> dict[BlockType, _Encoded]:
        if not is_finite(values):
            raise non_finite_error(str(self.checkpoint.path), [part.name for part in slab.tensor.parts[:1]])
        rows = values.reshape(slab.end - slab.begin, -1)
        h = self._weights(slab, rows.shape[1])
        kinds = {types[slab.tensor.name] for types in self.files.values() if slab.tensor.name in types}
        encoded: dict[BlockType, _Encoded] = {}
        for kind in kinds:
            encoded[kind] = _in_type(kind, slab.tensor.name, rows, h)
        return encoded

    def _weights(self, slab: _Slab, inputs: int) -> torch.Tensor | None:
        """What each input of the slab's rows weighs; None for all alike."""
        if self.importance is None:
            return None
        experts = slab.tensor.shape[0] if len(slab.tensor.shape) == 3 else None
        found = self.importance.importance(slab.tensor.name, inputs, experts)
        return found if found is None or found.dim() == 1 else found[slab.expert or 0]

    def _write(self, slab: _Slab, encoded: Mapping[BlockType, _Encoded]) -> None:
        name = slab.tensor.name
        for number, types in self.files.items():
            if name not in types:
                continue
            made = encoded[types[name]]
            row_bytes = types[name].row_bytes(_width(slab.tensor))
            self.output.write_bytes((number, name), slab.begin * row_bytes, byte_view(made.blocks))
            if made.loss:
                total = self._losses.setdefault((number, name), _Loss())
                for key, value in vars(made.loss).items():
                    setattr(total, key, getattr(total, key) + value)
        self.on_event(Advanced(_bytes(slab), name))


def stream_bytes(tensors: Sequence[GgufTensor]) -> int:
    """What `run` reports in all as it goes on: fp32 bytes."""
    return 4 * sum(math.prod(tensor.shape) for tensor in tensors)


def _width(tensor: GgufTensor) -> int:
    return tensor.shape[-1]


def _bytes(slab: _Slab) -> int:
    return 4 * (slab.end - slab.begin) * _width(slab.tensor)


def _slabs(tensor: GgufTensor) -> Iterator[_Slab]:
    """In step with `GgufTensor.slabs`: no slab reaches from one expert into the next."""
    experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
    rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, _SLAB // max(1, _width(tensor)))
    for expert in range(experts):
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            offset = expert * rows
            yield _Slab(tensor, offset + begin, offset + end, expert if len(tensor.shape) == 3 else None)


def _in_type(kind: BlockType, name: str, rows: torch.Tensor, h: torch.Tensor | None) -> _Encoded:
    """The rows [rows, in] in a type. SpecError that names the tensor for values beyond the type's."""
    try:
        blocks = kind.encode(rows, h)
    except SpecError as error:
        raise SpecError(f"{name}: {error.found}", expected=error.expected, remedy=error.remedy) from error
    if not is_coded(kind):
        return _Encoded(blocks, None)
    loss = _loss(rows, kind.decode(blocks), h)
    if not loss.square < _LARGEST_SCALE**2 and _cut_off(rows, kind.decode(blocks)):
        raise SpecError(
            f"{name}: a weight of {float(rows.abs().amax()):.6g}, too large for {kind.name}",
            expected="weights that scales of 16 bits can reach",
            remedy=f"another type for it, such as --override '{name}=bf16'",
        )
    return _Encoded(blocks, loss)


def _cut_off(rows: torch.Tensor, decoded: torch.Tensor) -> bool:
    """Whether the largest value is beyond the type's reach: encoders stop at the largest scale."""
    return bool(decoded.abs().amax() < 0.5 * rows.abs().amax())


def _loss(rows: torch.Tensor, decoded: torch.Tensor, h: torch.Tensor | None) -> _Loss:
    squares, lost = rows.square().sum(dim=0), decoded.sub_(rows).square_().sum(dim=0)
    if h is None:
        return _Loss(float(squares.sum()), float(lost.sum()))
    return _Loss(float(squares.sum()), float(lost.sum()), float(squares @ h), float(lost @ h))


def _share(lost: float, square: float) -> float:
    if square <= 0:
        return math.inf if lost > 0 else 0.0
    return math.sqrt(max(lost, 0.0) / square)
