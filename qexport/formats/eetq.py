"""EETQ's layout: int8 with one scale a row, in the order that its CUDA kernels load.

`weight` int8 [in, out], `weight_scales` fp16 [out]; w = q * scale with q in [-128, 127]. The bytes of
`weight` are not in the order of its shape. By pairs of output rows, 64 inputs of the first row and the same
64 of the second lie side by side; of 16 inputs, each of the first eight lies beside one of the last eight; a
byte is q + 128. Source: NetEase-FuXi/EETQ, csrc/cutlass_kernels/cutlass_preprocessors.cc at 465e972,
`preprocess_weights_for_mixed_gemm` of int8 for compute capabilities 7.5 to 8.9, and its steps
permute_B_rows_for_mixed_gemm, subbyte_transpose, interleave_column_major_tensor and
add_bias_and_interleave_int8s_inplace. That code refuses other capabilities.

EETQ itself fits absmax/128, and clips a highest weight by a step; the scale here reaches it.

Checked against transcriptions of that code and of the order in which EETQ's small-batch kernel reads, and
loaded by transformers with the latter in place of the kernel. Not checked: a run on a GPU, which the kernels
need.
"""

from __future__ import annotations

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
from qexport.grids.int8_rows import Int8RowCodes, Int8RowGrid

NAME = "eetq"
METHOD = "eetq"
# transformers converts the head as well when it is not among `modules_to_not_convert`; embeddings never
HOLDS_HEAD = True
HOLDS_EMBEDDINGS = False
HOLDS_CONV1D = False  # transformers converts nn.Linear alone
HOLDS_GROUP_ORDER = False
EXPERTS = "plain"  # transformers converts nn.Linear alone, and experts are none
_GRID = Int8RowGrid(bottom=-128, unit=1, dtype=torch.float16)
_TILE = 64  # of both sides: interleave_column_major_tensor


def grid_for(wish: Wish) -> Int8RowGrid:
    """int8 by rows, the only grid. Raises SpecError for a wish of another."""
    if (
        wish.bits != 8
        or wish.group_size not in (None, -1)
        or wish.symmetric is False
        or wish.codebook is not None
        or wish.double_quant is not None
    ):
        raise SpecError(
            f"eetq with {_wished(wish)}",
            expected="8 bits, symmetric, one scale a row: all that the format has",
        )
    return _GRID


def _wished(wish: Wish) -> str:
    parts = [f"{wish.bits} bits"]
    parts += [f"groups of {wish.group_size}"] if wish.group_size not in (None, -1) else []
    parts += ["zero points"] if wish.symmetric is False else []
    parts += [f"codebook {wish.codebook}"] if wish.codebook is not None else []
    parts += [f"double_quant {wish.double_quant}"] if wish.double_quant is not None else []
    return ", ".join(parts)


def obstacle(shape: Sequence[int], grid: Int8RowGrid) -> str | None:
    """Why a matrix [out, in] cannot be stored, in a few words; None when it can."""
    if shape[0] % _TILE or shape[1] % _TILE:
        return f"sides that are no multiples of {_TILE}, the tile of EETQ's kernels"
    return None


def layout(module: str, shape: Sequence[int], grid: Int8RowGrid) -> list[TensorInfo]:
    """The tensors that a linear layer [out, in] becomes."""
    return [
        TensorInfo(f"{module}.weight", torch.int8, (shape[1], shape[0])),
        TensorInfo(f"{module}.weight_scales", torch.float16, (shape[0],)),
    ]


