"""Scales, norms and biases of neighbouring blocks by gradients, codes as they are, for what comes out.

The full-precision model's hidden states after the last of them tell what should come out, and the curvature
of the model's loss by it how much each deviation costs. Like the training of step sizes in EfficientQAT (Chen
et al. 2024, section 3.2), here weighed, and by the few numbers of a few blocks. Two at a time make good for
each other what one alone cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from qexport.grids.grid import Grid, Scalable, spread
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream, Layer, set_weight

_EPOCHS = 4
_WARM_UP = 5  # steps
_SCALES_RATE = 7e-3  # of the logarithm of a scale, a step of Adam
_FREE_RATE = 2e-3  # of the root mean square of a norm's weight or a bias
_HELD_OUT = 8  # each so many-th batch tells whether tuning helped, and is not learned from
_FEW = 4  # batches, from which on one can be held out


Cost = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Number of a batch, what a block puts out for it, and what it should, [n, length, hidden] -> a number."""


def weighed_error(metric: torch.Tensor) -> Cost:
    """e^T M e of the deviations e, M fp32 [hidden, hidden], as a share of what is put out."""

    def cost(number: int, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        error = found - wanted
        return (error @ metric).mul(error).mean() / wanted.square().mean().clamp(min=1e-30)

    return cost


def divergence(batches: Sequence[torch.Tensor], logits: Callable[..., torch.Tensor]) -> Cost:
    """KL(full || now), nats a token: what the last block's deviations cost needs no approximation."""

    def cost(number: int, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            full = logits(batches[number], wanted).float().log_softmax(-1)
        now = logits(batches[number], found).float().log_softmax(-1)
        return (full.exp() * (full - now)).sum(-1).mean()

    return cost


@dataclass(frozen=True)
class Tunable:
    """Block number `index`, `module`, whose `solved` layers have codes.

    `free` are inner names of tensors that are stored as they are, of which those of one dimension are tuned,
    and rounded by `keep`.
    """

    index: int
    module: nn.Module
    solved: Mapping[str, tuple[Layer, Any, Grid]]
    free: Collection[str]
    keep: Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Tuned:
    """What became of a block: codes of layers by inner name, and the inner names of other tensors."""

    codes: dict[str, Any] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


def tune_blocks(
    stream: BlockStream, blocks: Sequence[Tunable], *, wanted: Activations, now: Activations, cost: Cost
) -> list[Tuned]:
    """Tunes neighbouring `blocks` to put out the `wanted` hidden states; what became of each, in order.

    `now` are those that the first of them gets, and `cost` tells what it costs to put out others. The blocks
    are left as tuned where batches that were held out gain by it, and otherwise as they were.
    """
    tuners = [_Tuner(block, stream.device) for block in blocks]
    if not any(group["params"] for tuner in tuners for group in tuner.parameters()):
        return [Tuned() for _ in tuners]
    numbers = list(range(len(now)))
    held = numbers[::_HELD_OUT] if len(numbers) >= _FEW else []
    learned = [number for number in numbers if number not in held]
    steps = _EPOCHS * len(learned)
    generator = torch.Generator().manual_seed(0)

    def loss(number: int) -> torch.Tensor:
        hidden = now[number]
        for tuner in tuners:
            hidden = stream.forward(tuner.index, hidden, tuner.run)
        return cost(number, hidden, wanted[number])

    def held_out() -> float:
        with torch.no_grad():
            return sum(float(loss(number)) for number in held or learned)

    before = held_out()
    optimizer = torch.optim.Adam(
        [group for tuner in tuners for group in tuner.parameters()], betas=(0.9, 0.95)
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARM_UP, max(1 - step / steps, 0.0))
    )
    with torch.enable_grad():
        for _ in range(_EPOCHS):
            for place in torch.randperm(len(learned), generator=generator).tolist():
                optimizer.zero_grad()
                loss(learned[place]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                rate.step()
    for tuner in tuners:
        tuner.settle()
    if held_out() < before:
        return [tuner.applied() for tuner in tuners]
    return [Tuned() for _ in tuners]


class _Tuner:
    """A block's tensors as functions of what is tuned, all on `device`, where the block lies; codes and what
    becomes of them on the CPU."""

    def __init__(self, tunable: Tunable, device: torch.device) -> None:
        self.index, self._block, self._keep = tunable.index, tunable.module, tunable.keep
        solved, free = tunable.solved, tunable.free
        self._layers = {inner: one for inner, one in solved.items() if isinstance(one[2], Scalable)}
        self._device = device
        self._decoded = {
            inner: grid.decode(codes).to(device) for inner, (_, codes, grid) in self._layers.items()
        }
        self._log_factors = {
            inner: torch.zeros(_groups(decoded, self._layers[inner][2]), device=device, requires_grad=True)
            for inner, decoded in self._decoded.items()
        }
        parameters = dict(self._block.named_parameters())
        self._base = {
            inner: value.data.clone()
            for inner, value in parameters.items()
            if inner in free and value.dim() == 1 and value.is_floating_point()
        }
        self._spread = {inner: value.square().mean().sqrt() for inner, value in self._base.items()}
        self._offsets = {
            inner: torch.zeros_like(base, requires_grad=True) for inner, base in self._base.items()
        }
        self._settled: dict[str, torch.Tensor] | None = None
        self._codes: dict[str, Any] = {}

    def parameters(self) -> list[dict[str, Any]]:
        """For an optimizer."""
        return [
            {"params": list(self._log_factors.values()), "lr": _SCALES_RATE},
            {"params": list(self._offsets.values()), "lr": _FREE_RATE},
        ]

    def run(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's forward under the tensors as they are now."""
        return functional_call(self._block, self._tensors(), (hidden, *args), kwargs)

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self._settled is not None:
            return self._settled
        found = {
            inner: base + self._spread[inner] * self._offsets[inner] for inner, base in self._base.items()
        }
        for inner, (layer, codes, grid) in self._layers.items():
            decoded = self._decoded[inner]
            factors = self._log_factors[inner].exp()
            group_of = getattr(codes, "group_of", None)
            weight = decoded * spread(factors, decoded.shape[1], grid, group_of)
            found[f"{inner}.weight"] = weight.t() if layer.transposed else weight
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Rounds all to what will be stored; from now on the block runs with that."""
        found = {
            inner: self._keep(inner, value).to(value.dtype)
            for inner, value in self._tensors().items()
            if inner in self._base
        }
        for inner, (layer, codes, grid) in self._layers.items():
            assert isinstance(grid, Scalable)  # noqa: S101 - only such were taken
            self._codes[inner] = grid.stretched(codes, self._log_factors[inner].exp().cpu())
            weight = grid.decode(self._codes[inner]).to(self._device)
            found[f"{inner}.weight"] = weight.t().contiguous() if layer.transposed else weight
        self._settled = found

    def applied(self) -> Tuned:
        """Puts the settled tensors into the block."""
        assert self._settled is not None  # noqa: S101 - `settle` comes first
        for inner in self._base:
            self._block.get_parameter(inner).data = self._settled[inner]
        for inner, (layer, _, grid) in self._layers.items():
            set_weight(self._block, layer, grid.decode(self._codes[inner]))
        return Tuned(self._codes, set(self._base))


def _groups(decoded: torch.Tensor, grid: Grid) -> tuple[int, int]:
    out, inputs = decoded.shape
    return out, -(-inputs // grid.group_width(inputs))
