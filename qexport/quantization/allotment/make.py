"""A spec with a budget, or with a plan's file, becomes one that every layer's bits are told in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.staging import check_target_file, write_file_atomically
from qexport.devices import device_of
from qexport.errors import QexportError, SpecError
from qexport.events import Noted, OnEvent, ignore
from qexport.methods import FORMATS
from qexport.modeling.calibration import CalibrationData, calibration_data, check_calibration
from qexport.modeling.skeleton import Skeleton, build_skeleton
from qexport.quantization.allotment.allot import (
    Allotment,
    asked,
    choices_of,
    plan_from_file,
    planned_spec,
    prepare,
    without_budget,
)
from qexport.quantization.allotment.held_out import HeldOut
from qexport.quantization.allotment.plan_file import BitsPlan
from qexport.quantization.plan import plan_quantization
from qexport.quantization.source import Source, opened_source
from qexport.sizes import format_size
from qexport.specs import AnyQuantizeSpec, CalibrationSpec

ROUNDS = 3  # how often --max-loss quantizes at most
_HELD_OUT = 8  # of so many calibration samples it keeps one to itself
_MARGIN = 0.95  # what a next round aims at, as a share of what would do if losses were proportional


@dataclass(frozen=True)
class Planned:
    """A plan, the spec that it comes to, and the calibration samples where they were read already.

    `held_out` are those that no solver is to see, with --max-loss; `allotment` is None for a plan that was
    read.
    """

    spec: AnyQuantizeSpec
    plan: BitsPlan
    data: CalibrationData | None = None
    held_out: HeldOut | None = None
    allotment: Allotment | None = None

    def tightened(self, rise: float) -> Planned:
        """The plan of the next round, after one that raised the perplexity by `rise`, a share.

        Raises SpecError when there is none."""
        assert self.allotment is not None  # noqa: S101 - there was a budget
        limit = self.allotment.spec.max_loss or 0.0
        loss = self.plan.loss or 0.0
        plan = self.allotment.plan(loss * math.log1p(limit) / math.log1p(rise) * _MARGIN)
        return replace(self, plan=plan, spec=_spec_of(self.allotment, plan))


def planned(
    source: Source,
    skeleton: Skeleton,
    spec: AnyQuantizeSpec,
    directory: Path,
    *,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> Planned:
    """The plan that `spec` asks for, by budget or by file. Measures unless the cache knows.

    Methods without data are measured on the package's own text. Hidden states past the spec's memory go to a
    file in `directory`. Raises InputError.
    """
    if spec.plan is not None:
        own_spec, plan = plan_from_file(
            source.checkpoint, skeleton, spec, inputs=source.inputs, on_event=on_event
        )
        return Planned(own_spec, plan)
    if spec.group_size is not None:
        what = "sets the size that the average comes to" if spec.average_bits else "is one to choose from"
        on_event(Noted(f"--group-size {spec.group_size} {what}; each layer gets the group size that pays"))
    choices = choices_of(source.checkpoint, skeleton, spec)
    text: CalibrationSpec = spec if isinstance(spec, CalibrationSpec) else CalibrationSpec()
    tell = on_event
    if text is not spec:
        tell = ignore  # no --calibration is advised, which the method has not
        on_event(
            Noted("what layers lose is measured on the package's own little text: a method without data")
        )
    device = device_of(text.device)  # whether it is there is known before a text is read
    data = calibration_data(source.path, text, skeleton, trust_remote_code=trust_remote_code, on_event=tell)
    held_out = None
    if spec.max_loss is not None:
        if data.samples < 2:
            raise SpecError(
                "--max-loss with one calibration sample: none is left to measure the loss on",
                expected="more text, or shorter samples: --sequence-length",
            )
        cut = data.samples - -(-data.samples // _HELD_OUT)
        held_out = HeldOut(source, data.windows[cut:], text.memory, device, trust_remote_code)
        data = replace(data, windows=data.windows[:cut])
    allotment = prepare(
        choices,
        spec,
        data,
        inputs=source.inputs(),
        memory=text.memory,
        directory=directory,
        device=device,
        on_event=on_event,
    )
    plan = allotment.plan()
    if spec.max_loss is None and allotment.is_best(plan):
        on_event(
            Noted(f"{asked(spec)}: every layer has what loses least, with {format_size(plan.size_bytes)}")
        )
    return Planned(_spec_of(allotment, plan), plan, data, held_out, allotment)


def _spec_of(allotment: Allotment, plan: BitsPlan) -> AnyQuantizeSpec:
    candidates = {name: layer.candidate for name, layer in plan.layers.items()}
    return planned_spec(allotment.spec, allotment.choices.uniform, candidates)


def write_plan(
    source: str | Path,
    out: Path,
    spec: AnyQuantizeSpec,
    *,
    adapters: Sequence[str | Path] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> BitsPlan:
    """Writes the plan that `quantize` would follow to the file `out`, and quantizes nothing.

    Of --max-loss that is the first round's, by prediction alone. Raises InputError, OutputExistsError,
    StorageError.
    """
    if spec.format == "gguf" or not (spec.budget or spec.plan):
        what = "for gguf" if spec.format == "gguf" else "without a budget"
        raise SpecError(
            f"--plan-only {what}",
            expected="it is for --bits 3.5, --target-size, --max-loss and --plan, and not for gguf",
        )
    check_target_file(out, "plan", _is_plan, overwrite=overwrite)
    with opened_source(
        source, adapters, spec, trust_remote_code=trust_remote_code, on_event=on_event
    ) as opened:
        skeleton = build_skeleton(opened.path, trust_remote_code=trust_remote_code)
        made = planned(
            opened, skeleton, spec, out.parent, trust_remote_code=trust_remote_code, on_event=on_event
        )
        plan_quantization(opened.checkpoint, skeleton, made.spec, on_event)  # for what that has to tell
    write_file_atomically(out, json.dumps(made.plan.content(), indent=2) + "\n")
    return made.plan


def _is_plan(path: Path) -> bool:
    try:
        return "layers" in read_json(path)
    except QexportError:
        return False


def uniform_size(source: Source, skeleton: Skeleton, spec: AnyQuantizeSpec) -> int:
    """Bytes of all weights that a plan may come to, at most, where nothing is measured.

    Raises the InputError that `quantize` would.
    """
    if isinstance(spec, CalibrationSpec):
        check_calibration(spec)
    if spec.plan is not None:
        return plan_from_file(source.checkpoint, skeleton, spec)[1].size_bytes
    choices_of(source.checkpoint, skeleton, spec)
    if spec.target_size is not None:
        return spec.target_size
    plain = without_budget(spec)
    if spec.max_loss is not None:
        plain = without_budget(spec.model_copy(update={"average_bits": 8.0}))
    plan = plan_quantization(source.checkpoint, skeleton, plain, ignore)
    return sum(info.size for info in plan.infos) * FORMATS[spec.format].copies


def told(plan: BitsPlan) -> Noted:
    """A plan in a line."""
    rows = plan.rows()
    parts = [
        f"{row.layers} of {row.bits} bits" + ("" if row.group_size is None else f" g{row.group_size}")
        for row in rows
    ]
    predicted = "" if plan.loss is None else f"; predicted KL {plan.loss:.4f} nats a token"
    return Noted(f"plan: {plan.bits:.2f} bits on average, layers: {', '.join(parts)}{predicted}")
