"""Writes a checkpoint tensor by tensor: planned files, the Hub's index, one rename at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qexport.checkpoint.checkpoint import CONFIG_FILE
from qexport.checkpoint.disk import read_errors, write_errors
from qexport.checkpoint.manifest import MANIFEST_FILE, Manifest, Recipe, record_files
from qexport.checkpoint.safetensors_file import MAX_TRANSFER, header_bytes
from qexport.checkpoint.sharding import INDEX_FILE, Shard, ShardPlan, plan_shards
from qexport.checkpoint.sidecars import sidecar_files
from qexport.checkpoint.staging import StagedDirectory, require_space
from qexport.checkpoint.tensors import TensorInfo
from qexport.events import Noted, OnEvent, ignore
from qexport.sizes import format_size


class CheckpointWriter:
    """`with CheckpointWriter(...) as writer:` write every planned tensor, in any order.

    Leaving the block without an error checks that all were written and renames the directory into
    place; leaving it with one leaves nothing behind. `recipe` is asked for at the end: hashing the
    inputs takes as long as reading them, and whatever refuses the job should do so before.
    """

    def __init__(
        self,
        out: Path,
        tensors: Sequence[TensorInfo],
        *,
        config: Mapping[str, Any],
        recipe: Callable[[], Recipe],
        max_shard_size: int,
        sidecars_from: Path,
        overwrite: bool = False,
        sources: Sequence[Path] = (),
        on_event: OnEvent = ignore,
    ) -> None:
        self.plan: ShardPlan = plan_shards(tensors, max_shard_size)
        self.figures: dict[str, Any] = {}
        self._config = dict(config)
        self._recipe = recipe
        self._sidecars_from = sidecars_from
        self._json_files: dict[str, Mapping[str, Any]] = {}
        self._places: dict[str, tuple[Path, int, TensorInfo]] = {}
        self._missing = {tensor.name for tensor in tensors}
        self._max_shard_size, self._on_event = max_shard_size, on_event
        self._staged = StagedDirectory(out, overwrite=overwrite, sources=(*sources, sidecars_from))

    def __enter__(self) -> CheckpointWriter:
        try:
            require_space(self._staged.target, self.plan.size)
            for tensor in self.plan.oversized:
                self._on_event(
                    Noted(
                        f"{tensor.name} ({format_size(tensor.size)}) is larger than the shard size "
                        f"{format_size(self._max_shard_size)}: it gets a file of its own"
                    )
                )
            for shard in self.plan.shards:
                self._create(shard)
        except BaseException as error:
            self._staged.__exit__(type(error), error, None)
            raise
        return self

    def _create(self, shard: Shard) -> None:
        header = header_bytes(shard.tensors)
        path = self._staged.path / shard.file
        with write_errors(self._staged.target):
            path.write_bytes(header)
        offset = len(header)
        for tensor in shard.tensors:
            self._places[tensor.name] = (path, offset, tensor)
            offset += tensor.size

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a planned tensor to its place. Dtype and shape must be the planned ones."""
        path, offset, planned = self._places[name]
        if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned was {planned.dtype} {planned.shape}"
            )
        raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with write_errors(self._staged.target):
            # opened each time: a model may have more shards than a process may have open files
            descriptor = os.open(path, os.O_WRONLY)
            try:
                _write_all(descriptor, memoryview(raw), offset)
            finally:
                os.close(descriptor)
        self._missing.discard(name)

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Adds a small JSON file, such as quantize_config.json."""
        self._json_files[name] = content

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._staged.__exit__(kind, error, trace)

    def _finish(self) -> None:
        if self._missing:
            raise RuntimeError(f"planned but not written: {sorted(self._missing)[:3]}")
        directory, target = self._staged.path, self._staged.target
        for sidecar in sidecar_files(self._sidecars_from):
            with read_errors(self._sidecars_from / sidecar):
                content = (self._sidecars_from / sidecar).read_bytes()
            with write_errors(target):
                (directory / sidecar).parent.mkdir(parents=True, exist_ok=True)
                (directory / sidecar).write_bytes(content)
        if len(self.plan.shards) > 1:
            self._json_files[INDEX_FILE] = self.plan.index()
        self._json_files[CONFIG_FILE] = self._config
        with write_errors(target):
            for shard in self.plan.shards:
                with (directory / shard.file).open("rb") as file:
                    os.fsync(file.fileno())
            for name, values in self._json_files.items():
                text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
                (directory / name).write_text(text, encoding="utf-8")
        manifest = Manifest(self._recipe(), record_files(directory), self.figures)
        with write_errors(target):
            (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        self._staged.commit()


def _write_all(descriptor: int, raw: memoryview, offset: int) -> None:
    done = 0
    while done < len(raw):
        done += os.pwrite(descriptor, raw[done : done + MAX_TRANSFER], offset + done)
