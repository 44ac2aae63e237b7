"""An importance matrix out of calibration windows: the model block by block, in full precision, once.

What is summed is one number an input, so that memory is that of one block and of the activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qexport.calibrate.importance import InputSquares
from qexport.calibrate.windows import batches
from qexport.checkpoint.checkpoint import Checkpoint
from qexport.devices import CPU
from qexport.errors import first_of
from qexport.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from qexport.formats.gguf.imatrix import ImportanceMatrix, Squares
from qexport.formats.gguf.tensors import GgufTensor
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream
from qexport.modeling.calibration import CalibrationData
from qexport.modeling.skeleton import Skeleton

_BATCH_TOKENS = 4096  # tokens that go through a block at once

LayerInput = tuple[str, int | None]
"""The input of a linear layer: the name on disk of its weight, and the expert where that holds several."""


@dataclass
class _Sums:
    """What was seen of the inputs of a block's layers. Layers of one input share its sums."""

    found: dict[str, InputSquares] = field(default_factory=dict)
    _same_as: dict[str, str] = field(default_factory=dict)
    _last: tuple[str, torch.Tensor] | None = None  # held, so that nothing else can take its memory

    def see(self, inner: str, x: torch.Tensor) -> None:
        """A layer's input [..., in]."""
        if inner in self._same_as:
            return
        if inner not in self.found:
            if self._last and _same_memory(self._last[1], x):
                self._same_as[inner] = self._last[0]
                return
            self.found[inner] = InputSquares(x.shape[-1])
        self.found[inner].add(x)
        self._last = inner, x

    def next_batch(self) -> None:
        """The last input's memory is free."""
        self._last = None

    def of(self, inner: str) -> InputSquares | None:
        """The sums of a layer; None for one, an expert, that no token came to."""
        return self.found.get(self._same_as.get(inner, inner))


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def layer_inputs(tensors: Iterable[GgufTensor]) -> dict[str, list[LayerInput]]:
    """The matrices of the blocks, by GGUF name, with the inputs that they take: what llama.cpp gathers."""
    return {
        tensor.name: [(part.name, part.source_expert) for part in tensor.parts]
        for tensor in tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1
    }


def gather_importance(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    data: CalibrationData,
    tensors: Mapping[str, Sequence[LayerInput]],
    hidden: Activations,
    on_event: OnEvent = ignore,
    device: torch.device = CPU,
) -> ImportanceMatrix:
    """Mean squares of the inputs of `tensors`, over the windows, as llama.cpp's imatrix has them.

    `tensors` are GGUF names with the inputs that their rows take, one or one an expert, in order. Those
    that no linear layer has get no entry. The output head (`skeleton.head_weight`) is run when it is among
    them; llama.cpp leaves it out unless asked. The model runs on `device`. Neither checkpoint nor skeleton is
    changed; `hidden`, empty, is filled with the hidden states.

    Raises UnsupportedModelError for a model without a row in architectures.py, NonFiniteError that names
    the layer whose inputs are not finite, StorageError.
    """
    wanted = {source for sources in tensors.values() for source in sources}
    stream = BlockStream(skeleton, checkpoint, device=device)
    tokens = batches(data.windows, _BATCH_TOKENS)
    places = skeleton.bound(checkpoint).places
    squares: dict[LayerInput, tuple[torch.Tensor | None, int]] = {}
    on_event(Started("importance", len(stream), "blocks"))
    hidden.extend(stream.embeddings(tokens))
    for index in range(len(stream)):
        prefix = f"{stream.architecture.blocks}.{index}"
        sums = _Sums()
        with stream.block(index) as block:
            layers: dict[str, LayerInput] = {}
            for inner, module in block.named_modules():
                place = places.get(f"{prefix}.{inner}.weight")
                if place and (place.name, place.expert) in wanted and not list(module.children()):
                    layers[inner] = (place.name, place.expert)
            for number, batch in enumerate(hidden):  # one set of activations, not two
                out = stream.inputs(index, batch, list(layers), sums.see, stop=False)
                assert out is not None  # noqa: S101 - it ran to the end
                hidden[number] = out
                sums.next_batch()
        for inner, source in layers.items():
            seen = sums.of(inner)
            squares[source] = (seen.sums(inner), seen.count) if seen else (None, 0)
        on_event(Advanced(1, stream.block_name(index)))
    head: LayerInput = (skeleton.head_weight, None)
    if head in wanted:
        squares[head] = _head_squares(stream, skeleton, tokens, hidden)
    on_event(Finished())
    entries = {name: found for name, sources in tensors.items() if (found := _entry(sources, squares))}
    # where the user's texts lie is nobody else's business
    datasets = tuple(Path(source.name).name for source in data.sources)
    matrix = ImportanceMatrix(entries, datasets, data.samples, data.length)
    if matrix.unseen:
        on_event(
            Noted(
                f"no token came to some experts of {len(matrix.unseen)} tensors "
                f"({first_of(matrix.unseen, 2)}): all their inputs count alike; more text helps"
            )
        )
    return matrix


def _head_squares(
    stream: BlockStream, skeleton: Skeleton, tokens: list[torch.Tensor], hidden: Activations
) -> tuple[torch.Tensor, int]:
    sums: list[InputSquares] = []

    def see(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not sums:
            sums.append(InputSquares(args[0].shape[-1]))
        sums[0].add(args[0])

    handle = skeleton.model.get_submodule(skeleton.head_name).register_forward_pre_hook(see)
    try:
        for _ in stream.logits(tokens, hidden):
            pass
    finally:
        handle.remove()
    return sums[0].sums(skeleton.head_name), sums[0].count


def _entry(
    sources: Sequence[LayerInput], squares: Mapping[LayerInput, tuple[torch.Tensor | None, int]]
) -> Squares | None:
    """One tensor's entry: zeros for an expert that no token chose; None when there is nothing at all."""
    if not all(source in squares for source in sources):
        return None
    parts = [squares[source] for source in sources]
    known = next((sums for sums, _ in parts if sums is not None), None)
    if known is None:
        return None
    rows = [torch.zeros_like(known) if sums is None else sums for sums, _ in parts]
    counts = tuple(count for _, count in parts)
    return Squares(rows[0] if len(rows) == 1 else torch.stack(rows), counts)
