"""From a budget to a plan: the losses are measured, or known, and bits and group sizes go where they pay."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import SpecError, first_of
from qexport.events import Noted, OnEvent, ignore
from qexport.grids.grid import Grid
from qexport.methods import FORMATS, Method, grid_wish
from qexport.modeling.calibration import CalibrationData
from qexport.modeling.skeleton import Skeleton
from qexport.quantization.allotment.budget import (
    Option,
    least_loss,
    least_size,
    smallest_size,
    total_size,
)
from qexport.quantization.allotment.candidates import (
    Candidate,
    candidate_of,
    fitting,
    grids_to_try,
    stored_bytes,
    units_of,
)
from qexport.quantization.allotment.measured import Losses, losses_of, measured_as
from qexport.quantization.allotment.plan_file import BitsPlan, LayerPlan, read_plan
from qexport.quantization.allotment.sensitivity import measured_windows
from qexport.quantization.choice import FULL, chosen_bits, parse_override
from qexport.quantization.plan import Plan, plan_quantization
from qexport.sizes import format_share, format_size
from qexport.specs import AnyQuantizeSpec, Bits


def without_budget(spec: AnyQuantizeSpec) -> AnyQuantizeSpec:
    """The spec of the uniform choice: what layers get that no plan names. Where an average is asked for, that
    is the next width above it that the format has, or the nearest."""
    update = {**dict.fromkeys(spec.BUDGETS), "plan": None}
    if (average := spec.average_bits) is not None:
        update["bits"] = min(_widths(spec), key=lambda bits: (bits < average, abs(bits - average)), default=4)
    return spec.model_copy(update=update)


def _widths(spec: AnyQuantizeSpec) -> list[int]:
    """The bits that the format has."""
    found = []
    for bits in get_args(Bits):
        with contextlib.suppress(SpecError):
            FORMATS[spec.format].module.grid_for(grid_wish(spec, torch.float16, bits=bits))
            found.append(bits)
    return found


@dataclass(frozen=True)
class Choices:
    """What there is to allot: `uniform` is the plan without a budget; `units` are the layers that are one
    choice; `grids` tell what each layer may get."""

    uniform: Plan
    units: Sequence[tuple[str, ...]]
    grids: Mapping[str, Mapping[Candidate, Grid]]


@dataclass(frozen=True)
class Allotment:
    """Choices, and the `losses`, nats a token, that each was measured to cost; see `BitsPlan.measured`."""

    spec: AnyQuantizeSpec
    choices: Choices
    losses: Losses
    measured: Mapping[str, Any]

    def plan(self, most: float | None = None) -> BitsPlan:
        """The plan of the spec's budget; `most`, for --max-loss, is the KL, nats a token, in place of
        log(1 + max_loss). Raises SpecError when no plan keeps to it."""
        units = self.choices.units
        options = [self._options(unit) for unit in units]
        costs = [[option for _, option in unit] for unit in options]
        if self.spec.max_loss is not None:
            limit = math.log1p(self.spec.max_loss) if most is None else most
            chosen = least_size(costs, limit)
            if chosen is None:
                best = math.expm1(sum(min(option.loss for option in unit) for unit in costs))
                raise SpecError(
                    f"{asked(self.spec)}: with the most bits that "
                    f"{self.spec.format} has, the perplexity is predicted to rise by {format_share(best)}",
                    expected="more than that",
                )
        else:
            chosen = least_loss(costs, self._budget() - self._fixed())
            if chosen is None:
                least = (self._fixed() + smallest_size(costs)) * self._copies
                raise SpecError(
                    f"{asked(self.spec)}: the smallest that {self.spec.format} gives here is {least} bytes "
                    f"({format_size(least)})",
                    expected="at least that",
                )
        candidates = {
            name: unit_options[number][0]
            for unit, unit_options, number in zip(units, options, chosen, strict=True)
            for name in unit
        }
        size = (self._fixed() + total_size(costs, chosen)) * self._copies
        return _bits_plan(self.spec, self.choices.uniform, candidates, size, self.losses, self.measured)

    def is_best(self, plan: BitsPlan) -> bool:
        """Whether no other plan is predicted to lose less."""
        for unit in self.choices.units:
            options = dict(self._options(unit))
            if options[plan.layers[unit[0]].candidate].loss > min(option.loss for option in options.values()):
                return False
        return True

    def _options(self, unit: Sequence[str]) -> list[tuple[Candidate, Option]]:
        method, shapes, grids = self.choices.uniform.method, self.choices.uniform.shapes, self.choices.grids
        common = [candidate for candidate in grids[unit[0]] if all(candidate in grids[name] for name in unit)]
        return [
            (
                candidate,
                Option(
                    sum(stored_bytes(method, shapes[name], grids[name][candidate]) for name in unit),
                    math.fsum(self.losses[name][candidate] for name in unit),
                ),
            )
            for candidate in common
        ]

    @property
    def _copies(self) -> int:
        return FORMATS[self.spec.format].copies

    def _fixed(self) -> int:
        """Bytes of everything that the allotment leaves as it is, once."""
        uniform = self.choices.uniform
        own = sum(
            stored_bytes(uniform.method, uniform.shapes[name], uniform.grids[name])
            for unit in self.choices.units
            for name in unit
        )
        return sum(info.size for info in uniform.infos) - own

    def _budget(self) -> int:
        """Bytes for all weights, once."""
        if self.spec.target_size is not None:
            return self.spec.target_size // self._copies
        assert self.spec.average_bits is not None  # noqa: S101 - one of the three is set
        uniform = self.choices.uniform
        return self._fixed() + sum(
            _at_average(uniform.method, uniform.shapes[name], self.spec.average_bits)
            for unit in self.choices.units
            for name in unit
        )


def asked(spec: AnyQuantizeSpec) -> str:
    """The budget as the user gave it."""
    if spec.target_size is not None:
        return f"--target-size {format_size(spec.target_size)}"
    if spec.max_loss is not None:
        return f"--max-loss {format_share(spec.max_loss)}"
    return f"--bits {spec.average_bits:g}"


def _at_average(method: Method, shape: tuple[int, int], bits: float) -> int:
    """Bytes of a layer [out, in] with so many bits on average and the common group size: between those of
    the next widths below and above that the format has."""
    common = candidate_of(method.common).group_size
    sizes = {
        candidate.bits: stored_bytes(method, shape, grid)
        for candidate, grid in grids_to_try(method, common).items()
    }
    if not min(sizes) <= bits <= max(sizes):
        raise SpecError(
            f"--bits {bits:g} in {method.spec.format}",
            expected=f"an average from {min(sizes)} to {max(sizes)}",
        )
    below, above = max(b for b in sizes if b <= bits), min(b for b in sizes if b >= bits)
    share = (bits - below) / (above - below) if above > below else 0.0
    return int(sizes[below] + share * (sizes[above] - sizes[below]))


def prepare(
    choices: Choices,
    spec: AnyQuantizeSpec,
    data: CalibrationData,
    *,
    inputs: Mapping[str, str],
    memory: int,
    directory: Path,
    device: torch.device,
    on_event: OnEvent,
) -> Allotment:
    """Measures, unless the cache knows, what each layer may cost. `inputs` are the hashes of what the model
    is made of; `memory` bytes are for hidden states, those past it go to a file in `directory`. The model
    runs on `device`.
    """
    uniform = choices.uniform
    measured = {name: choices.grids[name] for unit in choices.units for name in unit}
    losses = losses_of(
        uniform.checkpoint,
        uniform.skeleton,
        uniform.method,
        measured,
        data.windows,
        inputs=inputs,
        memory=memory,
        directory=directory,
        device=device,
        on_event=on_event,
    )
    tokens = measured_windows(data.windows).numel()
    return Allotment(spec, choices, losses, {"tokens": tokens, **measured_as(uniform.method, inputs)})


def choices_of(checkpoint: Checkpoint, skeleton: Skeleton, spec: AnyQuantizeSpec) -> Choices:
    """All that is known before anything is measured.

    Raises SpecError where the format has but one grid, or none that may differ from layer to layer, and for
    an average or a size that cannot be kept to.
    """
    uniform = plan_quantization(checkpoint, skeleton, without_budget(spec), ignore)
    own = chosen_bits([*uniform.grids, *uniform.left], _other_bits(spec))
    wanted = [name for name in uniform.grids if name not in uniform.alone and name not in own]
    all_grids = grids_to_try(uniform.method)
    grids = {name: fitting(uniform.method, uniform.shapes[name], all_grids) for name in wanted}
    units = units_of(uniform.skeleton, {name for name, found in grids.items() if found})
    choices = Choices(uniform, units, grids)
    _check_mixing(spec, choices)
    if spec.max_loss is None:  # whether the budget can be kept to is known before
        unknown = {name: dict.fromkeys(grids[name], 0.0) for unit in units for name in unit}
        Allotment(spec, choices, unknown, {}).plan()
    return choices


def _other_bits(spec: AnyQuantizeSpec) -> list[str]:
    """The user's overrides that give layers other bits; those that keep layers full have done their work."""
    return [text for text in spec.override if parse_override(text).bits != FULL]


