"""ggml's plain numbers: F32, F16 and BF16, the low byte first, rounded to nearest, ties to even."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexport.errors import SpecError
from qexport.grids.ggml.blocks import cut
from qexport.grids.ggml.types import Affine, Decoder, Encoder


def _encoder(dtype: torch.dtype) -> Encoder:
    def encode(weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """See `Encoder`; importance has no say. Raises SpecError for what would become infinite."""
        weight = weight.detach().float()
        rounded = weight.contiguous() if dtype == torch.float32 else weight.to(dtype).contiguous()
        # fp32 keeps what it was, and callers have refused infinities
        if dtype != torch.float32 and rounded.numel():
            _refuse_overflow(weight, rounded)
        return rounded.view(torch.uint8)

    return encode


def _refuse_overflow(weight: torch.Tensor, rounded: torch.Tensor) -> None:
    low, high = rounded.aminmax()
    if bool(torch.maximum(-low, high) == torch.inf):  # one question, for a GPU has to be waited for
        largest = float(weight.abs().amax())
        name, limit = ("f16", 65504) if rounded.dtype == torch.float16 else ("bf16", 3.39e38)
        raise SpecError(
            f"a weight of {largest:.6g}, too large for {name}",
            expected=f"at most {limit}",
            remedy="choose bf16 or f32" if name == "f16" else "choose f32",
        )


def _decoder(dtype: torch.dtype) -> Decoder:
    def decode(blocks: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        parts = cut(blocks, dtype.itemsize).flatten(1)
        if parts.storage_offset() % dtype.itemsize or parts.stride(0) % dtype.itemsize:
            parts = parts.clone(memory_format=torch.contiguous_format)
        return parts.contiguous().view(dtype).float()

    return decode


_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ENCODERS: Mapping[str, Encoder] = {name: _encoder(dtype) for name, dtype in _DTYPES.items()}
DECODERS: Mapping[str, Decoder] = {name: _decoder(dtype) for name, dtype in _DTYPES.items()}
AFFINE: Mapping[str, Affine] = {}
