"""Base plus adapters as a checkpoint that is merged while it is read: no merged file in between.

What `merge` would write, tensor for tensor and bit for bit: the same plan, the same edits, the same rounding.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, cast

import torch

from qexport.checkpoint.checkpoint import CONFIG_FILE, Checkpoint
from qexport.checkpoint.disk import write_errors
from qexport.checkpoint.finiteness import non_finite_error
from qexport.checkpoint.manifest import Recipe
from qexport.checkpoint.safetensors_file import byte_view
from qexport.checkpoint.sidecars import copy_sidecars
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.ties import tie_of
from qexport.checkpoint.writer import CheckpointWriter
from qexport.devices import device_of
from qexport.errors import SpecError
from qexport.events import OnEvent, ignore
from qexport.merging.merge import merge_recipe
from qexport.merging.plan import MergePlan, plan_merge
from qexport.merging.sources import ResizedSource, Source, StoredSource
from qexport.merging.stream import MergeStream, PlannedTensor
from qexport.specs import MergeSpec


@dataclass(frozen=True)
class MergedView:
    """An opened merge: `checkpoint` reads like the directory that `merge` would write.

    Its path is a private directory with the merged config and the small files, and without weights.
    """

    checkpoint: Checkpoint
    plan: MergePlan
    recipe: Callable[[], Recipe]  # `merge_recipe`, which reads every file of the base once


@contextlib.contextmanager
def merged_view(
    base: str | Path,
    adapters: Sequence[str | Path],
    spec: MergeSpec | None = None,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Iterator[MergedView]:
    """`base` with `adapters` merged into it, a tensor at a time, as each is read. The inputs are not changed.

    A tensor that is read twice is merged twice. Within the block only. Raises what `merge` raises (NaN and
    infinity when the tensor is read), SpecError for options that are about files.
    """
    spec = spec or MergeSpec()
    if spec.legacy_format:
        raise SpecError(
            "--legacy-format says how a merged model is written, and none is written here",
            remedy="leave it out, or merge first",
        )
    device = device_of(spec.device)
    plan = plan_merge(base, adapters, spec, trust_remote_code=trust_remote_code, on_event=on_event)
    with tempfile.TemporaryDirectory(prefix="qexport-merged-") as made:
        directory = Path(made)
        _write_small_files(directory, plan)
        decoder = MergedDecoder(plan, device)
        tie = tie_of(plan.config, decoder.infos())
        checkpoint = Checkpoint(directory, plan.config, {}, tie, decoder=decoder)
        yield MergedView(checkpoint, plan, lambda: merge_recipe(base, adapters, spec))


def _write_small_files(directory: Path, plan: MergePlan) -> None:
    copy_sidecars(plan.sidecars, directory, directory)
    with write_errors(directory):
        if plan.chat_template:
            (directory / "chat_template.jinja").write_text(plan.chat_template, encoding="utf-8")
        config = json.dumps(dict(plan.config), indent=2, ensure_ascii=False) + "\n"
        (directory / CONFIG_FILE).write_text(config, encoding="utf-8")


class MergedDecoder:
    """Reads a plan's tensors, merged."""

    def __init__(self, plan: MergePlan, device: torch.device) -> None:
        self._planned = {planned.info.name: planned for planned in plan.tensors}
        self._infos = {name: planned.info for name, planned in self._planned.items()}
        self._base, self._device = plan.base.checkpoint.path, device
        self._lock = threading.Lock()  # a stream sets torch's number of threads while it runs

    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors of the merge, in its order."""
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        """One merged tensor. Raises NonFiniteError when it, or the base's, is not finite."""
        planned = self._planned[name]
        # its bytes come in any order, perhaps again: nobody can hash the file as it passes by
        planned = replace(planned, source=_unheard(planned.source))
        memory = _Memory(planned.info)
        stream = MergeStream(cast(CheckpointWriter, memory), self._device, ignore, self._raise_broken)
        with self._lock:
            stream.run([planned])
        return memory.tensor

    def is_quantized(self, name: str) -> bool:
        """Nothing is: a quantized base is decoded."""
        return False

    def _raise_broken(self, whose: str, planned: PlannedTensor) -> NoReturn:
        where = str(self._base) if whose == "base" else "the merged model"
        raise non_finite_error(where, [planned.info.name])


def _unheard(source: Source) -> Source:
    """The same values, no listener told of their bytes."""
    if isinstance(source, StoredSource):
        return replace(source, passing=None)
    return replace(source, inner=_unheard(source.inner)) if isinstance(source, ResizedSource) else source


class _Memory:
    """Takes the place of the writer of a checkpoint: the pieces of one tensor come together in memory."""

    def __init__(self, info: TensorInfo) -> None:
        self.tensor = torch.empty(info.shape, dtype=info.dtype)

    def write_piece(self, name: str, begin: int, values: torch.Tensor) -> None:
        """Values from byte `begin` on."""
        raw = byte_view(values.contiguous())
        byte_view(self.tensor)[begin : begin + len(raw)] = raw