def _check_mixing(spec: AnyQuantizeSpec, choices: Choices) -> None:
    """SpecError where the format's config cannot tell layers of differing bits."""
    uniform, units, grids = choices.uniform, choices.units, choices.grids
    remedy = "another format, such as gptq, gptq_v2 or mlx"
    found = {candidate for unit in units for candidate in grids[unit[0]]}
    if len(found) < 2:
        raise SpecError(
            f"{asked(spec)}: {spec.format} has one grid for these layers "
            f"({', '.join(map(str, found)) or 'none'}): there is nothing to allot",
            remedy=remedy,
        )
    unit, other = next(
        (unit, candidate)
        for unit in units
        for candidate in grids[unit[0]]
        if candidate != candidate_of(uniform.grids[unit[0]])
    )
    trial = planned_spec(spec, uniform, dict.fromkeys(unit, other))
    try:
        plan_quantization(uniform.checkpoint, uniform.skeleton, trial, ignore)
    except SpecError as error:
        raise SpecError(
            f"{asked(spec)}: {spec.format} does not take layers of differing grids ({error.found})",
            remedy=remedy,
        ) from error


def planned_spec(
    spec: AnyQuantizeSpec, uniform: Plan, candidates: Mapping[str, Candidate]
) -> AnyQuantizeSpec:
    """`spec` with a plan in the place of its budget: the most frequent grid becomes the common one, the
    others overrides. The user's own overrides stand."""
    found = {name: candidate_of(grid) for name, grid in uniform.grids.items()} | dict(candidates)
    shapes = uniform.shapes.values()
    counts = Counter(
        candidate
        for candidate in found.values()
        if candidate.bits != FULL
        and (
            candidate.group_size is None
            or candidate.group_size == -1
            or all(shape[1] % candidate.group_size == 0 for shape in shapes)
        )
    )
    common = counts.most_common(1)[0][0] if counts else candidate_of(uniform.method.common)
    overrides = [text for text in spec.override if parse_override(text).bits == FULL]
    overrides += [f"{name}={candidate}" for name, candidate in found.items() if candidate != common]
    return without_budget(spec).model_copy(
        update={"bits": common.bits, "group_size": common.group_size, "override": tuple(overrides)}
    )


