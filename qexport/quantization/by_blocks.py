"""Calibrated methods: the model block by block, read once for all outputs that are wanted of it.

What a layer's codes are fitted to depends on the effort. Those that do not follow take the inputs that the
full-precision model has there: gathered in one run a block, and shared by all such outputs. Those that follow
have hidden states of their own, and every layer makes up for what those before it became. Embeddings are the
exception: where they become codes too, the first block still sees them in full.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qexport.calibrate.cross import CrossMoment
from qexport.calibrate.hessian import InputStatistics, mean_abs
from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import first_of
from qexport.events import Advanced, Noted, OnEvent
from qexport.grids.grid import Grid
from qexport.methods import Prepared, Solving
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream, Layer, is_expert, set_weight, weight_of
from qexport.modeling.calibration import CalibrationData
from qexport.modeling.folding import Fold, apply_fold
from qexport.modeling.skeleton import Skeleton
from qexport.quantization.data_free import Write
from qexport.quantization.fidelity import tensor_error
from qexport.quantization.output_curvature import OutputCurvatures
from qexport.quantization.tuning import Cost, divergence, tune_block, weighed_error
from qexport.results import TensorError
from qexport.solvers.awq import search_awq_scales
from qexport.specs import GptqSpec

_BATCH_TOKENS = 2048  # tokens that go through a block at once
_LOGITS = 1 << 27  # values of a batch's: half a gigabyte each time they are copied
_ROUNDED = 5  # bits up to which what a weight loses by being rounded to bf16 is nothing beside its own error
_STORES_A_BLOCK = 4  # of a dense block's layers, by their inputs
_TOKENS_AN_INPUT = 10  # from which on a Hessian's directions are all seen several times

Group = tuple[Layer, ...]


class BlockPlan(Protocol):
    """What is asked of a plan. Layers are called by their names on disk, without `.weight`."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The model."""

    @property
    def skeleton(self) -> Skeleton:
        """Its modules, bound to the checkpoint."""

    @property
    def method(self) -> Solving:
        """How codes are chosen."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """[out, in] of the layers."""

    @property
    def grids(self) -> Mapping[str, Grid]:
        """The layers that become codes; those outside the blocks are left alone here."""

    @property
    def weights(self) -> Collection[str]:
        """Names of the tensors that become codes."""

    def layer_tensors(self, module: str, codes: Any) -> dict[str, torch.Tensor]:
        """What to write of a solved layer."""


@dataclass
class _Remarks:
    """What is to be said once, at the end."""

    unseen: dict[str, None] = field(default_factory=dict)  # experts that no token chose
    scarce: dict[str, None] = field(default_factory=dict)  # those fewer tokens chose than they have inputs
    damped: dict[str, float] = field(default_factory=dict)


@dataclass
class Lane:
    """One output: a plan, what writes its tensors, and what came of it.

    `errors` are those of the layers as they were solved, in that order. `rewritten` names the tensors, on
    disk, that are no codes and had to change: norms that took AWQ's scales, or that were tuned. They are
    written too.
    """

    plan: BlockPlan
    write: Write
    errors: list[TensorError] = field(default_factory=list)
    rewritten: set[str] = field(default_factory=set)
    hidden: Activations | None = None  # its own, once they differ from the full model's

    @property
    def rounded(self) -> bool:
        """Whether its passes may multiply in bf16: not those that follow what codes of many bits do to later
        layers, which bf16 would hide."""
        return not self.plan.method.follows or all(grid.bits <= _ROUNDED for grid in self.plan.grids.values())

    def chosen(self, group: Group) -> Group:
        """The layers of a group that become codes."""
        return tuple(layer for layer in group if layer.name in self.plan.grids)


@dataclass
class _Inputs:
    """What is known of the inputs of a group of layers; `seen` None where no token came by."""

    seen: InputStatistics | None
    cross: CrossMoment | None = None
    scales: torch.Tensor | None = None  # that the inputs have been divided by since


@dataclass
class _FullBlock:
    """The full model at one block: hidden states `before` and `after` it (the same store where none looks at
    both), statistics of its layers' inputs and, batch by batch, those inputs themselves."""

    before: Activations
    after: Activations
    seen: dict[str, InputStatistics] = field(default_factory=dict)
    inputs: dict[str, Activations] = field(default_factory=dict)


