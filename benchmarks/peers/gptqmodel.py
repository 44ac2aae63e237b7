"""GPTQModel: GPTQ with its defaults (act-order within groups, or of all inputs of a row that is one group;
damping .05), a GPTQ checkpoint.

Options are those of its QuantizeConfig (`sym`, `mse`, `gptaq` as a dict of GPTAQConfig's fields); asymmetric
codes go out as gptq_v2, as v1 cannot hold a zero of 0.
"""

from __future__ import annotations

from benchmarks.peers import Job, Outcome
from benchmarks.peers.common import Clock, copy_tokenizer

_BATCH = 8  # windows that go through a block at once: of no effect on the codes, and faster than its 1


def quantize(job: Job) -> Outcome:
    """Every linear layer but the head."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import config as settings

    options = dict(job["options"])
    if "gptaq" in options:
        options["gptaq"] = settings.GPTAQConfig(**options["gptaq"])
    if job["group_size"] == -1:  # its default order is one of groups, and refuses rows
        options |= {"act_group_aware": False, "desc_act": True}
    config = QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        format=settings.FORMAT.GPTQ if options.get("sym", True) else settings.FORMAT.GPTQ_V2,
        offload_to_disk=False,
        device="cpu",
        **options,
    )
    model = GPTQModel.load(job["model"], config)
    with Clock() as clock:
        model.quantize(job["ids"], batch_size=_BATCH)
    model.save(job["out"])
    copy_tokenizer(job["model"], job["out"])
    return clock.outcome("gptqmodel")
