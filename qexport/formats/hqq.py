"""HQQ's layout: safetensors as `HQQLinear.state_dict` has it, and the `qmodel.pt` that hqq itself loads.

A linear layer [out, in] of b bits in groups of g is taken for a matrix [rows, g] with rows = out * in / g
(axis 1) and becomes
    W_q    uint8 or int32  codes, packed along the rows (below)
    scale  float [rows, 1] in the model's dtype
    zero   float [rows, 1] likewise
and w = (W_q - zero) * scale, the zero having fractions. Beside them lie the settings, one tensor each:
nbits, group_size, axis int32; shape int64 [2]; view_as_float, quant_scale, quant_zero, channel_wise,
optimize, round_zero, offload_meta, encoded_state_dict, stores_quant_config uint8; packing,
unpack_view_dtype, compute_dtype as texts, a uint8 a letter.

Packing: rows are cut in as many equal parts as codes fit in a word, and a word holds one code of each, the
first part's highest: 2 parts for 4 bits, 4 for 2, 8 for 1. 8, 6 and 5 bits take a byte each; 3 bits go ten
to an int32, the last part filled up with zeros. Source: hqq 0.2.8, `core/bitpack.py`, `core/quantize.py`
(`Quantizer`, `HQQLinear`), `core/utils.py` (`encode_safetensor_type`).

`qmodel.pt` is a dict {module: {parameter: tensor or setting}} with plain modules too. hqq loads only that;
transformers 5.23 loads neither (it takes the safetensors and leaves random weights). It is made of the
safetensors, tensor by tensor; `hqq_safetensors.py` does without. It is never read: a pickle can run code,
and hqq evaluates the names of dtypes in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from qexport.checkpoint.checkpoint import Checkpoint, open_directory
from qexport.checkpoint.disk import write_errors
from qexport.checkpoint.safetensors_file import StoredTensor, byte_view, iter_values, read_tensor
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.torch_file import TorchFile
from qexport.errors import CorruptFileError, SpecError, UnsafeFileError, UnsupportedModelError
from qexport.formats.format import Facts, Wish
from qexport.formats.parts import FLOATS, misfit, require_part
from qexport.grids.integer import IntegerCodes, IntegerGrid

NAME = "hqq"
METHOD = "hqq"
HOLDS_HEAD = True  # hqq loads whatever has a W_q
HOLDS_EMBEDDINGS = False
HOLDS_CONV1D = False  # hqq puts a linear layer in its place, but loads GPT-2 without its head
HOLDS_GROUP_ORDER = False
EXPERTS = "none"  # hqq neither saves nor loads fused experts
BITS = (8, 6, 5, 4, 3, 2, 1)
PICKLE = "qmodel.pt"
_DEFAULT_GROUP = 64
_GROUP_STEP = 8  # hqq demands multiples of it
# what transformers calls modules in memory, and so hqq, where the checkpoint has another name
_IN_MEMORY = {"gpt_neox": {"embed_out": "lm_head"}}
_PARTS = ("W_q", "scale", "zero", "shape", "axis", "packing")


@dataclass(frozen=True)
class _Packing:
    """`parts` codes of `bits` share a word of `dtype`."""

    name: str
    parts: int
    bits: int
    dtype: torch.dtype

    def words(self, rows: int) -> int:
        """Rows of words for so many rows of codes."""
        return -(-rows // self.parts)


_PACKINGS = {
    packing.name: packing
    for packing in (
        _Packing("8bit_u8", 1, 8, torch.uint8),
        _Packing("4bit_u8", 2, 4, torch.uint8),
        _Packing("3bit_32", 10, 3, torch.int32),
        _Packing("2bit_u8", 4, 2, torch.uint8),
        _Packing("1bit_u8", 8, 1, torch.uint8),
    )
}
_PACKING_OF_BITS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8"} | {
    packing.bits: packing.name for packing in _PACKINGS.values()
}


def grid_for(wish: Wish) -> IntegerGrid:
    """The integer grid of the wish: groups of 64 and zeros with fractions unless it says otherwise."""
    if wish.bits not in BITS:
        raise SpecError(f"{wish.bits} bits in HQQ", expected=f"one of {', '.join(map(str, BITS))}")
    group = _DEFAULT_GROUP if wish.group_size is None else wish.group_size
    if group != -1 and (group < _GROUP_STEP or group % _GROUP_STEP):
        raise SpecError(
            f"a group size of {group} in HQQ", expected=f"a multiple of {_GROUP_STEP}, or -1 for a whole row"
        )
    return IntegerGrid(wish.bits, group, "middle" if wish.symmetric else "float", wish.dtype)


def obstacle(shape: Sequence[int], grid: IntegerGrid) -> str | None:
    """Why a matrix [out, in] cannot be stored in this layout, in a few words."""
    width = grid.group_width(shape[1])
    if shape[1] % width:
        return f"rows that are no whole number of groups of {grid.group_size}"
    packing = _packing_of(grid)
    if packing.dtype == torch.uint8 and (math.prod(shape) // width) % packing.parts:
        return f"a number of groups that is no multiple of {packing.parts}"
    return None


def layout(module: str, shape: Sequence[int], grid: IntegerGrid) -> list[TensorInfo]:
    """The tensors that a linear layer [out, in] becomes."""
    width = grid.group_width(shape[1])
    rows = math.prod(shape) // width
    packing = _packing_of(grid)
    infos = [
        TensorInfo(f"{module}.W_q", packing.dtype, (packing.words(rows), width)),
        TensorInfo(f"{module}.scale", grid.dtype, (rows, 1)),
        TensorInfo(f"{module}.zero", grid.dtype, (rows, 1)),
    ]
    for name, value in _settings(shape, grid).items():
        tensor = _encoded(value)
        infos.append(TensorInfo(f"{module}.{name}", tensor.dtype, tuple(tensor.shape)))
    return infos


def encode(module: str, codes: IntegerCodes, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    if codes.group_of is not None:
        raise ValueError(f"{module} has groups that are no neighbours, which HQQ cannot tell")
    zeros = codes.zeros
    if zeros is None:
        zeros = torch.full_like(codes.scales, grid.middle)
    shape = tuple(codes.codes.shape)
    tensors = {
        f"{module}.W_q": _pack(codes.codes.reshape(-1, grid.group_width(shape[1])), _packing_of(grid)),
        f"{module}.scale": codes.scales.reshape(-1, 1),
        f"{module}.zero": zeros.reshape(-1, 1),
    }
    settings = _settings(shape, grid).items()
    return tensors | {f"{module}.{name}": _encoded(value) for name, value in settings}


def _packing_of(grid: IntegerGrid) -> _Packing:
    return _PACKINGS[_PACKING_OF_BITS[grid.bits]]


def _settings(shape: Sequence[int], grid: IntegerGrid) -> dict[str, Any]:
    """What a layer's state has beside its three tensors, as values, in hqq's order."""
    packing = _packing_of(grid)
    return {
        "nbits": grid.bits,
        "group_size": grid.group_width(shape[1]),
        "shape": torch.Size(shape),
        "axis": 1,
        "packing": packing.name,
        "unpack_view_dtype": packing.dtype,
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": grid.dtype,
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": False,
    }


def _encoded(value: Any) -> torch.Tensor:
    """A setting as a tensor: hqq's `encode_safetensor_type`."""
    if isinstance(value, torch.Size):
        return torch.tensor(value)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    return torch.tensor(list(str(value).encode("ascii")), dtype=torch.uint8)


