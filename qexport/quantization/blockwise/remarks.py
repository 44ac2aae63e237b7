"""What a pass has to say of its calibration: too few tokens, experts without any, Hessians damped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qexport.calibrate.hessian import InputStatistics
from qexport.errors import first_of
from qexport.events import Noted, OnEvent
from qexport.methods import Prepared
from qexport.modeling.blocks import Layer
from qexport.quantization.blockwise.lanes import Group, Lane
from qexport.specs import GptqSpec

_TOKENS_AN_INPUT = 10  # from which on a Hessian's directions are all seen several times


@dataclass
class Remarks:
    """Gathered as layers are solved, on `tokens` of text, and told once."""

    tokens: int
    on_event: OnEvent
    _unseen: dict[str, None] = field(default_factory=dict)  # experts that no token chose
    _scarce: dict[str, None] = field(default_factory=dict)  # those fewer tokens chose than they have inputs
    _damped: dict[str, float] = field(default_factory=dict)

    def few_tokens(self, lanes: Sequence[Lane]) -> None:
        """Hessians of fewer tokens than inputs are not of full rank: the codes fit those few tokens."""
        inputs = max(lane.plan.shapes[name][1] for lane in lanes for name in lane.plan.grids)
        if self.tokens < inputs:
            self.on_event(
                Noted(
                    f"{self.tokens} calibration tokens are too few for layers of {inputs} inputs; "
                    f"at least {inputs} are wanted, better {_TOKENS_AN_INPUT * inputs}: "
                    "--samples, --sequence-length"
                )
            )

    def inputs(self, seen: InputStatistics | None, group: Group) -> None:
        """Which layers saw too few tokens."""
        if seen is None:
            self._unseen |= {layer.name: None for layer in group}
        elif seen.too_few and self.tokens >= seen.inputs:  # of too few in all a note was made
            self._scarce |= {layer.name: None for layer in group}

    def damping(self, layer: Layer, spec: object, prepared: Prepared) -> None:
        """Which Hessians were damped more than was asked for."""
        curvature = prepared.curvature
        if curvature and isinstance(spec, GptqSpec) and curvature.damp > spec.damp:
            self._damped[layer.name] = curvature.damp

    def tell(self) -> None:
        """Says what was gathered."""
        for names, what in (
            (self._unseen, "saw no token and were rounded"),
            (self._scarce, "saw fewer tokens than they have inputs"),
        ):
            if names:
                told = first_of(list(names), 2)
                self.on_event(Noted(f"{len(names)} layers of experts {what} ({told}); more text helps"))
        if self._damped:
            name, damp = max(self._damped.items(), key=lambda item: item[1])
            self.on_event(
                Noted(
                    f"the Hessians of {len(self._damped)} layers were not positive definite and were "
                    f"damped more, {name} by {damp:g} of its mean diagonal"
                )
            )
