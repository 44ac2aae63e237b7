"""`qexport merge`: adapters into their base, one tensor in memory at a time."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch

from qexport.checkpoint.checkpoint import Checkpoint, open_directory
from qexport.checkpoint.disk import is_file
from qexport.checkpoint.finiteness import is_finite, non_finite_error, require_finite
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import Recipe, file_hash, fingerprint, read_manifest
from qexport.checkpoint.safetensors_file import read_tensor
from qexport.checkpoint.sidecars import sidecar_files
from qexport.checkpoint.writer import CheckpointWriter
from qexport.errors import AdapterError, UnsupportedModelError
from qexport.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from qexport.merging.adapter import Adapter, LoraPair, open_adapter
from qexport.merging.lora import merge_lora
from qexport.specs import MergeSpec


def merge_recipe(base: Path, adapters: Sequence[Path], spec: MergeSpec) -> Recipe:
    """What determines the output of `merge`; the order of the adapters counts."""
    inputs = {"base": fingerprint(base)}
    inputs.update({f"adapter {n}": fingerprint(path) for n, path in enumerate(adapters, start=1)})
    return Recipe("merge", spec.model_dump(), inputs)


def merge(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    spec: MergeSpec | None = None,
    *,
    overwrite: bool = False,
    on_event: OnEvent = ignore,
) -> Checkpoint:
    """Writes `base` with `adapters` merged into it, one after the other, to `out`.

    Each matrix is read, changed in fp32, rounded once to its own dtype and written; peak memory is that
    of the largest tensor. The base's tokenizer and other small files are carried along. The inputs are
    not changed.

    Raises InputError for what cannot be read, AdapterError for an adapter of another base,
    UnsupportedModelError for a quantized base, NonFiniteError, OutputExistsError, StorageError.
    """
    spec = spec or MergeSpec()
    checkpoint, opened = check_merge(base, adapters)
    base_path = checkpoint.path
    for adapter in opened:
        own = [str(file) for file in sidecar_files(adapter.path) if _differs(adapter.path, base_path, file)]
        if own:
            on_event(
                Noted(
                    f"{adapter.path} brings its own {', '.join(own)}: the base's are kept; copy them over "
                    "if the fine-tune was trained with them"
                )
            )
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    with CheckpointWriter(
        Path(out),
        infos,
        config=checkpoint.config,
        recipe=lambda: merge_recipe(base_path, [adapter.path for adapter in opened], spec),
        max_shard_size=spec.max_shard_size,
        sidecars_from=base_path,
        overwrite=overwrite,
        sources=[adapter.path for adapter in opened],
        on_event=on_event,
    ) as writer:
        on_event(Started("merge", writer.plan.size, "bytes"))
        changed = 0
        for info in infos:
            pairs = _pairs_of(info.name, opened)
            merged = _merge_tensor(checkpoint, info.name, pairs)
            writer.write(info.name, merged)
            changed += bool(pairs)
            on_event(Advanced(info.size, info.name))
        on_event(Finished())
        writer.figures.update(tensors=len(infos), tensors_changed=changed)
    return open_directory(Path(out))


def merged_before(base: Path) -> set[str]:
    """Hashes of the adapters that the base, when qexport made it, was merged from."""
    recipe = read_manifest(base).get("recipe")
    inputs = recipe.get("inputs") if isinstance(recipe, dict) else None
    if not isinstance(inputs, dict):
        return set()
    return {str(value) for name, value in inputs.items() if name.startswith("adapter")}


def _differs(adapter: Path, base: Path, file: Path) -> bool:
    """Whether the adapter's tokenizer or template file is another than the base's."""
    chosen = file.suffix == ".jinja" or file.name.startswith(("tokenizer", "chat_template"))
    return chosen and not (is_file(base / file) and file_hash(base / file) == file_hash(adapter / file))


def check_merge(base: str | Path, adapters: Sequence[str | Path]) -> tuple[Checkpoint, list[Adapter]]:
    """Opens base and adapters and sees whether they fit, before anything is written.

    The adapters' matrices are read, one at a time: NaN in them is told now.
    Raises the InputError that `merge` would.
    """
    if not adapters:
        raise AdapterError("no adapter was given", remedy="name one with -a")
    opened = [open_adapter(adapter) for adapter in adapters]
    checkpoint = open_directory(resolve(base))
    marks = [fingerprint(adapter.path) for adapter in opened]
    held = merged_before(checkpoint.path)
    for n, (adapter, mark) in enumerate(zip(opened, marks, strict=True)):
        if mark in held or mark in marks[:n]:
            where = f"merged into {checkpoint.path} already" if mark in held else "named twice"
            raise AdapterError(
                f"{adapter.path} is {where}", expected="once: merging again doubles its change"
            )
    if checkpoint.quantization:
        raise UnsupportedModelError(
            f"{checkpoint.path} is quantized ({checkpoint.quantization.get('quant_method')})",
            expected="a 16- or 32-bit base",
            remedy="merge into the full-precision base and quantize the result",
        )
    for adapter in opened:
        _require_fit(checkpoint, adapter)
        broken = [
            f"{module}.lora_{side}"
            for module, pair in adapter.pairs.items()
            for side, tensor in (("A", pair.a), ("B", pair.b))
            if not is_finite(read_tensor(tensor))
        ]
        if broken:
            raise non_finite_error(str(adapter.path), broken)
    return checkpoint, opened


def _pairs_of(name: str, adapters: Sequence[Adapter]) -> list[LoraPair]:
    module = name.removesuffix(".weight")
    return [adapter.pairs[module] for adapter in adapters if module in adapter.pairs]


def _merge_tensor(checkpoint: Checkpoint, name: str, pairs: Sequence[LoraPair]) -> torch.Tensor:
    weight = checkpoint.read(name)
    if not is_finite(weight):
        require_finite(checkpoint)  # names all of them
    merged = weight.float() if len(pairs) > 1 else weight  # one rounding, at the end
    for pair in pairs:
        merged = merge_lora(merged, read_tensor(pair.a), read_tensor(pair.b), pair.scale)
    merged = merged.to(weight.dtype)
    if not is_finite(merged):
        raise non_finite_error("the merged model", [name])
    return merged


def _require_fit(checkpoint: Checkpoint, adapter: Adapter) -> None:
    names = set(checkpoint.names())
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    tied = {n.removesuffix(".weight") for n in _tied_names(checkpoint)}
    if touched := sorted(tied & set(adapter.pairs)):
        raise AdapterError(
            f"{adapter.path} changes {touched[0]}, one side of a tied pair",
            expected="adapters that leave tied embeddings alone can be merged so far",
        )
    strangers = sorted(set(adapter.pairs) - modules)
    trained_on = f" (it names {adapter.base_name!r} as its base)" if adapter.base_name else ""
    if strangers:
        near = difflib.get_close_matches(strangers[0], sorted(modules), n=1)
        raise AdapterError(
            f"{adapter.path} was made for another base{trained_on}: {len(strangers)} of its "
            f"{len(adapter.pairs)} modules are not in {checkpoint.path}, such as {strangers[0]}",
            expected=f"names like {near[0]}" if near else "",
        )
    shapes: list[tuple[str, tuple[int, ...]]] = [
        (module, pair.shape) for module, pair in adapter.pairs.items()
    ]
    shapes += [(module, shape) for module, shape in adapter.copies.items() if module in modules]
    misfits = [(m, shape) for m, shape in shapes if checkpoint.info(f"{m}.weight").shape != shape]
    if misfits:
        module, shape = misfits[0]
        raise AdapterError(
            f"{adapter.path} was made for another base{trained_on}: {len(misfits)} of its "
            f"{len(shapes)} matrices have other shapes; {module} is "
            f"{list(checkpoint.info(f'{module}.weight').shape)} in {checkpoint.path}, "
            f"{list(shape)} in the adapter"
        )


def _tied_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    return (checkpoint.tie.embedding, checkpoint.tie.head) if checkpoint.tie else ()
