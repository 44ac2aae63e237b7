"""`qexport merge`: adapters into their base, a few rows in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from qexport.checkpoint.finiteness import non_finite_error, require_finite
from qexport.checkpoint.manifest import Recipe, fingerprint
from qexport.checkpoint.sharding import PYTORCH, SAFETENSORS, plan_shards
from qexport.checkpoint.writer import CheckpointWriter
from qexport.devices import device_of
from qexport.errors import NonFiniteError
from qexport.events import Finished, OnEvent, Started, ignore
from qexport.measure import peak_resident_bytes
from qexport.merging.adapter import Adapter, open_adapter
from qexport.merging.base import ChosenBase, choose_base
from qexport.merging.plan import MergePlan, plan_merge
from qexport.merging.stream import MergeStream, PlannedTensor, stream_bytes
from qexport.results import MergeResult, TensorChange, plain
from qexport.specs import MergeSpec


def merge_recipe(base: str | Path, adapters: Sequence[str | Path], spec: MergeSpec) -> Recipe:
    """What determines the output of `merge`; the order of the adapters counts, and their weights."""
    opened = [open_adapter(adapter) for adapter in adapters]
    return _recipe(choose_base(str(base), opened, spec.base_precision), opened, spec)


def _recipe(base: ChosenBase, adapters: Sequence[Adapter], spec: MergeSpec) -> Recipe:
    inputs = {"base": fingerprint(base.checkpoint.path)}
    inputs.update({f"adapter {n}": fingerprint(a.path) for n, a in enumerate(adapters, start=1)})
    options = spec.model_dump() | {"weights": [adapter.weight for adapter in adapters]}
    return Recipe("merge", options, inputs, packages=("torch", "peft"))


def merge(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    spec: MergeSpec | None = None,
    *,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = ignore,
) -> MergeResult:
    """Writes `base` with `adapters` merged into it, one after the other, to `out`.

    An adapter given as "PATH:WEIGHT" has its change multiplied by the weight. Every weight is changed in
    fp32 and rounded once. The output is the base's in all else, or the adapter's where that brings a
    tokenizer or a resized vocabulary. The inputs are not changed.

    Raises InputError for what cannot be read, AdapterError for an adapter of another base or of a kind
    that no weight can hold, MissingDependencyError where PEFT is needed and not installed,
    NonFiniteError, OutputExistsError, StorageError.
    """
    spec = spec or MergeSpec()
    device = device_of(spec.device)
    plan = plan_merge(base, adapters, spec, trust_remote_code=trust_remote_code, on_event=on_event)
    with CheckpointWriter(
        Path(out),
        [planned.info for planned in plan.tensors],
        config=plan.config,
        recipe=lambda: _recipe(plan.base, plan.adapters, spec),
        max_shard_size=spec.max_shard_size,
        naming=PYTORCH if spec.legacy_format else SAFETENSORS,
        sidecars=plan.sidecars,
        overwrite=overwrite,
        sources=[plan.base.checkpoint.path, *(adapter.path for adapter in plan.adapters)],
        on_event=on_event,
    ) as writer:
        if plan.chat_template:
            writer.add_text("chat_template.jinja", plan.chat_template)
        on_event(Started("merge", writer.plan.size, "bytes"))
        stream = MergeStream(writer, device, on_event, partial(_raise_broken, plan))
        stream.run(plan.tensors)
        on_event(Finished())
        for passing in plan.passing:
            passing.remember()
        result = MergeResult(
            Path(out),
            plan.base.checkpoint.path,
            plan.base.precision,
            plan.vocabulary_rows,
            plan.size,
            len(plan.tensors),
            tuple(
                TensorChange(name, told.relative, told.adapters)
                for name, told in stream.changed.items()
                if told.delta_square
            ),
        )
        writer.figures.update(merge_figures(result, plan.adapters))
    return result


@dataclass(frozen=True)
class PlannedMerge:
    """What a merge would do: `touched` are name, shape and the adapters' numbers; sizes in bytes."""

    tensors: int
    touched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    files: tuple[tuple[str, int], ...]
    size_bytes: int
    peak_bytes: int


def planned_merge(
    base: str | Path,
    adapters: Sequence[str | Path],
    spec: MergeSpec | None = None,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> PlannedMerge:
    """The same checks as `merge`, and what it would write; nothing is written.

    The memory is what this process holds now, the pieces under way and the largest tensor that a kind
    of adapter needs as a whole. Raises as `merge` does.
    """
    spec = spec or MergeSpec()
    device_of(spec.device)
    plan = plan_merge(base, adapters, spec, trust_remote_code=trust_remote_code, on_event=on_event)
    naming = PYTORCH if spec.legacy_format else SAFETENSORS
    shards = plan_shards([t.info for t in plan.tensors], spec.max_shard_size, naming).shards
    return PlannedMerge(
        len(plan.tensors),
        tuple((t.info.name, t.info.shape, t.adapters) for t in plan.touched),
        tuple((shard.file, shard.size) for shard in shards),
        plan.size,
        peak_resident_bytes() + stream_bytes(plan.tensors),
    )


def _raise_broken(plan: MergePlan, whose: str, planned: PlannedTensor) -> NoReturn:
    """Raises NonFiniteError for a tensor that is not finite: merged, or in the base, then for all such."""
    name = planned.info.name
    if whose == "base":
        if plan.base.checkpoint.quantization is None:
            require_finite(plan.base.checkpoint)
        raise non_finite_error(str(plan.base.checkpoint.path), [name])
    if planned.info.dtype == torch.float16:
        raise NonFiniteError(
            f"the merged model has NaN or infinity in {name}, as float16",
            expected="weights below 65504",
            remedy="choose --dtype bfloat16 or float32",
        )
    raise non_finite_error("the merged model", [name])


def merge_figures(result: MergeResult, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The merge report: what changed, by how much, by which adapter."""
    figures: dict[str, Any] = plain(
        {
            "tensors": result.tensors,
            "tensors_changed": len(result.changes),
            "size_bytes": result.size_bytes,
            "base": str(result.base),
            "base_precision": result.base_precision,
            "vocabulary_rows": result.vocabulary_rows,
            "adapters": [
                {"number": n, "path": str(adapter.path), "kind": adapter.kind, "weight": adapter.weight}
                for n, adapter in enumerate(adapters, start=1)
            ],
            "changes": [asdict(change) for change in result.changes],
        }
    )
    return figures
