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
from qexport.formats.gguf.slabs import VALUES, Slab, SlabReader, slabs_of
from qexport.formats.gguf.tensors import GgufTensor
from qexport.grids.ggml.grid import GgmlGrid
from qexport.grids.ggml.types import BlockType
from qexport.quantization.fidelity import ratio
from qexport.quantization.gguf.plan import is_coded
from qexport.results import TensorError

_MAX_WORKERS = 16
_DEVICE_WORKERS = 2  # one reads and writes while the other's blocks are encoded
_CPU = torch.device("cpu")
_LARGEST_SCALE = 65504  # in fp16


@dataclass(frozen=True)
class _Weighed:
    """A slab, and what each input of its rows weighs, fp32 [in]."""

    slab: Slab
    importance: torch.Tensor | None


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
    """Encodes tensors into the files of an output; `files` tells the type of each tensor in each file.

    Blocks are encoded on `device`.
    """

    checkpoint: Checkpoint
    output: GgufOutput
    files: Mapping[int, Mapping[str, BlockType]]
    importance: ImportanceMatrix | None
    on_event: OnEvent
    device: torch.device = _CPU
    _losses: dict[tuple[int, str], _Loss] = field(default_factory=dict)

    def run(self, tensors: Sequence[GgufTensor]) -> None:
        """Reads, encodes and writes `tensors`. Raises NonFiniteError that names what is not finite."""
        reader = SlabReader(self.checkpoint)
        most = _MAX_WORKERS if self.device == _CPU else _DEVICE_WORKERS
        workers = max(1, min(most, os.cpu_count() or 1))
        largest = max((tensor.shape[-1] * 4 for tensor in tensors), default=0)
        room = 2 * workers * max(VALUES * 4, largest)

        def weighed() -> Iterator[_Weighed]:
            for tensor in tensors:
                h = self._weights(tensor)
                for slab in slabs_of(tensor):
                    yield _Weighed(slab, h if h is None or h.dim() == 1 else h[slab.part.expert or 0])

        def read(item: _Weighed) -> torch.Tensor:
            return reader.read(item.slab)

        Overlap(
            read, self._encode, self._write, size=lambda item: item.slab.size, room=room, workers=workers
        ).run(weighed())

    def errors(self, number: int) -> list[TensorError]:
        """What each matrix of a file lost."""
        return [
            TensorError(
                name,
                GgmlGrid(self.files[number][name]).bits,
                ratio(loss.lost, loss.square),
                ratio(loss.weighted_lost, loss.weighted_square) if loss.weighted_square else None,
            )
            for (file, name), loss in self._losses.items()
            if file == number
        ]

    def _encode(self, item: _Weighed, rows: torch.Tensor) -> dict[BlockType, _Encoded]:
        tensor = item.slab.tensor
        if not is_finite(rows):
            raise non_finite_error(str(self.checkpoint.path), [item.slab.part.name])
        rows = rows.to(self.device)
        importance = None if item.importance is None else item.importance.to(self.device)
        kinds = {types[tensor.name] for types in self.files.values() if tensor.name in types}
        return {kind: _in_type(kind, tensor.name, rows, importance) for kind in kinds}

    def _weights(self, tensor: GgufTensor) -> torch.Tensor | None:
        """What each input of the tensor's rows weighs, [in] or [experts, in]; None for all alike."""
        if self.importance is None:
            return None
        return self.importance.importance(tensor.name, tensor.shape[-1], tensor.experts)

    def _write(self, item: _Weighed, encoded: Mapping[BlockType, _Encoded]) -> None:
        slab, name = item.slab, item.slab.tensor.name
        for number, types in self.files.items():
            if name not in types:
                continue
            made = encoded[types[name]]
            begin = slab.begin * types[name].row_bytes(slab.width)
            self.output.write_bytes((number, name), begin, byte_view(made.blocks))
            if made.loss:
                total = self._losses.setdefault((number, name), _Loss())
                for key, value in vars(made.loss).items():
                    setattr(total, key, getattr(total, key) + value)
        self.on_event(Advanced(slab.size, name))


def stream_bytes(tensors: Sequence[GgufTensor]) -> int:
    """What `run` reports in all as it goes on: fp32 bytes."""
    return 4 * sum(math.prod(tensor.shape) for tensor in tensors)


def _in_type(kind: BlockType, name: str, rows: torch.Tensor, h: torch.Tensor | None) -> _Encoded:
    """The rows [rows, in] in a type. SpecError that names the tensor for values beyond the type's."""
    try:
        blocks = kind.encode(rows, h)
    except SpecError as error:
        raise SpecError(f"{name}: {error.found}", expected=error.expected, remedy=error.remedy) from error
    if not is_coded(kind):
        return _Encoded(blocks.cpu(), None)
    loss = _loss(rows, kind.decode(blocks), h)
    if not loss.square < _LARGEST_SCALE**2 and _cut_off(rows, kind.decode(blocks)):
        raise SpecError(
            f"{name}: a weight of {float(rows.abs().amax()):.6g}, too large for {kind.name}",
            expected="weights that scales of 16 bits can reach",
            remedy=f"another type for it, such as --override '{name}=bf16'",
        )
    return _Encoded(blocks.cpu(), loss)


def _cut_off(rows: torch.Tensor, decoded: torch.Tensor) -> bool:
    """Whether the largest value is beyond the type's reach: encoders stop at the largest scale."""
    return bool(decoded.abs().amax() < 0.5 * rows.abs().amax())


def _loss(rows: torch.Tensor, decoded: torch.Tensor, h: torch.Tensor | None) -> _Loss:
    squares, lost = rows.square().sum(dim=0), decoded.sub_(rows).square_().sum(dim=0)
    if h is None:
        return _Loss(float(squares.sum()), float(lost.sum()))
    return _Loss(float(squares.sum()), float(lost.sum()), float(squares @ h), float(lost @ h))
