"""A backward pass with one block in memory: forward once, keeping what goes into each block; then from the
last block to the first, each is run again with gradients on.

Recomputing a block from its kept input is gradient checkpointing (Chen et al., "Training Deep Nets with
Sublinear Memory Cost", 2016) with a block as the segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream


class Watcher(Protocol):
    """Who sees the backward pass go by. Every block is shown once, the last one first."""

    def begin(self, index: int, block: nn.Module, inputs: Sequence[torch.Tensor]) -> Sequence[str]:
        """A block, loaded, and what goes into it, [n, length, hidden] a batch. Returns the inner names of
        the modules, linear layers mostly, that it wants to see ("" is the block). Its weights may be read,
        not changed."""

    def see(self, inner: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """One batch of a wanted module: input [..., in], and the loss's gradient by its output [..., out].

        An expert's rows are the tokens that chose it; one that none chose is not shown.
        """

    def end(self, index: int, block: nn.Module) -> None:
        """All batches went through the block, which is still loaded."""


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids [n, length] and logits [n, length, vocabulary] -> a number."""


def sampled_likelihood(seed: int) -> Loss:
    """The log-likelihood, in nats summed over all positions, of labels drawn from the model's own
    distribution at each of them.

    The mean square of its gradient is the Fisher information, and that the curvature of KL(model || changed
    model): labels of the text would give the "empirical Fisher", which is not (Kunstner et al., "Limitations
    of the empirical Fisher approximation", 2019, section 2). Draws go by batches in order, set by `seed`.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        chances = logits.float().log_softmax(-1)
        with torch.no_grad():
            # Gumbel's trick would need as many random numbers; multinomial takes rows of a matrix
            drawn = torch.multinomial(chances.flatten(0, -2).exp().cpu(), 1, generator=generator)
        return chances.flatten(0, -2).gather(1, drawn.to(chances.device)).sum()

    return loss


def backward(
    stream: BlockStream,
    batches: Sequence[torch.Tensor],
    loss: Loss,
    watcher: Watcher,
    *,
    forward_only: Sequence[torch.Tensor] = (),
    memory: int,
    directory: Path,
    dtype: torch.dtype = torch.float16,
    on_event: OnEvent = ignore,
) -> None:
    """Runs `loss` over token ids [n, length] a batch, and shows `watcher` the gradients of its layers. What
    goes into a block is shown for the batches of `forward_only` too, after the others; those get none.

    Holds one block; the gradients by one block's outputs, in `memory` bytes and past them in a file; and of
    a batch what autograd keeps of one block. The inputs of all blocks, which alone grow with their number,
    lie in a file in `directory`, as Activations keep `dtype`: reading one is little beside the work on it.
    At the head one row of a batch is worked on at a time, so `loss` sees batches of one row. Raises what
    BlockStream does, and StorageError.
    """
    count, blocks = len(batches) + len(forward_only), len(stream)
    with ExitStack() as stack:
        inputs = stack.enter_context(Activations(0, directory, dtype))
        gradients = stack.enter_context(Activations(memory, directory, dtype))
        on_event(Started("gradients", 2 * blocks, "blocks"))
        inputs.extend(stream.embeddings([*batches, *forward_only]))
        for index in range(blocks):
            with stream.block(index):
                for number in range(count):
                    inputs.append(stream.run(index, inputs[index * count + number]))
            on_event(Advanced(1, stream.block_name(index)))
        with stream.head() as logits:
            for number, tokens in enumerate(batches):
                gradients.append(_head_gradient(tokens, inputs[blocks * count + number], logits, loss))
        for index in reversed(range(blocks)):
            with stream.block(index) as block:
                own = _Part(inputs, index * count, count)
                wanted = watcher.begin(index, block, own)
                with _Watched(block, wanted, watcher.see):
                    for number in range(len(batches)):
                        x = own[number].detach().requires_grad_()
                        with torch.enable_grad():
                            out = stream.forward(index, x)
                        (gradients[number],) = torch.autograd.grad(out, x, gradients[number])
                watcher.end(index, block)
            on_event(Advanced(1, stream.block_name(index)))
        on_event(Finished())


def _head_gradient(
    tokens: torch.Tensor,
    final: torch.Tensor,
    logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loss: Loss,
) -> torch.Tensor:
    """The loss's gradient by the final hidden states [n, length, hidden], a row at a time."""
    rows: list[torch.Tensor] = []
    for row, states in zip(torch.split(tokens, 1), torch.split(final, 1), strict=True):
        states = states.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(row, logits(row, states))
        rows += torch.autograd.grad(value, states)
    return torch.cat(rows)


class _Part(Sequence[torch.Tensor]):
    """Some neighbours of kept batches, read when they are asked for."""

    def __init__(self, kept: Activations, begin: int, count: int) -> None:
        self._kept, self._begin, self._count = kept, begin, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]  # no slices
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._kept[self._begin + index]


class _Watched:
    """While it lasts, the wanted modules of a block show their inputs and their outputs' gradients."""

    def __init__(
        self, block: nn.Module, wanted: Sequence[str], see: Callable[[str, torch.Tensor, torch.Tensor], None]
    ) -> None:
        self._block, self._wanted, self._see = block, wanted, see
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for inner in self._wanted:
            self._handles.append(self._block.get_submodule(inner).register_forward_hook(self._hook(inner)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, inner: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
            x = args[0].detach()
            out = out[0] if isinstance(out, tuple) else out  # of a block itself
            if out.requires_grad:  # not in a forward pass of the watcher's own
                out.register_hook(lambda gradient: self._see(inner, x, gradient.detach()))

        return hook
