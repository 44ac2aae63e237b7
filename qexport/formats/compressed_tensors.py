"""compressed-tensors' "pack-quantized": vLLM's own layout, which llm-compressor writes.

A linear layer [out, in] of b bits in groups of g becomes
    weight_packed     int32 [out, ceil(in * b / 32)]      codes, packed along `in`
    weight_scale      float [out, in / g]                 in the model's dtype
    weight_shape      int64 [2]                           out, in
    weight_zero_point int32 [ceil(out * b / 32), in / g]  zero points, packed along `out`; asymmetric only
and w = (q - zero) * scale, with a zero of 2^(b-1) where none is stored. Words fill up from their low bits.
The library counts codes and zeros from -2^(b-1) and adds that while packing; what lies in the file is
unsigned. Old checkpoints with `actorder: group` have weight_g_idx int32 [in], each input's group: read here,
but not written, for compressed-tensors refuses it since 0.20 (August 2026).

4 and 8 bits only: the packing of the others changed in June 2026 (codes now straddle words), and nothing in
a checkpoint says which of the two it has. vLLM reads all of this. transformers 5.23 with compressed-tensors
0.20 loads asymmetric layers, the library's own too, only with `CompressedTensorsConfig(dequantize=True)`:
else it expects zero points that are not packed. Source: compressed-tensors 0.20,
`compressors/pack_quantized`; vLLM, `compressed_tensors_wNa16.py`.
"""

from __future__ import annotations

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
from qexport.formats.packing import pack, pack_rows, unpack, unpack_rows
from qexport.formats.parts import FLOATS, misfit, require_part
from qexport.grids.integer import IntegerCodes, IntegerGrid, Zero

NAME = "compressed-tensors"
METHOD = "compressed-tensors"
HOLDS_HEAD = True  # transformers takes it for any linear layer; vLLM reads it too
HOLDS_EMBEDDINGS = False  # the library packs them as well, but vLLM has no kernel for that lookup
HOLDS_CONV1D = False  # targets are matched with nn.Linear
HOLDS_GROUP_ORDER = False
EXPERTS = "codes"  # transformers decodes them while it loads
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, -1)  # Marlin's, vLLM's usual kernel; the library takes any
PACKING = "pack-quantized"
_VERSION = "0.20.0"  # the library whose config this is
_DEFAULT_GROUP = 128
_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_OPTIONAL = ("weight_zero_point", "weight_g_idx")
_MAX_SIDE = 1 << 40


def grid_for(wish: Wish) -> IntegerGrid:
    """The integer grid of the wish: groups of 128 and symmetric unless it says otherwise."""
    if wish.bits not in BITS:
        raise SpecError(f"{wish.bits} bits in compressed-tensors", expected="4 or 8, whose layout is stable")
    group = _DEFAULT_GROUP if wish.group_size is None else wish.group_size
    if group not in GROUP_SIZES:
        raise SpecError(
            f"a group size of {group} in compressed-tensors",
            expected=f"one of {', '.join(map(str, GROUP_SIZES))}, what vLLM's kernels read",
        )
    return IntegerGrid(wish.bits, group, "integer" if wish.symmetric is False else "middle", wish.dtype)


def obstacle(shape: Sequence[int], grid: IntegerGrid) -> str | None:
    """Why a matrix [out, in] cannot be stored in this layout, in a few words."""
    out, inputs = shape
    each = 32 // grid.bits
    if inputs % grid.group_width(inputs):
        return f"rows that are no whole number of groups of {grid.group_size}"
    if inputs % each or (not grid.symmetric and out % each):
        return f"sides that are no multiples of {each}"
    return None


