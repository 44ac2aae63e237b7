"""What errors of a layer's outputs cost: the second moment of the loss's gradient by them.

One backward pass of the full-precision model, a block at a time, on labels drawn from the model's own
distribution: the mean of g g^T is then that half of K-FAC's Fisher information (Martens & Grosse 2015) that
tells outputs from one another, and the Fisher is the curvature of KL(full || changed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from qexport.events import OnEvent
from qexport.modeling.activations import Activations
from qexport.modeling.backward import backward, sampled_likelihood
from qexport.modeling.blocks import BlockStream
from qexport.solvers.refine import output_blocks, usable_outputs

SIZE = 128  # outputs whose errors are weighed together: of 32 to 128, and of all, the loss is nearly the same
_DAMP = 0.1  # of the mean diagonal: gradients are noisier than inputs
_TOKENS = 1 << 15  # that are enough for matrices of this size


@dataclass(frozen=True)
class BlockCurvature:
    """Of one block: `block` fp32 [hidden, hidden], of what it puts out, with a mean diagonal of 1, where it
    runs; those of `layers` on the CPU, where codes are chosen."""

    block: torch.Tensor
    layers: dict[str, torch.Tensor]

    def of(self, inner: str) -> torch.Tensor | None:
        """A layer's, as `refine` takes it; None for one that no gradient reached."""
        return self.layers.get(inner)


class OutputCurvatures:
    """The curvatures of all blocks, found from the last one on. A context manager.

    They lie in a temporary file in `directory`: of a model of many blocks they are gigabytes, and each is
    asked for once.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept = Activations(0, directory, torch.float32)
        self._where: dict[tuple[int, str], int] = {}
        self._stream: BlockStream | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._outs: dict[str, int] = {}

    def __enter__(self) -> OutputCurvatures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.close()

    def gather(
        self, stream: BlockStream, batches: Sequence[torch.Tensor], *, memory: int, on_event: OnEvent
    ) -> None:
        """Runs the model forward and backward over some of the batches, evenly spaced: 32768 tokens."""
        self._stream = stream
        count = min(max(_TOKENS // max(batches[0].numel(), 1), 1), len(batches))
        some = [batches[number * len(batches) // count] for number in range(count)]
        loss = sampled_likelihood(0)
        backward(stream, some, loss, self, memory=memory, directory=self._directory, on_event=on_event)

    def begin(self, index: int, block: nn.Module, inputs: Sequence[torch.Tensor]) -> Sequence[str]:
        """Of the backward pass: asks for all linear layers, and the block itself."""
        assert self._stream is not None  # noqa: S101 - `gather` set it
        self._sums.clear()
        return ["", *(layer.inner for group in self._stream.groups(index) for layer in group)]

    def see(self, inner: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Of the backward pass."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        found = output_blocks(rows, SIZE if inner else rows.shape[1])
        self._outs[inner] = rows.shape[1]
        self._sums[inner] = self._sums[inner].add_(found) if inner in self._sums else found

    def end(self, index: int, block: nn.Module) -> None:
        """Of the backward pass: keeps the block's matrices."""
        for inner, sums in self._sums.items():
            self._where[index, inner] = len(self._kept)
            self._kept.append(usable_outputs(sums, _DAMP, self._outs[inner]).cpu())
        self._sums.clear()

    def of_block(self, index: int) -> BlockCurvature:
        """The curvatures of a block that was gone through."""
        assert self._stream is not None  # noqa: S101 - `gather` set it
        found = {inner: self._kept[where] for (at, inner), where in self._where.items() if at == index}
        return BlockCurvature(found.pop("")[0].to(self._stream.device), found)
