"""A lane's copy of a block: its layers become codes, it runs as it became, and it is written."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from qexport.modeling.blocks import BlockStream, Layer, set_weight
from qexport.quantization.blockwise.lanes import Lane
from qexport.quantization.blockwise.tuning import Tunable, Tuned


class QuantizedBlock:
    """Number `index`, copied from the full model's, so that other lanes find that as it was."""

    def __init__(self, lane: Lane, stream: BlockStream, index: int, module: nn.Module) -> None:
        self._lane, self._stream, self._index = lane, stream, index
        self.module = copy.deepcopy(module)
        self._codes: dict[str, tuple[Layer, Any]] = {}
        self._changed: set[str] = set()

    def put(self, layer: Layer, codes: Any) -> torch.Tensor:
        """Gives a layer its codes, and the block what they decode to: [out, in] in fp32."""
        decoded: torch.Tensor = self._lane.plan.grids[layer.name].decode(codes)
        set_weight(self.module, layer, decoded)
        self._codes[layer.inner] = layer, codes
        return decoded

    def change(self, changed: set[str]) -> None:
        """Notes inner names of tensors that had to change for the codes. What is no codes is written in its
        own dtype: the block goes on with that."""
        self._changed |= changed
        for inner, _, stored in self._plain(changed):
            parameter = self.module.get_parameter(inner)
            parameter.data = stored.to(parameter.dtype)

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """Takes hidden states [n, length, hidden] through the block as it is now."""
        return self._stream.run(self._index, states, self.module)

    def tunable(self) -> Tunable:
        """What `tune_blocks` takes."""
        names, grids = self._plain_names(), self._lane.plan.grids
        return Tunable(
            self._index,
            self.module,
            {inner: (layer, codes, grids[layer.name]) for inner, (layer, codes) in self._codes.items()},
            names.keys(),
            lambda inner, value: self._as_stored(names[inner], value),
        )

    def take(self, tuned: Tuned) -> None:
        """Keeps what `tune_blocks` made of the block."""
        for inner, codes in tuned.codes.items():
            self._codes[inner] = self._codes[inner][0], codes
        self._changed |= tuned.changed

    def write(self) -> None:
        """Writes the codes, and what had to change for them."""
        for layer, codes in self._codes.values():
            for name, tensor in self._lane.plan.layer_tensors(layer.name, codes).items():
                self._lane.write(name, tensor)
        for _, name, stored in self._plain(self._changed):
            self._lane.write(name, stored.cpu())
            self._lane.rewritten.add(name)

    def _plain(self, changed: Iterable[str]) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Inner name, name on disk and value of those that are stored as they are."""
        names = self._plain_names()
        for inner in sorted(set(changed) & names.keys()):
            name = names[inner]
            yield inner, name, self._as_stored(name, self.module.get_parameter(inner).data)

    def _plain_names(self) -> dict[str, str]:
        """Names on disk, by inner name, of the block's tensors that become no codes."""
        names = self._stream.stored_names(self._index)
        return {inner: name for inner, name in names.items() if name not in self._lane.plan.weights}

    def _as_stored(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._lane.plan.checkpoint.info(name).dtype)
