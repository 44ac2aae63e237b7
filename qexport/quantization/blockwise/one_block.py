"""One lane's work on one block: scales are moved, codes chosen, and the block tuned.

The block runs, and is tuned, on its stream's device. Scales and codes are chosen on the CPU, by compiled
loops: what they need of weights and statistics comes there, and decoded weights go back into the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qexport.calibrate.cross import CrossMoment
from qexport.calibrate.hessian import InputStatistics, adding, mean_abs
from qexport.events import Advanced
from qexport.methods import Prepared
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import weight_of
from qexport.modeling.folding import apply_fold
from qexport.quantization.blockwise.full_block import FullBlock
from qexport.quantization.blockwise.lanes import Group, Lane, stages
from qexport.quantization.blockwise.quantized_block import QuantizedBlock
from qexport.quantization.blockwise.remarks import Remarks
from qexport.quantization.blockwise.tuning import Cost, divergence, tune_blocks, weighed_error
from qexport.quantization.fidelity import tensor_error
from qexport.solvers.awq import search_awq_scales

_LOGITS = 1 << 27  # values of a batch's: half a gigabyte each time they are copied


@dataclass
class _Inputs:
    """What is known of the inputs of a group of layers; `seen` None where no token came by."""

    seen: InputStatistics | None
    cross: CrossMoment | None = None
    scales: torch.Tensor | None = None  # that the inputs have been divided by since


class OneBlock:
    """What a lane makes of the block that `full` has, after its `previous` one, if that waits to be tuned."""

    def __init__(
        self,
        lane: Lane,
        full: FullBlock,
        batches: Sequence[torch.Tensor],
        remarks: Remarks,
        previous: QuantizedBlock | None,
    ) -> None:
        self._lane, self._full, self._previous = lane, full, previous
        self._batches, self._remarks = batches, remarks
        self._method, self._stream, self._index = lane.method, full.stream, full.index
        self._own = QuantizedBlock(lane, full.stream, full.index, full.module)
        self._curvature = full.curvature if lane.method.weighs_outputs else None
        # not all that other lanes compare: what is written does not depend on those that go along
        self._compared = frozenset(full.compared([lane]))
        self._divided: dict[str, torch.Tensor] = {}  # layer -> what its inputs have been divided by

    @property
    def _now(self) -> Activations:
        """The lane's own hidden states before the block."""
        return self._lane.hidden or self._full.before  # empty before the first block

    def solve(self) -> QuantizedBlock:
        """Chooses all codes of the block, and takes the lane's hidden states, if it has its own, through the
        block as it became. That is yet to be written; the previous one is."""
        groups = self._lane.groups(self._stream, self._index)
        if self._method.scaling:
            self._scale()
        if self._method.follows:
            for stage in stages(groups):
                for group, inputs in zip(stage, self._following(stage), strict=True):
                    self._solve_group(group, inputs)
        else:
            for group in groups:
                inner = group[0].inner
                self._solve_group(group, _Inputs(self._full.seen.get(inner), None, self._divided.get(inner)))
        if self._curvature:
            self._tune()
        if self._lane.hidden is not None:
            self._propagate(self._lane.hidden)
        return self._own

    def _propagate(self, hidden: Activations) -> None:
        """Takes the lane's hidden states through the block as it became."""
        before, earlier = self._now, self._lane.earlier
        for number in range(len(before)):
            if earlier is None:
                states = before[number]
            else:
                # before this block, now that the previous one is done with
                states = before[number] if self._previous is None else self._previous.run(earlier[number])
                earlier.put(number, states)
            hidden.put(number, self._own.run(states))

    def _following(self, stage: Sequence[Group]) -> list[_Inputs]:
        """What the layers of a stage see now, and how that differs from what the full model sees."""
        seen: dict[str, InputStatistics] = {}
        crosses: dict[str, CrossMoment] = {}
        wanted = [group[0].inner for group in stage]
        add = adding(seen)
        for number in range(len(self._now)):

            def see(inner: str, x: torch.Tensor, number: int = number) -> None:
                add(inner, x)
                if inner in self._compared:
                    divided, then = self._divided.get(inner), self._full.inputs[inner][number]
                    if inner not in crosses:
                        crosses[inner] = CrossMoment(x.shape[-1], x.device)
                    crosses[inner].add(then if divided is None else then / divided.to(then.device), x)

            self._stream.inputs(self._index, self._now[number], wanted, see, block=self._own.module)
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
            weight = weight_of(self._own.module, layer)
            width = grid.group_width(weight.shape[1])
            if width not in prepared:
                prepared[width] = method.prepare(hessian, grid, cross)
                self._remarks.damping(layer, method.spec, prepared[width])
            target = method.target(weight, prepared[width])
            outputs = self._curvature.of(layer.inner) if self._curvature else None
            codes = method.solve(target, prepared[width], grid, outputs)
            decoded = self._own.put(layer, codes)
            lane.errors.append(
                tensor_error(layer.name, grid.bits, target, decoded, hessian if inputs.seen else None)
            )
            self._remarks.on_event(Advanced(1, layer.name))

    def _hessian(self, inputs: _Inputs, group: Group) -> torch.Tensor:
        """Mean of x x^T; zeros, under which every solver rounds, where no token came by."""
        self._remarks.inputs(inputs.seen, group)
        if inputs.seen is None:
            count = weight_of(self._own.module, group[0]).shape[1]
            return torch.zeros(count, count)
        found = inputs.seen.mean(group[0].name)
        if inputs.scales is not None:
            found.div_(inputs.scales[:, None]).div_(inputs.scales)
        return found

    def _scale(self) -> None:
        """AWQ's first half: moves scales through the pairs of the block, before any code is chosen."""
        spec = self._method.scaling
        assert spec is not None  # noqa: S101 - the caller asked
        changed: set[str] = set()
        for fold, pairs in self._lane.folds(self._stream, self._index):
            shared = self._full.seen
            seen = [(layer, shared[first.inner]) for layer, first in pairs if first.inner in shared]
            if not seen:
                continue
            means = {id(found): found.mean(layer.name) for layer, found in seen}  # once for all that share it
            scales = search_awq_scales(
                [(weight_of(self._own.module, layer), means[id(found)]) for layer, found in seen],
                mean_abs([found for _, found in seen]),
                # where overrides differ, the layer of the fewest bits needs the scales most
                min((self._lane.plan.grids[layer.name] for layer, _ in seen), key=lambda grid: grid.bits),
                points=spec.grid_points,
            )
            if bool((scales != 1).any()):
                apply_fold(self._own.module, fold, scales)
                for inner in fold.targets:
                    self._divided[inner] = self._divided.get(inner, 1.0) * scales
                changed |= {f"{fold.source}.{leaf}" for leaf in ("weight", "bias")}
                changed |= {f"{target}.weight" for target in fold.targets}
        self._own.change(changed)

    def _tune(self) -> None:
        """Scales and norms by gradients, for what the block puts out, together with those of the previous
        one; that is done with then, and written."""
        blocks = [one for one in (self._previous, self._own) if one is not None]
        now = self._now if self._previous is None else self._lane.earlier
        assert now is not None  # noqa: S101 - there was a block before
        with self._cost() as cost:
            tuned = tune_blocks(
                self._stream, [one.tunable() for one in blocks], wanted=self._full.after, now=now, cost=cost
            )
        for one, found in zip(blocks, tuned, strict=True):
            one.take(found)
        if self._previous is not None:
            self._previous.write()

    @contextmanager
    def _cost(self) -> Iterator[Cost]:
        """By the Fisher's curvature; the last block's by the divergence itself, if logits are not many."""
        assert self._curvature is not None  # noqa: S101 - the caller asked
        vocabulary = self._lane.plan.skeleton.config.get_text_config().vocab_size
        batches = self._batches
        if self._index + 1 < len(self._stream) or batches[0].numel() * vocabulary > _LOGITS:
            yield weighed_error(self._curvature.block)
            return
        with self._stream.head() as logits:
            yield divergence(batches, logits)
