"""Layers' losses: against what is really lost, and kept for the next call."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.events import Event, Started, ignore
from qexport.formats.opening import open_checkpoint
from qexport.modeling.skeleton import build_skeleton
from qexport.quantization.allotment.candidates import Candidate, fitting, grids_to_try
from qexport.quantization.allotment.make import write_plan
from qexport.quantization.allotment.sensitivity import measure_losses
from qexport.quantization.plan import plan_quantization
from qexport.specs import AnyQuantizeSpec, spec_of
from tests.budgeted import budgeted, windows_of
from tests.tiny import in_transformers, logits, tiny_model


def measured(path: Path, spec: AnyQuantizeSpec, windows: torch.Tensor, directory: Path) -> Any:
    checkpoint, skeleton = open_checkpoint(path), build_skeleton(path)
    plan = plan_quantization(checkpoint, skeleton, spec, ignore)
    grids = {
        name: fitting(plan.method, shape, grids_to_try(plan.method)) for name, shape in plan.shapes.items()
    }
    losses = measure_losses(
        checkpoint,
        plan.skeleton,
        plan.method,
        grids,
        windows,
        memory=1 << 30,
        directory=directory,
        on_event=ignore,
    )
    return plan, grids, losses


def test_losses_are_the_divergence_of_the_model_with_one_layer_quantized(tmp_path: Path, text: Path) -> None:
    """The oracle: transformers runs the model with that layer's weights replaced."""
    path = tiny_model(tmp_path / "model", initializer_range=0.08, dtype=torch.float32)
    windows = windows_of(path, text)
    plan, grids, losses = measured(path, spec_of("rtn", bits=4, group_size=32), windows, tmp_path)
    model = in_transformers(path, dtype=torch.float32)
    full = logits(model, windows).log_softmax(-1)
    found, real = [], []
    for name in plan.grids:
        weight = model.get_submodule(name).weight
        kept = weight.data.clone()
        for candidate in (Candidate(3, 32), Candidate(4, 32), Candidate(8, 128)):
            grid = grids[name][candidate]
            weight.data = grid.decode(plan.method.solve_alone(kept, grid))
            changed = logits(model, windows).log_softmax(-1)
            found.append(math.log(losses[name][candidate]))
            real.append(math.log(float((full.exp() * (full - changed)).sum(-1).mean())))
        weight.data = kept
    both = torch.tensor([found, real])
    assert float(torch.corrcoef(both)[0, 1]) > 0.98
    assert abs(float((both[0] - both[1]).mean())) < math.log(1.35)


def test_calibrated_losses_are_those_of_codes_made_from_other_windows(tmp_path: Path, text: Path) -> None:
    """GPTQ's stand for any that wants data: less than rounding's, and more for fewer bits."""
    path = tiny_model(tmp_path / "model", initializer_range=0.08, dtype=torch.float32)
    windows = windows_of(path, text)
    options = {"bits": 4, "group_size": 32, "symmetric": False}
    _, _, rounded = measured(path, spec_of("rtn", **options, format="gptq_v2"), windows, tmp_path)
    _, _, solved = measured(path, spec_of("gptq", **options, format="gptq_v2"), windows, tmp_path)
    for candidate in (Candidate(2, 32), Candidate(3, 32)):
        assert sum(own[candidate] for own in solved.values()) < sum(
            own[candidate] for own in rounded.values()
        )
    for own in solved.values():
        assert (
            own[Candidate(2, 128)] > own[Candidate(3, 128)] > own[Candidate(4, 128)] > own[Candidate(8, 128)]
        )


def test_what_was_measured_is_not_measured_again(uncached: Path, text: Path, tmp_path: Path) -> None:
    events: list[Event] = []

    def times() -> int:
        return sum(isinstance(event, Started) and event.stage == "gradients" for event in events)

    first = write_plan(uncached, tmp_path / "a.json", budgeted(text, bits=3.5), on_event=events.append)
    assert times() == 1
    other = write_plan(
        uncached, tmp_path / "b.json", budgeted(text, target_size="300kB"), on_event=events.append
    )
    assert times() == 1
    assert {n: own.losses for n, own in first.layers.items()} == {
        n: own.losses for n, own in other.layers.items()
    }
    write_plan(uncached, tmp_path / "c.json", budgeted(text, bits=3.5, samples=8), on_event=events.append)
    assert times() == 2  # another text
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("no JSON")
    again = write_plan(
        uncached, tmp_path / "a.json", budgeted(text, bits=3.5), overwrite=True, on_event=events.append
    )
    assert times() == 3
    assert again == first
    for file in (tmp_path / "cache").rglob("*.json"):
        if file.read_text() == "no JSON":
            file.unlink()  # that of the other text
    for number, broken in enumerate((None, math.nan, 10**400), start=4):
        for file in (tmp_path / "cache").rglob("*.json"):
            content = json.loads(file.read_text())
            name = next(iter(content["losses"]))
            if broken is None:
                del content["losses"][name]
            else:
                content["losses"][name] = dict.fromkeys(content["losses"][name], broken)
            file.write_text(json.dumps(content))
        again = write_plan(
            uncached, tmp_path / "a.json", budgeted(text, bits=3.5), overwrite=True, on_event=events.append
        )
        assert times() == number
        assert again == first


def test_a_method_without_data_is_measured_with_its_own_codes(uncached: Path, tmp_path: Path) -> None:
    plan = write_plan(uncached, tmp_path / "plan.json", spec_of("mlx", bits=4.5))
    assert 4 < plan.bits < 6
    assert plan.loss is not None
    result = qexport.quantize(uncached, tmp_path / "out", spec_of("mlx", bits=4.5))
    assert result.bits == pytest.approx(plan.bits, abs=1e-3)
