"""The model one block at a time: weights come from the checkpoint when their turn comes, and go again.

The model's own forward runs over a shell whose blocks only pass their input on. So masks, positions and
whatever else the architecture hands to a block are transformers' own, and nothing is written twice.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.devices import CPU
from qexport.grids.products import LinearInBf16
from qexport.heap import trim
from qexport.modeling.architectures import Architecture, architecture_of
from qexport.modeling.folding import Fold, expand, folds_of
from qexport.modeling.places import Place, read_places
from qexport.modeling.skeleton import Skeleton, is_conv1d, set_parameters

_EXPERTS = re.compile(r"^(.*\.experts)\.\d+\.")

Call = tuple[tuple[Any, ...], dict[str, Any]]
Block = Callable[..., Any]  # hidden states, and what else the architecture hands to a block -> hidden states


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: its path in the block, its module's full name on disk, and whether its
    weight lies as [in, out] (Conv1D)."""

    inner: str
    name: str
    transposed: bool


def weight_of(block: nn.Module, layer: Layer) -> torch.Tensor:
    """The layer's weight [out, in] in a loaded block, in fp32 and on the CPU, where codes are chosen; its own
    memory where it is both already."""
    weight = block.get_parameter(f"{layer.inner}.weight").data.cpu().float()
    return weight.T if layer.transposed else weight


def set_weight(block: nn.Module, layer: Layer, weight: torch.Tensor) -> None:
    """Puts `weight` [out, in] in the place of the layer's, on the device and in the dtype that that has."""
    parameter = block.get_parameter(f"{layer.inner}.weight")
    weight = weight.T if layer.transposed else weight
    parameter.data = weight.to(parameter.device, parameter.dtype).contiguous()


def layer_names(skeleton: Skeleton) -> frozenset[str]:
    """Names on disk of all linear layers that have a place in their architecture's row.

    Raises UnsupportedModelError for a model without a row.
    """
    return frozenset(itertools.chain.from_iterable(fused_layers(skeleton)))


def fused_layers(skeleton: Skeleton) -> list[tuple[str, ...]]:
    """The layers of `layer_names`, in the sets that runtimes make one matrix of, or one kernel: those that
    share an input, q with k and v, gate with up, and all experts of a block.

    Raises UnsupportedModelError for a model without a row.
    """
    row = architecture_of(skeleton.model_type)
    blocks: nn.ModuleList = skeleton.model.get_submodule(row.blocks)
    found: dict[str, list[str]] = {}
    for index, block in enumerate(blocks):
        for group in _groups(block, _block_places(skeleton, row, index, block), row):
            names = [layer.name for layer in group]
            experts = _EXPERTS.match(names[0])
            found.setdefault(experts[1] if experts else names[0], []).extend(names)
    return [tuple(names) for names in found.values()]


def _block_places(skeleton: Skeleton, row: Architecture, index: int, block: nn.Module) -> dict[str, Place]:
    return {inner: skeleton.places[f"{row.blocks}.{index}.{inner}"] for inner in block.state_dict()}


def _groups(block: nn.Module, places: dict[str, Place], row: Architecture) -> list[tuple[Layer, ...]]:
    modules = dict(block.named_modules())
    groups = []
    for patterns in row.linears:
        # the n-th names of all patterns share an input: of one expert, or the only ones
        present = [names for pattern in patterns if (names := expand(pattern, modules))]
        for inners in zip(*present, strict=True):
            group = tuple(
                Layer(inner, place.name.removesuffix(".weight"), is_conv1d(modules[inner]))
                for inner in inners
                if (place := places[f"{inner}.weight"]).expert is None
            )
            if group:
                groups.append(group)
    return groups


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """The forward pass has come to the place where it should end."""


class _Unpacked(Exception):  # noqa: N818 - a signal, not an error
    """The model took the first of what a block returned: its blocks return tuples."""


class _PassThrough(nn.Module):
    """Stands where a block stood: keeps what it was called with, and passes the hidden states on."""

    def __init__(self, block: nn.Module, *, tuples: bool) -> None:
        super().__init__()
        self._stand_in_for = [block]  # in a list, so that it is no submodule
        self._tuples = tuples
        self.call: Call | None = None
        self.received: torch.Tensor | None = None
        self.result: torch.Tensor | None = None
        self.stop = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stand_in_for"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dim() != 3:  # no longer [n, length, hidden]
            raise _Unpacked
        self.received, self.call = hidden_states, (args, kwargs)
        if self.stop:
            raise _Reached
        result = hidden_states if self.result is None else self.result
        return (result,) if self._tuples else result


