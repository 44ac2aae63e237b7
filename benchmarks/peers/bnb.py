"""bitsandbytes through transformers: int8 rows for 8 bits, double-quantized NF4 in blocks of 64 for 4.

transformers quantizes while it loads; the seconds are those of bitsandbytes' own calls for the same weights.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers import Job, Outcome
from benchmarks.peers.common import Clock, copy_tokenizer, load


def quantize(job: Job) -> Outcome:
    """Every linear layer but the head."""
    from bitsandbytes import functional
    from torch import nn
    from transformers import BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig
    int8 = job["bits"] == 8
    clock = Clock()
    for name, layer in load(job["model"]).named_modules():
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        weight = layer.weight.data
        with clock:
            if int8:
                functional.int8_vectorwise_quant(weight.half())
            else:
                functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    if int8:
        config = settings(load_in_8bit=True)
    else:
        config = settings(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = load(job["model"], quantization_config=config, device_map="cpu")
    model.save_pretrained(job["out"])
    copy_tokenizer(job["model"], job["out"])
    return clock.outcome("bitsandbytes")
