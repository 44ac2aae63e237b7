"""Writes a checkpoint tensor by tensor: planned files, the Hub's index, one rename at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qexport.checkpoint.checkpoint import CONFIG_FILE
from qexport.checkpoint.manifest import MANIFEST_FILE, Manifest, Recipe, record_files
from qexport.checkpoint.safetensors_file import header_bytes
from qexport.checkpoint.sharding import INDEX_FILE, Shard, ShardPlan, plan_shards
from qexport.checkpoint.sidecars import sidecar_files
from qexport.checkpoint.staging import StagedDirectory, storage_errors
from qexport.checkpoint.tensors import TensorInfo
from qexport.events import Noted, OnEvent, ignore
from qexport.sizes import format_size


class CheckpointWriter:
    """`with CheckpointWriter(...) as writer:` write every planned tensor, in any order.

    Leaving the block without an error checks that all were written and renames the directory into
    place; leaving it with one leaves nothing behind.
    """

    def __init__(
        self,
        out: Path,
        tensors: Sequence[TensorInfo],
        *,
        config: Mapping[str, Any],
        recipe: Recipe,
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
        self._files: dict[str, Any] = {}
        self._staged = StagedDirectory(out, overwrite=overwrite, sources=(*sources, sidecars_from))
        self._descriptors: dict[str, int] = {}
        self._places: dict[str, tuple[str, int, TensorInfo]] = {}
        self._missing = {tensor.name for tensor in tensors}
        for tensor in self.plan.oversized:
            on_event(
                Noted(
                    f"{tensor.name} ({format_size(tensor.size)}) is larger than the shard size "
                    f"{format_size(max_shard_size)}: it gets a file of its own"
                )
            )

    def __enter__(self) -> CheckpointWriter:
        try:
            self._staged.require_space(self.plan.size)
            with storage_errors(self._staged.target):
                for shard in self.plan.shards:
                    self._create(shard)
        except BaseException as error:
            self._abandon(error)
            raise
        return self

    def _create(self, shard: Shard) -> None:
        header = header_bytes(shard.tensors)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        descriptor = os.open(self._staged.path / shard.file, flags, 0o666)
        self._descriptors[shard.file] = descriptor
        _write_all(descriptor, memoryview(header), 0)
        offset = len(header)
        for tensor in shard.tensors:
            self._places[tensor.name] = (shard.file, offset, tensor)
            offset += tensor.size

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a planned tensor to its place. Dtype and shape must be the planned ones."""
        file, offset, planned = self._places[name]
        if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned was {planned.dtype} {planned.shape}"
            )
        raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with storage_errors(self._staged.target):
            _write_all(self._descriptors[file], memoryview(raw), offset)
        self._missing.discard(name)

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Adds a small JSON file, such as quantize_config.json."""
        self._files[name] = dict(content)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as failure:
                self._abandon(failure)
                raise
        self._abandon(error)

    def _abandon(self, error: BaseException | None) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()
        self._staged.__exit__(type(error) if error else None, error, None)

    def _finish(self) -> None:
        if self._missing:
            raise RuntimeError(f"planned but not written: {sorted(self._missing)[:3]}")
        directory = self._staged.path
        with storage_errors(self._staged.target):
            for file in list(self._descriptors):
                descriptor = self._descriptors.pop(file)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            for sidecar in sidecar_files(self._sidecars_from):
                (directory / sidecar).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._sidecars_from / sidecar, directory / sidecar)
            if len(self.plan.shards) > 1:
                self._files[INDEX_FILE] = self.plan.index()
            self._files[CONFIG_FILE] = self._config
            for name, content in self._files.items():
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (directory / name).write_text(text, encoding="utf-8")
            manifest = Manifest(self._recipe, record_files(directory), self.figures)
            (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        self._staged.commit()


def _write_all(descriptor: int, raw: memoryview, offset: int) -> None:
    done = 0
    while done < len(raw):
        done += os.pwrite(descriptor, raw[done:], offset + done)
