"""Several outputs of one pass over the model: each is what it is alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.events import ignore
from qexport.formats.opening import open_checkpoint
from qexport.modeling.calibration import calibration_data
from qexport.modeling.skeleton import build_skeleton
from qexport.quantization.blockwise.by_blocks import BlockQuantizer
from qexport.quantization.blockwise.lanes import Lane
from qexport.quantization.plan import plan_quantization
from qexport.results import TensorError
from qexport.specs import AnyQuantizeSpec, spec_of
from tests.tiny import tiny_model
from tests.zoo import zoo_model

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast": ("gptq", {"bits": 4, "group_size": 32, "effort": "fast"}),
    "balanced": ("gptq", {"bits": 3, "group_size": 32, "effort": "balanced"}),
    "in order": (
        "gptq",
        {"bits": 4, "group_size": 32, "act_order": "full", "static_groups": False, "skip": ("*.[qkv]_proj",)},
    ),
    "followed": ("gptq", {"bits": 4, "group_size": 32, "skip": ("*.[qkv]_proj",)}),
    "best": ("gptq", {"bits": 2, "group_size": 32, "effort": "best"}),
    "awq": ("awq", {"bits": 4, "group_size": 64}),
    "awq+gptq": ("awq", {"solver": "awq+gptq", "format": "gptq", "bits": 3, "group_size": 32}),
}
Written = dict[str, torch.Tensor]


def together(
    path: Path, specs: list[AnyQuantizeSpec], directory: Path
) -> list[tuple[Written, list[TensorError], set[str]]]:
    """What each plan writes, and what is told of it."""
    checkpoint, skeleton = open_checkpoint(path), build_skeleton(path)
    data = calibration_data(path, specs[0], skeleton)  # type: ignore[arg-type]
    written: list[Written] = [{} for _ in specs]
    lanes = [
        Lane(plan_quantization(checkpoint, skeleton, spec, ignore), into.__setitem__)
        for spec, into in zip(specs, written, strict=True)
    ]
    BlockQuantizer(lanes, data, 1 << 30, directory, ignore).run()
    return [(into, lane.errors, lane.rewritten) for into, lane in zip(written, lanes, strict=True)]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_each_writes_what_it_writes_alone(model_type: str, text: Path, tmp_path: Path) -> None:
    if model_type == "llama":
        path = tiny_model(tmp_path / "model", **SIZES)
        names = list(WAYS)
    else:
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "tied": False, "head_dim": 16}
        path = zoo_model(tmp_path / "model", model_type, **SIZES, **experts)
        names = ["awq", "balanced", "fast"]
    common = {"calibration": str(text), "samples": 8, "sequence_length": 32}
    specs = [spec_of(method, **common, **options) for method, options in (WAYS[name] for name in names)]
    everything = together(path, specs, tmp_path)
    for name, spec, (written, errors, rewritten) in zip(names, specs, everything, strict=True):
        ((alone, errors_alone, rewritten_alone),) = together(path, [spec], tmp_path)
        assert list(written) == list(alone), name
        assert all(torch.equal(value, alone[key]) for key, value in written.items()), name
        assert errors == errors_alone, name
        assert rewritten == rewritten_alone, name
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_types_of_gguf_by_a_calibrated_solver(text: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", **SIZES, num_hidden_layers=1)
    options = {"calibration": str(text), "samples": 8, "sequence_length": 32, "solver": "gptq"}

    def files(name: str, *types: str) -> dict[str, bytes]:
        out = tmp_path / name
        qexport.quantize(model, out, spec_of("gguf", type=types, **options))
        return {file.name: file.read_bytes() for file in out.glob("*.gguf")}

    both = files("both", "q4_0", "q8_0")
    assert len(both) == 2
    assert both == files("one", "q4_0") | files("other", "q8_0")
