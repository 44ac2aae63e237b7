"""The full-precision model at one block: run once, for all that lanes want to see of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qexport.calibrate.hessian import InputStatistics, adding
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream, is_expert
from qexport.quantization.blockwise.lanes import Lane, stages
from qexport.quantization.blockwise.output_curvature import BlockCurvature


@dataclass
class FullBlock:
    """Number `index`, loaded as `module`: hidden states `before` and `after` it (the same store where none
    looks at both).

    `seen` are statistics of layers' inputs by inner name; `inputs` are those inputs themselves, batch by
    batch. `curvature` is set where a lane weighs outputs.
    """

    stream: BlockStream
    index: int
    module: nn.Module
    before: Activations
    after: Activations
    curvature: BlockCurvature | None = None
    seen: dict[str, InputStatistics] = field(default_factory=dict)
    inputs: dict[str, Activations] = field(default_factory=dict)

    def compared(self, lanes: Sequence[Lane]) -> list[str]:
        """The layers whose inputs following lanes compare with the full model's: the first of each group.

        Before the first block's first layers nothing differs; which tokens an expert sees may.
        """
        found: dict[str, None] = {}
        for lane in lanes:
            if lane.method.follows:
                places = stages(lane.groups(self.stream, self.index))[1 if self.index == 0 else 0 :]
                found |= {group[0].inner: None for stage in places for group in stage}
        return [inner for inner in found if not is_expert(inner)]

    def run(self, lanes: Sequence[Lane]) -> None:
        """Takes the hidden states through the block; fills `seen`, and the stores that `inputs` has."""
        wanted: dict[str, None] = {}
        for lane in lanes:
            if not lane.method.follows:
                wanted |= {group[0].inner: None for group in lane.groups(self.stream, self.index)}
            if lane.method.scaling:
                for _, pairs in lane.folds(self.stream, self.index):
                    wanted |= {first.inner: None for _, first in pairs}
        add = adding(self.seen)

        def see(inner: str, x: torch.Tensor) -> None:
            if inner in wanted:
                add(inner, x)
            if inner in self.inputs:
                self.inputs[inner].append(x)

        looked_at = list(wanted | dict.fromkeys(self.inputs))
        for number in range(len(self.before)):
            out = self.stream.inputs(self.index, self.before[number], looked_at, see, stop=False)
            assert out is not None  # noqa: S101 - it ran to the end
            self.after.put(number, out)
