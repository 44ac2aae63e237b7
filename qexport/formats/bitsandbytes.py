"""bitsandbytes' serialized layers, as `save_pretrained` writes and `from_pretrained` reads them.

4 bits: `weight` uint8 [n/2, 1], `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`,
`weight.nested_quant_map`, `weight.quant_state.bitsandbytes__nf4` (JSON as bytes).
8 bits: `weight` int8 [out, in], `SCB` fp32 [out], `weight_format` uint8, 0 for row-major.
Source: bitsandbytes.functional.QuantState.as_dict, bitsandbytes.nn.Linear8bitLt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qexport.checkpoint.safetensors_file import StoredTensor, read_tensor
from qexport.checkpoint.tensors import DTYPES, TensorInfo
from qexport.errors import CorruptFileError, UnsupportedModelError
from qexport.formats.format import Facts
from qexport.grids.int8_rows import Int8RowCodes, Int8RowGrid
from qexport.grids.nf4 import BLOCK, NESTED_BLOCK, Nf4Codes, Nf4Grid

METHOD = "bitsandbytes"
_STATE = "quant_state.bitsandbytes__nf4"
# The state's JSON differs in length with its numbers; padded with spaces, which JSON allows, its size
# is known before the numbers are.
_STATE_BYTES = 256
_FLOATS = {str(d).removeprefix("torch."): d for d in DTYPES.values() if d.is_floating_point}

Grid = Nf4Grid | Int8RowGrid
Codes = Nf4Codes | Int8RowCodes


def obstacle(shape: Sequence[int], grid: Grid) -> str | None:
    """Why a matrix [out, in] is better not stored, seen with bitsandbytes 0.50.

    CUDA takes any shape. On a CPU, 4-bit rows that are no whole number of blocks are decoded wrongly and
    without a word (128 x 352: errors of the size of the weights), and outputs that are no multiple of 32
    end in an assertion.
    """
    if isinstance(grid, Nf4Grid) and (shape[1] % BLOCK or shape[0] % 32):
        return f"sides that are no multiples of 32 and {BLOCK}, which bitsandbytes cannot read on a CPU"
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
    blocks = -(-count // BLOCK)
    weight = f"{module}.weight"
    return [
        TensorInfo(weight, torch.uint8, (-(-count // 2), 1)),
        TensorInfo(f"{weight}.absmax", torch.uint8, (blocks,)),
        TensorInfo(f"{weight}.quant_map", torch.float32, (16,)),
        TensorInfo(f"{weight}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)),
        TensorInfo(f"{weight}.nested_quant_map", torch.float32, (256,)),
        TensorInfo(f"{weight}.{_STATE}", torch.uint8, (_STATE_BYTES,)),
    ]


def encode(module: str, codes: Codes, grid: Grid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    weight = f"{module}.weight"
    if isinstance(codes, Int8RowCodes):
        return {
            weight: codes.codes,
            f"{module}.SCB": codes.absmax,
            f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    state = {
        "quant_type": "nf4",
        "blocksize": codes.block,
        "dtype": str(codes.dtype).removeprefix("torch."),
        "shape": list(codes.shape),
        "nested_blocksize": codes.nested_block,
        "nested_dtype": "float32",
        "nested_offset": codes.offset,
    }
    raw = json.dumps(state).encode("ascii").ljust(_STATE_BYTES)
    return {
        weight: codes.packed.reshape(-1, 1),
        f"{weight}.absmax": codes.absmax,
        f"{weight}.quant_map": codes.codebook,
        f"{weight}.nested_absmax": codes.nested_absmax,
        f"{weight}.nested_quant_map": codes.nested_codebook,
        f"{weight}.{_STATE}": torch.frombuffer(bytearray(raw), dtype=torch.uint8),
    }


def quantization_config(grid: Grid, facts: Facts) -> dict[str, Any]:
    """The `quantization_config` of config.json; `llm_int8_skip_modules` holds for 4 bits too."""
    four = isinstance(grid, Nf4Grid)
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": str(facts.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if four else "fp4",
        "bnb_4bit_use_double_quant": four,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [*facts.left, facts.head] if facts.left else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": METHOD,
    }


def extra_files(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """None: config.json says it all."""
    return {}


@dataclass(frozen=True)
class BitsandbytesDecoder:
    """Reads NF4 with double quantization, and LLM.int8."""

    stored: Mapping[str, StoredTensor]
    float_dtype: torch.dtype

    def _owner(self, name: str) -> str | None:
        """The quantized weight that a stored tensor is a part of, itself included; None if of none."""
        for marker in (".weight.", ".SCB", ".weight_format", ".weight"):
            module, found, _ = name.rpartition(marker)
            if found and (module + ".SCB" in self.stored or f"{module}.weight.absmax" in self.stored):
                return f"{module}.weight"
        return None

    def infos(self) -> dict[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order."""
        return self._infos

    def is_quantized(self, name: str) -> bool:
        """Whether `name` is the weight of a quantized layer."""
        return name.endswith(".weight") and self._owner(name) == name

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        """Full-precision tensors; a quantized layer's `weight` has the dtype it was made from."""
        infos: dict[str, TensorInfo] = {}
        for name, tensor in self.stored.items():
            owner = self._owner(name)
            if owner is None:
                infos[name] = tensor
            elif owner == name:
                infos[name] = self._info(name, tensor)
        return infos

    def _info(self, name: str, tensor: StoredTensor) -> TensorInfo:
        if tensor.dtype == torch.int8:
            return TensorInfo(name, self.float_dtype, tensor.shape)
        state = self._state(name)
        return TensorInfo(name, _FLOATS[state["dtype"]], tuple(state["shape"]))

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, or a layer's weight in fp32, unrounded."""
        tensor = read_tensor(self.stored[name])
        if not self.is_quantized(name):
            return tensor
        module = name.removesuffix(".weight")
        if tensor.dtype == torch.int8:
            absmax = read_tensor(self.stored[f"{module}.SCB"])
            if len(tensor.shape) != 2 or absmax.shape != tensor.shape[:1]:
                raise CorruptFileError(f"{module}.SCB does not fit {name}")
            return Int8RowGrid().decode(Int8RowCodes(tensor, absmax))
        return Nf4Grid().decode(self._nf4_codes(name, tensor.reshape(-1)))

    def _nf4_codes(self, name: str, packed: torch.Tensor) -> Nf4Codes:
        state = self._state(name)
        parts = {
            part: self._part(name, part)
            for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        }
        count = math.prod(state["shape"])
        blocks = -(-count // state["blocksize"])
        if (
            packed.dtype != torch.uint8
            or len(packed) != -(-count // 2)
            or parts["absmax"].shape != (blocks,)
            or parts["quant_map"].shape != (16,)
            or parts["nested_quant_map"].shape != (256,)
            or parts["nested_absmax"].shape != (-(-blocks // state["nested_blocksize"]),)
        ):
            raise CorruptFileError(f"the tensors of {name} do not fit its shape {state['shape']}")
        return Nf4Codes(
            packed,
            parts["absmax"],
            parts["quant_map"],
            parts["nested_absmax"],
            parts["nested_quant_map"],
            float(state["nested_offset"]),
            tuple(state["shape"]),
            _FLOATS[state["dtype"]],
            state["blocksize"],
            state["nested_blocksize"],
        )

    def _part(self, name: str, part: str) -> torch.Tensor:
        tensor = self.stored.get(f"{name}.{part}")
        if tensor is None:
            raise CorruptFileError(f"{name} has no {part}", expected="NF4 with double quantization")
        return read_tensor(tensor)

    def _state(self, name: str) -> dict[str, Any]:
        if f"{name}.{_STATE}" not in self.stored:
            raise UnsupportedModelError(
                f"{name} is 4-bit, but not NF4", expected="NF4 with double quantization"
            )
        raw = self._part(name, _STATE).numpy().tobytes()
        try:
            state = json.loads(raw)
            whole = [state["blocksize"], state["nested_blocksize"], *state["shape"]]
            if not all(isinstance(n, int) and n > 0 for n in whole):
                raise ValueError("sizes must be positive")
            float(state["nested_offset"])
            _FLOATS[state["dtype"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptFileError(f"{name}.{_STATE} is damaged: {error!r}") from error
        return dict(state)


def decoder(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], float_dtype: torch.dtype
) -> BitsandbytesDecoder:
    """The reader of a checkpoint with this `quantization_config`."""
    if config.get("load_in_4bit") and (
        config.get("bnb_4bit_quant_type") != "nf4" or not config.get("bnb_4bit_use_double_quant")
    ):
        raise UnsupportedModelError(
            "a 4-bit bitsandbytes checkpoint of another kind",
            expected="NF4 with double quantization can be read so far",
        )
    return BitsandbytesDecoder(stored, float_dtype)
