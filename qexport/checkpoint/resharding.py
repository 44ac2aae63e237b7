"""`qexport shard`: the same tensors, in files of another size."""

from __future__ import annotations

from pathlib import Path

from qexport.checkpoint.checkpoint import Checkpoint, open_directory
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import Recipe, fingerprint
from qexport.checkpoint.sidecars import sidecars_of
from qexport.checkpoint.writer import CheckpointWriter
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

    Tensors are copied as they are stored, quantized ones too, but those of a GGUF decoded; a tied pair is
    written once, under the embedding's name. The input is not changed.

    Raises InputError for a source that cannot be read, OutputExistsError, StorageError.
    """
    spec = spec or ShardSpec()
    path = resolve(source)
    checkpoint = open_directory(path)
    names = list(checkpoint.names())
    config = dict(checkpoint.config)
    if any(map(checkpoint.is_quantized, names)):  # decoded on the way
        config.pop("quantization_config", None)
    with CheckpointWriter(
        Path(out),
        [checkpoint.info(name) for name in names],
        config=config,
        recipe=lambda: shard_recipe(path, spec),
        max_shard_size=spec.max_shard_size,
        sidecars=sidecars_of(path),
        sources=[path],
        overwrite=overwrite,
        on_event=on_event,
    ) as writer:
        on_event(Started("shard", writer.plan.size, "bytes"))
        for name in names:
            writer.write(name, checkpoint.read(name))
            on_event(Advanced(checkpoint.info(name).size, name))
        on_event(Finished())
        writer.figures["shards"] = len(writer.plan.shards)
    return open_directory(Path(out))
