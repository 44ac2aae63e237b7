"""AutoGPTQ's layout, in version 1, what every runtime reads, and version 2, which keeps any zero point.

A linear layer [out, in] of b bits in groups of g becomes
    qweight int32 [in * b / 32, out]        codes, packed along `in`
    qzeros  int32 [in / g, out * b / 32]    zero points, packed along `out`: minus one in version 1
    scales  fp16  [in / g, out]
    g_idx   int32 [in]                      group of every input
and w = (q - zero) * scale. Version 1 cannot hold a zero point of 0, so asymmetric grids are written in
version 2 (`checkpoint_format: gptq_v2`), symmetric ones in version 1; `gptq_v2.py` writes version 2 always.
Source: AutoGPTQ's qlinear modules; GPTQModel 7.7, `PackableQuantLinear` and `FORMAT`. GPTQModel's 5, 6 and
7 bits, and all of its `gptq_p`, are another layout ("planar"), which is neither written nor read here.
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

NAME = "gptq"
METHOD = "gptq"
HOLDS_HEAD = True
HOLDS_EMBEDDINGS = False
HOLDS_CONV1D = True  # by GPTQModel's own loader; transformers 5.23 cannot load them
HOLDS_GROUP_ORDER = True
EXPERTS = "codes"  # by vLLM and GPTQModel's own loader; transformers 5.23 leaves them random
BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, -1)  # what GPTQModel's kernels accept
SIDE = 32
CONFIG_FILE = "quantize_config.json"
_DEFAULT_GROUP = 128
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_VERSION_KEYS = ("checkpoint_format", "format")  # GPTQModel writes both
# The zero point that is stored as 0, by version.
_SMALLEST_ZERO = {"gptq": 1, "gptq_v2": 0}
# Layers that vLLM and SGLang fuse: they look in `dynamic` for the fused name alone.
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def grid_for(wish: Wish) -> IntegerGrid:
    """The integer grid of the wish: groups of 128 and symmetric unless it says otherwise; scales in fp16."""
    if wish.bits not in BITS:
        raise SpecError(f"{wish.bits} bits in the GPTQ layout", expected="2, 3, 4 or 8")
    group = _DEFAULT_GROUP if wish.group_size is None else wish.group_size
    if group not in GROUP_SIZES:
        raise SpecError(
            f"a group size of {group} in the GPTQ layout",
            expected=f"one of {', '.join(map(str, GROUP_SIZES))}, what GPTQModel reads",
        )
    asymmetric = wish.symmetric is False
    if asymmetric and (wish.bits, group) == (4, -1):
        # GPTQModel 7.7: TorchFusedLinear.transform_cpu takes every zero point for 8, without a word
        raise SpecError(
            "4 bits with zero points and one group a row, which GPTQModel misreads on a CPU",
            expected="a group size, or the symmetric grid",
        )
    return IntegerGrid(wish.bits, group, "integer" if asymmetric else "middle")


def obstacle(shape: Sequence[int], grid: IntegerGrid) -> str | None:
    """Why a matrix [out, in] cannot be stored in this layout, in a few words."""
    return f"sides that are no multiples of {SIDE}" if any(side % SIDE for side in shape) else None


def version_of(grid: IntegerGrid) -> str:
    """The `checkpoint_format` that this module writes a grid in."""
    return "gptq" if grid.symmetric else "gptq_v2"


def layout(module: str, shape: Sequence[int], grid: IntegerGrid) -> list[TensorInfo]:
    """The tensors that a linear layer [out, in] becomes."""
    out, inputs = shape
    groups = -(-inputs // grid.group_width(inputs))
    return [
        TensorInfo(f"{module}.qweight", torch.int32, (inputs * grid.bits // 32, out)),
        TensorInfo(f"{module}.qzeros", torch.int32, (groups, out * grid.bits // 32)),
        TensorInfo(f"{module}.scales", torch.float16, (groups, out)),
        TensorInfo(f"{module}.g_idx", torch.int32, (inputs,)),
    ]


def encode(module: str, codes: IntegerCodes, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    return encode_as(version_of(grid), module, codes, grid)


def encode_as(version: str, module: str, codes: IntegerCodes, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    """`encode` in the version that `checkpoint_format` calls so."""
    inputs = codes.codes.shape[1]
    zeros = codes.zeros
    if zeros is None:
        zeros = torch.full(codes.scales.shape, grid.middle, dtype=torch.uint8)
    if (smallest := _SMALLEST_ZERO[version]) > int(zeros.min()):
        raise ValueError(f"{module} has a zero point of 0, which version 1 cannot hold")
    group_of = codes.group_of
    if group_of is None:
        group_of = torch.arange(inputs) // grid.group_width(inputs)
    return {
        f"{module}.qweight": pack(codes.codes.t().contiguous(), grid.bits),
        f"{module}.qzeros": pack(zeros - smallest, grid.bits).t().contiguous(),
        f"{module}.scales": codes.scales.t().contiguous(),
        f"{module}.g_idx": group_of.to(torch.int32),
    }


def config_entries(facts: Facts) -> dict[str, Any]:
    """config.json's `quantization_config`, which is quantize_config.json too."""
    versions = {version_of(cast(IntegerGrid, grid)) for grid in (facts.common, *facts.grids.values())}
    if len(versions) > 1:
        raise SpecError(
            "symmetric and asymmetric layers in one GPTQ checkpoint of version 1",
            remedy="use the format gptq_v2, or one kind of layers",
        )
    return entries_as(versions.pop(), facts)


