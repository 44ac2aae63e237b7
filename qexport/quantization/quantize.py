"""The verb: one checkpoint in, one quantized checkpoint out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.hashing import file_hash
from qexport.checkpoint.manifest import Recipe, fingerprint
from qexport.checkpoint.staging import check_target
from qexport.errors import GateError, SpecError
from qexport.events import Noted, OnEvent, ignore
from qexport.formats.gguf.text_model import is_multimodal
from qexport.methods import FORMATS
from qexport.modeling.calibration import calibration_fingerprints, check_calibration
from qexport.modeling.skeleton import Skeleton, build_skeleton
from qexport.quantization.allotment.held_out import HeldOut
from qexport.quantization.allotment.make import (
    ROUNDS,
    planned,
    told,
    uniform_size,
)
from qexport.quantization.plan import plan_quantization
from qexport.quantization.source import Source, opened_source, text_source
from qexport.quantization.together import Job, shareable, write_together
from qexport.results import QuantizeResult
from qexport.sizes import format_share
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
    without data: as it comes), MissingDependencyError, OutputExistsError, StorageError, and GateError where
    the spec's max_loss is not kept to: then nothing is written.
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

    All outputs of a pass appear together, when all are whole. Every spec is checked before the first pass.
    Raises as `quantize` does.
    """
    for out in outs:
        check_target(out, overwrite=overwrite)
    options = {"overwrite": overwrite, "trust_remote_code": trust_remote_code}
    results: dict[Path, QuantizeResult] = {}
    passes = _passes(outs)
    for group in passes:
        specs = [spec for _, spec in group]
        with opened_source(
            source, adapters, specs[0], trust_remote_code=trust_remote_code, on_event=ignore
        ) as opened:
            _check(opened, specs, trust_remote_code=trust_remote_code)
    try:
        for group in passes:
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
    except BaseException:
        if results:
            on_event(Noted(f"{len(results)} of {len(outs)} outputs stand: {', '.join(map(str, results))}"))
        raise
    return [results[out] for out in outs]


def _recipe_of(opened: Source, spec: AnyQuantizeSpec) -> Recipe:
    return _recipe(opened.inputs(), spec)


def _check(source: Source, specs: Sequence[AnyQuantizeSpec], *, trust_remote_code: bool) -> None:
    """Raises the InputError that `quantize` would, as far as it shows without reading a tensor."""
    if specs[0].format == GGUF:
        from qexport.quantization.gguf.quantize import prepare_gguf  # its packages are an extra

        text, skeleton = text_source(source, specs[0], trust_remote_code=trust_remote_code, on_event=ignore)
        prepare_gguf(text, skeleton, specs[0], trust_remote_code=trust_remote_code, on_event=ignore)
        return
    skeleton = build_skeleton(source.path, trust_remote_code=trust_remote_code)
    for spec in specs:
        planned_size(source.checkpoint, skeleton, spec)


def _passes(outs: Mapping[Path, AnyQuantizeSpec]) -> list[list[tuple[Path, AnyQuantizeSpec]]]:
    """The outputs, those together that one pass makes."""
    groups: list[list[tuple[Path, AnyQuantizeSpec]]] = []
    for out, spec in outs.items():
        fitting = (
            []
            if _alone(spec)
            else [group for group in groups if not _alone(group[0][1]) and shareable(group[0][1], spec)]
        )
        if fitting:
            fitting[0].append((out, spec))
        else:
            groups.append([(out, spec)])
    return groups


def _alone(spec: AnyQuantizeSpec) -> bool:
    """Whether an output has passes of its own: one that is measured before."""
    return spec.format == GGUF or bool(spec.budget or spec.plan)


def _planned(
    source: Source,
    skeleton: Skeleton,
    job: Job,
    *,
    overwrite: bool,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> QuantizeResult:
    """A job whose spec has a budget or a plan. --max-loss is measured before the output has its name and,
    where the prediction was too good, quantized again with more bits, some rounds at most."""
    spec, out = job.spec, job.out
    made = planned(source, skeleton, spec, out.parent, trust_remote_code=trust_remote_code, on_event=on_event)
    gate = None
    if made.held_out and spec.max_loss is not None:
        gate = partial(_gate, made.held_out, spec.max_loss, on_event)
    for number in range(1, ROUNDS + 1):
        on_event(told(made.plan))
        try:
            (result,) = write_together(
                source,
                skeleton,
                [replace(job, spec=made.spec, made=made, gate=gate)],
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
        except _TooLossyError as lossy:
            rise = lossy.rise
        else:
            return result
        if math.isnan(rise):
            break
        if number < ROUNDS:
            try:
                made = made.tightened(rise)
            except SpecError:  # every layer has the most that it can have, or nearly
                break
    raise GateError(
        f"nothing is written to {out}: after {number} round{'s' if number > 1 else ''} the perplexity "
        + ("is no number" if math.isnan(rise) else f"rises by {format_share(rise)}"),
        expected=f"at most {format_share(spec.max_loss or 0.0)} (--max-loss)",
        remedy="allow more, or take another format; --bits and --target-size promise no loss",
    )


class _TooLossyError(Exception):
    """A round's output that raises the perplexity by more than --max-loss."""

    def __init__(self, rise: float) -> None:
        self.rise = rise
        super().__init__(rise)


def _gate(held_out: HeldOut, max_loss: float, on_event: OnEvent, directory: Path) -> None:
    """Raises _TooLossyError when the model in `directory` loses more than `max_loss`."""
    rise = held_out.rise(directory)
    allowed = format_share(max_loss)
    on_event(Noted(f"perplexity on calibration samples held out: {_signed(rise)}, allowed {allowed}"))
    if not rise <= max_loss:  # so that NaN does not pass
        raise _TooLossyError(rise)


def _signed(share: float) -> str:
    return ("+" if share >= 0 else "") + format_share(share)


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
