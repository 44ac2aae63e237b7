"""The losses of layers, out of the user's cache where they were measured before."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from qexport.checkpoint.checkpoint import Checkpoint, read_json
from qexport.checkpoint.disk import is_file
from qexport.checkpoint.staging import write_file_atomically
from qexport.checkpoint.user_cache import user_cache
from qexport.errors import QexportError
from qexport.events import Noted, OnEvent
from qexport.grids.grid import Grid
from qexport.methods import Solving
from qexport.modeling.skeleton import Skeleton
from qexport.quantization.allotment.candidates import Candidate
from qexport.quantization.allotment.sensitivity import measure_losses, measured_windows, stand_in
from qexport.version import __version__

_FORM = 2  # goes up when what is measured changes

Grids = Mapping[str, Mapping[Candidate, Grid]]
Losses = dict[str, dict[Candidate, float]]


def losses_of(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    method: Solving,
    grids: Grids,
    windows: torch.Tensor,
    *,
    inputs: Mapping[str, str],
    memory: int,
    directory: Path,
    device: torch.device,
    on_event: OnEvent,
) -> Losses:
    """Nats a token for each layer of `grids` on each of its grids; measured on some of the token ids
    [samples, length], see `measure_losses`, unless the cache has them: those of one device serve any other.

    `inputs` are the hashes of what the model is made of. The cache is a file in
    ~/.cache/qexport/sensitivities for each model, text and set of candidates; one that cannot be written is
    but a note.
    """
    windows = measured_windows(windows)
    path = user_cache("sensitivities") / f"{_key(method, grids, windows, inputs)}.json"
    if (found := _read(path, grids)) is not None:
        return found
    found = measure_losses(
        checkpoint,
        skeleton,
        method,
        grids,
        windows,
        memory=memory,
        directory=directory,
        device=device,
        on_event=on_event,
    )
    content = {name: {str(candidate): loss for candidate, loss in own.items()} for name, own in found.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, json.dumps({"qexport": __version__, "losses": content}, indent=1) + "\n")
    except (OSError, QexportError) as error:
        on_event(Noted(f"the sensitivities are not kept for the next call: {error}"))
    return found


def measured_as(method: Solving, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What losses are of: the solver that stood for the method's own, the grids' kind, and the model, which
    `inputs` are the hashes of."""
    symmetric = getattr(method.spec, "symmetric", None)
    return {
        "solver": stand_in(method),
        "format": method.spec.format,
        "symmetric": symmetric,
        "inputs": dict(inputs),
    }


def _key(method: Solving, grids: Grids, windows: torch.Tensor, inputs: Mapping[str, str]) -> str:
    content = {
        "form": _FORM,
        "qexport": __version__,
        "inputs": dict(inputs),
        "solver": stand_in(method),
        "layers": {name: {str(c): repr(grid) for c, grid in own.items()} for name, own in grids.items()},
        "windows": blake3(windows.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest(),
    }
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest(length=16)


def _read(path: Path, grids: Grids) -> Losses | None:
    """What is kept, where it is whole: somebody may have meddled with it."""
    if not is_file(path):
        return None
    try:
        kept = read_json(path)["losses"]
        found = {
            name: {candidate: float(kept[name][str(candidate)]) for candidate in own}
            for name, own in grids.items()
        }
    except (QexportError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return found if all(0 <= loss < math.inf for own in found.values() for loss in own.values()) else None
