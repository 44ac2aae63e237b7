"""The methods of benchmarks/quality.py: one table, which a new method is a row of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL_BITS = (8, 4, 3, 2)


@dataclass(frozen=True)
class Method:
    """How a model is quantized: by which module of `benchmarks.peers`, with what options.

    `calibrated`: the calibration text has an influence, so that a second seed tells something. `group_size`
    differs from the model's where the tool has no other. `size_of` names a method of a row above: bits are
    allotted so that the output is not larger than that one's at the same width.
    """

    label: str
    peer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bits: tuple[int, ...] = ALL_BITS
    calibrated: bool = True
    group_size: int | None = None
    size_of: str | None = None

    @property
    def ours(self) -> bool:
        """Whether qexport does it."""
        return self.peer == "ours"


def _asymmetric(method: str, **options: Any) -> dict[str, Any]:
    """Such a method's format is the model's `layout`."""
    return {"method": method, "symmetric": False, **options}


METHODS = {
    # the peers, each as it comes and at its best
    "rtn": Method("RTN (hqq, not optimised)", "hqq", {"optimize": False}, calibrated=False),
    "bnb": Method("bitsandbytes int8, NF4", "bnb", bits=(8, 4), calibrated=False, group_size=64),
    "hqq": Method("HQQ", "hqq", {"optimize": True}, calibrated=False),
    "autoawq": Method("AutoAWQ", "autoawq", {"dtype": "float16"}),
    "gptqmodel": Method("GPTQModel", "gptqmodel", {"sym": True}),
    "gptqmodel-asym": Method("GPTQModel, asymmetric", "gptqmodel", {"sym": False}),
    "gptqmodel-gptaq": Method(
        "GPTQModel, asymmetric, GPTAQ", "gptqmodel", {"sym": False, "gptaq": {"alpha": 0.25}}
    ),
    "autoround": Method("AutoRound", "autoround", {"sym": True, "iters": 200}),
    "autoround-asym": Method("AutoRound, asymmetric", "autoround", {"sym": False, "iters": 200}),
    # qexport
    "q-rtn": Method("qexport rtn", "ours", _asymmetric("rtn"), calibrated=False),
    "q-hqq": Method("qexport hqq", "ours", {"method": "hqq"}, calibrated=False),
    "q-bnb": Method("qexport bnb", "ours", {"method": "bnb", "group_size": None}, (8, 4), False, 64),
    "q-awq": Method("qexport awq", "ours", {"method": "awq"}, (4,)),
    "q-gptq-sym": Method("qexport gptq, symmetric", "ours", {"method": "gptq", "symmetric": True}),
    "q-gptq-fast": Method("qexport gptq, fast", "ours", _asymmetric("gptq", effort="fast")),
    "q-gptq": Method("qexport gptq, balanced", "ours", _asymmetric("gptq")),
    "q-allotted": Method(
        "qexport gptq, balanced, bits allotted under the size of the row above",
        "ours",
        _asymmetric("gptq"),
        (4, 3, 2),
        size_of="q-gptq",
    ),
    "q-gptq-best": Method("qexport gptq, best", "ours", _asymmetric("gptq", effort="best")),
    "q-awq-gptq": Method("qexport awq+gptq, balanced", "ours", _asymmetric("gptq", solver="awq+gptq")),
    "q-awq-gptq-best": Method(
        "qexport awq+gptq, best", "ours", _asymmetric("gptq", solver="awq+gptq", effort="best")
    ),
}