def layout(module: str, shape: Sequence[int], grid: IntegerGrid) -> list[TensorInfo]:
    """The tensors that a linear layer [out, in] becomes."""
    out, inputs = shape
    groups = inputs // grid.group_width(inputs)
    infos = [
        TensorInfo(f"{module}.weight_packed", torch.int32, (out, inputs * grid.bits // 32)),
        TensorInfo(f"{module}.weight_scale", grid.dtype, (out, groups)),
        TensorInfo(f"{module}.weight_shape", torch.int64, (2,)),
    ]
    if not grid.symmetric:
        infos.append(TensorInfo(f"{module}.weight_zero_point", torch.int32, (out * grid.bits // 32, groups)))
    return infos


def encode(module: str, codes: IntegerCodes, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    if codes.group_of is not None:
        raise ValueError(f"{module} has groups that are no neighbours, which the library no longer reads")
    tensors = {
        f"{module}.weight_packed": pack_rows(codes.codes, grid.bits),
        f"{module}.weight_scale": codes.scales,
        f"{module}.weight_shape": torch.tensor(codes.codes.shape),
    }
    if codes.zeros is not None:
        tensors[f"{module}.weight_zero_point"] = pack(codes.zeros, grid.bits)
    return tensors


def config_entries(facts: Facts) -> dict[str, Any]:
    """config.json's `quantization_config`, as the library serializes it.

    Each grid is a group of its own. That of `facts.common` comes last and targets every linear layer, the
    others their layers by name, which counts before the class; `ignore` names what stays as it was.
    """
    if facts.desc_act and not facts.static_groups:
        raise SpecError(
            "act-order with groups that follow it, in compressed-tensors",
            expected="groups of neighbouring inputs: the library dropped the others in August 2026",
            remedy="use static groups (actorder: weight), or the format gptq",
        )
    common = cast(IntegerGrid, facts.common)
    grids = cast(Mapping[str, IntegerGrid], facts.grids)
    members: dict[IntegerGrid, list[str]] = {}
    for name, grid in grids.items():
        if grid != common:
            members.setdefault(grid, []).extend(dict.fromkeys((name, facts.in_memory.get(name, name))))
    schemes = [_scheme(grid, names) for grid, names in members.items()]
    if common in grids.values():
        schemes.append(_scheme(common, ["Linear"]))
    asymmetric = not all(grid.symmetric for grid in grids.values())
    if asymmetric and len(schemes) > 1:
        raise SpecError(
            "asymmetric codes of several kinds in compressed-tensors, which transformers does not load",
            remedy="use --symmetric, or leave --override away",
        )
    if asymmetric and any(".experts." in name for name in grids):
        raise SpecError(
            "asymmetric experts in compressed-tensors, which neither transformers nor vLLM reads",
            remedy="use --symmetric",
        )
    if any(".experts." in name for names in members.values() for name in names):
        raise SpecError(
            "experts on grids of their own in compressed-tensors, which transformers cannot load",
            remedy="let --override leave the experts out",
        )
    head = [] if facts.head in facts.grids or facts.head in facts.left else [facts.head]
    # transformers 5.23 fails over packed zero points unless it is to decode the weights while it loads
    dequantize = {"dequantize": True} if asymmetric else {}
    return {
        "quantization_config": {
            **dequantize,
            "config_groups": {f"group_{index}": scheme for index, scheme in enumerate(schemes)},
            "format": PACKING,
            "global_compression_ratio": None,
            "ignore": [*facts.left, *head],
            "kv_cache_scheme": None,
            "moe_sparsity_config": None,
            "quant_method": METHOD,
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": _VERSION,
        }
    }


def _scheme(grid: IntegerGrid, targets: Sequence[str]) -> dict[str, Any]:
    channel = grid.group_size == -1
    return {
        "format": PACKING,
        "input_activations": None,
        "output_activations": None,
        "targets": list(targets),
        "weights": {
            "dynamic": False,
            "group_size": None if channel else grid.group_size,
            "num_bits": grid.bits,
            "strategy": "channel" if channel else "group",
            "symmetric": grid.symmetric,
            "type": "int",
        },
    }


def extra_files(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """None: config.json says it all."""
    return {}


def finish(directory: Path) -> None:
    """Nothing: a checkpoint is its tensors and its config."""


@dataclass(frozen=True)
class _Layer:
    """A packed layer's tensors, seen to fit together, and what their shapes say."""

    packed: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None
    group_of: StoredTensor | None
    shape: tuple[int, int]
    bits: int
    group_size: int


@dataclass(frozen=True)
class PackQuantizedDecoder:
    """Reads 4 and 8 bits, symmetric and not, by group and by channel, act-order included.

    `bits` and `group_sizes` are those that the config has; a layer's own are told by its shapes.
    """

    stored: Mapping[str, StoredTensor]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    asymmetric: bool  # all layers have zero points

    def infos(self) -> dict[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order.

        A quantized layer's `weight` has its scales' dtype. Raises CorruptFileError for a layer whose
        tensors do not fit together.
        """
        return self._infos

    def is_quantized(self, name: str) -> bool:
        """Whether `name` is the weight of a packed layer."""
        return name.endswith(".weight") and f"{name}_packed" in self.stored

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, or a layer's weight [out, in] in fp32, unrounded."""
        if not self.is_quantized(name):
            return read_tensor(self.stored[name])
        layer = self._layer(name.removesuffix(".weight"))
        out, inputs = layer.shape
        zeros = group_of = None
        if layer.zero is not None:
            zeros = unpack(read_tensor(layer.zero), layer.bits)[:out]
        if layer.group_of is not None:
            group_of = read_tensor(layer.group_of).long()
            if bool(((group_of < 0) | (group_of >= layer.scale.shape[1])).any()):
                raise CorruptFileError(
                    f"{layer.group_of.name} names groups that are not there",
                    expected=f"0 to {layer.scale.shape[1] - 1}",
                )
        codes = IntegerCodes(
            unpack_rows(read_tensor(layer.packed), layer.bits)[:, :inputs],
            read_tensor(layer.scale),
            zeros,
            group_of,
        )
        zero: Zero = "middle" if zeros is None else "integer"
        return IntegerGrid(layer.bits, layer.group_size, zero, layer.scale.dtype).decode(codes)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for name, tensor in self.stored.items():
            module, _, part = name.rpartition(".")
            if part in (*_PARTS, *_OPTIONAL):
                if part == "weight_packed":
                    layer = self._layer(module)
                    infos[f"{module}.weight"] = TensorInfo(f"{module}.weight", layer.scale.dtype, layer.shape)
                elif f"{module}.weight_packed" not in self.stored:
                    raise CorruptFileError(
                        f"{module} has {part}, but no weight_packed", expected=", ".join(_PARTS)
                    )
            else:
                infos[name] = tensor
        return infos

    def _layer(self, module: str) -> _Layer:
        if f"{module}.weight" in self.stored:
            raise CorruptFileError(f"{module} has both weight and weight_packed", expected="one of them")

        def part(name: str, dtypes: Sequence[torch.dtype], sides: int) -> StoredTensor:
            return require_part(self.stored, module, name, dtypes=dtypes, sides=(sides,), parts=_PARTS)

        packed = part("weight_packed", (torch.int32,), 2)
        scale = part("weight_scale", FLOATS, 2)
        told = part("weight_shape", (torch.int64, torch.int32), 1)
        zero = group_of = None
        if self.asymmetric or f"{module}.weight_zero_point" in self.stored:
            zero = part("weight_zero_point", (torch.int32,), 2)
        if f"{module}.weight_g_idx" in self.stored:
            group_of = part("weight_g_idx", (torch.int32,), 1)
        found = [tensor for tensor in (packed, scale, told, zero, group_of) if tensor is not None]
        expected = (
            "weight_packed [out, in * bits / 32], weight_scale [out, in / group size], weight_shape [2]"
        )
        expected += ", weight_zero_point [out * bits / 32, in / group size], weight_g_idx [in]"
        if told.shape != (2,):
            raise misfit(module, found, expected)
        out, inputs = (int(side) for side in read_tensor(told).tolist())
        if out != packed.shape[0] or not 0 < inputs < _MAX_SIDE:
            raise CorruptFileError(
                f"{told.name} is {[out, inputs]}, {packed.name} is {list(packed.shape)}", expected=expected
            )
        bits = next((b for b in self.bits if _words(inputs, b) == packed.shape[1]), 0)
        groups = scale.shape[1]
        sizes = (inputs if size == -1 else size for size in self.group_sizes)
        group_size = next((size for size in sizes if -(-inputs // size) == groups), 0)
        if (
            not bits
            or not group_size
            or scale.shape[0] != out
            or (zero is not None and zero.shape != (_words(out, bits), groups))
            or (group_of is not None and group_of.shape != (inputs,))
        ):
            raise misfit(module, found, expected)
        return _Layer(packed, scale, zero, group_of, (out, inputs), bits, group_size)


def _words(count: int, bits: int) -> int:
    """Words that so many codes fill."""
    return -(-count * bits // 32)


def decoder(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], float_dtype: torch.dtype
) -> PackQuantizedDecoder:
    """The reader of a checkpoint with this `quantization_config`; scales tell the dtype by themselves.

    Raises UnsupportedModelError for the library's other packings, and for bits whose packing is not told.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UnsupportedModelError(
            "a compressed-tensors checkpoint without config_groups", expected="one group or more"
        )
    bits: list[int] = []
    sizes: list[int] = []
    asymmetric: list[bool] = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise UnsupportedModelError(
                f"the config group {name!r} of a compressed-tensors checkpoint is {type(group).__name__}",
                expected="an object that has weights",
            )
        packing = group.get("format") or config.get("format")
        if packing != PACKING or weights.get("type", "int") != "int":
            raise UnsupportedModelError(
                f"a compressed-tensors checkpoint in the form {packing!r} of {weights.get('type')!r}",
                expected=f"{PACKING} of int",
            )
        if type(weights.get("num_bits")) is not int or weights["num_bits"] not in BITS:
            raise UnsupportedModelError(
                f"a compressed-tensors checkpoint of {weights.get('num_bits')!r} bits",
                expected="4 or 8: the packing of the others changed in June 2026, and no file tells which",
            )
        size = weights.get("group_size")
        size = -1 if size is None else size
        if (
            weights.get("strategy", "group") not in ("group", "channel")
            or type(size) is not int
            or (size < 1 and size != -1)
        ):
            raise UnsupportedModelError(
                f"a compressed-tensors checkpoint by {weights.get('strategy')!r} of {size!r}",
                expected="by group of some size, or by channel",
            )
        bits.append(weights["num_bits"])
        sizes.append(size)
        asymmetric.append(weights.get("symmetric") is False)
    return PackQuantizedDecoder(stored, tuple(bits), tuple(sizes), all(asymmetric))
