"""The model one block at a time: weights come from the checkpoint when their turn comes, and go again.

The model's own forward runs over a shell whose blocks only pass their input on. So masks, positions and
whatever else the architecture hands to a block are transformers' own, and nothing is written twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.modeling.architectures import architecture_of
from qexport.modeling.skeleton import Skeleton, set_parameters

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """The forward pass has come to the place where it should end."""


class _PassThrough(nn.Module):
    """Stands where a block stood: keeps what it was called with, and passes the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._stand_in_for = [block]  # in a list, so that it is no submodule
        self.call: Call | None = None
        self.received: torch.Tensor | None = None
        self.result: torch.Tensor | None = None
        self.stop = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stand_in_for"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.received, self.call = hidden_states, (args, kwargs)
        if self.stop:
            raise _Reached
        return hidden_states if self.result is None else self.result


class BlockStream:
    """Runs token batches through a checkpoint's model block by block, in `dtype`."""

    def __init__(
        self, skeleton: Skeleton, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32
    ) -> None:
        self._skeleton, self._checkpoint, self._dtype = skeleton, checkpoint, dtype
        self.architecture = architecture_of(skeleton.model_type)
        self._owner_name, _, self._list_name = self.architecture.blocks.rpartition(".")
        self._blocks: nn.ModuleList = skeleton.model.get_submodule(self.architecture.blocks)
        self._calls: dict[tuple[int, ...], list[Call]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def block_name(self, index: int) -> str:
        """Full name of a block, e.g. model.layers.3."""
        return f"{self.architecture.blocks}.{index}"

    @contextlib.contextmanager
    def _loaded(self, names: list[str], prefix: str, module: nn.Module) -> Iterator[nn.Module]:
        empty = {name: value for name, value in module.state_dict().items() if name in names}
        tie = self._checkpoint.tie
        try:
            for name in names:
                if tie and prefix + name == tie.head:
                    value = module.get_parameter(tie.embedding).data
                else:
                    value = self._checkpoint.read(prefix + name)
                if value.is_floating_point():
                    value = value.to(self._dtype)
                set_parameters(module, {name: value})
            yield module
        finally:
            set_parameters(module, empty)

    def _outer(self, *, with_head: bool) -> contextlib.AbstractContextManager[nn.Module]:
        """Everything outside the blocks: embeddings, final norm and, when wanted, the output head."""
        model = self._skeleton.model
        left_out = [self.architecture.blocks + "."]
        if not with_head and self._skeleton.head_name:
            left_out.append(self._skeleton.head_name + ".")
        names = [name for name in model.state_dict() if not name.startswith(tuple(left_out))]
        return self._loaded(names, "", model)

    @contextlib.contextmanager
    def _shell(self) -> Iterator[list[_PassThrough]]:
        owner = self._skeleton.model.get_submodule(self._owner_name)
        passes = [_PassThrough(block) for block in self._blocks]
        setattr(owner, self._list_name, nn.ModuleList(passes))
        try:
            yield passes
        finally:
            setattr(owner, self._list_name, self._blocks)

    @torch.no_grad()
    def embed(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Token ids [n, length] each -> hidden states [n, length, hidden] before the first block."""
        embedded = []
        with self._outer(with_head=False), self._shell() as passes:
            passes[-1].stop = True
            for tokens in batches:
                with contextlib.suppress(_Reached):
                    self._skeleton.model(input_ids=tokens, use_cache=False)
                assert passes[0].received is not None  # noqa: S101 - the shell has run
                embedded.append(passes[0].received)
                self._calls[tuple(tokens.shape)] = [p.call for p in passes if p.call is not None]
        return embedded

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights, for as long as the context lasts."""
        prefix = self.block_name(index) + "."
        block = self._blocks[index]
        with self._loaded(list(block.state_dict()), prefix, block):
            yield block

    @torch.no_grad()
    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [n, length, hidden] through a block that is loaded; batches as given to `embed`."""
        args, kwargs = self._calls[tuple(hidden.shape[:2])][index]
        out = self._blocks[index](hidden, *args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def run_until(self, index: int, hidden: torch.Tensor, inner: str) -> torch.Tensor:
        """The input [n, length, in] of the block's inner layer named `inner`; the rest is not run."""
        received: list[torch.Tensor] = []

        def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            received.append(args[0].detach())
            raise _Reached

        hook = self._blocks[index].get_submodule(inner).register_forward_pre_hook(stop)
        try:
            with contextlib.suppress(_Reached):
                self.run(index, hidden)
        finally:
            hook.remove()
        return received[0]

    @torch.no_grad()
    def logits(self, batches: list[torch.Tensor], hidden: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Final hidden states -> logits [n, length, vocabulary], a batch at a time."""
        with self._outer(with_head=True), self._shell() as passes:
            for tokens, final in zip(batches, hidden, strict=True):
                passes[-1].result = final
                yield self._skeleton.model(input_ids=tokens, use_cache=False).logits
