"""A LoRA adapter as a GGUF file: `TENSOR.lora_a` [.., rank, in] and `TENSOR.lora_b` [.., out, rank].

TENSOR is the name in the base's file. llama.cpp adds alpha / rank * B (A x) to W x, the rank being each
pair's own, and an alpha of 0 standing for a factor of 1. For token_embd, whose rows are looked up, lora_a is
[tokens, rank] and lora_b [out, rank] (llama.cpp, src/llama-adapter.cpp and llama-graph.cpp;
convert_lora_to_gguf.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qexport.checkpoint.finiteness import is_finite
from qexport.errors import NonFiniteError, SpecError
from qexport.formats.gguf.container import PLAIN, Metadata, PlannedTensor, f32, text, u32
from qexport.formats.gguf.whole_file import write_plain
from qexport.grids.ggml.types import TYPES

_DTYPES = {PLAIN[name]: name for name in ("f32", "f16", "bf16")}
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}  # llama.h, llama_ftype

Shapes = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A tensor's name, and the shapes of its lora_a and lora_b."""


@dataclass(frozen=True)
class LoraPair:
    """The matrices of one tensor of the base, fp32, in the shapes that the file has."""

    tensor: str
    a: torch.Tensor
    b: torch.Tensor


def check_dtype(dtype: torch.dtype) -> None:
    """Raises SpecError for a dtype that an adapter's file does not get."""
    if dtype not in _DTYPES:
        raise SpecError(f"a GGUF adapter in {dtype}", expected="float32, float16 or bfloat16")


def adapter_metadata(arch: str, alpha: float, name: str, base_name: str | None) -> Metadata:
    """The settings of an adapter for files of this architecture (`general.architecture`)."""
    metadata: Metadata = {
        "general.architecture": text(arch),
        "general.type": text("adapter"),
        "adapter.type": text("lora"),
        "adapter.lora.alpha": f32(alpha),
        "general.name": text(name),
    }
    if base_name:
        metadata["general.base_model.count"] = u32(1)
        metadata["general.base_model.0.name"] = text(base_name.rstrip("/").rpartition("/")[2] or base_name)
        if _is_hub_id(base_name):
            metadata["general.base_model.0.repo_url"] = text(f"https://huggingface.co/{base_name}")
    return metadata


def _is_hub_id(name: str) -> bool:
    owner, _, model = name.partition("/")
    return bool(owner and model) and "/" not in model and not owner.startswith((".", "~"))


def write_lora(
    path: Path, metadata: Metadata, shapes: Sequence[Shapes], pairs: Iterable[LoraPair], dtype: torch.dtype
) -> int:
    """Writes the file whole or not at all, one pair in memory at a time; its size in bytes.

    `pairs` come in the order of `shapes`. Raises NonFiniteError for a value that `dtype` cannot hold,
    StorageError.
    """
    check_dtype(dtype)
    kind = _DTYPES[dtype]
    planned = [
        PlannedTensor(f"{name}.{side}", TYPES[kind], shape)
        for name, *sides in shapes
        for side, shape in zip(("lora_a", "lora_b"), sides, strict=True)
    ]
    metadata = {**metadata, "general.file_type": u32(_FILE_TYPES[kind])}
    return write_plain(path, metadata, planned, _values(pairs, dtype))


def _values(pairs: Iterable[LoraPair], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for pair in pairs:
        for side, values in (("lora_a", pair.a), ("lora_b", pair.b)):
            cast = values.to(dtype)
            if not is_finite(cast):
                raise NonFiniteError(
                    f"{pair.tensor}.{side} has values that {_DTYPES[dtype]} cannot hold",
                    expected=f"at most {torch.finfo(dtype).max:g}",
                    remedy="choose float32",
                )
            yield cast