def encode(module: str, codes: Int8RowCodes, grid: Int8RowGrid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    return {
        f"{module}.weight": interleaved(codes.codes),
        f"{module}.weight_scales": codes.scales.to(torch.float16),
    }


def config_entries(facts: Facts) -> dict[str, Any]:
    """`quantization_config`, and `dtype`: the kernels take any activations' bytes for fp16."""
    left = list(facts.left)
    if facts.head not in facts.grids and facts.head not in left:
        left.append(facts.head)  # a tied head; an empty list would have it converted
    config = {"quant_method": METHOD, "weights": "int8", "modules_to_not_convert": left}
    return {"quantization_config": config, "dtype": "float16"}


def extra_files(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """None: config.json says it all."""
    return {}


def finish(directory: Path) -> None:
    """Nothing is left to do."""


def interleaved(codes: torch.Tensor) -> torch.Tensor:
    """Codes int8 [out, in] -> int8 [in, out] as the kernels load them; both sides multiples of 64."""
    out, inputs = codes.shape
    # pair of rows, row, tile, 16 inputs of it, half, place: the tile goes before the row, and the place
    # before the half
    parts = codes.reshape(out // 2, 2, inputs // _TILE, 4, 2, 8).permute(0, 2, 1, 3, 5, 4)
    # int8: q + 128 as a byte is q with its sign bit turned
    return parts.reshape(inputs, out) ^ -128


def plain(stored: torch.Tensor) -> torch.Tensor:
    """Codes int8 [out, in] of what `interleaved` made."""
    inputs, out = stored.shape
    parts = stored.reshape(out // 2, inputs // _TILE, 2, 4, 8, 2).permute(0, 2, 1, 3, 5, 4)
    return parts.reshape(out, inputs) ^ -128


@dataclass(frozen=True)
class EetqDecoder:
    """Reads EETQ layers; all other tensors as they are."""

    stored: Mapping[str, StoredTensor]
    float_dtype: torch.dtype

    def infos(self) -> dict[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order.

        Raises CorruptFileError for a layer whose tensors do not fit together.
        """
        return self._infos

    def is_quantized(self, name: str) -> bool:
        """Whether `name` is the weight of a quantized layer."""
        return f"{name}_scales" in self.stored

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, or a layer's weight in fp32, unrounded."""
        if not self.is_quantized(name):
            return read_tensor(self.stored[name])
        weight, scales = (read_tensor(part) for part in self._parts(name))
        return _GRID.decode(Int8RowCodes(plain(weight), scales))

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for name, tensor in self.stored.items():
            if self.is_quantized(name):
                inputs, out = self._parts(name)[0].shape
                infos[name] = TensorInfo(name, self.float_dtype, (out, inputs))
            elif name.endswith(".weight") and tensor.dtype in (torch.int8, torch.uint8):
                raise CorruptFileError(
                    f"{name} is {tensor.dtype} and has no scales", expected=f"{name}_scales beside it"
                )
            elif not name.endswith(".weight_scales"):
                infos[name] = tensor
            else:
                self._parts(name.removesuffix("_scales"))
        return infos

    def _parts(self, name: str) -> tuple[StoredTensor, StoredTensor]:
        """Codes [in, out] and scales [out] of a layer, seen to fit together."""
        if name not in self.stored:
            raise CorruptFileError(f"{name} is missing, though its scales are there")
        codes, scales = self.stored[name], self.stored[f"{name}_scales"]
        if (
            codes.dtype != torch.int8
            or len(codes.shape) != 2
            or not codes.numel
            or any(side % _TILE for side in codes.shape)
            or scales.shape != codes.shape[1:]
            or not scales.dtype.is_floating_point
        ):
            found = ", ".join(f"{part.name} is {part.dtype} {list(part.shape)}" for part in (codes, scales))
            raise CorruptFileError(
                found, expected=f"int8 codes [in, out], multiples of {_TILE}, and floats [out]"
            )
        return codes, scales


def decoder(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], float_dtype: torch.dtype
) -> EetqDecoder:
    """The reader of a checkpoint with this `quantization_config`; UnsupportedModelError if it is not int8."""
    if (weights := config.get("weights", "int8")) != "int8":
        raise UnsupportedModelError(f"EETQ weights of {weights!r}", expected="int8, all that EETQ has")
    return EetqDecoder(stored, float_dtype)
