"""A checkpoint in hqq's own loader (transformers 5.23 no longer loads one).

That loader tells of nothing that it leaves out, so names are compared here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hqq.core.quantize import HQQLinear
from hqq.models.hf.base import AutoHQQHFModel

if TYPE_CHECKING:
    from qexport.verification.runtimes.drivers.driver import Job, Loaded


def load(job: Job) -> Loaded:
    """The model with fp32 as its compute dtype, on the CPU."""
    path = job["model"]
    weights = torch.load(f"{path}/qmodel.pt", map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(isinstance(held, dict) for held in weights.values()):
        raise ValueError(f"{path}/qmodel.pt holds no dictionary of layers")
    if any("encoded_state_dict" in held for held in weights.values()) and not job["trust_remote_code"]:
        raise ValueError(f"{path}/qmodel.pt holds encoded layers, whose dtypes hqq's loader would eval()")
    skeleton = AutoHQQHFModel.create_model(path, {})
    missing, unexpected, mismatched = compare(skeleton, weights)
    found: Loaded = {
        "forward": None,
        "dtype": "float32",
        "layers": {},
        "missing": missing,
        "unexpected": unexpected,
        "mismatched": mismatched,
        "problems": [],
    }
    if missing or mismatched:  # left on the meta device, or put in place as they are
        return found
    model = AutoHQQHFModel.from_quantized(path, compute_dtype=torch.float32, device="cpu")
    model.eval()
    count = sum(isinstance(module, HQQLinear) for module in model.modules())

    def forward(ids: list[list[int]]) -> Any:
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.float().numpy()

    found["forward"] = forward
    found["layers"] = {"HQQLinear": count} if count else {}
    return found


def compare(skeleton: Any, weights: dict[str, dict[str, Any]]) -> tuple[list[str], list[str], list[str]]:
    """Names that the model lacks, that it has no place for, and those of another shape.

    hqq stores a tied head twice, and its loader knows of no tie.
    """
    missing, unexpected, mismatched = [], [], []
    modules = dict(skeleton.named_modules())
    for name, module in modules.items():
        own = dict(module.named_parameters(recurse=False))
        held = weights.get(name, {})
        if "W_q" in held:
            if tuple(held.get("shape", ())) != tuple(own["weight"].shape if "weight" in own else ()):
                mismatched.append(f"{name}.W_q")
            missing += [f"{name}.{leaf}" for leaf in ("scale", "zero") if leaf not in held]
            own.pop("weight", None)
            held = {"bias": held["bias"]} if held.get("bias") is not None else {}
        missing += [f"{name}.{leaf}" for leaf in own if leaf not in held]
        for leaf, tensor in held.items():
            if leaf not in own and leaf not in dict(module.named_buffers(recurse=False)):
                unexpected.append(f"{name}.{leaf}")
            elif leaf in own and tuple(tensor.shape) != tuple(own[leaf].shape):
                mismatched.append(f"{name}.{leaf}")
    unexpected += [f"{name}.{leaf}" for name in weights if name not in modules for leaf in weights[name]]
    return missing, unexpected, mismatched