def _pack(codes: torch.Tensor, packing: _Packing) -> torch.Tensor:
    """Codes uint8 [rows, g] -> words [words, g]."""
    count = packing.words(len(codes))
    words = torch.zeros(count, codes.shape[1], dtype=packing.dtype)
    for part in range(packing.parts):
        own = codes[part * count : (part + 1) * count].to(packing.dtype)
        words[: len(own)] |= own << (packing.bits * (packing.parts - 1 - part))
    return words


def _unpack(words: torch.Tensor, packing: _Packing, rows: int) -> torch.Tensor:
    """The inverse of `_pack`: uint8 [rows, g]."""
    count = len(words)
    codes = torch.empty(count * packing.parts, words.shape[1], dtype=torch.uint8)
    for part in range(packing.parts):
        shifted = words >> (packing.bits * (packing.parts - 1 - part))
        codes[part * count : (part + 1) * count] = shifted & ((1 << packing.bits) - 1)
    return codes[:rows]


def config_entries(facts: Facts) -> dict[str, Any]:
    """config.json's `quantization_config`, in the form of transformers' HqqConfig.

    Each layer tells its own settings; these are for whoever looks there first. They have names of layers
    without numbers ("tags"): so differing grids are told where every block has the same.
    """
    common = cast(IntegerGrid, facts.common)
    by_tag: dict[str, set[IntegerGrid]] = {}
    for name, grid in cast(Mapping[str, IntegerGrid], facts.grids).items():
        by_tag.setdefault(tag(name), set()).add(grid)
    settings: dict[str, Any] = _quant_config(common)
    if {common} != set().union(*by_tag.values()) and all(len(grids) == 1 for grids in by_tag.values()):
        settings = {name: _quant_config(next(iter(grids))) for name, grids in by_tag.items()}
    left = [*facts.left] if facts.head in (*facts.left, *facts.grids) else [*facts.left, facts.head]
    skipped = {name if tag(name) in by_tag else tag(name) for name in left}
    return {
        "quantization_config": {
            "quant_config": settings,
            "quant_method": METHOD,
            "skip_modules": sorted(skipped),
        }
    }


