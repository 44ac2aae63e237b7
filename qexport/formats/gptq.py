"""AutoGPTQ's layout, version 1: what every runtime reads.

A linear layer [out, in] of b bits in groups of g becomes
    qweight int32 [in * b / 32, out]        codes, packed along `in`
    qzeros  int32 [in / g, out * b / 32]    zero points minus one (version 1), packed along `out`
    scales  fp16  [in / g, out]
    g_idx   int32 [in]                      group of every input
and w = (q - zero) * scale. Source: AutoGPTQ's qlinear modules; GPTQModel's README, "checkpoint_format".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qexport.checkpoint.safetensors_file import StoredTensor, read_tensor
from qexport.checkpoint.tensors import TensorInfo
from qexport.errors import CorruptFileError, UnsupportedModelError
from qexport.formats.format import Facts
from qexport.formats.packing import pack, unpack
from qexport.grids.integer import IntegerCodes, IntegerGrid

METHOD = "gptq"
SIDE = 32  # both sides of a matrix must be multiples of it, in GPTQModel and in vLLM
CONFIG_FILE = "quantize_config.json"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def obstacle(shape: Sequence[int], grid: IntegerGrid | None = None) -> str | None:
    """Why a matrix [out, in] cannot be stored in this layout, whatever the grid."""
    return f"sides that are no multiples of {SIDE}" if any(side % SIDE for side in shape) else None


def layout(module: str, shape: Sequence[int], grid: IntegerGrid) -> list[TensorInfo]:
    """The tensors that a linear layer [out, in] becomes."""
    out, inputs = shape
    groups = inputs // grid.group_width(inputs)
    return [
        TensorInfo(f"{module}.qweight", torch.int32, (inputs * grid.bits // 32, out)),
        TensorInfo(f"{module}.qzeros", torch.int32, (groups, out * grid.bits // 32)),
        TensorInfo(f"{module}.scales", torch.float16, (groups, out)),
        TensorInfo(f"{module}.g_idx", torch.int32, (inputs,)),
    ]


def encode(module: str, codes: IntegerCodes, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    out, inputs = codes.codes.shape
    groups = codes.scales.shape[1]
    zeros = torch.full((out, groups), grid.zero - 1, dtype=torch.uint8)
    return {
        f"{module}.qweight": pack(codes.codes.t().contiguous(), grid.bits),
        f"{module}.qzeros": pack(zeros, grid.bits).t().contiguous(),
        f"{module}.scales": codes.scales.t().contiguous(),
        f"{module}.g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
    }


def quantization_config(grid: IntegerGrid, facts: Facts) -> dict[str, Any]:
    """The `quantization_config` of config.json, also written as quantize_config.json.

    What stays as it was is told twice where there is any: in transformers' words
    (`modules_in_block_to_quantize`) and in GPTQModel's and vLLM's (`dynamic`, where "-:" leaves out
    what the pattern matches).
    """
    config: dict[str, Any] = {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "lm_head": False,
        "quant_method": METHOD,
        "checkpoint_format": "gptq",
    }
    if facts.damp is not None:
        config["damp_percent"] = facts.damp
    if facts.left:
        inner = {re.sub(r"^.*?\.\d+\.", "", name) for name in facts.converted}
        config["modules_in_block_to_quantize"] = [sorted(inner)]
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in facts.left}
    return config


def extra_files(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """quantize_config.json, where AutoGPTQ's descendants look first."""
    return {CONFIG_FILE: config}


@dataclass(frozen=True)
class GptqDecoder:
    """Reads symmetric and asymmetric checkpoints of versions 1 and 2, act-order included."""

    stored: Mapping[str, StoredTensor]
    bits: int
    zero_offset: int  # 1 where the file stores zero - 1

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        """Full-precision tensors: a quantized layer's `weight` is fp16, as its scales are."""
        infos: dict[str, TensorInfo] = {}
        for name, tensor in self.stored.items():
            module, _, part = name.rpartition(".")
            if f"{module}.qweight" not in self.stored or part not in _PARTS:
                infos[name] = tensor
            elif part == "qweight":
                if len(tensor.shape) != 2:
                    raise CorruptFileError(f"{name} has {len(tensor.shape)} dimensions, expected 2")
                rows, out = tensor.shape
                shape = (out, rows * 32 // self.bits)
                infos[f"{module}.weight"] = TensorInfo(f"{module}.weight", torch.float16, shape)
        return infos

    def infos(self) -> dict[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order."""
        return self._infos

    def is_quantized(self, name: str) -> bool:
        """Whether `name` is the weight of a packed layer."""
        return name.removesuffix(".weight") + ".qweight" in self.stored

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, or a layer's weight [out, in] in fp32, unrounded."""
        if not self.is_quantized(name):
            return read_tensor(self.stored[name])
        module = name.removesuffix(".weight")
        parts = {part: self._part(module, part) for part in _PARTS}
        codes = unpack(parts["qweight"], self.bits)  # [in, out]
        zeros = unpack(parts["qzeros"].t().contiguous(), self.bits).t().int() + self.zero_offset
        group = parts["g_idx"].long()
        scales = parts["scales"].float()
        if (
            len(group) != len(codes)
            or zeros.shape != scales.shape
            or codes.shape[1] != scales.shape[1]
            or not bool(((group >= 0) & (group < len(scales))).all())
        ):
            raise CorruptFileError(
                f"the tensors of {module} do not fit together: "
                + ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
            )
        return ((codes.int() - zeros[group]).float() * scales[group]).t().contiguous()

    def _part(self, module: str, part: str) -> torch.Tensor:
        tensor = self.stored.get(f"{module}.{part}")
        if tensor is None:
            raise CorruptFileError(f"{module} has no {part}", expected=", ".join(_PARTS))
        expected = 1 if part == "g_idx" else 2
        if len(tensor.shape) != expected or (part != "scales" and tensor.dtype != torch.int32):
            raise CorruptFileError(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}",
                expected=f"{expected} dimensions, int32 unless scales",
            )
        return read_tensor(tensor)


def decoder(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], float_dtype: torch.dtype
) -> GptqDecoder:
    """The reader of a checkpoint with this `quantization_config`; scales tell the dtype by themselves."""
    bits = config.get("bits")
    if bits not in (2, 3, 4, 8):
        raise UnsupportedModelError(f"a GPTQ checkpoint of {bits} bits", expected="2, 3, 4 or 8")
    version = config.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"a GPTQ checkpoint in the form {version!r}", expected="gptq or gptq_v2")
    return GptqDecoder(stored, bits, 1 if version == "gptq" else 0)
