"""Opens any checkpoint whose form is known, as a stream of full-precision tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qexport.checkpoint.checkpoint import Checkpoint, PlainDecoder, open_directory
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.ties import tie_of
from qexport.errors import UnsupportedModelError
from qexport.formats import awq, bitsandbytes, compressed_tensors, eetq, gptq, hqq, mlx
from qexport.formats.format import Reader
from qexport.formats.mlx_names import hugging_face_names
from qexport.formats.transposed import TransposedDecoder
from qexport.modeling.architectures import stored_transposed

# What can be opened, by `quant_method`. What can be written is in methods.py.
FORMATS: dict[str, Reader] = {
    gptq.METHOD: gptq,
    awq.METHOD: awq,
    bitsandbytes.METHOD: bitsandbytes,
    eetq.METHOD: eetq,
    compressed_tensors.METHOD: compressed_tensors,
    hqq.METHOD: hqq,
    mlx.METHOD: mlx,
}


def float_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config names, or else that of the first tensor of floats; fp16 at last."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if isinstance(named, str) and named in known:
        return known[named]
    floats = (t.dtype for t in checkpoint.stored.values() if t.dtype in known.values())
    return next(floats, torch.float16)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """The checkpoint in a directory, in a GGUF file or under a Hub id, quantized or not; reads headers only.

    Raises CheckpointNotFoundError, NotACheckpointError, CorruptFileError, UnsafeFileError, and
    UnsupportedModelError for a quantization that has no reader yet.
    """
    path = resolve(source)
    hqq.refuse_pickle_alone(path)
    checkpoint = open_directory(path)
    config = checkpoint.quantization
    if config is None or not isinstance(checkpoint.decoder, PlainDecoder):
        return checkpoint
    method = mlx.METHOD if mlx.is_mlx(config) else str(config.get("quant_method"))
    if method not in FORMATS:
        raise UnsupportedModelError(
            f"{checkpoint.path} is quantized by {method!r}",
            expected=f"{', '.join(FORMATS)} can be read so far",
        )
    decoder = FORMATS[method].decoder(config, checkpoint.stored, float_dtype(checkpoint))
    if checkpoint.tie and method == mlx.METHOD:  # the tie was found by names that the decoder changes
        checkpoint = replace(checkpoint, tie=tie_of(checkpoint.config, hugging_face_names(checkpoint.stored)))
    return replace(checkpoint, decoder=TransposedDecoder(decoder, stored_transposed(checkpoint.config)))
