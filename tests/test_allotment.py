"""Bits by budget: the knapsack against brute force, losses against what is really lost, plans end to end."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.errors import GateError, SpecError
from qexport.events import Event, Noted, Started, ignore
from qexport.formats.opening import open_checkpoint
from qexport.graph.recipe import ExportRecipe
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.quantization.allotment.budget import (
    Option,
    least_loss,
    least_size,
    smallest_size,
    total_loss,
    total_size,
)
from qexport.quantization.allotment.candidates import Candidate, fitting, grids_to_try, stored_bytes
from qexport.quantization.allotment.make import perplexity_rise, write_plan
from qexport.quantization.allotment.plan_file import PLAN_FILE, BitsPlan, LayerPlan
from qexport.quantization.allotment.sensitivity import measure_losses
from qexport.quantization.plan import plan_quantization
from qexport.specs import AnyQuantizeSpec, VerifySpec, spec_of
from tests.conftest import RunCli, shared
from tests.tiny import calibration_windows, in_transformers, logits, tiny_model
from tests.zoo import ZOO


def instance(generator: random.Random, units: int, step: int) -> list[list[Option]]:
    """Options as layers have them: more bytes, less loss, but for a few that are simply worse."""
    found = []
    for _ in range(units):
        weights = generator.choice([1, 2, 3, 8]) * step
        found.append(
            [
                Option(bits * weights + generator.randrange(3) * step, generator.random() * weights / 4**bits)
                for bits in (2, 3, 4, 8)
            ]
        )
    return found


def brute(units: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    return [
        (total_size(units, chosen), total_loss(units, chosen))
        for chosen in itertools.product(*(range(len(unit)) for unit in units))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_least_loss_and_the_least_size_are_those_of_brute_force(seed: int) -> None:
    generator = random.Random(seed)
    units = instance(generator, 6, step=generator.choice([1, 7, 64]))
    all_ways = brute(units)
    largest = max(size for size, _ in all_ways)
    for budget in {smallest_size(units), (smallest_size(units) + largest) // 2, largest}:
        chosen = least_loss(units, budget)
        assert chosen is not None
        assert total_size(units, chosen) <= budget
        best = min(loss for size, loss in all_ways if size <= budget)
        assert total_loss(units, chosen) == pytest.approx(best, rel=1e-9)
    assert least_loss(units, smallest_size(units) - 1) is None
    losses = sorted(loss for _, loss in all_ways)
    for limit in (losses[0], losses[len(losses) // 2], losses[-1]):
        chosen = least_size(units, limit + 1e-12)
        assert chosen is not None
        assert total_loss(units, chosen) <= limit + 1e-12
        assert total_size(units, chosen) == min(size for size, loss in all_ways if loss <= limit + 1e-12)
    assert least_size(units, losses[0] * 0.99) is None


def test_large_sizes_without_a_common_divisor_come_out_nearly_best() -> None:
    generator = random.Random(1)
    units = [
        [Option(option.size * 1_000_003 + generator.randrange(999), option.loss) for option in unit]
        for unit in instance(generator, 200, 1)
    ]
    budget = smallest_size(units) * 2
    chosen = least_loss(units, budget)
    assert chosen is not None
    assert total_size(units, chosen) <= budget
    # the Lagrangian bound: no choice within the budget loses less, whatever the multiplier
    price = [10.0 ** (-k / 8) for k in range(40, 120)]
    bound = max(sum(min(o.loss + p * o.size for o in unit) for unit in units) - p * budget for p in price)
    assert bound <= total_loss(units, chosen) <= bound * 1.02
    assert least_loss(units, budget) == chosen


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


def windows_of(path: Path, text: Path) -> torch.Tensor:
    documents = text.read_text().split("<|endoftext|>")
    return calibration_windows(documents, load_tokenizer(path), samples=24, length=64, seed=0)


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


def test_experts_are_measured_and_get_one_grid(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = ZOO["mixtral"](tmp_path / "model")
    result = qexport.quantize(path, tmp_path / "out", budgeted(text, bits=3.5))
    layers = json.loads((tmp_path / "out" / PLAN_FILE).read_text())["layers"]
    for block in range(2):
        kinds = {
            (own["bits"], own["group_size"])
            for name, own in layers.items()
            if f"layers.{block}." in name and ".experts." in name
        }
        assert len(kinds) == 1
    assert sum(row.layers for row in result.plan) == result.quantized_layers == len(layers)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny_model(tmp_path / "model", initializer_range=0.08)


def budgeted(text: Path, **options: Any) -> AnyQuantizeSpec:
    usual = {"format": "gptq_v2", "symmetric": False, "group_size": 32, "calibration": str(text)}
    return spec_of("gptq", **{**usual, "samples": 16, "sequence_length": 32, **options})


def planned_layers(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / PLAN_FILE).read_text())["layers"]
    return found


def test_an_average_of_bits_is_as_large_as_the_uniform_choices_between(
    model: Path, text: Path, tmp_path: Path
) -> None:
    result = qexport.quantize(model, tmp_path / "mixed", budgeted(text, bits=3.5))
    sizes = [
        qexport.quantize(model, tmp_path / str(bits), budgeted(text, bits=bits)).size_bytes for bits in (3, 4)
    ]
    assert sizes[0] < result.size_bytes <= sum(sizes) / 2
    assert result.size_bytes > sizes[0] + 0.2 * (sizes[1] - sizes[0])  # the budget is used
    layers = planned_layers(tmp_path / "mixed")
    for block in range(2):
        stem = f"model.layers.{block}"
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            kinds = {
                (own["bits"], own["group_size"])
                for name, own in layers.items()
                if name.startswith(stem) and name.endswith(fused)
            }
            assert len(kinds) == 1, fused  # vLLM fuses them, and needs them equal
    # the file says what the plan says
    written = open_checkpoint(tmp_path / "mixed")
    config = written.config["quantization_config"]
    for name, own in layers.items():
        told = config["dynamic"].get(f"+:^{name.replace('.', chr(92) + '.')}$", config)
        assert (told["bits"], told["group_size"]) == (own["bits"], own["group_size"])
        packed = torch.tensor(written.info(f"{name}.weight").shape)
        assert packed.tolist() == list(in_transformers(model).get_submodule(name).weight.shape)
    figures = json.loads((tmp_path / "mixed" / "qexport.json").read_text())["figures"]
    weights = {name: math.prod(open_checkpoint(model).info(f"{name}.weight").shape) for name in layers}
    mean = sum(layers[name]["bits"] * weights[name] for name in layers) / sum(weights.values())
    assert figures["bits"] == pytest.approx(result.bits) == pytest.approx(mean, abs=1e-4)
    bits = {error.tensor: error.bits for error in result.tensors}
    assert bits == {name: own["bits"] for name, own in layers.items()}


def test_what_was_measured_is_not_measured_again(model: Path, text: Path, tmp_path: Path) -> None:
    events: list[Event] = []

    def times() -> int:
        return sum(isinstance(event, Started) and event.stage == "gradients" for event in events)

    first = write_plan(model, tmp_path / "a.json", budgeted(text, bits=3.5), on_event=events.append)
    assert times() == 1
    other = write_plan(
        model, tmp_path / "b.json", budgeted(text, target_size="300kB"), on_event=events.append
    )
    assert times() == 1
    assert {n: own.losses for n, own in first.layers.items()} == {
        n: own.losses for n, own in other.layers.items()
    }
    write_plan(model, tmp_path / "c.json", budgeted(text, bits=3.5, samples=8), on_event=events.append)
    assert times() == 2  # another text
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("no JSON")
    again = write_plan(
        model, tmp_path / "a.json", budgeted(text, bits=3.5), overwrite=True, on_event=events.append
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
            model, tmp_path / "a.json", budgeted(text, bits=3.5), overwrite=True, on_event=events.append
        )
        assert times() == number
        assert again == first


def test_a_group_size_beside_a_budget_is_told_what_it_is_for(model: Path, text: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    for name, budget in (("a", {"bits": 3.5}), ("b", {"target_size": "300kB"})):
        write_plan(
            model,
            tmp_path / name,
            budgeted(text, **budget),
            on_event=lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
        )
    told = [note for note in notes if "--group-size 32" in note]
    assert ["sets the size" in note for note in told] == [True, False]


def test_a_plan_is_edited_and_passed_back(model: Path, text: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    write_plan(model, plan, budgeted(text, bits=3.5))
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
        model,
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
    assert qexport.quantization.quantize.quantize_recipe(model, spec).key != key
    # and an output's own plan makes the same output
    again = qexport.quantize(
        model, tmp_path / "again", budgeted(text, plan=str(tmp_path / "out" / PLAN_FILE), skip=spec.skip)
    )
    assert [e for e in again.tensors if e.bits] == list(result.tensors)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ({"model.layers.0.mlp.dwon_proj": {"bits": 4, "group_size": 32}}, "dwon_proj is no linear layer"),
        ({"model.layers.0.mlp.down_proj": {"bits": 5, "group_size": 32}}, "5 bits in the GPTQ layout"),
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
    layers: Any, told: str, model: Path, text: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": layers}))
    with pytest.raises(SpecError, match=told) as refused:
        qexport.quantize(model, tmp_path / "out", budgeted(text, plan=str(plan)))
    assert "--plan" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_target_size_is_kept_to_and_the_smallest_is_told(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the smallest") as refused:
        qexport.quantize(model, tmp_path / "out", budgeted(text, target_size=1000))
    least = int(str(refused.value).split(" bytes")[0].split()[-1])
    assert qexport.quantize(model, tmp_path / "least", budgeted(text, target_size=least)).size_bytes == least
    with pytest.raises(SpecError, match=f"{least} bytes"):
        write_plan(model, tmp_path / "p.json", budgeted(text, target_size=least - 1))
    for size in (least + 5_000, least + 30_000):
        plan = write_plan(model, tmp_path / f"{size}.json", budgeted(text, target_size=size))
        assert plan.size_bytes <= size
        result = qexport.quantize(model, tmp_path / str(size), budgeted(text, target_size=size))
        assert result.size_bytes == plan.size_bytes
        assert result.size_bytes == sum(bytes_of(info) for info in stored(tmp_path / str(size)))


def stored(path: Path) -> list[Any]:
    from safetensors import safe_open

    with safe_open(path / "model.safetensors", "pt") as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - it is no dict


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_a_loss_is_promised_on_samples_held_out(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    generous = qexport.quantize(model, tmp_path / "10", budgeted(text, max_loss="10%"))
    strict = qexport.quantize(
        model,
        tmp_path / "1",
        budgeted(text, max_loss="1%"),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
    )
    assert generous.size_bytes < strict.size_bytes
    assert any("held out" in note for note in notes)
    with pytest.raises(SpecError, match="predicted to rise"):
        qexport.quantize(model, tmp_path / "0", budgeted(text, max_loss="0.0000001%"))
    with pytest.raises(SpecError, match=r"--max-loss 0\.0001%"):
        qexport.quantize(model, tmp_path / "0", budgeted(text, max_loss="0.0001%"))
    # a prediction that is too good: more bits are given, and again, and then it is said
    sizes: list[int] = []

    def rises(source: Any, quantized: Path, *args: Any, **options: Any) -> float:
        sizes.append(open_size(quantized))
        return 0.2

    monkeypatch.setattr("qexport.quantization.quantize.perplexity_rise", rises)
    with pytest.raises(GateError, match="after 3 rounds"):
        qexport.quantize(model, tmp_path / "never", budgeted(text, max_loss="10%"))
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(
    ("rise", "told"),
    [
        (0.2, "after 3 rounds the perplexity rises by 20%; at most 10%"),
        (1e9, "after 2 rounds the perplexity rises by"),  # no bits are left to give
        (math.nan, "after 1 round the perplexity is no number"),
    ],
)
def test_what_loses_too_much_never_stands(
    rise: float, told: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it at a second call, nor in the place of what was there."""
    monkeypatch.setattr("qexport.quantization.quantize.perplexity_rise", lambda *args, **options: rise)
    spec = budgeted(text, max_loss="10%", effort="fast")
    verify = VerifySpec(text=str(text), window=32, max_documents=4)
    recipe = ExportRecipe(base=str(model), output=str(tmp_path / "report"), quantize=(spec,), verify=verify)
    for _ in range(2):
        with pytest.raises(GateError, match="nothing is written to"):
            qexport.export(recipe)
    qexport.quantize(model, tmp_path / "out", spec_of("rtn"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(GateError, match=told):
        qexport.quantize(model, tmp_path / "out", spec, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    left = [path.name for path in tmp_path.rglob("*gptq*") if "cache" not in path.parts]
    assert not left
    assert not [path.name for path in tmp_path.rglob(".*")]


def open_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_the_rise_is_that_of_transformers(model: Path, text: Path, tmp_path: Path) -> None:
    from qexport.conversion import convert
    from qexport.quantization.source import Source
    from qexport.specs import ConvertSpec

    result = qexport.quantize(model, tmp_path / "out", budgeted(text, bits=2))
    windows = windows_of(model, text)
    source = Source(open_checkpoint(model), model, dict, [])
    found = perplexity_rise(source, result.path, windows, memory=1 << 30, trust_remote_code=False)
    plain = convert(result.path, tmp_path / "plain", ConvertSpec(dtype="float32"))
    nll = []
    for path in (model, plain.path):
        chances = logits(in_transformers(path, dtype=torch.float32), windows)[:, :-1].log_softmax(-1)
        nll.append(-float(chances.gather(-1, windows[:, 1:, None]).mean()))
    assert found == pytest.approx(math.exp(nll[1] - nll[0]) - 1, abs=1e-4)


def test_one_budget_at_a_time_and_where_it_can_be_kept(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--bits 3\.5 beside --target-size 1GB"):
        budgeted(text, bits=3.5, target_size="1GB")
    with pytest.raises(SpecError, match="beside"):
        budgeted(text, max_loss="3%", plan="plan.json")
    with pytest.raises(SpecError, match="an average from 2 to 8"):
        qexport.quantize(model, tmp_path / "out", budgeted(text, bits=1.5))
    with pytest.raises(SpecError, match="in an AWQ checkpoint"):
        qexport.quantize(
            model,
            tmp_path / "out",
            spec_of("awq", bits=4.5, calibration=str(text), samples=4, sequence_length=32),
        )
    with pytest.raises(SpecError, match=r"--bits 3\.5 with gguf"):
        qexport.quantize(model, tmp_path / "out", spec_of("gguf", bits=3.5))
    assert not (tmp_path / "out").exists()


def test_a_method_without_data_is_measured_with_its_own_codes(model: Path, tmp_path: Path) -> None:
    plan = write_plan(model, tmp_path / "plan.json", spec_of("mlx", bits=4.5))
    assert 4 < plan.bits < 6
    assert plan.loss is not None
    result = qexport.quantize(model, tmp_path / "out", spec_of("mlx", bits=4.5))
    assert result.bits == pytest.approx(plan.bits, abs=1e-3)


def test_the_command_line_plans_and_takes_the_plan_back(
    model: Path, text: Path, tmp_path: Path, cli: RunCli
) -> None:
    options = ("--method", "gptq", "--format", "gptq_v2", "--calibration", text, "--sequence-length", "32")
    plan = tmp_path / "plan.json"
    code, out, err = cli("quantize", model, "-o", plan, "--plan-only", "--bits", "3.5", *options)
    assert code == 0, err
    assert "bits on average" in out
    assert "predicted KL" in out
    assert cli("quantize", model, "-o", plan, "--plan-only", "--bits", "3.5", *options)[0] == 2  # it is there
    code, out, err = cli("quantize", model, "-o", tmp_path / "out", "--plan", plan, *options)
    assert code == 0, err
    assert json.loads(plan.read_text())["size_bytes"] == open_size(tmp_path / "out") - header(
        tmp_path / "out"
    )
    for wrong in ("3.x", "9.5", "7", "0"):
        code, _, err = cli("quantize", model, "-o", tmp_path / "no", "--bits", wrong, *options)
        assert code == 2
        assert "average such as 3.5" in err
    code, _, err = cli("quantize", model, "-o", tmp_path / "no", "--plan-only", "--bits", "4", *options)
    assert code == 2
    assert "--plan-only" in err


def header(path: Path) -> int:
    return 8 + int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")


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


def test_bytes_are_those_of_the_files(model: Path, text: Path) -> None:
    plan = plan_quantization(open_checkpoint(model), build_skeleton(model), budgeted(text, bits=4), ignore)
    grids = grids_to_try(plan.method)
    # gptq_v2, 128 x 256 at 3 bits in groups of 64: codes, zeros of 3 bits and scales of 16 a group, g_idx
    found = stored_bytes(plan.method, (128, 256), grids[Candidate(3, 64)])
    assert found == 128 * 256 * 3 // 8 + 128 * 4 * 3 // 8 + 128 * 4 * 2 + 256 * 4
    assert Candidate(5, 64) not in grids


def test_a_plan_beats_the_uniform_choice_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qexport.specs import VerifySpec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = shared("models", "tinystories-656k")
    calibration = shared("text", "tinystories_calib800.txt")
    held_out = VerifySpec(
        text=str(shared("text", "tinystories_eval200.txt")), window=256, stride=256, max_documents=15
    )

    def made(name: str, **options: Any) -> tuple[int, float]:
        spec = budgeted(calibration, samples=64, sequence_length=256, group_size=32, **options)
        result = qexport.quantize(path, tmp_path / name, spec)
        scores = qexport.verify(path, result.path, held_out).candidate.divergence
        assert scores is not None
        return result.size_bytes, scores.mean

    size, uniform = made("uniform", bits=3)
    allotted_size, allotted = made("allotted", target_size=size)
    assert allotted_size <= size
    assert allotted < 0.85 * uniform
