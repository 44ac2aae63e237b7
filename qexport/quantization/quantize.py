"""The verb: one checkpoint in, one quantized checkpoint out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.hashing import file_hash
from qexport.checkpoint.manifest import Recipe, fingerprint
from qexport.checkpoint.staging import check_target
from qexport.devices import device_of
from qexport.errors import GateError
from qexport.events import Noted, OnEvent, ignore
from qexport.formats.gguf.text_model import is_multimodal
from qexport.methods import FORMATS
from qexport.modeling.calibration import calibration_fingerprints, check_calibration
from qexport.modeling.skeleton import Skeleton, build_skeleton
from qexport.quantization.allotment.make import ROUNDS, perplexity_rise, planned, told, uniform_size
from qexport.quantization.plan import plan_quantization
from qexport.quantization.source import Source, opened_source, text_source
from qexport.quantization.together import Job, shareable, write_together
from qexport.results import QuantizeResult
from qexport.specs import AnyQuantizeSpec, CalibrationSpec, ImportanceSpec

GGUF = "gguf"


def quantize_recipe(source: Path, spec: AnyQuantizeSpec) -> Recipe:
    """What determines the output of `quantize`; the calibration text counts by its content."""
    return _recipe({"model": fingerprint(source)}, spec)


def _recipe(inputs: Mapping[str, str], spec: AnyQuantizeSpec) -> Recipe:
    inputs = dict(inputs)
    options = spec.model_dump(exclude={"calibration", "imatrix", "memory", "plan"})
    packages = spec.packages
    if isinstance(spec, ImportanceSpec) and spec.imatrix is not None:
        inputs["imatrix"] = file_hash(Path(spec.imatrix))
    elif isinstance(spec, CalibrationSpec):
        inputs |= calibration_fingerprints(spec)
    if spec.plan is not None:
        inputs["plan"] = file_hash(Path(spec.plan))
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
    calibration activations. With a device in the spec the model runs there for the calibration, a block at a
    time; codes are chosen on the CPU (in GGUF without data: on the device). The inputs are not changed.

    Raises InputError for what cannot be read or does not fit, NonFiniteError before the long work (in GGUF
    without data: as it comes), MissingDependencyError, OutputExistsError, StorageError.
    """
    check_target(Path(out), overwrite=overwrite)  # again, with the inputs known, before anything is written
    with opened_source(
        source, adapters, spec, trust_remote_code=trust_remote_code, on_event=on_event
    ) as opened:
        options = {"overwrite": overwrite, "trust_remote_code": trust_remote_code}
        if spec.format == GGUF:
            from qexport.quantization.gguf.quantize import quantize_gguf  # its packages are an extra

            opened, skeleton = text_source(
                opened, spec, trust_remote_code=trust_remote_code, on_event=on_event
            )
            recipe = partial(_recipe_of, opened, spec)
            return quantize_gguf(
                opened, skeleton, Path(out), spec, recipe=recipe, on_event=on_event, **options
            )
        skeleton = build_skeleton(opened.path, trust_remote_code=trust_remote_code)
        job = Job(Path(out), spec, partial(_recipe_of, opened, spec))
        if spec.budget or spec.plan:
            return _planned(opened, skeleton, job, on_event=on_event, **options)
        return write_together(opened, skeleton, [job], on_event=on_event, **options)[0]


def quantize_several(
    source: str | Path,
    outs: Mapping[Path, AnyQuantizeSpec],
    *,
    adapters: Sequence[str | Path] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> list[QuantizeResult]:
    """As `quantize`, for each directory its spec. Calibrated ones of the same text are made in one pass: the
    model is read once, and what they can share of each block's statistics is gathered once.

    All outputs of a pass appear together, when all are whole. Raises as `quantize` does.
    """
    for out in outs:
        check_target(out, overwrite=overwrite)
    options = {"overwrite": overwrite, "trust_remote_code": trust_remote_code}
    results: dict[Path, QuantizeResult] = {}
    for group in _passes(outs):
        if len(group) == 1:
            out, spec = group[0]
            results[out] = quantize(source, out, spec, adapters=adapters, on_event=on_event, **options)
            continue
        first = group[0][1]
        with opened_source(
            source, adapters, first, trust_remote_code=trust_remote_code, on_event=on_event
        ) as opened:
            skeleton = build_skeleton(opened.path, trust_remote_code=trust_remote_code)
            jobs = [Job(out, spec, partial(_recipe_of, opened, spec)) for out, spec in group]
            found = write_together(opened, skeleton, jobs, on_event=on_event, **options)
        results |= dict(zip((out for out, _ in group), found, strict=True))
    return [results[out] for out in outs]


def _recipe_of(opened: Source, spec: AnyQuantizeSpec) -> Recipe:
    return _recipe(opened.inputs(), spec)


def _passes(outs: Mapping[Path, AnyQuantizeSpec]) -> list[list[tuple[Path, AnyQuantizeSpec]]]:
    """The outputs, those together that one pass makes."""
    groups: list[list[tuple[Path, AnyQuantizeSpec]]] = []
    for out, spec in outs.items():
        alone = spec.format == GGUF or spec.budget or spec.plan
        fitting = [group for group in groups if not alone and shareable(group[0][1], spec)]
        if fitting:
            fitting[0].append((out, spec))
        else:
            groups.append([(out, spec)])
    return groups


def _planned(
    source: Source,
    skeleton: Skeleton,
    job: Job,
    *,
    overwrite: bool,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> QuantizeResult:
    """A job whose spec has a budget or a plan. --max-loss is measured and, where the prediction was too good,
    quantized again with more bits, some rounds at most."""
    spec, out = job.spec, job.out
    made = planned(source, skeleton, spec, out.parent, trust_remote_code=trust_remote_code, on_event=on_event)
    limit, rise = spec.max_loss, None
    for number in range(ROUNDS):
        on_event(told(made.plan))
        (result,) = write_together(
            source,
            skeleton,
            [replace(job, spec=made.spec, made=made)],
            overwrite=overwrite or number > 0,
            trust_remote_code=trust_remote_code,
            on_event=on_event,
        )
        if limit is None or made.held_out is None:
            break
        memory = spec.memory if isinstance(spec, CalibrationSpec) else CalibrationSpec().memory
        rise = perplexity_rise(
            source,
            out,
            made.held_out,
            memory=memory,
            device=device_of(spec.device),
            trust_remote_code=trust_remote_code,
        )
        on_event(Noted(f"perplexity on calibration samples held out: {rise:+.2%}, allowed {limit:.2%}"))
        if rise <= limit or number + 1 == ROUNDS:
            break
        made = made.tightened(rise)
    if limit is not None and rise is not None and rise > limit:
        raise GateError(
            f"{out} is written, but its perplexity rises by {rise:.2%} after {ROUNDS} rounds",
            expected=f"at most {limit:.2%} (--max-loss)",
            remedy="a smaller --max-loss aims lower; --bits and --target-size promise no loss",
        )
    return result


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
    if spec.budget or spec.plan:
        return uniform_size(Source(checkpoint, checkpoint.path, dict, []), skeleton, spec)
    plan = plan_quantization(checkpoint, skeleton, spec, on_event)
    if isinstance(spec, CalibrationSpec):
        check_calibration(spec)
    return sum(info.size for info in plan.infos) * FORMATS[spec.format].copies
