"""What a layer's codes cost the model: nats a token, measured once for each layer and grid.

To second order in a layer's weight error D, the divergence of the changed model from the full one is
    KL = 1/2 E_t[(g_t^T D x_t)^2],
x_t being the layer's input at a position and g_t the gradient, by its output there, of the log-likelihood
of labels drawn from the model itself (Fisher information; LeCun et al., "Optimal Brain Damage", 1990; Li
et al., "BRECQ", 2021, section 3). Positions are taken as independent: the mean over tokens then converges
after a few thousand of them, where the square of a window's sum would need thousands of windows.

With D of GPTQ that agrees with the divergence that is really measured with one unit quantized: on
tinystories-656k .91 to .97 of it at 2, 3, 4 and 8 bits, and the same order (correlation of logarithms over
.98); on captions22m 1.05 to 1.09 of it at 4 and 3 bits (.99). Rounding at 2 bits is too far for a second
order on captions22m: 1.5 times the truth, scattered by a factor of 2 (.83).

D is that of the solver itself where it needs no data. Calibrated ones are stood for by GPTQ on the
full-precision inputs: scale search loses 1.6 times as much and orders layers less well (.75 to .80).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexport.calibrate.hessian import InputStatistics, adding
from qexport.calibrate.windows import batches
from qexport.checkpoint.checkpoint import Checkpoint
from qexport.devices import CPU
from qexport.errors import NonFiniteError
from qexport.events import OnEvent
from qexport.grids.grid import Grid, SelfFitting
from qexport.methods import Solving
from qexport.modeling.backward import backward, sampled_likelihood
from qexport.modeling.blocks import BlockStream, Layer, weight_of
from qexport.modeling.skeleton import Skeleton
from qexport.quantization.allotment.candidates import Candidate
from qexport.solvers.gptq import curvature, gptq
from qexport.solvers.search import search

BATCH_TOKENS = 2048  # tokens that go through a block at once, with what autograd keeps of them
MOST_TOKENS = 32_768  # enough of them: see `measured_windows`
_GRADED = 4  # of so many windows one gets gradients
_DAMP = 0.01

Losses = Mapping[str, Mapping[Candidate, float]]
"""Layer -> candidate -> nats a token."""


def stand_in(method: Solving) -> str:
    """Whose codes are measured: a data-free solver's own, GPTQ's for any that wants data."""
    return "gptq" if method.calibrated else method.spec.solver


def measured_windows(windows: torch.Tensor) -> torch.Tensor:
    """The first of `windows` [samples, length], 32768 tokens at most, one window at least."""
    return windows[: max(MOST_TOKENS // windows.shape[1], 1)]


def measure_losses(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    method: Solving,
    grids: Mapping[str, Mapping[Candidate, Grid]],
    windows: torch.Tensor,
    *,
    memory: int,
    directory: Path,
    device: torch.device = CPU,
    seed: int = 0,
    on_event: OnEvent,
) -> dict[str, dict[Candidate, float]]:
    """The loss of each layer of `grids` on each of its grids, on token ids [samples, length].

    For calibrated solvers a quarter of the windows gets gradients and the others make the Hessians: on the
    Hessian's own tokens codes look better than they are, the more so the more inputs a layer has.

    Of a block at a time, holds the errors D of all candidates, in bf16, beside what `backward` holds: on
    `device`, where the model runs; codes are chosen on the CPU. The passes over the model are one forward,
    one backward, and one forward a candidate; each candidate is solved once. Raises
    NonFiniteError that names a layer whose inputs are not finite, StorageError.
    """
    stream = BlockStream(skeleton, checkpoint, device=device)
    cut = len(windows)
    if method.calibrated and cut > 1:
        cut = -(-cut // _GRADED)
    graded = batches(windows[:cut], BATCH_TOKENS)
    others = batches(windows[cut:], BATCH_TOKENS) if len(windows) > cut else []
    watcher = _Watcher(stream, method, grids, windows[:cut].numel(), len(graded) if others else 0)
    backward(
        stream,
        graded,
        sampled_likelihood(seed),
        watcher,
        forward_only=others,
        memory=memory,
        directory=directory,
        on_event=on_event,
    )
    return {name: watcher.losses[name] for name in grids if name in watcher.losses}


@dataclass
class _Watcher:
    """Solves a block's layers on all their grids, then sums the squares of what each error does."""

    stream: BlockStream
    method: Solving
    grids: Mapping[str, Mapping[Candidate, Grid]]
    tokens: int
    first: int  # the first batch that Hessians are made of
    losses: dict[str, dict[Candidate, float]] = field(default_factory=dict)
    _layers: dict[str, Layer] = field(default_factory=dict)
    _errors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def begin(self, index: int, block: nn.Module, inputs: Sequence[torch.Tensor]) -> Sequence[str]:
        """See `backward.Watcher`."""
        groups = [
            [layer for layer in group if layer.name in self.grids] for group in self.stream.groups(index)
        ]
        groups = [group for group in groups if group]
        seen: dict[str, InputStatistics] = {}
        if self.method.calibrated and groups:
            seen = self._statistics(index, inputs, groups)
        for group in groups:
            inputs_of = weight_of(block, group[0]).shape[1]
            solve = self._solver(seen.get(group[0].inner), inputs_of, group[0].name)
            for layer in group:
                self._layers[layer.inner] = layer
                weight = weight_of(block, layer)
                self._errors[layer.inner] = [
                    (grid.decode(solve(weight, grid)) - weight).to(torch.bfloat16).to(self.stream.device)
                    for grid in self.grids[layer.name].values()
                ]
                self._sums[layer.inner] = torch.zeros(len(self._errors[layer.inner]), dtype=torch.float64)
        return list(self._layers)

    def _statistics(
        self, index: int, inputs: Sequence[torch.Tensor], groups: Sequence[Sequence[Layer]]
    ) -> dict[str, InputStatistics]:
        first = [group[0] for group in groups]
        seen: dict[str, InputStatistics] = {}
        for number in range(self.first, len(inputs)):
            self.stream.inputs(index, inputs[number], [layer.inner for layer in first], adding(seen))
        return seen

    def _solver(
        self, seen: InputStatistics | None, inputs: int, name: str
    ) -> Callable[[torch.Tensor, Grid], Any]:
        """How the layers of an input are solved: weight [out, in] and grid -> codes."""
        if not self.method.calibrated:
            return self.method.solve_alone
        # the identity where no token came by: under it GPTQ rounds
        hessian = torch.eye(inputs) if seen is None else seen.mean(name)
        shape_of_loss = curvature(hessian, damp=_DAMP, act_order="full")

        def solve(weight: torch.Tensor, grid: Grid) -> Any:
            if isinstance(grid, SelfFitting) and not grid.has_lines:
                return search(weight, grid, hessian.diagonal())
            return gptq(weight, shape_of_loss, grid, static_groups=True, searched=True).assembled(grid)

        return solve

    def see(self, inner: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """See `backward.Watcher`."""
        x, gradient = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        for number, error in enumerate(self._errors[inner]):
            effect = ((x @ error.float().T) * gradient).sum(dim=1)
            self._sums[inner][number] += float(effect.double().square().sum())

    def end(self, index: int, block: nn.Module) -> None:
        """See `backward.Watcher`."""
        for inner, layer in self._layers.items():
            found = self._sums[inner] / (2 * self.tokens)
            if not bool(found.isfinite().all()):
                raise NonFiniteError(
                    f"the gradients of {layer.name} are NaN or infinite on the calibration text"
                )
            self.losses[layer.name] = dict(zip(self.grids[layer.name], found.tolist(), strict=True))
        self._layers, self._errors, self._sums = {}, {}, {}
