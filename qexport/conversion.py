"""Any checkpoint that can be read, GGUF files too, as plain safetensors in full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint, open_directory
from qexport.checkpoint.finiteness import is_finite, non_finite_error
from qexport.checkpoint.gguf_files import gguf_files
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import Recipe, fingerprint
from qexport.checkpoint.sidecars import sidecars_of
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.writer import CheckpointWriter
from qexport.errors import NonFiniteError
from qexport.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from qexport.formats.opening import float_dtype, open_checkpoint
from qexport.specs import ConvertSpec

_QUANTIZATION_KEYS = ("quantization_config", "quantization")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_WIDER = ("bfloat16", "float32")  # than float16
_SECOND_CONFIG = "quantize_config.json"


def convert_recipe(source: Path, spec: ConvertSpec) -> Recipe:
    """What determines the output of `convert`."""
    return Recipe("convert", spec.model_dump(), {"model": fingerprint(source)}, ("torch",))


def convert(
    source: str | Path,
    out: str | Path,
    spec: ConvertSpec | None = None,
    *,
    overwrite: bool = False,
    on_event: OnEvent = ignore,
) -> Checkpoint:
    """Writes `source` to `out` as safetensors without codes, a tensor in memory at a time.

    Codes are decoded to the dtype that the config names (`spec.dtype` settles that of all weights); what
    quantization lost stays lost. The input is not changed.

    Raises InputError for a source that cannot be read, NonFiniteError for weights that are not finite or that
    the dtype cannot hold, OutputExistsError, StorageError.
    """
    spec = spec or ConvertSpec()
    path = resolve(source)
    checkpoint = open_checkpoint(path)
    decoded = sum(checkpoint.is_quantized(name) for name in checkpoint.names())
    if decoded:
        on_event(Noted(f"{decoded} tensors are decoded: what their quantization lost stays lost"))
    infos = [_planned(checkpoint, name, spec) for name in checkpoint.names()]
    with CheckpointWriter(
        Path(out),
        infos,
        config=_config(checkpoint, spec),
        recipe=lambda: convert_recipe(path, spec),
        max_shard_size=spec.max_shard_size,
        sidecars={name: file for name, file in sidecars_of(path).items() if name.name != _SECOND_CONFIG},
        sources=[path],
        overwrite=overwrite,
        on_event=on_event,
    ) as writer:
        on_event(Started("convert", writer.plan.size, "bytes"))
        for info in infos:
            values = checkpoint.read(info.name)
            if not is_finite(values):
                raise non_finite_error(str(source), [info.name])
            converted = values.to(info.dtype)
            if converted is not values and not is_finite(converted):
                raise _overflow(str(source), info, values)
            writer.write(info.name, converted)
            on_event(Advanced(info.size, info.name))
        on_event(Finished())
        writer.figures["decoded_tensors"] = decoded
    return open_directory(Path(out))


def _overflow(source: str, info: TensorInfo, values: torch.Tensor) -> NonFiniteError:
    largest, limit = float(values.double().abs().max()), torch.finfo(info.dtype).max
    wider = next((dtype for dtype in _WIDER if is_finite(values.to(getattr(torch, dtype)))), None)
    return NonFiniteError(
        f"{source} has weights of up to {largest:g} in {info.name}",
        expected=f"at most {limit:g}, where {_name(info.dtype)} ends",
        remedy=f"--dtype {wider}" if wider else "",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _planned(checkpoint: Checkpoint, name: str, spec: ConvertSpec) -> TensorInfo:
    info = checkpoint.info(name)
    dtype = info.dtype
    if info.dtype.is_floating_point:
        if spec.dtype is not None:
            dtype = getattr(torch, spec.dtype)
        elif checkpoint.is_quantized(name):  # GGUF does not tell what a model was before; its scales are fp16
            dtype = torch.float16 if gguf_files(checkpoint.path) else float_dtype(checkpoint)
    return TensorInfo(name, dtype, info.shape)


def _config(checkpoint: Checkpoint, spec: ConvertSpec) -> dict[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key not in _QUANTIZATION_KEYS}
    coded_gguf = checkpoint.quantization is not None and gguf_files(checkpoint.path)
    if dtype := spec.dtype or ("float16" if coded_gguf else None):
        named = next((key for key in _DTYPE_KEYS if key in config), _DTYPE_KEYS[0])
        config[named] = dtype
    return config
