"""Writes a checkpoint tensor by tensor: planned files, the Hub's index, one rename at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qexport.checkpoint.checkpoint import CONFIG_FILE
from qexport.checkpoint.disk import read_errors, write_errors
from qexport.checkpoint.manifest import MANIFEST_FILE, Manifest, Recipe, carried_figures, record_files
from qexport.checkpoint.safetensors_file import byte_view
from qexport.checkpoint.sharding import SAFETENSORS, Naming, ShardPlan, plan_shards
from qexport.checkpoint.staging import StagedDirectory, require_space
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.weights_files import Flusher, LastOpened, WeightsFile, create
from qexport.events import Noted, OnEvent, ignore
from qexport.sizes import format_size


class CheckpointWriter:
    """`with CheckpointWriter(...) as writer:` write every planned tensor.

    Tensors go into safetensors in any order; into PyTorch's own files (`naming`) in the planned one.
    `sidecars` are the small files to carry along: name in the output -> where it lies.
    Leaving the block without an error checks that all were written and renames the directory into
    place; leaving it with one leaves nothing behind. `recipe` is asked for at the end: the inputs'
    hashes may be known by then, and whatever refuses the job should do so before. `finish` gets the staged
    directory once all files are written: it may add some that are made of them, so that the weights lie
    there `copies` times.
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
        self.figures: dict[str, Any] = {}
        self._sources = sources
        self._config, self._naming = dict(config), naming
        self._recipe, self._finish_directory, self._copies = recipe, finish, copies
        self._sidecars = sidecars
        self._texts: dict[str, str] = {}
        self._files: dict[str, WeightsFile] = {}
        self._planned = {tensor.name: tensor for tensor in tensors}
        self._left = {tensor.name: tensor.size for tensor in tensors if tensor.size}
        self._max_shard_size, self._on_event = max_shard_size, on_event
        self._staged = StagedDirectory(out, overwrite=overwrite, sources=sources)
        self._flusher, self._opened = Flusher(), LastOpened()

    def __enter__(self) -> CheckpointWriter:
        try:
            require_space(self._staged.target, self.plan.size * self._copies)
            if oversized := self.plan.oversized:
                first = oversized[0]
                more = f" and {len(oversized) - 1} more tensors are" if len(oversized) > 1 else " is"
                self._on_event(
                    Noted(
                        f"{first.name} ({format_size(first.size)}){more} larger than the shard size "
                        f"{format_size(self._max_shard_size)}: each gets a file of its own"
                    )
                )
            with write_errors(self._staged.target):
                for shard in self.plan.shards:
                    file = create(self._staged.path / shard.file, shard, self._opened)
                    self._files.update({tensor.name: file for tensor in shard.tensors})
        except BaseException as error:
            self._release()
            self._staged.__exit__(type(error), error, None)
            raise
        return self

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
        raw = byte_view(values.contiguous())
        file = self._files[name]
        with write_errors(self._staged.target):
            file.write(name, begin, raw)
        self._flusher.wrote(file.path, len(raw))
        left = self._left.get(name, 0) - len(raw)
        if left < 0:
            raise ValueError(f"{-left} bytes too many for {name}")
        if left:
            self._left[name] = left
        else:
            self._left.pop(name, None)

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Adds a small JSON file, such as quantize_config.json."""
        self.add_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def add_text(self, name: str, text: str) -> None:
        """Adds a small text file."""
        self._texts[name] = text

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
            self._release()
            self._staged.__exit__(kind, error, trace)

    def _release(self) -> None:
        self._flusher.close()
        self._opened.close()

    def _finish(self) -> None:
        if self._left:
            raise RuntimeError(f"planned but not written: {sorted(self._left)[:3]}")
        directory, target = self._staged.path, self._staged.target
        for sidecar, source in self._sidecars.items():
            with read_errors(source):
                content = source.read_bytes()
            with write_errors(target):
                (directory / sidecar).parent.mkdir(parents=True, exist_ok=True)
                (directory / sidecar).write_bytes(content)
        if len(self.plan.shards) > 1:
            self.add_json(self._naming.index, self.plan.index())
        self.add_json(CONFIG_FILE, self._config)
        with write_errors(target):
            for file in {id(file): file for file in self._files.values()}.values():
                file.close()
            for name, text in self._texts.items():
                (directory / name).write_text(text, encoding="utf-8")
            self._flusher.finish()
        if self._finish_directory:
            self._finish_directory(directory)
        figures = {**carried_figures(self._sources), **self.figures}
        manifest = Manifest(self._recipe(), record_files(directory), figures)
        with write_errors(target):
            (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        self._staged.commit()
