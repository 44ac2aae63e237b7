"""A checkpoint in mlx-lm, on whatever device MLX finds; on Linux that is the CPU."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

if TYPE_CHECKING:
    from qexport.verification.runtimes.drivers.driver import Job, Loaded


def load(job: Job) -> Loaded:
    """The model with its floats in fp32.

    mlx-lm stops at the first kind of mismatch, in a message; here all three kinds are collected.
    """
    missing: list[str] = []
    unexpected: list[str] = []
    mismatched: list[str] = []
    kind: Any = mlx.nn.Module  # type: ignore[attr-defined, unused-ignore]
    original = kind.load_weights

    def collect(self: Any, weights: Any, strict: bool = True) -> Any:
        given, own = dict(weights), dict(tree_flatten(self.parameters()))
        missing.extend(own.keys() - given.keys())
        unexpected.extend(given.keys() - own.keys())
        mismatched.extend(n for n in own.keys() & given.keys() if own[n].shape != given[n].shape)
        return original(self, [(n, given[n]) for n in own if n in given], strict=False)

    kind.load_weights = collect
    try:
        model, _ = load_model(Path(job["model"]), trust_remote_code=job["trust_remote_code"])
    finally:
        kind.load_weights = original
    model.set_dtype(mx.float32)
    layers: Counter[str] = Counter()
    for _, module in model.named_modules():
        # a quantized class knows its bits; a stack of experts has one matrix each
        if hasattr(module, "bits") and hasattr(module, "group_size") and "scales" in module:
            layers[type(module).__name__] += math.prod(module["scales"].shape[:-2])

    def forward(ids: list[list[int]]) -> Any:
        return np.array(model(mx.array(ids)).astype(mx.float32))

    return {
        "forward": forward,
        "dtype": "float32",
        "layers": dict(layers),
        "missing": missing,
        "unexpected": unexpected,
        "mismatched": mismatched,
        "problems": [],
    }
