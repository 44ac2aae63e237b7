"""One lane's work on one block: scales are moved, codes chosen, the block tuned, and all of it written.

The block runs, and is tuned, on its stream's device. Scales and codes are chosen on the CPU, by compiled
loops: what they need of weights and statistics comes there, and decoded weights go back into the block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qexport.calibrate.cross import CrossMoment
from qexport.calibrate.hessian import InputStatistics, adding, mean_abs
from qexport.events import Advanced
from qexport.methods import Prepared
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import Layer, set_weight, weight_of
from qexport.modeling.folding import apply_fold
from qexport.quantization.blockwise.full_block import FullBlock
from qexport.quantization.blockwise.lanes import Group, Lane, stages
from qexport.quantization.blockwise.remarks import Remarks
from qexport.quantization.blockwise.tuning import Cost, Tunable, divergence, tune_blocks, weighed_error
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
    """On a copy of the full model's block, so that other lanes find that as it was."""

    def __init__(
        self,
        lane: Lane,
        full: FullBlock,
        batches: Sequence[torch.Tensor],
        remarks: Remarks,
        previous: OneBlock | None,
    ) -> None:
        self._lane, self._full, self._previous = lane, full, previous
        self._batches, self._remarks = batches, remarks
        self._method, self._stream, self._index = lane.method, full.stream, full.index
        self._block = copy.deepcopy(full.module)
        self._curvature = full.curvature if lane.method.weighs_outputs else None
        # not all that other lanes compare: what is written does not depend on those that go along
        self._compared = frozenset(full.compared([lane]))
        self._divided: dict[str, torch.Tensor] = {}  # layer -> what its inputs have been divided by
        self._solved: dict[str, tuple[Layer, Any]] = {}
        self._moved: set[str] = set()  # inner names of what had to change for the codes

    @property
    def _now(self) -> Activations:
        """The lane's own hidden states before the block."""
        return self._lane.hidden or self._full.before  # empty before the first block

    def solve(self) -> None:
        """Chooses all codes of the block, and takes the lane's hidden states, if it has its own, through the
        block as it became."""
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
        # a block that waits to be tuned with the next holds no Hessians
        del self._full, self._curvature, self._previous

    def finish(self) -> None:
        """Writes the codes, and what had to change for them."""
        for layer, codes in self._solved.values():
            for name, tensor in self._lane.plan.layer_tensors(layer.name, codes).items():
                self._lane.write(name, tensor)
        for _, name, stored in self._plain(self._moved):
            self._lane.write(name, stored.cpu())
            self._lane.rewritten.add(name)

    def _propagate(self, hidden: Activations) -> None:
        """Takes the lane's hidden states through the block as it became."""
        before, earlier = self._now, self._lane.earlier
        for number in range(len(before)):
            if earlier is None:
                states = before[number]
            else:
                # before this block, now that the previous one is done with
                states = before[number] if self._previous is None else self._previous._run(earlier[number])
                earlier.put(number, states)
            hidden.put(number, self._run(states))

    def _run(self, states: torch.Tensor) -> torch.Tensor:
        return self._stream.run(self._index, states, self._block)

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
                self._remarks.damping(layer, method.spec, prepared[width])
            target = method.target(weight, prepared[width])
            outputs = self._curvature.of(layer.inner) if self._curvature else None
            codes = method.solve(target, prepared[width], grid, outputs)
            decoded = grid.decode(codes)
            lane.errors.append(
                tensor_error(layer.name, grid.bits, target, decoded, hessian if inputs.seen else None)
            )
            set_weight(self._block, layer, decoded)
            self._solved[layer.inner] = layer, codes
            self._remarks.on_event(Advanced(1, layer.name))

    def _hessian(self, inputs: _Inputs, group: Group) -> torch.Tensor:
        """Mean of x x^T; zeros, under which every solver rounds, where no token came by."""
        self._remarks.inputs(inputs.seen, group)
        if inputs.seen is None:
            count = weight_of(self._block, group[0]).shape[1]
            return torch.zeros(count, count)
        found = inputs.seen.mean(group[0].name)
        if inputs.scales is not None:
            found = found / inputs.scales[:, None] / inputs.scales
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
        self._moved |= changed

    def _tune(self) -> None:
        """Scales and norms by gradients, for what the block puts out, together with those of the previous
        one; that is done with then, and written."""
        blocks = [one for one in (self._previous, self) if one is not None]
        now = self._now if self._previous is None else self._lane.earlier
        assert now is not None  # noqa: S101 - there was a block before
        with self._cost() as cost:
            tuned = tune_blocks(
                self._stream, [one._tunable() for one in blocks], wanted=self._full.after, now=now, cost=cost
            )
        for one, found in zip(blocks, tuned, strict=True):
            for inner, codes in found.codes.items():
                one._solved[inner] = one._solved[inner][0], codes
            one._moved |= found.changed
        if self._previous is not None:
            self._previous.finish()

    def _tunable(self) -> Tunable:
        names, grids = self._plain_names(), self._lane.plan.grids
        return Tunable(
            self._index,
            self._block,
            {inner: (layer, codes, grids[layer.name]) for inner, (layer, codes) in self._solved.items()},
            names.keys(),
            lambda inner, value: self._as_stored(names[inner], value),
        )

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

    def _round_changed(self, changed: Iterable[str]) -> None:
        """What is no codes is written in its own dtype: the block goes on with that."""
        for inner, _, stored in self._plain(changed):
            parameter = self._block.get_parameter(inner)
            parameter.data = stored.to(parameter.dtype)

    def _plain(self, changed: Iterable[str]) -> Iterable[tuple[str, str, torch.Tensor]]:
        """Inner name, name on disk and value of those that are stored as they are."""
        names = self._plain_names()
        for inner in sorted(set(changed) & names.keys()):
            name = names[inner]
            yield inner, name, self._as_stored(name, self._block.get_parameter(inner).data)

    def _plain_names(self) -> dict[str, str]:
        """Names on disk, by inner name, of the block's tensors that become no codes."""
        names = self._stream.stored_names(self._index)
        return {inner: name for inner, name in names.items() if name not in self._lane.plan.weights}

    def _as_stored(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._lane.plan.checkpoint.info(name).dtype)
