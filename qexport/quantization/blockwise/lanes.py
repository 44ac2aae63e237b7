"""One output of a pass over the model: a lane, its plan, and which layers it solves together."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.grids.grid import Grid
from qexport.methods import Solving
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream, Layer
from qexport.modeling.folding import Fold
from qexport.modeling.skeleton import Skeleton
from qexport.quantization.data_free import Write
from qexport.results import TensorError

_ROUNDED = 5  # bits up to which what a weight loses by being rounded to bf16 is nothing beside its own error

Group = tuple[Layer, ...]
"""Layers that share an input."""


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
    hidden: Activations | None = (
        None  # its own before the block at hand, once they differ from the full model's
    )
    earlier: Activations | None = None  # those before the block before that, where both are tuned

    @property
    def method(self) -> Solving:
        """How its codes are chosen."""
        return self.plan.method

    @property
    def rounded(self) -> bool:
        """Whether its passes may multiply in bf16, on a processor that is fast at it: not those that follow
        what codes of many bits do to later layers, which bf16 would hide."""
        return not self.method.follows or all(grid.bits <= _ROUNDED for grid in self.plan.grids.values())

    def groups(self, stream: BlockStream, index: int) -> list[Group]:
        """The layers of a block that become codes, by their inputs, in the order in which they run."""
        grids = self.plan.grids
        groups = (tuple(layer for layer in group if layer.name in grids) for group in stream.groups(index))
        return [group for group in groups if group]

    def folds(self, stream: BlockStream, index: int) -> list[tuple[Fold, list[tuple[Layer, Layer]]]]:
        """The folds of a block whose targets become codes: those targets, each with the first of its group,
        whose inputs are looked at in its stead."""
        pairs = {layer.inner: (layer, group[0]) for group in self.groups(stream, index) for layer in group}
        folds = [
            (fold, [pairs[inner] for inner in fold.targets if inner in pairs]) for fold in stream.folds(index)
        ]
        return [(fold, targets) for fold, targets in folds if targets]


def stages(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of a block whose inputs are collected in one run: those that run side by side."""
    # the experts of a block are one place
    places = [re.sub(r"(?<=\.)\d+(?=\.)", "*", group[0].inner) for group in groups]
    together = groupby(zip(places, groups, strict=True), key=lambda pair: pair[0])
    return [[group for _, group in stage] for _, stage in together]