def stages(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of a block whose inputs are collected in one run: those that run side by side."""
    # the experts of a block are one place
    places = [re.sub(r"(?<=\.)\d+(?=\.)", "*", group[0].inner) for group in groups]
    together = groupby(zip(places, groups, strict=True), key=lambda pair: pair[0])
    return [[group for _, group in stage] for _, stage in together]


@dataclass
class BlockQuantizer:
    """Runs plans of one model over its calibration windows.

    Holds one block and a copy of it, its statistics, and `memory` bytes of hidden states; the rest of these
    lies in a temporary file in `directory`.
    """

    lanes: Sequence[Lane]
    data: CalibrationData
    memory: int
    directory: Path
    on_event: OnEvent
    _remarks: _Remarks = field(default_factory=_Remarks)

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """Token ids [n, length] that go through a block at once."""
        windows = self.data.windows
        return list(torch.split(windows, max(_BATCH_TOKENS // windows.shape[1], 1)))

    def run(self) -> None:
        """Solves every layer of every block for each lane, and writes it.

        Raises NonFiniteError that names the layer whose inputs are not finite.
        """
        self._note_few_tokens()
        # what a lane writes does not depend on those that go with it
        for rounded in (True, False):
            if lanes := [lane for lane in self.lanes if lane.rounded is rounded]:
                self._pass(lanes, rounded=rounded)
        self._tell()

    def _pass(self, lanes: Sequence[Lane], *, rounded: bool) -> None:
        """Once through the model."""
        plan = lanes[0].plan
        stream = BlockStream(plan.skeleton, plan.checkpoint, rounded=rounded)
        batches = self.batches
        following = [lane for lane in lanes if lane.plan.method.follows]
        # the full model's before a block and, if it is followed, after it and within it; and the lanes' own
        share = self.memory // (len(following) + (3 if following else 1))
        with ExitStack() as stack:
            curvatures = None
            if any(lane.plan.method.weighs_outputs for lane in lanes):
                curvatures = stack.enter_context(OutputCurvatures(self.directory))
                curvatures.gather(stream, batches, memory=self.memory, on_event=self.on_event)
            before = stack.enter_context(Activations(share, self.directory))
            before.extend(stream.embeddings(batches))
            after = stack.enter_context(Activations(share, self.directory)) if following else before
            for index in range(len(stream)):
                with stream.block(index) as block, ExitStack() as within:
                    full = _FullBlock(before, after)
                    for inner in self._compared(following, stream, index):
                        store = Activations(share // _STORES_A_BLOCK, self.directory)
                        full.inputs[inner] = within.enter_context(store)
                    self._run_full(lanes, stream, index, full)
                    for lane in lanes:
                        one = _OneBlock(self, lane, stream, index, block, full, curvatures)
                        one.solve()
                        if lane.plan.method.follows:
                            if lane.hidden is None:
                                lane.hidden = stack.enter_context(Activations(share, self.directory))
                            one.propagate(lane.hidden)
                        del one
                before, after = after, before

    @staticmethod
    def _compared(following: Sequence[Lane], stream: BlockStream, index: int) -> list[str]:
        """The layers whose inputs following lanes compare with the full model's: the first of each group.

        Before the first block's first layers nothing differs; which tokens an expert sees may.
        """
        found: dict[str, None] = {}
        for lane in following:
            groups = [chosen for group in stream.groups(index) if (chosen := lane.chosen(group))]
            places = stages(groups)[1 if index == 0 else 0 :]
            found |= {group[0].inner: None for stage in places for group in stage}
        return [inner for inner in found if not is_expert(inner)]

    def _run_full(self, lanes: Sequence[Lane], stream: BlockStream, index: int, full: _FullBlock) -> None:
        """Takes the full model's hidden states through a block, once for all that lanes want to see of it."""
        wanted: dict[str, None] = {}
        for lane in lanes:
            method = lane.plan.method
            if not method.follows:
                groups = stream.groups(index)
                wanted |= {chosen[0].inner: None for group in groups if (chosen := lane.chosen(group))}
            if method.scaling:
                wanted |= {
                    first.inner: None for _, pairs in self.folds(stream, index, lane) for _, first in pairs
                }
        add = _adding(full.seen)

        def see(inner: str, x: torch.Tensor) -> None:
            if inner in wanted:
                add(inner, x)
            if inner in full.inputs:
                full.inputs[inner].append(x)

        looked_at = list(wanted | dict.fromkeys(full.inputs))
        for number in range(len(full.before)):
            out = stream.inputs(index, full.before[number], looked_at, see, stop=False)
            assert out is not None  # noqa: S101 - it ran to the end
            _put(full.after, number, out)

    def folds(
        self, stream: BlockStream, index: int, lane: Lane
    ) -> list[tuple[Fold, list[tuple[Layer, Layer]]]]:
        """The folds of a block whose targets become codes: those targets, each with the layer whose inputs
        are looked at in its stead."""
        groups = stream.groups(index)
        first = {layer.inner: (layer, group[0]) for group in groups for layer in group}
        folds = []
        for fold in stream.folds(index):
            pairs = [first[inner] for inner in fold.targets if inner in first]
            if pairs := [pair for pair in pairs if pair[0].name in lane.plan.grids]:
                # what was gathered is that of the first one of a group that becomes codes
                folds.append((fold, [(layer, self._first_chosen(groups, layer, lane)) for layer, _ in pairs]))
        return folds

    @staticmethod
    def _first_chosen(groups: Sequence[Group], layer: Layer, lane: Lane) -> Layer:
        return next(lane.chosen(group)[0] for group in groups if layer in group)

    def remark_inputs(self, seen: InputStatistics | None, group: Group) -> None:
        """Keeps in mind which layers saw too few tokens."""
        if seen is None:
            self._remarks.unseen |= {layer.name: None for layer in group}
        elif seen.too_few and self.data.tokens >= seen.inputs:  # of too few in all a note was made
            self._remarks.scarce |= {layer.name: None for layer in group}

    def remark_damping(self, layer: Layer, spec: object, prepared: Prepared) -> None:
        """Keeps in mind which Hessians were damped more than was asked for."""
        curvature = prepared.curvature
        if curvature and isinstance(spec, GptqSpec) and curvature.damp > spec.damp:
            self._remarks.damped[layer.name] = curvature.damp

    def _note_few_tokens(self) -> None:
        """Hessians of fewer tokens than inputs are not of full rank: the codes fit those few tokens."""
        inputs = max(lane.plan.shapes[name][1] for lane in self.lanes for name in lane.plan.grids)
        if self.data.tokens < inputs:
            self.on_event(
                Noted(
                    f"{self.data.tokens} calibration tokens are too few for layers of {inputs} inputs; "
                    f"at least {inputs} are wanted, better {_TOKENS_AN_INPUT * inputs}: "
                    "--samples, --sequence-length"
                )
            )

    def _tell(self) -> None:
        remarks = self._remarks
        for names, what in (
            (remarks.unseen, "saw no token and were rounded"),
            (remarks.scarce, "saw fewer tokens than they have inputs"),
        ):
            if names:
                told = first_of(list(names), 2)
                self.on_event(Noted(f"{len(names)} layers of experts {what} ({told}); more text helps"))
        if remarks.damped:
            name, damp = max(remarks.damped.items(), key=lambda item: item[1])
            self.on_event(
                Noted(
                    f"the Hessians of {len(remarks.damped)} layers were not positive definite and were "
                    f"damped more, {name} by {damp:g} of its mean diagonal"
                )
            )


class _OneBlock:
    """One lane's work on one block: on a copy, so that other lanes find the block as it was."""

    def __init__(
        self,
        owner: BlockQuantizer,
        lane: Lane,
        stream: BlockStream,
        index: int,
        block: nn.Module,
        full: _FullBlock,
        curvatures: OutputCurvatures | None,
    ) -> None:
        self._owner, self._lane, self._stream, self._index = owner, lane, stream, index
        self._full = full
        self._block = copy.deepcopy(block)
        self._method = lane.plan.method
        self._curvature = None
        if curvatures and self._method.weighs_outputs:
            self._curvature = curvatures.of_block(index)
        self._divided: dict[str, torch.Tensor] = {}  # layer -> what its inputs have been divided by
        self._solved: dict[str, tuple[Layer, Any]] = {}

    @property
    def _now(self) -> Activations:
        """The lane's own hidden states before the block."""
        return self._full.before if self._lane.hidden is None else self._lane.hidden

    def solve(self) -> None:
        """Chooses all codes of the block, and writes them and what had to change for them."""
        groups = [
            chosen for group in self._stream.groups(self._index) if (chosen := self._lane.chosen(group))
        ]
        moved = self._scale() if self._method.scaling else set()
        if self._method.follows:
            for stage in stages(groups):
                for group, inputs in zip(stage, self._following(stage), strict=True):
                    self._solve_group(group, inputs)
        else:
            for group in groups:
                inner = group[0].inner
                self._solve_group(group, _Inputs(self._full.seen.get(inner), None, self._divided.get(inner)))
        if self._curvature:
            moved |= self._tune()
        for layer, codes in self._solved.values():
            for name, tensor in self._lane.plan.layer_tensors(layer.name, codes).items():
                self._lane.write(name, tensor)
        self._rewrite(moved)

    def propagate(self, hidden: Activations) -> None:
        """Takes the lane's hidden states through the block as it became."""
        before = hidden if len(hidden) else self._full.before
        for number in range(len(before)):
            _put(hidden, number, self._stream.run(self._index, before[number], self._block))

    def _following(self, stage: Sequence[Group]) -> list[_Inputs]:
        """What the layers of a stage see now, and how that differs from what the full model sees."""
        seen: dict[str, InputStatistics] = {}
        crosses: dict[str, CrossMoment] = {}
        wanted = [group[0].inner for group in stage]
        add = _adding(seen)
        for number in range(len(self._now)):

            def see(inner: str, x: torch.Tensor, number: int = number) -> None:
                add(inner, x)
                if inner in self._full.inputs:
                    divided, then = self._divided.get(inner), self._full.inputs[inner][number]
                    cross = crosses.setdefault(inner, CrossMoment(x.shape[-1]))
                    cross.add(then if divided is None else then / divided, x)

            self._stream.inputs(self._index, self._now[number], wanted, see, block=self._block)
        return [_Inputs(seen.pop(inner, None), crosses.pop(inner, None)) for inner in wanted]

    def _solve_group(self, group: Group, inputs: _Inputs) -> None:
        lane, method = self._lane, self._method
        hessian = self._hessian(inputs, group)
        cross = None
        if inputs.seen and inputs.cross and not inputs.seen.too_few:
            cross = inputs.cross.mean()
        prepared: dict[int, Prepared] = {}
        for layer in group:
            grid = lane.plan.grids[layer.name]
            weight = weight_of(self._block, layer)
            width = grid.group_width(weight.shape[1])
            if width not in prepared:
                prepared[width] = method.prepare(hessian, grid, cross)
                self._owner.remark_damping(layer, method.spec, prepared[width])
            target = method.target(weight, prepared[width])
            outputs = self._curvature.of(layer.inner) if self._curvature else None
            codes = method.solve(target, prepared[width], grid, outputs)
            decoded = grid.decode(codes)
            lane.errors.append(
                tensor_error(layer.name, grid.bits, target, decoded, hessian if inputs.seen else None)
            )
            set_weight(self._block, layer, decoded)
            self._solved[layer.inner] = layer, codes
            self._owner.on_event(Advanced(1, layer.name))

    def _hessian(self, inputs: _Inputs, group: Group) -> torch.Tensor:
        """Mean of x x^T; zeros, under which every solver rounds, where no token came by."""
        self._owner.remark_inputs(inputs.seen, group)
        if inputs.seen is None:
            count = weight_of(self._block, group[0]).shape[1]
            return torch.zeros(count, count)
        found = inputs.seen.mean(group[0].name)
        if inputs.scales is not None:
            found = found / inputs.scales[:, None] / inputs.scales
        return found

    def _scale(self) -> set[str]:
        """AWQ's first half: moves scales through the pairs of the block, before any code is chosen."""
        spec = self._method.scaling
        assert spec is not None  # noqa: S101 - the caller asked
        changed: set[str] = set()
        for fold, pairs in self._owner.folds(self._stream, self._index, self._lane):
            shared = self._full.seen
            seen = [(layer, shared[first.inner]) for layer, first in pairs if first.inner in shared]
            if not seen:
                continue
            means = {id(found): found.mean(layer.name) for layer, found in seen}  # once for all that share it
            scales = search_awq_scales(
                [(weight_of(self._block, layer), means[id(found)]) for layer, found in seen],
                mean_abs([found for _, found in seen]),
                # where overrides differ, the layer of the fewest bits needs the scales most
                min((self._lane.plan.grids[layer.name] for layer, _ in seen), key=lambda grid: grid.bits),
                points=spec.grid_points,
            )
            if bool((scales != 1).any()):
                apply_fold(self._block, fold, scales)
                for inner in fold.targets:
                    self._divided[inner] = self._divided.get(inner, 1.0) * scales
                changed |= {f"{fold.source}.{leaf}" for leaf in ("weight", "bias")}
                changed |= {f"{target}.weight" for target in fold.targets}
        self._round_changed(changed)
        return changed

    def _tune(self) -> set[str]:
        """Scales and norms by gradients, for what the block puts out; the inner names of what changed."""
        assert self._curvature is not None  # noqa: S101 - the caller asked
        names = self._stream.stored_names(self._index)
        free = [inner for inner in names if names[inner] not in self._lane.plan.weights]
        grids = {inner: self._lane.plan.grids[layer.name] for inner, (layer, _) in self._solved.items()}
        with self._cost() as cost:
            tuned = tune_block(
                self._stream,
                self._index,
                self._block,
                solved={
                    inner: (layer, codes, grids[inner]) for inner, (layer, codes) in self._solved.items()
                },
                free=free,
                wanted=self._full.after,
                now=self._now,
                cost=cost,
                keep=lambda inner, value: value.to(self._lane.plan.checkpoint.info(names[inner]).dtype),
            )
        for inner, codes in tuned.codes.items():
            self._solved[inner] = self._solved[inner][0], codes
        return tuned.changed

    @contextmanager
    def _cost(self) -> Iterator[Cost]:
        """By the Fisher's curvature; the last block's by the divergence itself, if logits are not many."""
        assert self._curvature is not None  # noqa: S101 - the caller asked
        vocabulary = self._lane.plan.skeleton.config.get_text_config().vocab_size
        batches = self._owner.batches
        if self._index + 1 < len(self._stream) or batches[0].numel() * vocabulary > _LOGITS:
            yield weighed_error(self._curvature.block)
            return
        with self._stream.head() as logits:
            yield divergence(batches, logits)

    def _round_changed(self, changed: Iterable[str]) -> None:
        """What is no codes is written in its own dtype: the block goes on with that."""
        for inner, _, stored in self._plain(changed):
            parameter = self._block.get_parameter(inner)
            parameter.data = stored.to(parameter.dtype)

    def _rewrite(self, changed: Iterable[str]) -> None:
        for _, name, stored in self._plain(changed):
            self._lane.write(name, stored)
            self._lane.rewritten.add(name)

    def _plain(self, changed: Iterable[str]) -> Iterable[tuple[str, str, torch.Tensor]]:
        """Inner name, name on disk and value of those that are stored as they are."""
        names = self._stream.stored_names(self._index)
        for inner in sorted(set(changed) & names.keys()):
            name = names[inner]
            if name not in self._lane.plan.weights:
                value = self._block.get_parameter(inner).data
                yield inner, name, value.to(self._lane.plan.checkpoint.info(name).dtype)


def _put(hidden: Activations, number: int, batch: torch.Tensor) -> None:
    """A batch in its place, the first time after those before it."""
    if number < len(hidden):
        hidden[number] = batch
    else:
        hidden.append(batch)


def _adding(found: dict[str, InputStatistics]) -> Any:
    """Adds what it is shown to the statistics of that layer."""

    def see(inner: str, x: torch.Tensor) -> None:
        if inner not in found:
            found[inner] = InputStatistics(x.shape[-1])
        found[inner].add(x)

    return see
