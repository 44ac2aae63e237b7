"""hqq's own quantizer, with its optimisation or, as plain rounding to nearest, without; asymmetric, axis 1.

Options: `optimize` (bool). hqq writes a pickle, which qexport does not read: the weights that hqq decodes are
written in fp32. Scales and zeros stay in the model's own dtype.
"""

from __future__ import annotations

from benchmarks.peers import Job, Outcome
from benchmarks.peers.common import Clock, load, save_decoded


def quantize(job: Job) -> Outcome:
    """Every linear layer but the head."""
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer
    from torch import nn

    group = None if job["group_size"] == -1 else job["group_size"]
    settings = BaseQuantizeConfig(nbits=job["bits"], group_size=group, axis=1)["weight_quant_params"]
    settings["optimize"] = job["options"]["optimize"]
    model = load(job["model"])
    clock, decoded = Clock(), {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        weight = layer.weight.data
        with clock:
            codes, meta = Quantizer.quantize(weight, device="cpu", compute_dtype=weight.dtype, **settings)
        meta["compute_dtype"] = layer.weight.dtype
        decoded[name] = Quantizer.dequantize(codes, meta).reshape(weight.shape)
    save_decoded(job["model"], decoded, job["out"])
    return clock.outcome("hqq")