class BlockStream:
    """Runs token batches through a checkpoint's model block by block, in `dtype` on `device`.

    There lie the weights at hand and the buffers beside them, for as long as a context lasts, and what it
    hands out: hidden states, inputs of layers, logits. Token ids may come from anywhere. With `rounded`,
    `run` and `inputs` let linear layers multiply in bf16 where that is faster.

    Raises UnsupportedModelError for a model without a row in architectures.py.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        *,
        rounded: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self.architecture = architecture_of(skeleton.model_type)
        self._skeleton, self._checkpoint, self._dtype = skeleton.bound(checkpoint), checkpoint, dtype
        self._owner_name, _, self._list_name = self.architecture.blocks.rpartition(".")
        self._blocks: nn.ModuleList = skeleton.model.get_submodule(self.architecture.blocks)
        self._rounded = rounded
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._tuples = False  # whether the blocks return tuples; the first run tells

    def __len__(self) -> int:
        return len(self._blocks)

    def block_name(self, index: int) -> str:
        """Full name of a block on disk, e.g. model.layers.3."""
        for inner, name in self.stored_names(index).items():
            if name.endswith(f".{inner}"):
                return name.removesuffix(f".{inner}")
        return f"{self.architecture.blocks}.{index}"

    def _places(self, index: int) -> dict[str, Place]:
        # not the model's own list: while its head or embeddings run, that holds stand-ins
        return _block_places(self._skeleton, self.architecture, index, self._blocks[index])

    def stored_names(self, index: int) -> dict[str, str]:
        """Name on disk of each tensor of a block, by its key in the block's state_dict.

        Experts that lie fused on disk share a name.
        """
        return {inner: place.name for inner, place in self._places(index).items()}

    def groups(self, index: int) -> list[tuple[Layer, ...]]:
        """A block's linear layers, grouped by common input, in the order in which the block runs them.

        Each expert has groups of its own. Layers that lie fused on disk are left out.
        """
        return _groups(self._blocks[index], self._places(index), self.architecture)

    def folds(self, index: int) -> list[Fold]:
        """The pairs of a block through which a scale can move, each expert's of its own.

        Left out are those that would change experts which lie fused on disk.
        """
        fused = {
            inner.removesuffix(".weight")
            for inner, place in self._places(index).items()
            if place.expert is not None
        }
        folds = folds_of(self._blocks[index], self.architecture, self._skeleton.config)
        return [fold for fold in folds if not fused & {fold.source, *fold.targets}]

    @contextlib.contextmanager
    def _loaded(
        self, places: dict[str, Place], module: nn.Module, without: str | None = None
    ) -> Iterator[nn.Module]:
        """`module` with its tensors; buffers that start with `without` stay where they are."""
        empty = {name: value for name, value in module.state_dict().items() if name in places}
        # those that no checkpoint holds, rotary tables mostly
        computed = [
            name
            for name, _ in module.named_buffers(remove_duplicate=False)
            if name not in empty and not (without and name.startswith(without))
        ]
        try:
            _move_buffers(module, computed, self.device)
            for name, value in read_places(self._checkpoint, places, self._dtype, self.device):
                set_parameters(module, {name: value})
            yield module
        finally:
            set_parameters(module, empty)
            _move_buffers(module, computed, CPU)  # as they became: some follow the length of the input

    def _outer(self, *, with_head: bool) -> contextlib.AbstractContextManager[nn.Module]:
        """Everything outside the blocks: embeddings, final norm and, when wanted, the output head."""
        blocks = self.architecture.blocks + "."
        left_out = [blocks]
        if not with_head and self._skeleton.head_name:
            left_out.append(self._skeleton.head_name + ".")
        places = {
            name: place
            for name, place in self._skeleton.places.items()
            if not name.startswith(tuple(left_out))
        }
        return self._loaded(places, self._skeleton.model, blocks)

    @contextlib.contextmanager
    def _shell(self) -> Iterator[list[_PassThrough]]:
        owner = self._skeleton.model.get_submodule(self._owner_name)
        passes = [_PassThrough(block, tuples=self._tuples) for block in self._blocks]
        setattr(owner, self._list_name, nn.ModuleList(passes))
        try:
            yield passes
        finally:
            setattr(owner, self._list_name, self._blocks)

    def embed(self, batches: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Token ids [n, length] each -> hidden states [n, length, hidden] before the first block."""
        return list(self.embeddings(batches))

    @torch.no_grad()
    def embeddings(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """As `embed`, a batch at a time."""
        with self._outer(with_head=False):
            for tokens in batches:
                try:
                    yield self._embedded(tokens)
                except _Unpacked:
                    self._tuples = True
                    yield self._embedded(tokens)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        with self._shell() as passes:
            passes[-1].stop = True
            with contextlib.suppress(_Reached):
                self._skeleton.model(input_ids=tokens.to(self.device), use_cache=False)
            assert passes[0].received is not None  # noqa: S101 - the shell has run
            self._calls[tuple(tokens.shape)] = [p.call for p in passes if p.call is not None]
            return passes[0].received

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights, for as long as the context lasts. Memory that is free then goes back to
        the system."""
        block = self._blocks[index]
        with self._loaded(self._places(index), block):
            yield block
        trim()

    @torch.no_grad()
    def run(self, index: int, hidden: torch.Tensor, block: nn.Module | None = None) -> torch.Tensor:
        """`hidden` [n, length, hidden] through a block that is loaded; batches as given to `embed`.

        `block` is one that takes its place, a changed copy mostly.
        """
        with LinearInBf16() if self._rounded else contextlib.nullcontext():
            return self.forward(index, hidden, block)

    def forward(self, index: int, hidden: torch.Tensor, block: Block | None = None) -> torch.Tensor:
        """As `run`; gradients flow to `hidden` where they are on. `block` may be any function like it."""
        args, kwargs = self._calls[tuple(hidden.shape[:2])][index]
        out = (block or self._blocks[index])(hidden, *args, **kwargs)
        self._tuples = isinstance(out, tuple)
        result: torch.Tensor = out[0] if self._tuples else out
        return result

    @torch.no_grad()
    def inputs(
        self,
        index: int,
        hidden: torch.Tensor,
        wanted: Sequence[str],
        see: Callable[[str, torch.Tensor], None],
        stop: bool = True,
        block: nn.Module | None = None,
    ) -> torch.Tensor | None:
        """Runs `hidden` [n, length, hidden] through a loaded block and shows `see` the inner name of each
        wanted layer with its input [..., in].

        An expert's input [tokens, in] holds the tokens that chose it; one that none chose is not shown. With
        `stop` the run ends at the last wanted layer, unless experts are among them. Returns the block's
        output when it ran to the end. `block` as in `run`.
        """
        block, waiting = block or self._blocks[index], set(wanted)
        stop = stop and not any(is_expert(inner) for inner in wanted)

        def hook(inner: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def show(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                see(inner, args[0].detach())
                waiting.discard(inner)
                if stop and not waiting:
                    raise _Reached

            return show

        hooks = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in waiting]
        try:
            return self.run(index, hidden, block)
        except _Reached:
            return None
        finally:
            for handle in hooks:
                handle.remove()

    @contextlib.contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Final norm and output head, loaded: a function of token ids [n, length] and final hidden states
        that gives logits [n, length, vocabulary]; gradients flow to the states where they are on."""
        with self._outer(with_head=True), self._shell() as passes:

            def logits(tokens: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
                passes[-1].result = final
                tokens = tokens.to(self.device)
                found: torch.Tensor = self._skeleton.model(input_ids=tokens, use_cache=False).logits
                return found

            yield logits

    @torch.no_grad()
    def logits(
        self, batches: Iterable[torch.Tensor], hidden: Iterable[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Final hidden states -> logits [n, length, vocabulary], a batch at a time."""
        with self.head() as logits:
            for tokens, final in zip(batches, hidden, strict=True):
                yield logits(tokens, final)


def _move_buffers(module: nn.Module, names: Iterable[str], device: torch.device) -> None:
    set_parameters(module, {name: module.get_buffer(name).to(device) for name in names})


def is_expert(inner: str) -> bool:
    """Whether the layer is one of many experts, any of which may get no token."""
    return any(part.isdigit() for part in inner.split("."))
