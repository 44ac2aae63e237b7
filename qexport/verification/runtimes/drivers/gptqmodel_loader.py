"""GPTQ and AWQ checkpoints in GPTQModel: through transformers, or by its own loader where only that can.

transformers 5.23 puts no codes into Conv1D layers and fused experts, and it ignores `dynamic`, which tells
layers of other bits. GPTQModel's own loader reads these; it names codes that are missing, and refuses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# a script's own folder is on its path
import transformers_loader

if TYPE_CHECKING:
    from qexport.verification.runtimes.drivers.driver import Job, Loaded

_OWN_LOADER = ("gpt2", "mixtral", "qwen3_moe")


def load(job: Job) -> Loaded:
    """The model on the CPU, by the loader that is made for it."""
    config = json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))
    if _needs_own_loader(config):
        return _load_by_gptqmodel(job)
    return transformers_loader.load(job)  # type: ignore[no-any-return, unused-ignore]


def _needs_own_loader(config: dict[str, Any]) -> bool:
    settings = config.get("quantization_config") or {}
    other_bits = any(name.startswith("+:") for name in settings.get("dynamic") or ())
    return config.get("model_type") in _OWN_LOADER or other_bits


def _load_by_gptqmodel(job: Job) -> Loaded:
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(
        job["model"],
        backend=BACKEND.TORCH,  # the fused one for CPUs has 4 bits alone, and takes every zero for 8
        device="cpu",
        dtype=torch.float16,  # this kernel has no fp32
        trust_remote_code=job["trust_remote_code"],
    )
    model = loaded.model.eval()

    def forward(ids: list[list[int]]) -> Any:
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.float().numpy()

    return {
        "forward": forward,
        "dtype": "float16",
        "layers": transformers_loader.quantized_layers(model),
        "missing": [],  # it refuses to load then
        "unexpected": [],
        "mismatched": [],
        "problems": [],
    }
