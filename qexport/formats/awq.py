"""AutoAWQ's layout, version GEMM: the one that AWQ checkpoints are shared in. Read only.

A linear layer [out, in] of 4 bits in groups of g becomes
    qweight int32 [in, out / 8]      codes, packed along `out`
    qzeros  int32 [in / g, out / 8]  zero points as they are, packed alike
    scales  fp16  [in / g, out]
and w = (q - zero) * scale. Eight outputs share a word; its nibbles, lowest first, hold outputs
0, 2, 4, 6, 1, 3, 5, 7. Source: AutoAWQ's `WQLinear_GEMM.from_linear` and its `packing_utils`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qexport.checkpoint.safetensors_file import StoredTensor, read_tensor
from qexport.checkpoint.tensors import TensorInfo
from qexport.errors import CorruptFileError, UnsupportedModelError
from qexport.formats.packing import unpack

METHOD = "awq"
BITS = 4
_EACH = 32 // BITS  # codes in a word
_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse of the order above
_PARTS = ("qweight", "qzeros", "scales")
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_VERSION_KEYS = ("version", "format", "checkpoint_format")  # AutoAWQ's, and GPTQModel's two


@dataclass(frozen=True)
class AwqDecoder:
    """Reads 4-bit GEMM checkpoints with zero points; the group size is what the tensors' shapes say."""

    stored: Mapping[str, StoredTensor]

    def infos(self) -> dict[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order.

        A quantized layer's `weight` has its scales' dtype. Raises CorruptFileError for a layer whose
        tensors do not fit together.
        """
        return self._infos

    def is_quantized(self, name: str) -> bool:
        """Whether `name` is the weight of a packed layer."""
        return name.endswith(".weight") and f"{name.removesuffix('.weight')}.qweight" in self.stored

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, or a layer's weight [out, in] in fp32, unrounded."""
        if not self.is_quantized(name):
            return read_tensor(self.stored[name])
        qweight, qzeros, scales = self._layer(name.removesuffix(".weight"))
        codes = _unpack(read_tensor(qweight))  # [out, in]
        zeros = _unpack(read_tensor(qzeros))[:, :, None]  # [out, groups, 1]
        steps = read_tensor(scales).float().t()[:, :, None]
        grouped = codes.reshape(steps.shape[0], steps.shape[1], -1)
        return ((grouped - zeros).float() * steps).reshape(codes.shape)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for name, tensor in self.stored.items():
            module, _, part = name.rpartition(".")
            if part in _PARTS and f"{module}.qweight" in self.stored:
                if part == "qweight":
                    infos[f"{module}.weight"] = self._info(module)
            elif part == "qzeros":
                raise CorruptFileError(f"{module} has qzeros, but no qweight", expected=", ".join(_PARTS))
            else:
                infos[name] = tensor
        return infos

    def _info(self, module: str) -> TensorInfo:
        qweight, _, scales = self._layer(module)
        return TensorInfo(f"{module}.weight", scales.dtype, (scales.shape[1], qweight.shape[0]))

    def _layer(self, module: str) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
        """The layer's tensors in the order of `_PARTS`, seen to fit together."""
        if f"{module}.weight" in self.stored:
            raise CorruptFileError(f"{module} has both weight and qweight", expected="one of them")
        parts: list[StoredTensor] = []
        for part in _PARTS:
            tensor = self.stored.get(f"{module}.{part}")
            if tensor is None:
                raise CorruptFileError(f"{module} has no {part}", expected=", ".join(_PARTS))
            dtypes = _SCALES if part == "scales" else (torch.int32,)
            if len(tensor.shape) != 2 or tensor.dtype not in dtypes or not tensor.numel:
                raise CorruptFileError(
                    f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}",
                    expected="two dimensions, int32 unless scales, which are floats",
                )
            parts.append(tensor)
        qweight, qzeros, scales = parts
        inputs, words = qweight.shape
        groups = scales.shape[0]
        if qzeros.shape != (groups, words) or scales.shape[1] != words * _EACH or inputs % groups:
            raise CorruptFileError(
                f"the tensors of {module} do not fit together: "
                + ", ".join(f"{p} {list(t.shape)}" for p, t in zip(_PARTS, parts, strict=True)),
                expected=f"qweight [in, out/{_EACH}], qzeros [groups, out/{_EACH}], scales [groups, out] "
                "and groups that divide in",
            )
        return qweight, qzeros, scales


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """Words int32 [n, out / 8] -> codes int8 [out, n], outputs in their order."""
    codes = unpack(words.t(), BITS).to(torch.int8)
    by_word = codes.reshape(-1, _EACH, words.shape[0])
    return by_word[:, _NIBBLE_OF_OUTPUT].reshape(codes.shape)


def decoder(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], float_dtype: torch.dtype
) -> AwqDecoder:
    """The reader of a checkpoint with this `quantization_config`; scales tell the dtype by themselves.

    Raises UnsupportedModelError for another version, other bits, or codes without zero points.
    """
    if config.get("bits") != BITS:
        raise UnsupportedModelError(
            f"an AWQ checkpoint of {config.get('bits')!r} bits", expected=f"{BITS} bits"
        )
    # a config that names no version means GEMM, AutoAWQ's and transformers' default
    versions = {str(config[key]).lower() for key in _VERSION_KEYS if config.get(key)}
    if config.get("backend") == "llm-awq":  # an own layout, which transformers tells by the backend
        versions.add("llm-awq")
    if others := sorted(versions - {"gemm"}):
        raise UnsupportedModelError(f"an AWQ checkpoint of version {', '.join(others)}", expected="gemm")
    if not config.get("zero_point", True):
        raise UnsupportedModelError("an AWQ checkpoint without zero points", expected="zero_point: true")
    return AwqDecoder(stored)
