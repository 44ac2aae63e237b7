"""A plan of bits, and bits_plan.json, which keeps it: made by an allotment, open to editing, read again."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import is_file
from qexport.errors import SpecError
from qexport.quantization.allotment.candidates import Candidate
from qexport.quantization.choice import FULL
from qexport.results import PlanRow
from qexport.version import __version__

PLAN_FILE = "bits_plan.json"
_MOST_BITS = 8
_LAYERS, _BITS, _GROUP = "layers", "bits", "group_size"
_LOSSES, _MEASURED = "kl_of", "measured"
_MOST = 1e6  # nats a token: no model loses so much, and a sum of such losses is still a number


@dataclass(frozen=True)
class LayerPlan:
    """What a layer gets; `weights` that it has; and the loss, nats a token, of all it could get, where that
    was measured."""

    candidate: Candidate
    weights: int
    losses: Mapping[Candidate, float]

    @property
    def loss(self) -> float | None:
        """That of the choice."""
        return self.losses.get(self.candidate)


@dataclass(frozen=True)
class BitsPlan:
    """Grids by layer, names as on disk; those of 16 bits stay as they are. `budget` is what was asked for,
    `size_bytes` all weights of the output; `measured` tells on how many tokens the losses were measured, and
    of what model and method (empty: they were not)."""

    budget: Mapping[str, float]
    layers: Mapping[str, LayerPlan]
    size_bytes: int
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def coded(self) -> dict[str, LayerPlan]:
        """The layers that become codes."""
        return {name: layer for name, layer in self.layers.items() if layer.candidate.bits != FULL}

    @property
    def bits(self) -> float:
        """Bits a code, the mean over all weights of the layers."""
        layers = self.coded.values()
        weights = sum(layer.weights for layer in layers)
        return sum(layer.candidate.bits * layer.weights for layer in layers) / max(weights, 1)

    @property
    def loss(self) -> float | None:
        """Predicted KL(full || quantized), nats a token: the sum over the layers that were measured."""
        return _total(self.coded.values())

    def rows(self) -> tuple[PlanRow, ...]:
        """The layers counted by grid, the fewest bits first."""
        kinds: dict[Candidate, list[LayerPlan]] = defaultdict(list)
        for layer in self.coded.values():
            kinds[layer.candidate].append(layer)
        return tuple(
            PlanRow(
                candidate.bits,
                candidate.group_size,
                len(layers),
                sum(layer.weights for layer in layers),
                _total(layers),
            )
            for candidate, layers in sorted(
                kinds.items(), key=lambda kind: (kind[0].bits, kind[0].group_size or 0)
            )
        )

    def content(self) -> dict[str, Any]:
        """What bits_plan.json holds."""
        return {
            "qexport": __version__,
            "budget": dict(self.budget),
            "mean_bits": round(self.bits, 4),
            "size_bytes": self.size_bytes,
            "predicted_kl": self.loss,
            _MEASURED: dict(self.measured),
            _LAYERS: {
                name: {
                    _BITS: layer.candidate.bits,
                    _GROUP: layer.candidate.group_size,
                    **({"kl": layer.loss} if layer.loss is not None else {}),
                    **({_LOSSES: {str(c): loss for c, loss in layer.losses.items()}} if layer.losses else {}),
                }
                for name, layer in self.layers.items()
            },
        }


def _total(layers: Iterable[LayerPlan]) -> float | None:
    known = [layer.loss for layer in layers if layer.loss is not None]
    return math.fsum(known) if known else None


@dataclass(frozen=True)
class ReadPlan:
    """What a file tells: bits and group sizes by layer, and what was measured when it was made, as
    `BitsPlan` has it."""

    candidates: Mapping[str, Candidate]
    losses: Mapping[str, Mapping[Candidate, float]]
    measured: Mapping[str, Any]


def read_plan(path: Path, layers: Collection[str]) -> ReadPlan:
    """From a file that `BitsPlan.content` wrote and the user may have edited.

    What else it holds does not matter, and losses that are none are left out. Raises SpecError for a file
    that is no plan, a name that is none of `layers`, and values that are no bits or group sizes.
    """
    if not is_file(path):
        what = "this is a directory" if path.is_dir() else "there is no such file"
        raise SpecError(f"--plan {path}: {what}", expected=f"a {PLAN_FILE}")
    content = read_json(path)
    planned = content.get(_LAYERS)
    if not isinstance(planned, dict) or not planned:
        raise SpecError(
            f"--plan {path} has no {_LAYERS!r}",
            expected=f"a {PLAN_FILE} as --plan-only or --bits 3.5 make it",
        )
    found: dict[str, Candidate] = {}
    losses: dict[str, dict[Candidate, float]] = {}
    known = set(layers)
    for name, entry in planned.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise SpecError(
                f"--plan {path}: {name} is no linear layer of the model",
                expected=f"names such as {near[0] if near else next(iter(layers), 'none')}",
            )
        values: dict[str, Any] = entry if isinstance(entry, dict) else {}
        bits, group = values.get(_BITS), values.get(_GROUP)
        if (
            bits is None
            or not (_is_whole(bits) and (0 < bits <= _MOST_BITS or bits == FULL))
            or not (group is None or (_is_whole(group) and (group > 0 or group == -1)))
        ):
            raise SpecError(
                f"--plan {path}: {name} has {json.dumps(entry)[:80]}",
                expected=f'{{"{_BITS}": 4, "{_GROUP}": 128}}: 1 to {_MOST_BITS} bits, or {FULL} to keep the '
                "layer; a group size, or -1 for a whole row",
            )
        found[name] = Candidate(bits, None if bits == FULL else group)
        losses[name] = _losses(values.get(_LOSSES))
    measured = content.get(_MEASURED)
    return ReadPlan(found, losses, measured if isinstance(measured, dict) else {})


def _losses(kept: Any) -> dict[Candidate, float]:
    found: dict[Candidate, float] = {}
    for text, loss in (kept if isinstance(kept, dict) else {}).items():
        with contextlib.suppress(ValueError):
            if isinstance(loss, int | float) and not isinstance(loss, bool) and 0 <= loss < _MOST:
                found[Candidate.parse(text)] = float(loss)
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
