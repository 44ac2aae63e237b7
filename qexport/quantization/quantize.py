"""The verb: one checkpoint in, one quantized checkpoint out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.finiteness import require_finite
from qexport.checkpoint.hashing import file_hash
from qexport.checkpoint.manifest import Recipe, fingerprint
from qexport.checkpoint.sidecars import sidecars_of
from qexport.checkpoint.staging import check_target
from qexport.checkpoint.writer import CheckpointWriter
from qexport.events import Finished, OnEvent, Started, ignore
from qexport.formats.gguf.text_model import is_multimodal
from qexport.measure import Measured
from qexport.methods import FORMATS
from qexport.modeling.calibration import (
    CalibrationData,
    calibration_data,
    calibration_fingerprints,
    check_calibration,
)
from qexport.modeling.skeleton import Skeleton, build_skeleton
from qexport.quantization.by_blocks import BlockQuantizer
from qexport.quantization.data_free import quantize_alone
from qexport.quantization.plan import Plan, plan_quantization
from qexport.quantization.source import Source, opened_source, text_source
from qexport.results import QuantizeResult, TensorError
from qexport.specs import AnyQuantizeSpec, CalibrationSpec, ImportanceSpec

GGUF = "gguf"


def quantize_recipe(source: Path, spec: AnyQuantizeSpec) -> Recipe:
    """What determines the output of `quantize`; the calibration text counts by its content."""
    return _recipe({"model": fingerprint(source)}, spec)


def _recipe(inputs: Mapping[str, str], spec: AnyQuantizeSpec) -> Recipe:
    inputs = dict(inputs)
    options = spec.model_dump(exclude={"calibration", "imatrix"})
    packages = spec.packages
    if isinstance(spec, ImportanceSpec) and spec.imatrix is not None:
        inputs["imatrix"] = file_hash(Path(spec.imatrix))
    elif isinstance(spec, CalibrationSpec):
        inputs |= calibration_fingerprints(spec)
    if spec.format == GGUF:
        packages = (*packages, "gguf", "numba")
        options["split"] = "max_shard_size" in spec.model_fields_set  # one file unless a size is named
    return Recipe("quantize", options, inputs, packages)


def quantize(
    source: str | Path,
    out: str | Path,
    spec: AnyQuantizeSpec,
    *,
    adapters: Sequence[str | Path] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> QuantizeResult:
    """Writes `source`, with `adapters` merged into it as it is read, to `out`, quantized as `spec` says.

    Norms, routers and what the spec skips stay as they are, embeddings and the output head too unless they
    are asked for (in GGUF they are codes always), and so does a layer that the format cannot hold; the result
    names those. Methods without data stream tensor by tensor; calibrated ones hold one block and the
    calibration activations. The inputs are not changed.

    Raises InputError for what cannot be read or does not fit, NonFiniteError before the long work (in GGUF
    without data: as it comes), MissingDependencyError, OutputExistsError, StorageError.
    """
    check_target(Path(out), overwrite=overwrite)  # again, with the inputs known, before anything is written
    with opened_source(
        source, adapters, spec, trust_remote_code=trust_remote_code, on_event=on_event
    ) as opened:
        if spec.format == GGUF:
            from qexport.quantization.gguf.quantize import quantize_gguf as run  # its packages are an extra

            opened, skeleton = text_source(
                opened, spec, trust_remote_code=trust_remote_code, on_event=on_event
            )
        else:
            run = _quantize
            skeleton = build_skeleton(opened.path, trust_remote_code=trust_remote_code)
        return run(
            opened,
            skeleton,
            Path(out),
            spec,
            recipe=lambda: _recipe(opened.inputs(), spec),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            on_event=on_event,
        )


def _quantize(
    source: Source,
    skeleton: Skeleton,
    out: Path,
    spec: AnyQuantizeSpec,
    *,
    recipe: Callable[[], Recipe],
    overwrite: bool,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> QuantizeResult:
    checkpoint, path = source.checkpoint, source.path
    plan = plan_quantization(checkpoint, skeleton, spec, on_event)
    if isinstance(spec, CalibrationSpec):
        check_calibration(spec)
    with (
        Measured() as cost,
        CheckpointWriter(
            out,
            plan.infos,
            config={**checkpoint.config, **plan.config_entries},
            recipe=recipe,
            max_shard_size=spec.max_shard_size,
            sidecars=sidecars_of(path),
            finish=plan.method.format.finish,
            copies=FORMATS[spec.format].copies,
            sources=source.directories,
            overwrite=overwrite,
            on_event=on_event,
        ) as writer,
    ):
        for name, content in plan.method.format.extra_files(plan.config_entries).items():
            writer.add_json(name, content)
        require_finite(checkpoint, on_event=on_event)
        data = None
        if isinstance(spec, CalibrationSpec):
            data = calibration_data(
                path, spec, plan.skeleton, trust_remote_code=trust_remote_code, on_event=on_event
            )
        on_event(Started(f"{spec.method} {spec.bits} bits", len(plan.grids), "layers"))
        errors = _run(plan, data, writer, on_event)
        on_event(Finished())
        figures = _figures(plan, writer.plan.size)
        writer.figures.update(figures)
        writer.figures["tensor_errors"] = [asdict(error) for error in errors]
        if data:
            writer.figures["calibration"] = data.figures()
    return QuantizeResult(
        path=out,
        method=spec.method,
        solver=spec.solver,
        format=spec.format,
        bits=spec.bits,
        quantized_layers=len(plan.grids),
        layers_left=tuple(plan.left),
        size_bytes=writer.plan.size,
        bits_per_weight=figures["bits_per_weight"],
        layer_bits_per_weight=figures["layer_bits_per_weight"],
        copies=FORMATS[spec.format].copies,
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
        tensors=tuple(errors),
    )


def planned_size(
    checkpoint: Checkpoint, skeleton: Skeleton, spec: AnyQuantizeSpec, *, on_event: OnEvent = ignore
) -> int:
    """Bytes of the weights that `quantize` would write: all is checked, no tensor is read.

    Raises the InputError that `quantize` would.
    """
    if spec.format == GGUF:
        from qexport.quantization.gguf.quantize import prepare_gguf

        source = Source(checkpoint, checkpoint.path, dict, [checkpoint.path])
        if is_multimodal(checkpoint):
            source, skeleton = text_source(source, spec, on_event=on_event)
        files = prepare_gguf(source, skeleton, spec, on_event=on_event).plan
        return sum(map(files.size, files.variants))
    plan = plan_quantization(checkpoint, skeleton, spec, on_event)
    if isinstance(spec, CalibrationSpec):
        check_calibration(spec)
    return sum(info.size for info in plan.infos) * FORMATS[spec.format].copies


def _run(
    plan: Plan, data: CalibrationData | None, writer: CheckpointWriter, on_event: OnEvent
) -> list[TensorError]:
    """Writes every tensor; the errors of the layers in the order in which they were solved."""
    rewritten: set[str] = set()
    errors: list[TensorError] = []
    alone = list(plan.grids)
    if data is not None:
        blocks = BlockQuantizer(plan, data, writer.write, on_event)
        blocks.run()
        rewritten, errors = blocks.rewritten, blocks.errors
        alone = [name for name in plan.grids if name in plan.alone]
    errors += quantize_alone(plan, alone, writer.write, on_event)
    for name in plan.kept():
        if name not in rewritten:
            writer.write(name, plan.checkpoint.read(name))
    return errors


def _figures(plan: Plan, size: int) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    parameters = sum(checkpoint.info(name).numel for name in checkpoint.names())
    coded = sum(info.size for info in plan.infos) - sum(checkpoint.info(name).size for name in plan.kept())
    weights = sum(checkpoint.info(name).numel for name in plan.weights)
    return {
        "size_bytes": size,
        "bits_per_weight": round(8 * size / parameters, 4),
        "layer_bits_per_weight": round(8 * coded / weights, 4),
        "quantized_layers": len(plan.grids),
        "layers_left": len(plan.left),
    }