def entries_as(version: str, facts: Facts) -> dict[str, Any]:
    """`config_entries` of a checkpoint in this version.

    What stays as it was is told twice: in the words of transformers and vLLM
    (`modules_in_block_to_quantize`), and in those of GPTQModel and vLLM (`dynamic`, where "-:" leaves out
    what the pattern matches, and "+:" gives it bits and groups of its own; transformers knows neither).
    """
    common = cast(IntegerGrid, facts.common)
    config: dict[str, Any] = {
        "bits": common.bits,
        "group_size": common.group_size,
        # Readers take it for "g_idx is no neighbour's": not so where the order of work left the groups alone.
        "desc_act": facts.desc_act and not facts.static_groups,
        "static_groups": facts.static_groups,
        "sym": common.symmetric,
        "true_sequential": facts.true_sequential,
        "lm_head": facts.head in facts.grids,
        "quant_method": METHOD,
        "checkpoint_format": version,
    }
    if facts.damp is not None:
        config["damp_percent"] = facts.damp
    left = [name for name in facts.left if name != facts.head]  # told by `lm_head`
    if left or config["lm_head"]:
        config["modules_in_block_to_quantize"] = [told_by(list(facts.grids), left)]
    if config["lm_head"]:
        # optimum looks for layers below this name only; below "" lies the head too
        config["block_name_to_quantize"] = ""
    if dynamic := _dynamic(facts, left):
        config["dynamic"] = dynamic
    return {"quantization_config": config}


def told_by(converted: Sequence[str], left: Sequence[str]) -> list[str]:
    """Names that tell the layers `converted` from those `left`: within a block if that does, else in full.

    transformers compares them with a name's end, vLLM with any part of it.
    """
    inner = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in converted})
    return sorted(converted) if any(name in other for name in inner for other in left) else inner


