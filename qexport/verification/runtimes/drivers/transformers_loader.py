"""A checkpoint in transformers, as every user loads it; in GPTQModel's environment, GPTQ and AWQ too."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from qexport.verification.runtimes.drivers.driver import Job, Loaded

_BNB_LAYERS = ("Linear4bit", "Linear8bitLt")


def load(job: Job) -> Loaded:
    """The model in fp32 on the CPU, and what transformers did not find a place or a tensor for."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    kind: Any = AutoModelForCausalLM
    log = _Log()
    logging.getLogger("transformers").addHandler(log)
    try:
        model, info = kind.from_pretrained(
            job["model"],
            device_map="cpu",
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told, not raised
            trust_remote_code=job["trust_remote_code"],
        )
    except RuntimeError as error:
        if unmade := log.not_converted():
            raise ValueError(f"its parts do not make {', '.join(unmade)}") from error
        raise
    finally:
        logging.getLogger("transformers").removeHandler(log)
    model.eval()
    compute_in_fp32(model)

    def forward(ids: list[list[int]]) -> Any:
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.float().numpy()

    return {
        "forward": forward,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": quantized_layers(model),
        "missing": list(info["missing_keys"]),
        "unexpected": list(info["unexpected_keys"]),
        "mismatched": [str(entry[0]) for entry in info["mismatched_keys"]],
        "problems": [str(message) for message in info.get("error_msgs") or ()],
    }


class _Log(logging.Handler):
    """What transformers logs: the names of layers that cannot be made stand nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self._text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self._text += record.getMessage() + "\n"

    def not_converted(self) -> list[str]:
        return re.findall(r"^(\S+)\s*\|\s*CONVERSION", self._text, re.MULTILINE)


def compute_in_fp32(model: Any) -> None:
    """Takes what transformers leaves in 16 bits off it: that would hide how well the weights are read.

    It leaves a bitsandbytes model in the file's dtype. 4-bit layers decode to the dtype in the file, compute
    in the one in the config, and on CPUs with AVX-512 BF16 in bf16 whatever those say.
    """
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if type(getattr(module, "weight", None)).__name__ == "Params4bit":
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.support_avx512bf16_for_cpu = False
            module.weight.quant_state.dtype = torch.float32


def quantized_layers(model: Any) -> dict[str, int]:
    """How many layers hold codes, by class."""
    return dict(Counter(type(module).__name__ for module in model.modules() if _is_quantized(module)))


def _is_quantized(module: Any) -> bool:
    classes = [kind.__name__ for kind in type(module).__mro__]
    if "BaseQuantLinear" in classes or any(
        name in classes for name in _BNB_LAYERS
    ):  # GPTQModel's, bitsandbytes'
        return True
    scheme = getattr(module, "quantization_scheme", None)  # compressed-tensors keeps torch's own classes
    return getattr(scheme, "weights", None) is not None
