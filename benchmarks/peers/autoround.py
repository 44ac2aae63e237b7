"""AutoRound: SignRound with its defaults (200 iterations, batches of 8).

Options are those of its class (`sym`, `iters`). The weights that its tuned model holds, codes times scales as
its files would have them, are written in fp32: not all of its asymmetric formats are read by qexport.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers import Job, Outcome
from benchmarks.peers.common import Clock, load, save_decoded

_BATCH = 8  # its default


def quantize(job: Job) -> Outcome:
    """Every linear layer but the head."""
    from auto_round import AutoRound  # type: ignore[import-not-found, unused-ignore]
    from torch import nn
    from transformers import AutoTokenizer

    model = load(job["model"], dtype=torch.float32)
    linears = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    ids: Any = torch.tensor(job["ids"])
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(_BATCH)]
    work = AutoRound(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(job["model"]),
        bits=job["bits"],
        group_size=job["group_size"],
        dataset=batches,
        nsamples=ids.shape[0],
        seqlen=ids.shape[1],
        batch_size=_BATCH,
        seed=job["seed"],
        device_map="cpu",
        enable_torch_compile=False,  # on models this small compiling takes longer than it saves
        **job["options"],
    )
    with Clock() as clock:
        tuned, _ = work.quantize()
    decoded = {name: tuned.get_submodule(name).weight.data for name in linears if name != "lm_head"}
    save_decoded(job["model"], decoded, job["out"])
    return clock.outcome("auto-round")
