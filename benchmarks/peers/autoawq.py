"""AutoAWQ: scales and clips searched with its defaults, an AWQ checkpoint; 4 bits are all that it writes.

Options are those of its `quantize` (`apply_clip`), and `dtype`, in which it loads and computes.
"""

from __future__ import annotations

import torch

from benchmarks.peers import Job, Outcome
from benchmarks.peers.common import Clock, copy_tokenizer


def quantize(job: Job) -> Outcome:
    """Every linear layer but the head."""
    from awq import AutoAWQForCausalLM  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoTokenizer

    options = dict(job["options"])
    dtype = getattr(torch, options.pop("dtype"))
    model = AutoAWQForCausalLM.from_pretrained(job["model"], torch_dtype=dtype, device_map="cpu")
    config = {"zero_point": True, "q_group_size": job["group_size"], "w_bit": job["bits"], "version": "GEMM"}
    length = max(map(len, job["ids"]))
    with Clock() as clock:
        model.quantize(
            AutoTokenizer.from_pretrained(job["model"]),
            quant_config=config,
            calib_data=job["ids"],
            max_calib_samples=len(job["ids"]),
            max_calib_seq_len=length,  # a longer sample would be dropped without a word
            **options,
        )
    model.save_quantized(job["out"])
    copy_tokenizer(job["model"], job["out"])
    return clock.outcome("autoawq")
