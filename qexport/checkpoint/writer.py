"""Writes a checkpoint tensor by tensor: planned files, the Hub's index, one rename at the end."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint.checkpoint import CONFIG_FILE
from qexport.checkpoint.disk import write_errors
from qexport.checkpoint.manifest import Recipe
from qexport.checkpoint.output import Room, StagedOutput
from qexport.checkpoint.safetensors_file import byte_view
from qexport.checkpoint.sharding import SAFETENSORS, Naming, ShardPlan, plan_shards
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.weights_files import LastOpened, create
from qexport.events import Noted, OnEvent, ignore
from qexport.sizes import format_size


class CheckpointWriter(StagedOutput):
    """See `StagedOutput`; the files are safetensors, with config.json.

    Tensors go into safetensors in any order; into PyTorch's own files (`naming`) in the planned one.
    `finish` gets the staged directory once all files are written: it may add some that are made of them, so
    that the weights lie there `copies` times.
    """

    def __init__(
        self,
        out: Path,
        tensors: Sequence[TensorInfo],
        *,
        config: Mapping[str, Any],
        recipe: Callable[[], Recipe],
        max_shard_size: int,
        sidecars: Mapping[Path, Path],
        naming: Naming = SAFETENSORS,
        overwrite: bool = False,
        sources: Sequence[Path],
        finish: Callable[[Path], None] | None = None,
        copies: int = 1,
        on_event: OnEvent = ignore,
    ) -> None:
        self.plan: ShardPlan = plan_shards(tensors, max_shard_size, naming)
        super().__init__(
            out,
            size=self.plan.size * copies,
            recipe=recipe,
            sidecars=sidecars,
            sources=sources,
            overwrite=overwrite,
        )
        self._finish_directory = finish
        self._planned = {tensor.name: tensor for tensor in tensors}
        self._max_shard_size, self._on_event = max_shard_size, on_event
        if len(self.plan.shards) > 1:
            self.add_json(naming.index, self.plan.index())
        self.add_json(CONFIG_FILE, config)

    def create_files(self, directory: Path, opened: LastOpened) -> Mapping[Hashable, Room]:
        """See `StagedOutput`; the keys are the tensors' names."""
        if oversized := self.plan.oversized:
            first = oversized[0]
            more = f" and {len(oversized) - 1} more tensors are" if len(oversized) > 1 else " is"
            self._on_event(
                Noted(
                    f"{first.name} ({format_size(first.size)}){more} larger than the shard size "
                    f"{format_size(self._max_shard_size)}: each gets a file of its own"
                )
            )
        rooms: dict[Hashable, Room] = {}
        for shard in self.plan.shards:
            with write_errors(self.target):
                file = create(directory / shard.file, shard, opened)
            rooms |= {tensor.name: Room(file, tensor.name, tensor.size) for tensor in shard.tensors}
        return rooms

    def last_files(self, directory: Path) -> None:
        """See `StagedOutput`."""
        if self._finish_directory:
            self._finish_directory(directory)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a planned tensor to its place. Dtype and shape must be the planned ones."""
        planned = self._planned[name]
        if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned was {planned.dtype} {planned.shape}"
            )
        self.write_piece(name, 0, tensor.detach().cpu())

    def write_piece(self, name: str, begin: int, values: torch.Tensor) -> None:
        """Writes values of a planned tensor, from byte `begin` of it on."""
        self.write_bytes(name, begin, byte_view(values.contiguous()))
