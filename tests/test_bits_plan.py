"""Plans of bits as files: edited, passed back, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qexport
from qexport.errors import SpecError
from qexport.events import Noted
from qexport.quantization.allotment.candidates import Candidate
from qexport.quantization.allotment.make import write_plan
from qexport.quantization.allotment.plan_file import PLAN_FILE, BitsPlan, LayerPlan
from qexport.specs import spec_of
from tests.budgeted import budgeted
from tests.conftest import RunCli


def test_a_plan_is_edited_and_passed_back(uncached: Path, text: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    write_plan(uncached, plan, budgeted(text, bits=3.5))
    content = json.loads(plan.read_text())
    name = "model.layers.1.mlp.down_proj"
    content["layers"] = {
        "model.layers.1.mlp.down_proj": {"bits": 8, "group_size": 64},
        "model.layers.0.mlp.down_proj": {"bits": 2, "group_size": 128},
        "model.layers.0.self_attn.o_proj": {"bits": 3, "group_size": 32},
        "model.layers.1.self_attn.o_proj": {"bits": 3, "group_size": 32},
    }
    plan.write_text(json.dumps(content))
    spec = budgeted(
        text,
        plan=str(plan),
        override=["*.0.self_attn.o_proj=8:32"],
        skip=["*.1.self_attn.o_proj"],
    )
    notes: list[str] = []
    result = qexport.quantize(
        uncached,
        tmp_path / "out",
        spec,
        on_event=lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
    )
    assert [note for note in notes if "does not name 10 of" in note and "they get 4 bits" in note]
    bits = {error.tensor: error.bits for error in result.tensors}
    assert bits.pop(name) == 8
    assert bits.pop("model.layers.0.mlp.down_proj") == 2
    assert bits.pop("model.layers.0.self_attn.o_proj") == 8  # --override wins
    assert "model.layers.1.self_attn.o_proj" not in bits  # so does --skip
    assert set(bits.values()) == {4}  # what it does not name gets what --bits says by default
    key = json.loads((tmp_path / "out" / "qexport.json").read_text())["key"]
    content["layers"][name]["bits"] = 4
    plan.write_text(json.dumps(content))
    assert qexport.quantization.quantize.quantize_recipe(uncached, spec).key != key
    # and an output's own plan makes the same output
    again = qexport.quantize(
        uncached, tmp_path / "again", budgeted(text, plan=str(tmp_path / "out" / PLAN_FILE), skip=spec.skip)
    )
    assert [e for e in again.tensors if e.bits] == list(result.tensors)


def test_what_an_edited_plan_is_predicted_to_lose(uncached: Path, text: Path, tmp_path: Path) -> None:
    """The losses of the choices that it makes, where all were measured."""
    plan = tmp_path / "plan.json"
    write_plan(uncached, plan, budgeted(text, bits=3.5))
    content = json.loads(plan.read_text())
    layers = content["layers"]
    for name in layers:
        layers[name] |= {"bits": 2, "group_size": 64}
    down, up = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"
    layers[down] |= {"bits": 16}

    def made() -> dict[str, Any]:
        plan.write_text(json.dumps(content))
        qexport.quantize(uncached, tmp_path / "out", budgeted(text, plan=str(plan)), overwrite=True)
        return dict(json.loads((tmp_path / "out" / PLAN_FILE).read_text()))

    expected = sum(layer["kl_of"]["2:64"] for name, layer in layers.items() if name != down)
    assert made()["predicted_kl"] == pytest.approx(expected)
    assert made()["measured"] == content["measured"]
    assert content["measured"]["tokens"] == 16 * 32
    # of other methods nothing is predicted by what was measured for this one
    rtn = spec_of("rtn", format="gptq_v2", symmetric=False, plan=str(plan))
    for other in (rtn, budgeted(text, plan=str(plan), symmetric=True)):
        qexport.quantize(uncached, tmp_path / "other", other, overwrite=True)
        assert json.loads((tmp_path / "other" / PLAN_FILE).read_text())["predicted_kl"] is None
    for meddled in (
        {"2:64": 10**400},
        {"2:64": 1.7e308},
        {"2:64": True},
        {"2:64": "much"},
        {"4:64": 0.1},
        {"2:64": -1},
        {"2:64": float("nan")},
        ["2:64"],
        {"2": 1},
    ):
        layers[up]["kl_of"] = meddled
        assert made()["predicted_kl"] is None


def test_a_plan_that_keeps_most_layers(uncached: Path, text: Path, tmp_path: Path) -> None:
    """16 bits are no codes: neither in the mean of bits nor in the count of layers."""
    plan = tmp_path / "plan.json"
    write_plan(uncached, plan, budgeted(text, bits=3.5))
    content = json.loads(plan.read_text())
    for name in content["layers"]:
        content["layers"][name] = {"bits": 3, "group_size": 64} if "down_proj" in name else {"bits": 16}
    plan.write_text(json.dumps(content))
    notes: list[str] = []
    result = qexport.quantize(
        uncached,
        tmp_path / "out",
        budgeted(text, plan=str(plan)),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
    )
    assert (result.bits, result.quantized_layers) == (3, 2)
    assert [(row.bits, row.group_size, row.layers) for row in result.plan] == [(3, 64, 2)]
    assert any(note.startswith("plan: 3.00 bits on average, layers: 2 of 3 bits g64") for note in notes)
    kept = json.loads((tmp_path / "out" / PLAN_FILE).read_text())["layers"]
    assert [layer["bits"] for layer in kept.values()].count(16) == len(kept) - 2
    for name in content["layers"]:
        content["layers"][name] = {"bits": 16, "group_size": 48}
    plan.write_text(json.dumps(content))
    with pytest.raises(SpecError, match="leaves no layer to quantize"):
        qexport.quantize(uncached, tmp_path / "no", budgeted(text, plan=str(plan)))


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ({"model.layers.0.mlp.dwon_proj": {"bits": 4, "group_size": 32}}, "dwon_proj is no linear layer"),
        ({"model.layers.0.mlp.down_proj": {"bits": 5, "group_size": 32}}, "5 bits in the GPTQ layout"),
        ({"model.layers.0.mlp.down_proj": {"bits": 32, "group_size": 32}}, "1 to 8 bits, or 16"),
        ({"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": 48}}, "group size of 48"),
        ({"model.layers.0.mlp.down_proj": {"bits": "four"}}, "four"),
        ({"model.layers.0.mlp.down_proj": 4}, "down_proj has 4"),
        (["model.layers.0.mlp.down_proj"], "has no 'layers'"),
        ({}, "has no 'layers'"),
        ({"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": 0}}, '"group_size": 0'),
        ({"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": -2}}, '"group_size": -2'),
        ({"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": 32.0}}, '"group_size": 32.0'),
        ({"model.layers.0.mlp.down_proj": {"bits": 0, "group_size": 32}}, '"bits": 0'),
    ],
)
def test_plans_that_do_not_fit_are_refused_in_a_line(
    layers: Any, told: str, uncached: Path, text: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": layers}))
    with pytest.raises(SpecError, match=told) as refused:
        qexport.quantize(uncached, tmp_path / "out", budgeted(text, plan=str(plan)))
    assert "--plan" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line_plans_and_takes_the_plan_back(
    uncached: Path, text: Path, tmp_path: Path, cli: RunCli
) -> None:
    options = ("--method", "gptq", "--format", "gptq_v2", "--calibration", text, "--sequence-length", "32")
    plan = tmp_path / "plan.json"
    code, out, err = cli("quantize", uncached, "-o", plan, "--plan-only", "--bits", "3.5", *options)
    assert code == 0, err
    assert "bits on average" in out
    assert "predicted KL" in out
    assert (
        cli("quantize", uncached, "-o", plan, "--plan-only", "--bits", "3.5", *options)[0] == 2
    )  # it is there
    predicted = json.loads(plan.read_text())["predicted_kl"]
    code, out, err = cli("quantize", uncached, "-o", tmp_path / "out", "--plan", plan, *options)
    assert code == 0, err
    assert f"predicted KL {predicted:.4f}" in err
    file = tmp_path / "out" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert json.loads(plan.read_text())["size_bytes"] == file.stat().st_size - header
    for command, told in (
        (("--plan", tmp_path), "this is a directory"),
        (("--plan", plan, "--bits", "4,3"), "--bits 4,3 beside --plan"),
        (("--plan-only",), "--plan-only without a budget"),
    ):
        code, _, err = cli("quantize", uncached, "-o", tmp_path / "no", *command, *options)
        assert code == 2
        assert told in err
    for wrong in ("3.x", "9.5", "7", "0"):
        code, _, err = cli("quantize", uncached, "-o", tmp_path / "no", "--bits", wrong, *options)
        assert code == 2
        assert "average such as 3.5" in err
    code, _, err = cli("quantize", uncached, "-o", tmp_path / "no", "--plan-only", "--bits", "4", *options)
    assert code == 2
    assert "--plan-only" in err


def test_a_plan_counts_its_layers() -> None:
    coarse, fine = Candidate(2, 32), Candidate(4, 64)
    plan = BitsPlan(
        {},
        {
            "a": LayerPlan(fine, 100, {coarse: 0.5, fine: 0.25}),
            "b": LayerPlan(coarse, 300, {coarse: 0.5, fine: 0.125}),
            "head": LayerPlan(fine, 100, {}),  # not measured
        },
        size_bytes=1,
    )
    assert (plan.bits, plan.loss) == ((4 * 200 + 2 * 300) / 500, 0.75)
    assert [(row.bits, row.group_size, row.layers, row.weights, row.loss) for row in plan.rows()] == [
        (2, 32, 1, 300, 0.5),
        (4, 64, 2, 200, 0.25),
    ]
