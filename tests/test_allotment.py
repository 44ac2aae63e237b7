"""Bits by budget, end to end: averages, sizes and losses that are kept to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.devices import CPU
from qexport.errors import GateError, SpecError
from qexport.events import Noted, ignore
from qexport.formats.opening import open_checkpoint
from qexport.graph.recipe import ExportRecipe
from qexport.modeling.skeleton import build_skeleton
from qexport.quantization.allotment.candidates import Candidate, grids_to_try, stored_bytes
from qexport.quantization.allotment.held_out import HeldOut
from qexport.quantization.allotment.make import write_plan
from qexport.quantization.allotment.plan_file import PLAN_FILE
from qexport.quantization.plan import plan_quantization
from qexport.specs import VerifySpec, spec_of
from tests.budgeted import budgeted, planned_layers, windows_of
from tests.conftest import shared
from tests.tiny import in_transformers, logits, tiny_model
from tests.zoo import ZOO


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


def test_an_average_of_bits_is_as_large_as_the_uniform_choices_between(
    uncached: Path, text: Path, tmp_path: Path
) -> None:
    result = qexport.quantize(uncached, tmp_path / "mixed", budgeted(text, bits=3.5))
    sizes = [
        qexport.quantize(uncached, tmp_path / str(bits), budgeted(text, bits=bits)).size_bytes
        for bits in (3, 4)
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
        assert packed.tolist() == list(in_transformers(uncached).get_submodule(name).weight.shape)
    figures = json.loads((tmp_path / "mixed" / "qexport.json").read_text())["figures"]
    weights = {name: math.prod(open_checkpoint(uncached).info(f"{name}.weight").shape) for name in layers}
    mean = sum(layers[name]["bits"] * weights[name] for name in layers) / sum(weights.values())
    assert figures["bits"] == pytest.approx(result.bits) == pytest.approx(mean, abs=1e-4)
    bits = {error.tensor: error.bits for error in result.tensors}
    assert bits == {name: own["bits"] for name, own in layers.items()}


def test_a_group_size_beside_a_budget_is_told_what_it_is_for(
    uncached: Path, text: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    for name, budget in (("a", {"bits": 3.5}), ("b", {"target_size": "300kB"})):
        write_plan(
            uncached,
            tmp_path / name,
            budgeted(text, **budget),
            on_event=lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
        )
    told = [note for note in notes if "--group-size 32" in note]
    assert ["sets the size" in note for note in told] == [True, False]


def test_layers_that_runtimes_fuse_are_not_parted_without_a_word(uncached: Path, tmp_path: Path) -> None:
    def notes(*overrides: str, **options: Any) -> list[str]:
        found: list[str] = []
        qexport.quantize(
            uncached,
            tmp_path / "out",
            spec_of(method="rtn", group_size=32, override=overrides, **options),
            overwrite=True,
            on_event=lambda event: found.append(event.text) if isinstance(event, Noted) else None,
        )
        return [note for note in found if "vLLM fuses" in note]

    assert not notes("*.o_proj=8", "*.down_proj=16", "*.0.self_attn.[qkv]_proj=8")
    (note,) = notes("*.0.self_attn.k_proj=8", "*.mlp.up_proj=16")
    assert "model.layers.0.self_attn.q_proj, " in note
    assert "3 of 4 such sets" in note
    assert notes(skip=["*.1.self_attn.k_proj"])
    assert not notes("*.0.self_attn.k_proj=8", format="mlx")  # whose runtime fuses nothing


def test_a_target_size_is_kept_to_and_the_smallest_is_told(
    uncached: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="the smallest") as refused:
        qexport.quantize(uncached, tmp_path / "out", budgeted(text, target_size=1000))
    least = int(str(refused.value).split(" bytes")[0].split()[-1])
    assert (
        qexport.quantize(uncached, tmp_path / "least", budgeted(text, target_size=least)).size_bytes == least
    )
    with pytest.raises(SpecError, match=f"{least} bytes"):
        write_plan(uncached, tmp_path / "p.json", budgeted(text, target_size=least - 1))
    for size in (least + 5_000, least + 30_000):
        plan = write_plan(uncached, tmp_path / f"{size}.json", budgeted(text, target_size=size))
        assert plan.size_bytes <= size
        result = qexport.quantize(uncached, tmp_path / str(size), budgeted(text, target_size=size))
        assert result.size_bytes == plan.size_bytes
        assert result.size_bytes == sum(bytes_of(info) for info in stored(tmp_path / str(size)))


def test_a_budget_beyond_all_need_is_told(uncached: Path, text: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    qexport.quantize(
        uncached,
        tmp_path / "out",
        spec_of("rtn", format="gptq_v2", target_size="100GB"),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
    )
    assert any("--target-size 100 GB: every layer has what loses least, with " in note for note in notes)
    # no --calibration is advised, which a method without data has not
    assert any("measured on the package's own" in note for note in notes)
    assert not any("--calibration" in note for note in notes)
    assert {layer["bits"] for layer in planned_layers(tmp_path / "out").values()} == {8}
    notes.clear()
    size = open_size(tmp_path / "out")
    for budget in (size, size - 20_000):  # with the header, and with a little less than all need
        qexport.quantize(
            uncached,
            tmp_path / "out",
            spec_of("rtn", format="gptq_v2", target_size=str(budget)),
            overwrite=True,
            on_event=lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
        )
    assert len([note for note in notes if "what loses least" in note]) == 1


def stored(path: Path) -> list[Any]:
    from safetensors import safe_open

    with safe_open(path / "model.safetensors", "pt") as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - it is no dict


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_a_loss_is_promised_on_samples_held_out(
    uncached: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    generous = qexport.quantize(uncached, tmp_path / "10", budgeted(text, max_loss="10%"))
    strict = qexport.quantize(
        uncached,
        tmp_path / "1",
        budgeted(text, max_loss="1%"),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
    )
    assert generous.size_bytes < strict.size_bytes
    assert any("held out" in note for note in notes)
    with pytest.raises(SpecError, match="predicted to rise"):
        qexport.quantize(uncached, tmp_path / "0", budgeted(text, max_loss="0.0000001%"))
    with pytest.raises(SpecError, match=r"--max-loss 0\.0001%"):
        qexport.quantize(uncached, tmp_path / "0", budgeted(text, max_loss="0.0001%"))
    # a prediction that is too good: more bits are given, and again, and then it is said
    sizes: list[int] = []

    def rises(_: HeldOut, quantized: Path) -> float:
        sizes.append(open_size(quantized))
        return 0.2

    monkeypatch.setattr(HeldOut, "rise", rises)
    with pytest.raises(GateError, match="after 3 rounds"):
        qexport.quantize(uncached, tmp_path / "never", budgeted(text, max_loss="10%"))
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
    rise: float, told: str, uncached: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it at a second call, nor in the place of what was there."""
    monkeypatch.setattr(HeldOut, "rise", lambda *args: rise)
    spec = budgeted(text, max_loss="10%", effort="fast")
    verify = VerifySpec(text=str(text), window=32, max_documents=4)
    recipe = ExportRecipe(
        base=str(uncached), output=str(tmp_path / "report"), quantize=(spec,), verify=verify
    )
    for _ in range(2):
        with pytest.raises(GateError, match="nothing is written to"):
            qexport.export(recipe)
    qexport.quantize(uncached, tmp_path / "out", spec_of("rtn"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(GateError, match=told):
        qexport.quantize(uncached, tmp_path / "out", spec, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    left = [path.name for path in tmp_path.rglob("*gptq*") if "cache" not in path.parts]
    assert not left
    assert not [path.name for path in tmp_path.rglob(".*")]


def open_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_the_rise_is_that_of_transformers(
    uncached: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qexport.conversion import convert
    from qexport.quantization.source import Source
    from qexport.specs import ConvertSpec

    result = qexport.quantize(uncached, tmp_path / "out", budgeted(text, bits=2))
    windows = windows_of(uncached, text)
    source = Source(open_checkpoint(uncached), uncached, dict, [])
    held_out = HeldOut(source, windows, 1 << 30, CPU, trust_remote_code=False)
    runs: list[Path] = []
    real = HeldOut._nll

    def counted(self: HeldOut, source: Source, directory: Path) -> float:
        runs.append(source.checkpoint.path)
        return real(self, source, directory)

    monkeypatch.setattr(HeldOut, "_nll", counted)
    found = held_out.rise(result.path)
    assert held_out.rise(result.path) == found
    assert runs == [uncached, result.path, result.path]
    plain = convert(result.path, tmp_path / "plain", ConvertSpec(dtype="float32"))
    nll = []
    for path in (uncached, plain.path):
        chances = logits(in_transformers(path, dtype=torch.float32), windows)[:, :-1].log_softmax(-1)
        nll.append(-float(chances.gather(-1, windows[:, 1:, None]).mean()))
    assert found == pytest.approx(math.exp(nll[1] - nll[0]) - 1, abs=1e-4)


def test_one_budget_at_a_time_and_where_it_can_be_kept(uncached: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--bits 3\.5 beside --target-size 1GB"):
        budgeted(text, bits=3.5, target_size="1GB")
    with pytest.raises(SpecError, match="beside"):
        budgeted(text, max_loss="3%", plan="plan.json")
    with pytest.raises(SpecError, match="an average from 2 to 8"):
        qexport.quantize(uncached, tmp_path / "out", budgeted(text, bits=1.5))
    with pytest.raises(SpecError, match="awq does not take layers of differing grids"):
        qexport.quantize(
            uncached,
            tmp_path / "out",
            spec_of("awq", bits=4.5, calibration=str(text), samples=4, sequence_length=32),
        )
    with pytest.raises(SpecError, match=r"--bits 3\.5 with gguf"):
        qexport.quantize(uncached, tmp_path / "out", spec_of("gguf", bits=3.5))
    assert not (tmp_path / "out").exists()


def test_layers_of_one_grid_beside_others_of_several(tmp_path: Path, text: Path) -> None:
    """Inputs of 96 go in groups of 32 alone, those of 256 in more."""
    model = tiny_model(tmp_path / "model", hidden_size=96, intermediate_size=256)
    with pytest.raises(SpecError, match="awq does not take layers of differing grids"):
        qexport.quantize(
            model, tmp_path / "out", spec_of("awq", group_size=32, target_size="10MB", calibration=str(text))
        )


def test_bytes_are_those_of_the_files(uncached: Path, text: Path) -> None:
    plan = plan_quantization(
        open_checkpoint(uncached), build_skeleton(uncached), budgeted(text, bits=4), ignore
    )
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
