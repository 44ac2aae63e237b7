"""bitsandbytes' serialized layers, as `save_pretrained` writes and `from_pretrained` reads them.

4 bits: `weight` uint8 [ceil(n/2), 1] (or those bytes seen as another dtype, `bnb_4bit_quant_storage`),
`weight.absmax` fp32 [blocks], `weight.quant_map` fp32 [16], `weight.quant_state.bitsandbytes__nf4` or
`__fp4` (JSON as bytes); with double quantization `weight.absmax` is uint8, and there are
`weight.nested_absmax` fp32 and `weight.nested_quant_map` fp32 [256].
8 bits: `weight` int8 [out, in], `SCB` fp32 [out], `weight_format` uint8, 0 for row-major.
All are read, and all are written but codes in another dtype than uint8.
Source: bitsandbytes.functional.QuantState.as_dict, bitsandbytes.nn.Linear8bitLt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint.safetensors_file import StoredTensor, read_tensor
from qexport.checkpoint.tensors import TensorInfo
from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.formats.format import Facts, Wish
from qexport.grids.bnb4 import BLOCK, NESTED_BLOCK, Bnb4Codes, Bnb4Grid, NestedAbsmax
from qexport.grids.int8_rows import Int8RowCodes, Int8RowGrid

NAME = "bitsandbytes"
METHOD = "bitsandbytes"
# transformers converts the head as well when `llm_int8_skip_modules` is a list without it
HOLDS_HEAD = True
HOLDS_EMBEDDINGS = False
HOLDS_CONV1D = True  # transformers makes them linear layers, and loads codes of [out, in]
HOLDS_GROUP_ORDER = False
EXPERTS = "plain"  # transformers converts nn.Linear alone, and experts are none
_STATES = {kind: f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
_PARTS_4 = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATES.values())
_PARTS_8 = ("SCB", "weight_format")
# The state's JSON differs in length with its numbers; padded with spaces, which JSON allows, its size
# is known before the numbers are.
_STATE_BYTES = 256
_MAX_STATE_BYTES = 1 << 16  # far above any real one
_FLOATS = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32)}
_ORDERS = ("row", "col32", "col_turing", "col_ampere")  # of 8-bit codes, by their `weight_format`

Grid = Bnb4Grid | Int8RowGrid
Codes = Bnb4Codes[torch.Tensor | NestedAbsmax] | Int8RowCodes


def grid_for(wish: Wish) -> Grid:
    """NF4 or FP4 for 4 bits, LLM.int8's rows for 8. Raises SpecError for a wish of anything else."""
    if wish.bits not in (4, 8):
        raise SpecError(f"bitsandbytes with {wish.bits} bits", expected="4 (nf4 or fp4) or 8")
    if wish.symmetric is False:
        raise SpecError("bitsandbytes with zero points", expected="a symmetric grid, all that it has")
    if wish.bits == 8:
        if wish.group_size not in (None, -1):
            raise SpecError(
                f"bitsandbytes with 8 bits in groups of {wish.group_size}", expected="one scale a row"
            )
        if wish.codebook is not None or wish.double_quant is not None:
            raise SpecError(
                "a codebook or double quantization with 8 bits", expected="either with 4 bits alone"
            )
        return Int8RowGrid()
    if wish.group_size not in (None, BLOCK):
        raise SpecError(
            f"bitsandbytes with 4 bits in groups of {wish.group_size}", expected=f"blocks of {BLOCK}"
        )
    double_quant = wish.double_quant is not False
    if wish.codebook is None or wish.codebook == "nf4":
        return Bnb4Grid("nf4", double_quant, dtype=wish.dtype)
    if wish.codebook == "fp4":
        return Bnb4Grid("fp4", double_quant, dtype=wish.dtype)
    raise SpecError(f"bitsandbytes with codebook {wish.codebook!r}", expected="nf4 or fp4")