def plan_from_file(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    spec: AnyQuantizeSpec,
    *,
    inputs: Callable[[], Mapping[str, str]] | None = None,
    on_event: OnEvent = ignore,
) -> tuple[AnyQuantizeSpec, BitsPlan]:
    """The spec that the plan in the file `spec.plan` comes to. --override and --skip go before it; a note
    tells of layers that the plan does not name. With the hashes of what the model is made of, `inputs`, what
    the file says of losses counts where it was measured of this model and method.

    Raises SpecError for a file that does not fit the model or the format.
    """
    assert spec.plan is not None  # noqa: S101 - the caller asked
    uniform = plan_quantization(checkpoint, skeleton, without_budget(spec), ignore)
    path = Path(spec.plan)
    read = read_plan(path, [*uniform.grids, *uniform.left])
    own = chosen_bits([*uniform.grids, *uniform.left], _other_bits(spec))
    named = read.candidates
    if unnamed := [
        name for name in uniform.grids if name not in named and name not in (*own, *uniform.alone)
    ]:
        on_event(
            Noted(
                f"the plan does not name {len(unnamed)} of {len(uniform.grids)} layers "
                f"({first_of(unnamed, 2)}): they get {spec.bits} bits"
            )
        )
    candidates = {name: c for name, c in named.items() if name in uniform.grids and name not in own}
    if all(name in candidates and candidates[name].bits == FULL for name in uniform.grids):
        raise SpecError(
            f"--plan {path} leaves no layer to quantize", expected=f"fewer than {FULL} bits for some"
        )
    try:
        planned = planned_spec(spec, uniform, candidates)
        plan = plan_quantization(checkpoint, skeleton, planned, ignore)
    except SpecError as error:
        found = error.found.removeprefix("--override ")
        raise SpecError(f"--plan {path}: {found}", expected=error.expected, remedy=error.remedy) from error
    size = sum(info.size for info in plan.infos) * FORMATS[spec.format].copies
    made = _bits_plan(spec, uniform, candidates, size, read.losses, read.measured)
    # part of the losses predicts nothing
    known = all(layer.loss is not None for name, layer in made.coded.items() if name not in uniform.alone)
    if (
        not known
        or inputs is None
        or read.measured
        != {
            **read.measured,
            **measured_as(uniform.method, inputs()),
        }
    ):
        made = _bits_plan(spec, uniform, candidates, size, {}, {})
    return planned, made


def _bits_plan(
    spec: AnyQuantizeSpec,
    uniform: Plan,
    candidates: Mapping[str, Candidate],
    size: int,
    losses: Mapping[str, Mapping[Candidate, float]],
    measured: Mapping[str, Any],
) -> BitsPlan:
    budget = {"bits" if name == "average_bits" else name: getattr(spec, name) for name in spec.BUDGETS}
    layers = {
        name: LayerPlan(
            candidates.get(name) or candidate_of(grid), math.prod(uniform.shapes[name]), losses.get(name, {})
        )
        for name, grid in uniform.grids.items()
    }
    return BitsPlan({k: v for k, v in budget.items() if v is not None}, layers, size, measured)
