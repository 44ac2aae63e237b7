"""Calibrated methods: the model block by block, every layer seeing what those before it became.

Embeddings are the exception: where they become codes too, the first block still sees them in full.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import nn

from qexport.calibrate.hessian import InputStatistics, mean_abs
from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import first_of
from qexport.events import Advanced, Noted, OnEvent
from qexport.grids.grid import Grid
from qexport.methods import Prepared, Solving
from qexport.modeling.blocks import BlockStream, Layer, set_weight, weight_of
from qexport.modeling.calibration import CalibrationData
from qexport.modeling.folding import Fold, apply_fold
from qexport.modeling.skeleton import Skeleton
from qexport.quantization.data_free import Write
from qexport.quantization.fidelity import tensor_error
from qexport.results import TensorError
from qexport.solvers.awq import search_awq_scales
from qexport.specs import GptqSpec

_BATCH_TOKENS = 4096  # tokens that go through a block at once
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

    unseen: list[str] = field(default_factory=list)  # experts that no token chose
    scarce: list[str] = field(default_factory=list)  # those that fewer tokens chose than they have inputs
    damped: dict[str, float] = field(default_factory=dict)


def stages(groups: Sequence[Group], *, one_by_one: bool) -> list[list[Group]]:
    """Groups of a block whose inputs are collected in one run: all, or those that run side by side."""
    if not one_by_one:
        return [list(groups)] if groups else []
    # the experts of a block are one place
    places = [re.sub(r"(?<=\.)\d+(?=\.)", "*", group[0].inner) for group in groups]
    together = groupby(zip(places, groups, strict=True), key=lambda pair: pair[0])
    return [[group for _, group in stage] for _, stage in together]


@dataclass
class BlockQuantizer:
    """Runs one plan over its calibration windows. Holds one block, its statistics and the activations."""

    plan: BlockPlan
    data: CalibrationData
    write: Write
    on_event: OnEvent
    errors: list[TensorError] = field(default_factory=list)
    rewritten: set[str] = field(default_factory=set)
    _remarks: _Remarks = field(default_factory=_Remarks)

    def run(self) -> None:
        """Solves every layer of every block, writes it, and collects its error.

        `rewritten` names the tensors, on disk, that had to change to make up for AWQ's scales; they are
        written too. Raises NonFiniteError that names the layer whose inputs are not finite.
        """
        self._note_few_tokens()
        stream = BlockStream(self.plan.skeleton, self.plan.checkpoint)
        windows = self.data.windows
        batches = list(torch.split(windows, max(_BATCH_TOKENS // windows.shape[1], 1)))
        hidden = stream.embed(batches)
        for index in range(len(stream)):
            with stream.block(index) as block:
                groups = [chosen for group in stream.groups(index) if (chosen := self._chosen(group))]
                if self.plan.method.scaling:
                    self._scale(stream, index, block, hidden)
                spec = self.plan.method.spec
                one_by_one = isinstance(spec, GptqSpec) and spec.true_sequential
                for stage in stages(groups, one_by_one=one_by_one):
                    self._solve(stream, index, block, hidden, stage)
                for number, batch in enumerate(hidden):  # one set of activations, not two
                    hidden[number] = stream.run(index, batch)
        self._tell()

    def _chosen(self, group: Group) -> Group:
        return tuple(layer for layer in group if layer.name in self.plan.grids)

    def _statistics(
        self, stream: BlockStream, index: int, hidden: Sequence[torch.Tensor], layers: Iterable[Layer]
    ) -> dict[str, InputStatistics]:
        """Statistics of the inputs of `layers`, by inner name; an expert that saw no token has none."""
        found: dict[str, InputStatistics] = {}

        def see(inner: str, x: torch.Tensor) -> None:
            if inner not in found:
                found[inner] = InputStatistics(x.shape[-1])
            found[inner].add(x)

        wanted = [layer.inner for layer in layers]
        for batch in hidden:
            stream.inputs(index, batch, wanted, see)
        return found

    def _solve(
        self,
        stream: BlockStream,
        index: int,
        block: nn.Module,
        hidden: Sequence[torch.Tensor],
        stage: Sequence[Group],
    ) -> None:
        method = self.plan.method
        statistics = self._statistics(stream, index, hidden, [group[0] for group in stage])
        for group in stage:
            seen = statistics.pop(group[0].inner, None)
            hessian = self._hessian(seen, block, group)
            prepared: dict[int, Prepared] = {}
            for layer in group:
                grid = self.plan.grids[layer.name]
                weight = weight_of(block, layer)
                width = grid.group_width(weight.shape[1])
                if width not in prepared:
                    prepared[width] = method.prepare(hessian, grid)
                    self._note_damping(layer, prepared[width])
                codes = method.solve(weight, prepared[width], grid)
                decoded = grid.decode(codes)
                self.errors.append(
                    tensor_error(layer.name, grid.bits, weight, decoded, hessian if seen else None)
                )
                set_weight(block, layer, decoded)
                for name, tensor in self.plan.layer_tensors(layer.name, codes).items():
                    self.write(name, tensor)
                self.on_event(Advanced(1, layer.name))

    def _hessian(self, seen: InputStatistics | None, block: nn.Module, group: Group) -> torch.Tensor:
        """Mean of x x^T; zeros, under which every solver rounds, where no token came by."""
        inputs = weight_of(block, group[0]).shape[1]
        if seen is None:
            self._remarks.unseen += [layer.name for layer in group]
            return torch.zeros(inputs, inputs)
        if seen.too_few and self.data.tokens >= inputs:  # of too few in all a note was made
            self._remarks.scarce += [layer.name for layer in group]
        return seen.mean(group[0].name)

    def _scale(
        self, stream: BlockStream, index: int, block: nn.Module, hidden: Sequence[torch.Tensor]
    ) -> None:
        """AWQ's first half: moves scales through the pairs of the block, before any code is chosen."""
        spec = self.plan.method.scaling
        assert spec is not None  # noqa: S101 - the caller asked
        groups = stream.groups(index)
        layers = {layer.inner: layer for group in groups for layer in group}
        first = {layer.inner: group[0] for group in groups for layer in group}
        folds: list[tuple[Fold, list[Layer]]] = []
        for fold in stream.folds(index):
            targets = [layers[inner] for inner in fold.targets if inner in layers]
            if targets := [layer for layer in targets if layer.name in self.plan.grids]:
                folds.append((fold, targets))
        wanted = {first[layer.inner].inner: first[layer.inner] for _, targets in folds for layer in targets}
        statistics = self._statistics(stream, index, hidden, wanted.values())
        moved: list[Fold] = []
        for fold, targets in folds:
            seen = [
                (layer, statistics[first[layer.inner].inner])
                for layer in targets
                if first[layer.inner].inner in statistics
            ]
            if not seen:
                continue
            means = {id(found): found.mean(layer.name) for layer, found in seen}  # once for all that share it
            scales = search_awq_scales(
                [(weight_of(block, layer), means[id(found)]) for layer, found in seen],
                mean_abs([found for _, found in seen]),
                # where overrides differ, the layer of the fewest bits needs the scales most
                min((self.plan.grids[layer.name] for layer, _ in seen), key=lambda grid: grid.bits),
                points=spec.grid_points,
            )
            if bool((scales != 1).any()):
                apply_fold(block, fold, scales)
                moved.append(fold)
        self._rewrite(stream, index, block, moved)

    def _rewrite(self, stream: BlockStream, index: int, block: nn.Module, folds: Sequence[Fold]) -> None:
        """Writes what folds changed and no codes are made of; the block goes on with the rounded values."""
        names = stream.stored_names(index)
        touched = {f"{fold.source}.{leaf}" for fold in folds for leaf in ("weight", "bias")}
        touched |= {f"{target}.weight" for fold in folds for target in fold.targets}
        for inner in sorted(touched & names.keys()):
            name = names[inner]
            if name in self.plan.weights:
                continue
            parameter = block.get_parameter(inner)
            stored = parameter.data.to(self.plan.checkpoint.info(name).dtype)
            parameter.data = stored.to(parameter.dtype)
            self.write(name, stored)
            self.rewritten.add(name)

    def _note_few_tokens(self) -> None:
        """Hessians of fewer tokens than inputs are not of full rank: the codes fit those few tokens."""
        inputs = max(self.plan.shapes[name][1] for name in self.plan.grids)
        if self.data.tokens < inputs:
            self.on_event(
                Noted(
                    f"{self.data.tokens} calibration tokens are too few for layers of {inputs} inputs; "
                    f"at least {inputs} are wanted, better {_TOKENS_AN_INPUT * inputs}: "
                    "--samples, --sequence-length"
                )
            )

    def _note_damping(self, layer: Layer, prepared: Prepared) -> None:
        spec, curvature = self.plan.method.spec, prepared.curvature
        if curvature and isinstance(spec, GptqSpec) and curvature.damp > spec.damp:
            self._remarks.damped[layer.name] = curvature.damp

    def _tell(self) -> None:
        remarks = self._remarks
        for names, what in (
            (remarks.unseen, "saw no token and were rounded"),
            (remarks.scarce, "saw fewer tokens than they have inputs"),
        ):
            if names:
                self.on_event(
                    Noted(f"{len(names)} layers of experts {what} ({first_of(names, 2)}); more text helps")
                )
        if remarks.damped:
            name, damp = max(remarks.damped.items(), key=lambda item: item[1])
            self.on_event(
                Noted(
                    f"the Hessians of {len(remarks.damped)} layers were not positive definite and were "
                    f"damped more, {name} by {damp:g} of its mean diagonal"
                )
            )