def _dynamic(facts: Facts, left: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The layers that are not as `facts.common`, and the fused ones made of such layers alone."""
    common = cast(IntegerGrid, facts.common)
    rules: dict[str, tuple[str, dict[str, Any]] | None] = {name: ("-:", {}) for name in left}
    for name, grid in cast(Mapping[str, IntegerGrid], facts.grids).items():
        own = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
        if own == {"bits": common.bits, "group_size": common.group_size, "sym": common.symmetric}:
            rules[name] = None
        else:
            rules[name] = rules[facts.in_memory.get(name, name)] = ("+:", own)
    fused: dict[str, list[tuple[str, dict[str, Any]] | None]] = {}
    for name, rule in rules.items():
        prefix, _, last = name.rpartition(".")
        if experts := re.match(r"(.*\.experts)\.\d+\.", name):
            fused.setdefault(experts[1], []).append(rule)
        elif last in _FUSED:
            fused.setdefault(f"{prefix}.{_FUSED[last]}", []).append(rule)
    for name, members in fused.items():
        if all(rule == members[0] for rule in members):
            rules.setdefault(name, members[0])
    return {f"{rule[0]}^{re.escape(name)}$": rule[1] for name, rule in rules.items() if rule}


def extra_files(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """quantize_config.json, where AutoGPTQ's descendants look first."""
    return {CONFIG_FILE: entries["quantization_config"]}


def finish(directory: Path) -> None:
    """Nothing: a checkpoint is its tensors and its configs."""


@dataclass(frozen=True)
class _Layer:
    """A packed layer's tensors, in the order of `_PARTS`, and what their shapes say."""

    parts: tuple[StoredTensor, ...]
    bits: int
    shape: tuple[int, int]


def _words(codes: int, bits: int) -> int | None:
    """How many words so many codes fill. The last one may be filled up, as GPTQModel does it, but not where
    codes straddle words."""
    return -(-codes * bits // 32) if 32 % bits == 0 or codes * bits % 32 == 0 else None


def _bits_of(words: int, codes: int) -> int | None:
    """Bits of each of `codes` that fill `words`; None where they do not, or would with several widths."""
    if words * 32 % codes == 0:
        return words * 32 // codes
    found = [bits for bits in BITS if _words(codes, bits) == words]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class GptqDecoder:
    """Reads versions 1 and 2, any zero points and any g_idx. A layer's bits are what its shapes say."""

    stored: Mapping[str, StoredTensor]
    smallest_zero: int  # what a stored 0 stands for

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
        module = name.removesuffix(".weight")
        layer = self._layer(module)
        qweight, qzeros, scales, g_idx = (read_tensor(part) for part in layer.parts)
        if not bool(((g_idx >= 0) & (g_idx < len(scales))).all()):
            raise CorruptFileError(
                f"{module}.g_idx names groups from {int(g_idx.min())} to {int(g_idx.max())}",
                expected=f"0 to {len(scales) - 1}",
            )
        group = g_idx.long()
        out, inputs = layer.shape
        zeros = unpack(qzeros.t().contiguous(), layer.bits).t()[:, :out].float() + self.smallest_zero
        weight = unpack(qweight, layer.bits)[:inputs].float()  # [in, out]
        weight -= zeros[group]
        weight *= scales.float()[group]
        return weight.t().contiguous()

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for name, tensor in self.stored.items():
            module, _, part = name.rpartition(".")
            if part in _PARTS and f"{module}.qweight" in self.stored:
                if part == "qweight":
                    layer = self._layer(module)
                    weight = f"{module}.weight"
                    infos[weight] = TensorInfo(weight, layer.parts[2].dtype, layer.shape)
            elif part == "qzeros":
                raise CorruptFileError(f"{module} has qzeros, but no qweight", expected=", ".join(_PARTS))
            else:
                infos[name] = tensor
        return infos

    def _layer(self, module: str) -> _Layer:
        """The layer's tensors, seen to fit together."""
        if f"{module}.weight" in self.stored:
            raise CorruptFileError(f"{module} has both weight and qweight", expected="one of them")
        parts = [
            require_part(
                self.stored,
                module,
                part,
                dtypes=FLOATS if part == "scales" else (torch.int32,),
                sides=(1,) if part == "g_idx" else (2,),
                parts=_PARTS,
            )
            for part in _PARTS
        ]
        qweight, qzeros, scales, g_idx = parts
        rows, out = qweight.shape
        groups, inputs = scales.shape[0], g_idx.shape[0]
        bits = _bits_of(rows, inputs)
        if not bits or scales.shape[1] != out or qzeros.shape != (groups, _words(out, bits)):
            raise misfit(
                module,
                parts,
                "for b bits qweight [in*b/32, out], qzeros [groups, out*b/32], scales [groups, out], "
                "g_idx [in], in and out rounded up to whole words",
            )
        if bits not in BITS:
            raise UnsupportedModelError(
                f"{module} has {bits} bits in the GPTQ layout", expected="2, 3, 4 or 8"
            )
        return _Layer(tuple(parts), bits, (out, inputs))


def decoder(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], float_dtype: torch.dtype
) -> GptqDecoder:
    """The reader of a checkpoint with this `quantization_config`.

    Bits and groups, those that `dynamic` gives to single layers too, are read off the tensors' shapes.
    """
    versions = {str(config[key]).lower() for key in _VERSION_KEYS if config.get(key)} or {"gptq"}
    if len(versions) > 1 or not versions <= _SMALLEST_ZERO.keys():
        raise UnsupportedModelError(
            f"a GPTQ checkpoint in the form {', '.join(sorted(versions))}", expected="gptq or gptq_v2"
        )
    return GptqDecoder(stored, _SMALLEST_ZERO[versions.pop()])