def tag(name: str) -> str:
    """A layer's name without numbers and what is around the blocks: hqq's `name_to_linear_tag`."""
    return ".".join(
        part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric()
    )


def _quant_config(grid: IntegerGrid) -> dict[str, Any]:
    """hqq's `BaseQuantizeConfig`."""
    return {
        "offload_meta": False,
        "scale_quant_params": None,
        "weight_quant_params": {
            "axis": 1,
            "channel_wise": True,
            "group_size": None if grid.group_size == -1 else grid.group_size,
            "nbits": grid.bits,
            "optimize": True,
            "round_zero": False,
            "view_as_float": False,
        },
        "zero_quant_params": None,
    }


def extra_files(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """None: config.json says it all."""
    return {}


def finish(directory: Path) -> None:
    """Writes qmodel.pt, made of the safetensors, a tensor in memory at a time."""
    checkpoint = open_directory(directory)
    kept = [tensor for name, tensor in checkpoint.stored.items() if _is_kept(name, checkpoint.stored)]
    with write_errors(directory):
        file = TorchFile(directory / PICKLE, kept, lambda tensors: _by_module(tensors, checkpoint))
        for tensor in kept:
            for values in iter_values(tensor):
                file.write(byte_view(values))
        file.close()


def _is_kept(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether qmodel.pt has this as a tensor; it has a layer's settings as values."""
    module, _, part = name.rpartition(".")
    return f"{module}.W_q" not in stored or part in ("W_q", "scale", "zero", "bias")


def _by_module(tensors: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """hqq's `serialize_weights`: what each module without others in it has."""
    modules: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        own = modules.setdefault(module, {})
        own[part] = tensor
        if part == "W_q":
            own.update(_read_settings(module, checkpoint.stored))
    if tie := checkpoint.tie:  # for hqq the head is a module of its own
        embedding = modules.get(tie.embedding.removesuffix(".weight"), {})
        if "weight" in embedding:
            modules[tie.head.removesuffix(".weight")] = {"weight": embedding["weight"]}
    renamed = _IN_MEMORY.get(str(checkpoint.config.get("model_type")), {})
    return {renamed.get(name, name): own for name, own in modules.items()}


def _read_settings(module: str, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The layer's settings as values; `encoded_state_dict` would tell hqq that they are tensors."""
    layer = _layer(module, stored)
    nbits = int(read_tensor(stored[f"{module}.nbits"]))
    grid = IntegerGrid(nbits, layer.width, "float", layer.scale.dtype)
    settings = _settings(layer.shape, grid)
    del settings["encoded_state_dict"]
    return settings


def refuse_pickle_alone(directory: Path) -> None:
    """Raises UnsafeFileError for a directory whose weights lie in hqq's qmodel.pt and nowhere else."""
    if (directory / PICKLE).is_file() and not any(directory.glob("*.safetensors")):
        raise UnsafeFileError(
            f"{directory} holds its weights in {PICKLE}, a pickle that can run code when loaded",
            expected="HQQ checkpoints are read from safetensors",
            remedy="quantize the full-precision model again (qexport quantize --method hqq), or convert this "
            'one once where you trust it: python -c "from hqq.models.hf.base import AutoHQQHFModel as M; '
            f"M.save_to_safetensors(M.from_quantized('{directory}', device='cpu'), 'OUT')\"",
        )


@dataclass(frozen=True)
class _Layer:
    """A packed layer's tensors, seen to fit together: `rows` groups of `width` codes."""

    words: StoredTensor
    scale: StoredTensor
    zero: StoredTensor
    shape: tuple[int, int]
    packing: _Packing
    axis: int
    rows: int
    width: int


@dataclass(frozen=True)
class HqqDecoder:
    """Reads every packing, both axes, and words that are stored as floats; each layer tells its own."""

    stored: Mapping[str, StoredTensor]

    def infos(self) -> dict[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order.

        A quantized layer's `weight` has its scales' dtype. Raises CorruptFileError for a layer whose
        tensors do not fit together, and UnsupportedModelError for an unknown packing.
        """
        return self._infos

    def is_quantized(self, name: str) -> bool:
        """Whether `name` is the weight of a packed layer."""
        return name.endswith(".weight") and f"{name.removesuffix('.weight')}.W_q" in self.stored

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, or a layer's weight [out, in] in fp32, unrounded."""
        if not self.is_quantized(name):
            return read_tensor(self.stored[name])
        layer = _layer(name.removesuffix(".weight"), self.stored)
        words = read_tensor(layer.words).view(layer.packing.dtype)
        # along axis 0 groups are columns, and 3 bits fill up the group
        codes = _unpack(words, layer.packing, layer.rows if layer.axis else layer.width)
        scale, zero = (read_tensor(part).reshape(-1, 1) for part in (layer.scale, layer.zero))
        grid = IntegerGrid(layer.packing.bits, -1, "float", scale.dtype)
        grouped = grid.decode(IntegerCodes(codes if layer.axis else codes.t(), scale, zero))
        return (grouped if layer.axis else grouped.t()).reshape(layer.shape)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for name, tensor in self.stored.items():
            module, _, part = name.rpartition(".")
            if f"{module}.W_q" not in self.stored:
                if part in ("unpack_view_dtype", "packing"):
                    raise CorruptFileError(f"{module} has {part}, but no W_q", expected=", ".join(_PARTS))
                infos[name] = tensor
            elif part == "W_q":
                layer = _layer(module, self.stored)
                infos[f"{module}.weight"] = TensorInfo(f"{module}.weight", layer.scale.dtype, layer.shape)
            elif part == "bias":
                infos[name] = tensor
        return infos


_WHOLE = (torch.int32, torch.int64, torch.uint8)
_SCALES = (*FLOATS, torch.float64)


def _layer(module: str, stored: Mapping[str, StoredTensor]) -> _Layer:
    if f"{module}.weight" in stored:
        raise CorruptFileError(f"{module} has both weight and W_q", expected="one of them")

    def part(name: str, dtypes: Sequence[torch.dtype], *sides: int) -> StoredTensor:
        return require_part(stored, module, name, dtypes=dtypes, sides=sides, parts=_PARTS)

    def number(name: str) -> int:
        tensor = part(name, _WHOLE, 0, 1)
        if tensor.numel != 1:
            raise CorruptFileError(f"{tensor.name} is {list(tensor.shape)}", expected="one number")
        return int(read_tensor(tensor))

    packing = _packing_named(module, part("packing", (torch.uint8,), 1))
    words = part("W_q", (packing.dtype, *FLOATS), 2)
    scale, zero = part("scale", _SCALES, 2), part("zero", _SCALES, 2)
    told = part("shape", (torch.int64, torch.int32), 1)
    axis = number("axis")
    found = (words, scale, zero, told)
    expected = "W_q packed rows, scale and zero [groups, 1] (axis 1) or [1, groups] (axis 0), shape [out, in]"
    if axis not in (0, 1) or told.numel != 2:
        raise misfit(module, found, expected)
    out, inputs = (int(side) for side in read_tensor(told).tolist())
    groups = scale.numel
    if out < 1 or inputs < 1 or out * inputs % groups:
        raise CorruptFileError(f"{told.name} is {[out, inputs]}, with {groups} scales", expected=expected)
    width = out * inputs // groups
    # words stored as floats of another size have fewer columns
    columns = words.shape[1] * words.dtype.itemsize / packing.dtype.itemsize
    stored_shape = (groups, 1) if axis else (1, groups)
    if (
        (words.shape[0], columns) != (packing.words(groups if axis else width), width if axis else groups)
        or scale.shape != stored_shape
        or zero.shape != stored_shape
    ):
        raise misfit(module, found, expected)
    return _Layer(words, scale, zero, (out, inputs), packing, axis, groups, width)


def _packing_named(module: str, tensor: StoredTensor) -> _Packing:
    text = bytes(read_tensor(tensor).tolist()).decode("latin-1") if tensor.numel < 32 else "..."
    if text not in _PACKINGS:
        raise UnsupportedModelError(
            f"the layer {module} is packed as {text!r}", expected=f"one of {', '.join(_PACKINGS)}"
        )
    return _PACKINGS[text]


def decoder(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], float_dtype: torch.dtype
) -> HqqDecoder:
    """The reader of an HQQ checkpoint in safetensors; what the config says, each layer says by itself."""
    return HqqDecoder(stored)
