"""Layers that need no data: read, solved and written at the same time, on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qexport.checkpoint.overlap import Overlap
from qexport.events import Advanced, OnEvent
from qexport.quantization.fidelity import tensor_error
from qexport.quantization.plan import Plan
from qexport.results import TensorError

_MAX_WORKERS = 8

Write = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class _Solved:
    tensors: dict[str, torch.Tensor]
    error: TensorError


def quantize_alone(plan: Plan, modules: Sequence[str], write: Write, on_event: OnEvent) -> list[TensorError]:
    """Solves `modules` one by one; their errors in order. `write` takes names and tensors of the output."""
    errors: list[TensorError] = []

    def read(module: str) -> torch.Tensor:
        weight = plan.checkpoint.read(f"{module}.weight")
        return weight.T if module in plan.transposed else weight

    def solve(module: str, weight: torch.Tensor) -> _Solved:
        grid = plan.grids[module]
        codes = plan.method.solve_alone(weight, grid)
        error = tensor_error(module, grid.bits, weight, grid.decode(codes))
        return _Solved(plan.layer_tensors(module, codes), error)

    def put(module: str, solved: _Solved) -> None:
        for name, tensor in solved.tensors.items():
            write(name, tensor)
        errors.append(solved.error)
        on_event(Advanced(1, module))

    def size(module: str) -> int:
        return plan.checkpoint.info(f"{module}.weight").size

    workers = max(1, min(_MAX_WORKERS, os.cpu_count() or 1))
    room = workers * max(map(size, modules), default=1)  # the largest on every core, and no more
    Overlap(read, solve, put, size=size, room=room, workers=workers).run(modules)
    return errors
