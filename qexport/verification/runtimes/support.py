"""Which runtime reads which format of which architecture: one table, and the README's rendering of it.

`tests/test_support.py` holds it against the runtimes themselves, cell by cell. A runtime reads all model
types of `modeling/architectures.py` but those that are named here. No torch is imported.
Versions: transformers 5.23, GPTQModel 7.7, hqq 0.2.8, mlx-lm 0.32, llama.cpp by cyllama 0.2.18.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qexport.modeling.architectures import ARCHITECTURES

PLAIN = "16-bit"  # a model that is not quantized
GGUF = "gguf"


@dataclass(frozen=True)
class Gap:
    """Why a runtime does not read a model type in a format.

    Nothing is written for it, unless `written`: then `verify --runtime` tells that the runtime fails.
    `asymmetric_only`: it reads symmetric codes.
    """

    reason: str
    written: bool = False
    asymmetric_only: bool = False


Gaps = Mapping[str, Gap]  # by model type

_CONV1D = Gap("the runtime puts no codes into GPT-2's transposed layers (Conv1D)")
_HQQ_CONV1D = Gap("hqq loads GPT-2 without its head")
_HQQ_EXPERTS = Gap("hqq neither saves nor loads fused experts")
_MIXTRAL = Gap(
    "written for vLLM, which the tests do not run; GPTQModel finds no codes under Mixtral's names of experts",
    written=True,
)
_CT_EXPERTS = Gap("asymmetric codes of experts are refused: transformers cannot decode them", False, True)
_OLDER_NAMES = Gap(
    "mlx-lm knows some settings by their names before transformers 5, which a config.json that was saved "
    "since lacks; the format mlx has both",
    written=True,
)
_AWQ_NEOX = Gap("AWQ's runtimes want scales of GPT-NeoX's activations, which are not written")

# Format -> the runtimes that read it -> what they do not read.
SUPPORT: dict[str, dict[str, Gaps]] = {
    PLAIN: {
        "transformers": {},
        "mlx": {
            "opt": Gap("mlx-lm has no such model", written=True),
            **dict.fromkeys(("qwen2", "gpt2", "gpt_neox", "qwen3_moe"), _OLDER_NAMES),
        },
    },
    "bitsandbytes": {"transformers": {}},
    "compressed-tensors": {
        "transformers": {"gpt2": _CONV1D, "mixtral": _CT_EXPERTS, "qwen3_moe": _CT_EXPERTS}
    },
    "gptq": {"gptqmodel": {"mixtral": _MIXTRAL}},
    "gptq_v2": {"gptqmodel": {"mixtral": _MIXTRAL}},
    "awq": {"gptqmodel": {"gpt2": _CONV1D, "gpt_neox": _AWQ_NEOX, "mixtral": _MIXTRAL}},
    "hqq": {"hqq": {"gpt2": _HQQ_CONV1D, "mixtral": _HQQ_EXPERTS, "qwen3_moe": _HQQ_EXPERTS}},
    "mlx": {"mlx": {"opt": Gap("mlx-lm has no such model")}},
    GGUF: {"llamacpp": {"opt": Gap("llama.cpp has no such model")}},
}
# Formats that nothing on a CPU reads, with what is refused in them.
UNREAD: dict[str, tuple[str, Gaps]] = {
    "hqq-safetensors": (
        "safetensors alone, without the qmodel.pt that hqq loads: for programs of one's own",
        {"gpt2": _HQQ_CONV1D, "mixtral": _HQQ_EXPERTS, "qwen3_moe": _HQQ_EXPERTS},
    ),
    "eetq": ("transformers reads it on CUDA alone, which the tests do not run", {"gpt2": _CONV1D}),
}
# What a reader of the table is to know where a runtime does read.
_EXPERTS_PLAIN = "experts stay in full precision"
NOTES = {"bitsandbytes": {"mixtral": _EXPERTS_PLAIN, "qwen3_moe": _EXPERTS_PLAIN}}
_METHODS = {"gptq_v2": "gptq"}  # the `quant_method` of a format, where it is not its name


def model_types() -> tuple[str, ...]:
    """All that have a row in `modeling/architectures.py`."""
    return tuple(name for row in ARCHITECTURES for name in row.model_types)


def gap(format_name: str, runtime: str, model_type: str, *, symmetric: bool = True) -> Gap | None:
    """Why `runtime` does not read such a checkpoint; None where it does."""
    found = SUPPORT[format_name][runtime].get(model_type)
    return None if found and found.asymmetric_only and symmetric else found


def refusal(format_name: str, model_type: str, *, symmetric: bool = True) -> Gap | None:
    """Why nothing is written in this format for a model type; None where something is."""
    if format_name in UNREAD:
        return UNREAD[format_name][1].get(model_type)
    gaps = [gap(format_name, runtime, model_type, symmetric=symmetric) for runtime in SUPPORT[format_name]]
    return next((found for found in gaps if found and not found.written), None)


def why_unread(format_name: str) -> str:
    """Why no runtime here reads a format; empty for one that is not in the table."""
    return UNREAD[format_name][0] if format_name in UNREAD else ""


def readers(format_name: str, model_type: str, *, symmetric: bool = True) -> tuple[str, ...]:
    """The runtimes that read a model type in a format; PLAIN is one."""
    return tuple(
        runtime
        for runtime in SUPPORT.get(format_name, {})
        if gap(format_name, runtime, model_type, symmetric=symmetric) is None
    )


def readers_by_method() -> dict[str, tuple[str, ...]]:
    """The runtimes that read a format at all, by `quant_method` (or PLAIN)."""
    return {_METHODS.get(name, name): tuple(runtimes) for name, runtimes in SUPPORT.items()}


def support_table() -> str:
    """Architectures x formats as Markdown, a cell naming the runtimes; the reasons are numbered below."""
    reasons: dict[str, int] = {}
    lines = [
        "| architecture | " + " | ".join(SUPPORT) + " |",
        "| --- |" + " --- |" * len(SUPPORT),
        *(
            f"| {model_type} | " + " | ".join(_cell(name, model_type, reasons) for name in SUPPORT) + " |"
            for model_type in model_types()
        ),
        "",
        *(f"{number}. {reason}" for reason, number in reasons.items()),
        "",
        *(f"- {name}: {reason}" for name, (reason, _) in UNREAD.items()),
    ]
    return "\n".join(lines)


def _cell(format_name: str, model_type: str, reasons: dict[str, int]) -> str:
    gaps = [found for runtimes in SUPPORT[format_name].values() if (found := runtimes.get(model_type))]
    remarks = [one.reason for one in gaps]
    if note := NOTES.get(format_name, {}).get(model_type):
        remarks.append(note)
    numbers = "".join(f" ({reasons.setdefault(one, len(reasons) + 1)})" for one in remarks)
    return (", ".join(readers(format_name, model_type)) or "–") + numbers
