"""`qexport shard`: the same tensors, in files of another size."""

from __future__ import annotations

from pathlib import Path

from qexport.checkpoint.checkpoint import Checkpoint, open_directory
from qexport.checkpoint.gguf_files import gguf_files
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import Recipe, fingerprint
from qexport.checkpoint.safetensors_file import read_tensor
from qexport.checkpoint.sidecars import sidecars_of
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.writer import CheckpointWriter
from qexport.errors import SpecError
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.specs import ShardSpec


def shard_recipe(source: Path, spec: ShardSpec) -> Recipe:
    """What determines the output of `shard`."""
    return Recipe("shard", spec.model_dump(), {"model": fingerprint(source)})


def shard(
    source: str | Path,
    out: str | Path,
    spec: ShardSpec | None = None,
    *,
    overwrite: bool = False,
    on_event: OnEvent = ignore,
) -> Checkpoint:
    """Writes `source` again in files of at most `spec.max_shard_size` bytes of tensors each.

    Tensors are copied as they are stored, quantized ones too; a tied pair is written once, under
    the embedding's name. The input is not changed.

    Raises InputError for a source that cannot be read, SpecError for a GGUF, OutputExistsError, StorageError.
    """
    spec = spec or ShardSpec()
    path = resolve(source)
    if gguf_files(path):
        raise SpecError(
            f"{source} is a GGUF, which shard would have to decode",
            remedy="a GGUF is cut into parts when it is written: qexport quantize --method gguf "
            "--max-shard-size SIZE; qexport convert makes safetensors of it",
        )
    checkpoint = open_directory(path)
    infos = [TensorInfo(name, tensor.dtype, tensor.shape) for name, tensor in checkpoint.stored.items()]
    with CheckpointWriter(
        Path(out),
        infos,
        config=checkpoint.config,
        recipe=lambda: shard_recipe(path, spec),
        max_shard_size=spec.max_shard_size,
        sidecars=sidecars_of(path),
        sources=[path],
        overwrite=overwrite,
        on_event=on_event,
    ) as writer:
        on_event(Started("shard", writer.plan.size, "bytes"))
        for name, tensor in checkpoint.stored.items():
            writer.write(name, read_tensor(tensor))
            on_event(Advanced(tensor.size, name))
        on_event(Finished())
        writer.figures["shards"] = len(writer.plan.shards)
    return open_directory(Path(out))