def obstacle(shape: Sequence[int], grid: Grid) -> str | None:
    """Why a matrix [out, in] is better not stored, seen with bitsandbytes 0.50.

    CUDA takes any shape. On a CPU, 4-bit rows that are no whole number of blocks are decoded wrongly and
    without a word (128 x 352: errors of the size of the weights), and outputs that are no multiple of 32
    end in an assertion.
    """
    if isinstance(grid, Bnb4Grid) and (shape[1] % grid.block or shape[0] % 32):
        return f"sides that are no multiples of 32 and {grid.block}, which bitsandbytes cannot read on a CPU"
    return None


def layout(module: str, shape: Sequence[int], grid: Grid) -> list[TensorInfo]:
    """The tensors that a linear layer [out, in] becomes."""
    if isinstance(grid, Int8RowGrid):
        return [
            TensorInfo(f"{module}.weight", torch.int8, tuple(shape)),
            TensorInfo(f"{module}.SCB", torch.float32, (shape[0],)),
            TensorInfo(f"{module}.weight_format", torch.uint8, ()),
        ]
    count = math.prod(shape)
    blocks = -(-count // grid.block)
    weight = f"{module}.weight"
    nested = [
        TensorInfo(f"{weight}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)),
        TensorInfo(f"{weight}.nested_quant_map", torch.float32, (256,)),
    ]
    return [
        TensorInfo(weight, torch.uint8, (-(-count // 2), 1)),
        TensorInfo(f"{weight}.absmax", torch.uint8 if grid.double_quant else torch.float32, (blocks,)),
        TensorInfo(f"{weight}.quant_map", torch.float32, (16,)),
        *(nested if grid.double_quant else []),
        TensorInfo(f"{weight}.{_STATES[grid.kind]}", torch.uint8, (_STATE_BYTES,)),
    ]


def encode(module: str, codes: Codes, grid: Grid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    weight = f"{module}.weight"
    if isinstance(codes, Int8RowCodes):
        return {
            weight: codes.codes,
            f"{module}.SCB": codes.scales,
            f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    if isinstance(grid, Int8RowGrid):
        raise TypeError(f"{module} has 4-bit codes for a grid of 8 bits")
    state: dict[str, Any] = {
        "quant_type": grid.kind,
        "blocksize": codes.block,
        "dtype": _short(grid.dtype),
        "shape": list(codes.shape),
    }
    tensors = {weight: codes.packed.reshape(-1, 1)}
    absmax = codes.absmax
    if isinstance(absmax, NestedAbsmax):
        state |= {
            "nested_blocksize": absmax.block,
            "nested_dtype": "float32",
            "nested_offset": absmax.offset,
        }
        tensors |= {
            f"{weight}.absmax": absmax.codes,
            f"{weight}.quant_map": codes.codebook,
            f"{weight}.nested_absmax": absmax.absmax,
            f"{weight}.nested_quant_map": absmax.codebook,
        }
    else:
        tensors |= {f"{weight}.absmax": absmax, f"{weight}.quant_map": codes.codebook}
    raw = json.dumps(state).encode("ascii").ljust(_STATE_BYTES)
    tensors[f"{weight}.{_STATES[grid.kind]}"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return tensors


def config_entries(facts: Facts) -> dict[str, Any]:
    """`quantization_config`; its `llm_int8_skip_modules` holds for 4 bits too.

    Raises SpecError for layers of several grids: the config has room for one.
    """
    grids = set(facts.grids.values()) or {facts.common}
    if len(grids) > 1:
        shown = " and ".join(sorted(_described_grid(grid) for grid in grids))
        raise SpecError(f"a bitsandbytes model with layers of {shown}", expected="one grid for all layers")
    grid = grids.pop()
    four = isinstance(grid, Bnb4Grid)
    left = list(facts.left)
    if facts.head not in facts.grids and facts.head not in left:
        left.append(facts.head)  # a tied head; an empty list would have it converted
    config = {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": _short(facts.dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": grid.kind if isinstance(grid, Bnb4Grid) else "fp4",
        "bnb_4bit_use_double_quant": isinstance(grid, Bnb4Grid) and grid.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": left,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": METHOD,
    }
    return {"quantization_config": config}


def _described_grid(grid: object) -> str:
    if isinstance(grid, Bnb4Grid):
        return f"{grid.kind}{' with double quantization' if grid.double_quant else ''}"
    return "int8" if isinstance(grid, Int8RowGrid) else type(grid).__name__


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def extra_files(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """None: config.json says it all."""
    return {}


def finish(directory: Path) -> None:
    """Nothing is left to do."""


@dataclass(frozen=True)
class _State:
    """What the JSON beside a 4-bit weight says; `nested_block` is None without double quantization."""

    block: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_block: int | None
    nested_offset: float


@dataclass(frozen=True)
class BitsandbytesDecoder:
    """Reads NF4 and FP4, each with and without double quantization, and LLM.int8."""

    stored: Mapping[str, StoredTensor]
    float_dtype: torch.dtype

    def infos(self) -> dict[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order.

        A 4-bit layer's `weight` has the dtype it was made from, an 8-bit one `float_dtype`. Raises
        CorruptFileError for a layer whose tensors do not fit together, and UnsupportedModelError for
        8-bit codes in another order than row-major.
        """
        return self._infos

    def is_quantized(self, name: str) -> bool:
        """Whether `name` is the weight of a quantized layer."""
        return name in self._quantized

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, or a layer's weight in fp32, unrounded."""
        if name not in self._quantized:
            return read_tensor(self.stored[name])
        if self._is_int8(name):
            codes, absmax = self._int8(name)
            return Int8RowGrid().decode(Int8RowCodes(read_tensor(codes), read_tensor(absmax)))
        return Bnb4Grid().decode(self._bnb4_codes(name, self._state(name)))

    @cached_property
    def _quantized(self) -> frozenset[str]:
        """Names of the weights that a part of a quantized layer is stored for."""
        return frozenset(owner for name in self.stored if (owner := _owner(name)))

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for name, tensor in self.stored.items():
            if name in self._quantized:
                infos[name] = self._info(name)
            elif name.endswith(".weight") and tensor.dtype in (torch.int8, torch.uint8):
                raise CorruptFileError(
                    f"{name} is {tensor.dtype} and has no scales",
                    expected="SCB (8 bits), or absmax, quant_map and quant_state (4 bits)",
                )
            elif not _owner(name):
                infos[name] = tensor
        for name in sorted(self._quantized - infos.keys()):
            raise CorruptFileError(f"{name} is missing, though its scales are there")
        return infos

    def _info(self, name: str) -> TensorInfo:
        if self._is_int8(name):
            return TensorInfo(name, self.float_dtype, self._int8(name)[0].shape)
        state = self._state(name)
        return TensorInfo(name, state.dtype, state.shape)

    def _is_int8(self, name: str) -> bool:
        module = name.removesuffix(".weight")
        return any(f"{module}.{part}" in self.stored for part in _PARTS_8)

    def _int8(self, name: str) -> tuple[StoredTensor, StoredTensor]:
        """Codes [out, in] and maxima [out] of an 8-bit layer, seen to fit together."""
        module = name.removesuffix(".weight")
        codes, absmax = self._part(name), self._part(f"{module}.SCB")
        if (
            codes.dtype != torch.int8
            or len(codes.shape) != 2
            or absmax.shape != codes.shape[:1]
            or not absmax.dtype.is_floating_point
        ):
            raise CorruptFileError(
                f"{_described(codes)}, {_described(absmax)}",
                expected="int8 codes [out, in] and floats [out]",
            )
        order = self.stored.get(f"{module}.weight_format")
        if order is not None:
            if order.dtype != torch.uint8 or order.numel != 1:
                raise CorruptFileError(_described(order), expected="one uint8")
            if number := int(read_tensor(order)):
                shown = _ORDERS[number] if number < len(_ORDERS) else "unknown"
                raise UnsupportedModelError(
                    f"the codes of {name} lie in the order {number} ({shown})",
                    expected="0 (row), the only order that bitsandbytes still reads",
                )
        return codes, absmax

    def _bnb4_codes(self, name: str, state: _State) -> Bnb4Codes[torch.Tensor | NestedAbsmax]:
        absmax = self._read(f"{name}.absmax")
        nested: NestedAbsmax | None = None
        if state.nested_block is not None:
            codebook = self._read(f"{name}.nested_quant_map").float()
            outer = self._read(f"{name}.nested_absmax").float()
            nested = NestedAbsmax(absmax, codebook, outer, state.nested_offset, state.nested_block)
        return Bnb4Codes(
            self._read(name).reshape(-1).view(torch.uint8),
            nested or absmax,
            self._read(f"{name}.quant_map").float(),
            state.shape,
            state.block,
        )

    def _state(self, name: str) -> _State:
        """The state of a 4-bit weight, seen to fit its tensors."""
        state = self._parsed_state(name)
        count = math.prod(state.shape)
        blocks = -(-count // state.block)
        lengths = {"absmax": blocks, "quant_map": 16}
        if state.nested_block is not None:
            lengths |= {"nested_absmax": -(-blocks // state.nested_block), "nested_quant_map": 256}
        for part, length in lengths.items():
            tensor = self._part(f"{name}.{part}")
            coded = part == "absmax" and state.nested_block is not None
            fits = tensor.dtype == torch.uint8 if coded else tensor.dtype.is_floating_point
            if tensor.shape != (length,) or not fits:
                kind = "bytes" if coded else "floats"
                raise CorruptFileError(_described(tensor), expected=f"{kind} [{length}], as its state says")
        if (packed := self._part(name)).size != -(-count // 2):
            raise CorruptFileError(
                f"{_described(packed)}, {packed.size} bytes",
                expected=f"half a byte for each value of {list(state.shape)}",
            )
        return state

    def _parsed_state(self, name: str) -> _State:
        kinds = [kind for kind, part in _STATES.items() if f"{name}.{part}" in self.stored]
        if len(kinds) != 1:
            raise CorruptFileError(
                f"{name} has {len(kinds)} quantization states",
                expected="one, " + " or ".join(_STATES.values()),
            )
        tensor = self._part(f"{name}.{_STATES[kinds[0]]}")
        if tensor.dtype != torch.uint8 or tensor.size > _MAX_STATE_BYTES:
            raise CorruptFileError(_described(tensor), expected="JSON as bytes")
        try:
            return _state_of(json.loads(read_tensor(tensor).numpy().tobytes()), kinds[0])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CorruptFileError(f"{tensor.name} is damaged: {error!r}") from error

    def _part(self, name: str) -> StoredTensor:
        tensor = self.stored.get(name)
        if tensor is None:
            raise CorruptFileError(f"{name} is missing, though other parts of its layer are there")
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        return read_tensor(self._part(name))


def _owner(name: str) -> str | None:
    """The quantized weight that a stored tensor is a part of, by its name; None if of none."""
    module, found, part = name.rpartition(".weight.")
    if found and part in _PARTS_4:
        return f"{module}.weight"
    module, _, part = name.rpartition(".")
    return f"{module}.weight" if part in _PARTS_8 else None


def _described(tensor: StoredTensor) -> str:
    return f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}"


def _state_of(content: Any, kind: str) -> _State:
    """The state that a JSON object says; ValueError, KeyError, TypeError or OverflowError if none."""
    if content["quant_type"] != kind:
        raise ValueError(f"its quant_type is not {kind}")
    if content["dtype"] not in _FLOATS:
        raise ValueError(f"its dtype is none of {', '.join(_FLOATS)}")
    nested = "nested_blocksize" in content
    sizes = [content["blocksize"], *content["shape"], *([content["nested_blocksize"]] if nested else [])]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError("its sizes are no positive integers")
    offset = float(content["nested_offset"]) if nested else 0.0
    if not math.isfinite(offset):
        raise ValueError("its nested_offset is not finite")
    return _State(
        content["blocksize"],
        _FLOATS[content["dtype"]],
        tuple(content["shape"]),
        content["nested_blocksize"] if nested else None,
        offset,
    )


def decoder(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], float_dtype: torch.dtype
) -> BitsandbytesDecoder:
    """The reader of a checkpoint with this `quantization_config`; each layer tells its kind by itself."""
    return BitsandbytesDecoder(stored, float_dtype)
