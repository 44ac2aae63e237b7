"""Outputs of one model that are made in one pass over it: read once, calibrated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qexport.checkpoint.finiteness import require_finite
from qexport.checkpoint.manifest import Recipe
from qexport.checkpoint.sidecars import sidecars_of
from qexport.checkpoint.writer import CheckpointWriter
from qexport.devices import device_of
from qexport.events import Finished, OnEvent, Started
from qexport.measure import Measured
from qexport.methods import FORMATS
from qexport.modeling.calibration import CalibrationData, calibration_data, check_calibration
from qexport.modeling.skeleton import Skeleton
from qexport.quantization.allotment.make import Planned
from qexport.quantization.allotment.plan_file import PLAN_FILE
from qexport.quantization.blockwise.by_blocks import BlockQuantizer
from qexport.quantization.blockwise.lanes import Lane
from qexport.quantization.data_free import quantize_alone
from qexport.quantization.plan import Plan, plan_quantization
from qexport.quantization.source import Source
from qexport.results import QuantizeResult, TensorError
from qexport.specs import AnyQuantizeSpec, CalibrationSpec


@dataclass(frozen=True)
class Job:
    """One output: where, how, what determines it, and the allotment of bits that it follows, if any.

    `gate` gets the finished directory before it has its name: what it raises leaves nothing of the output,
    and what stood there as it was.
    """

    out: Path
    spec: AnyQuantizeSpec
    recipe: Callable[[], Recipe]
    made: Planned | None = None
    gate: Callable[[Path], None] | None = None


def shareable(one: AnyQuantizeSpec, other: AnyQuantizeSpec) -> bool:
    """Whether two outputs can be made in one pass: both see activations, of one text, on one device."""
    if not isinstance(one, CalibrationSpec) or not isinstance(other, CalibrationSpec):
        return False
    return all(getattr(one, name) == getattr(other, name) for name in (*CalibrationSpec.TEXT, "device"))


def write_together(
    source: Source,
    skeleton: Skeleton,
    jobs: Sequence[Job],
    *,
    overwrite: bool,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> list[QuantizeResult]:
    """Writes a checkpoint for each job; all of more than one are `shareable`. What a result tells of seconds
    and memory is of the whole pass. Raises as `quantize` does, before anything is written if it can be."""
    checkpoint = source.checkpoint
    plans = [plan_quantization(checkpoint, skeleton, job.spec, on_event) for job in jobs]
    for job in jobs:
        if isinstance(job.spec, CalibrationSpec):
            check_calibration(job.spec)
    with Measured() as cost, ExitStack() as stack:
        writers = [
            stack.enter_context(_writer(source, job, plan, overwrite, on_event))
            for job, plan in zip(jobs, plans, strict=True)
        ]
        require_finite(checkpoint, on_event=on_event)
        data = _data(source, plans[0], jobs[0], trust_remote_code, on_event)
        figures = [_figures(plan, writer.plan.size) for plan, writer in zip(plans, writers, strict=True)]
        what = ", ".join(
            f"{job.spec.method} {one['bits']:.3g} bits" for job, one in zip(jobs, figures, strict=True)
        )
        on_event(Started(what, sum(len(plan.grids) for plan in plans), "layers"))
        errors = _run(plans, data, writers, jobs[0].out.parent, on_event)
        on_event(Finished())
        for writer, one, lost in zip(writers, figures, errors, strict=True):
            writer.figures.update(one)
            writer.figures["tensor_errors"] = [asdict(error) for error in lost]
            if data:
                writer.figures["calibration"] = data.figures()
    return [
        QuantizeResult(
            path=job.out,
            method=job.spec.method,
            solver=job.spec.solver,
            format=job.spec.format,
            bits=one["bits"],
            quantized_layers=len(plan.grids),
            layers_left=tuple(plan.left),
            size_bytes=one["size_bytes"],
            bits_per_weight=one["bits_per_weight"],
            layer_bits_per_weight=one["layer_bits_per_weight"],
            copies=FORMATS[job.spec.format].copies,
            seconds=cost.seconds,
            peak_bytes=cost.peak_bytes,
            tensors=tuple(lost),
            plan=job.made.plan.rows() if job.made else (),
        )
        for job, plan, one, lost in zip(jobs, plans, figures, errors, strict=True)
    ]


def _writer(source: Source, job: Job, plan: Plan, overwrite: bool, on_event: OnEvent) -> CheckpointWriter:
    spec, module = job.spec, plan.method.format

    def finish(directory: Path) -> None:
        module.finish(directory)
        if job.gate:
            job.gate(directory)

    writer = CheckpointWriter(
        job.out,
        plan.infos,
        config={**source.checkpoint.config, **plan.config_entries},
        recipe=job.recipe,
        max_shard_size=spec.max_shard_size,
        sidecars=sidecars_of(source.path),
        finish=finish,
        copies=FORMATS[spec.format].copies,
        sources=source.directories,
        overwrite=overwrite,
        on_event=on_event,
    )
    for name, content in module.extra_files(plan.config_entries).items():
        writer.add_json(name, content)
    if job.made:
        writer.add_json(PLAN_FILE, job.made.plan.content())
    return writer


def _data(
    source: Source, plan: Plan, job: Job, trust_remote_code: bool, on_event: OnEvent
) -> CalibrationData | None:
    if not isinstance(job.spec, CalibrationSpec):
        return None
    if job.made and job.made.data is not None:
        return job.made.data
    return calibration_data(
        source.path, job.spec, plan.skeleton, trust_remote_code=trust_remote_code, on_event=on_event
    )


def _run(
    plans: Sequence[Plan],
    data: CalibrationData | None,
    writers: Sequence[CheckpointWriter],
    directory: Path,
    on_event: OnEvent,
) -> list[list[TensorError]]:
    """Writes every tensor; the errors of each plan's layers in the order in which they were solved."""
    lanes = [Lane(plan, writer.write) for plan, writer in zip(plans, writers, strict=True)]
    if data is not None:
        memory = min(
            plan.method.spec.memory for plan in plans if isinstance(plan.method.spec, CalibrationSpec)
        )
        device = device_of(plans[0].method.spec.device)  # of all, see `shareable`
        BlockQuantizer(lanes, data, memory, directory, on_event, device).run()
    for plan, lane in zip(plans, lanes, strict=True):
        alone = list(plan.grids) if data is None else [name for name in plan.grids if name in plan.alone]
        lane.errors += quantize_alone(plan, alone, lane.write, on_event)
        for name in plan.kept():
            if name not in lane.rewritten:
                lane.write(name, plan.checkpoint.read(name))
    return [lane.errors for lane in lanes]


def _figures(plan: Plan, size: int) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    parameters = sum(checkpoint.info(name).numel for name in checkpoint.names())
    coded = sum(info.size for info in plan.infos) - sum(checkpoint.info(name).size for name in plan.kept())
    weights = sum(checkpoint.info(name).numel for name in plan.weights)
    bits = sum(grid.bits * checkpoint.info(f"{name}.weight").numel for name, grid in plan.grids.items())
    return {
        "size_bytes": size,
        "bits_per_weight": round(8 * size / parameters, 4),
        "layer_bits_per_weight": round(8 * coded / weights, 4),
        "bits": round(bits / weights, 4),
        "quantized_layers": len(plan.grids),
        "layers_left": len(plan.left),
    }
