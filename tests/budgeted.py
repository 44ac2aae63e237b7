"""Specs whose bits come by budget, what losses are measured on, and the plans that outputs hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qexport.modeling.tokenizer import load_tokenizer
from qexport.quantization.allotment.plan_file import PLAN_FILE
from qexport.specs import AnyQuantizeSpec, spec_of
from tests.tiny import calibration_windows


def budgeted(text: Path, **options: Any) -> AnyQuantizeSpec:
    """GPTQ with zero points, on a little of `text`."""
    usual = {"format": "gptq_v2", "symmetric": False, "group_size": 32, "calibration": str(text)}
    return spec_of("gptq", **{**usual, "samples": 16, "sequence_length": 32, **options})


def planned_layers(out: Path) -> dict[str, Any]:
    """What the plan in an output says of its layers."""
    found: dict[str, Any] = json.loads((out / PLAN_FILE).read_text())["layers"]
    return found


def windows_of(path: Path, text: Path) -> torch.Tensor:
    """24 of 64 tokens."""
    documents = text.read_text().split("<|endoftext|>")
    return calibration_windows(documents, load_tokenizer(path), samples=24, length=64, seed=0)
