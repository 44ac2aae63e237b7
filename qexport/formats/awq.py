"""AutoAWQ's layout, version GEMM: the one that AWQ checkpoints are shared in.

A linear layer [out, in] of 4 bits in groups of g becomes
    qweight int32 [in, out / 8]      codes, packed along `out`
    qzeros  int32 [in / g, out / 8]  zero points as they are, packed alike
    scales  fp16  [in / g, out]
and w = (q - zero) * scale. Eight outputs share a word; its nibbles, lowest first, hold outputs
0, 2, 4, 6, 1, 3, 5, 7. There is no g_idx: groups are neighbouring inputs. The symmetric grid is stored with
zero points of 8. Source: AutoAWQ's `WQLinear_GEMM.from_linear` and its `packing_utils`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from qexport.checkpoint.safetensors_file import StoredTensor, read_tensor
from qexport.checkpoint.tensors import TensorInfo
from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.formats.format import Facts, Wish
from qexport.formats.packing import pack, unpack
from qexport.formats.parts import FLOATS, misfit, require_part
from qexport.grids.integer import IntegerCodes, IntegerGrid

NAME = "awq"
METHOD = "awq"
HOLDS_HEAD = False  # transformers and vLLM take it for plain
HOLDS_EMBEDDINGS = False
HOLDS_CONV1D = False
HOLDS_GROUP_ORDER = False
EXPERTS = "codes"  # by vLLM; transformers 5.23 leaves them random
BITS = 4
SIDE = 32  # outputs must be a multiple of it, in GPTQModel
GROUP_SIZES = (16, 32, 64, 128, -1)  # what GPTQModel's kernels accept
# Where transformers and vLLM multiply an activation by scales that AutoAWQ stores beside the layers
# (transformers' AWQ_SCALES_MAPPINGS; without them the logits are NaN); those are not written here.
_SCALED_ACTIVATIONS = frozenset(
    {"bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "RefinedWebModel", "starcoder2"}
)
CONFIG_FILES = ("quant_config.json", "quantize_config.json")
_DEFAULT_GROUP = 128
_EACH = 32 // BITS  # codes in a word
_OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse of the order above
_PARTS = ("qweight", "qzeros", "scales")
_VERSION_KEYS = ("version", "format", "checkpoint_format")  # AutoAWQ's, and GPTQModel's two


def grid_for(wish: Wish) -> IntegerGrid:
    """The 4-bit grid of the wish: groups of 128 and asymmetric unless it says otherwise; scales in fp16."""
    if wish.bits != BITS:
        raise SpecError(
            f"{wish.bits} bits in the AWQ layout",
            expected=f"{BITS}",
            remedy="the formats gptq and gptq_v2 hold AWQ's scaled weights in 2, 3, 4 and 8 bits",
        )
    group = _DEFAULT_GROUP if wish.group_size is None else wish.group_size
    if group not in GROUP_SIZES:
        raise SpecError(
            f"a group size of {group} in the AWQ layout",
            expected=f"one of {', '.join(map(str, GROUP_SIZES))}, what GPTQModel reads",
        )
    return IntegerGrid(BITS, group, "middle" if wish.symmetric else "integer")


def obstacle(shape: Sequence[int], grid: IntegerGrid) -> str | None:
    """Why a matrix [out, in] cannot be stored in this layout, in a few words."""
    return f"outputs that are no multiple of {SIDE}" if shape[0] % SIDE else None


def layout(module: str, shape: Sequence[int], grid: IntegerGrid) -> list[TensorInfo]:
    """The tensors that a linear layer [out, in] becomes."""
    out, inputs = shape
    groups = inputs // grid.group_width(inputs)
    return [
        TensorInfo(f"{module}.qweight", torch.int32, (inputs, out // _EACH)),
        TensorInfo(f"{module}.qzeros", torch.int32, (groups, out // _EACH)),
        TensorInfo(f"{module}.scales", torch.float16, (groups, out)),
    ]


def encode(module: str, codes: IntegerCodes, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    if codes.group_of is not None:
        raise ValueError(f"{module} has groups that are no neighbours, which the AWQ layout cannot tell")
    zeros = codes.zeros
    if zeros is None:
        zeros = torch.full(codes.scales.shape, grid.middle, dtype=torch.uint8)
    return {
        f"{module}.qweight": _pack(codes.codes),
        f"{module}.qzeros": _pack(zeros),
        f"{module}.scales": codes.scales.t().contiguous(),
    }


def config_entries(facts: Facts) -> dict[str, Any]:
    """config.json's `quantization_config`, as AutoAWQ writes it; it has room for one grid only."""
    if facts.model_type in _SCALED_ACTIVATIONS:
        raise SpecError(
            f"{facts.model_type} in the AWQ layout, whose runtimes want scales of its activations as well",
            remedy="use the format gptq or gptq_v2",
        )
    common = cast(IntegerGrid, facts.common)
    for name, grid in cast(Mapping[str, IntegerGrid], facts.grids).items():
        if (grid.bits, grid.group_size) != (common.bits, common.group_size):
            raise SpecError(
                f"{grid.bits} bits in groups of {grid.group_size} for {name}, in an AWQ checkpoint of "
                f"{common.bits} bits in groups of {common.group_size}",
                expected="one width and one group size for all layers",
                remedy="the formats gptq and gptq_v2 can tell layers apart",
            )
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "bits": common.bits,
        "group_size": common.group_size,
        "zero_point": True,  # zeros are stored, those of the symmetric grid too
        "version": "gemm",
        # in full: transformers compares with a name's whole or its end, vLLM with any part of it
        "modules_to_not_convert": list(facts.left) or None,
    }
    if left := [name for name in facts.left if name != facts.head]:
        # GPTQModel's own loader knows these words only, and gave such layers codes that were not there
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
    return {"quantization_config": config}


def extra_files(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """quant_config.json, where AutoAWQ and older runtimes look."""
    return dict.fromkeys(CONFIG_FILES, entries["quantization_config"])


def finish(directory: Path) -> None:
    """Nothing: a checkpoint is its tensors and its configs."""


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
        parts = [
            require_part(
                self.stored,
                module,
                part,
                dtypes=FLOATS if part == "scales" else (torch.int32,),
                sides=(2,),
                parts=_PARTS,
            )
            for part in _PARTS
        ]
        qweight, qzeros, scales = parts
        inputs, words = qweight.shape
        groups = scales.shape[0]
        if qzeros.shape != (groups, words) or scales.shape[1] != words * _EACH or inputs % groups:
            raise misfit(
                module,
                parts,
                f"qweight [in, out/{_EACH}], qzeros [groups, out/{_EACH}], scales [groups, out] "
                "and groups that divide in",
            )
        return qweight, qzeros, scales


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [out, n] -> words int32 [n, out / 8]."""
    by_word = codes.reshape(-1, _EACH, codes.shape[1])
    return pack(by_word[:, _OUTPUT_OF_NIBBLE].reshape(codes.shape), BITS).t().contiguous()


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
