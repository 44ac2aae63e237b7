"""A merge, planned from names and shapes: every tensor of the output, before a weight is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.hashing import PassingHash
from qexport.checkpoint.manifest import fingerprint, merged_adapters
from qexport.errors import AdapterError
from qexport.events import Noted, OnEvent, ignore
from qexport.merging.adapter import Adapter, open_adapter, require_finite_adapter
from qexport.merging.base import ChosenBase, choose_base
from qexport.merging.book import EditBook
from qexport.merging.layout import Layout
from qexport.merging.lora_adapter import add_lora
from qexport.merging.names import Names
from qexport.merging.peft_adapter import add_by_peft
from qexport.merging.replication import replicated
from qexport.merging.rope import with_rope_scaling
from qexport.merging.settings import is_plain_lora
from qexport.merging.stream import PlannedTensor
from qexport.merging.together import all_edits, require_combinable
from qexport.merging.vocabulary import chosen_sidecars, rows_needed
from qexport.specs import MergeSpec


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write."""

    base: ChosenBase
    adapters: tuple[Adapter, ...]
    tensors: tuple[PlannedTensor, ...]
    config: Mapping[str, Any]
    sidecars: Mapping[Path, Path]
    chat_template: str | None
    vocabulary_rows: tuple[int, int] | None  # before and after, where they differ
    passing: tuple[PassingHash, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(planned.info.size for planned in self.tensors)

    @property
    def touched(self) -> list[PlannedTensor]:
        """The tensors that an adapter changes."""
        return [planned for planned in self.tensors if planned.edits]


def plan_merge(
    base: str | Path,
    adapters: Sequence[str | Path],
    spec: MergeSpec,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> MergePlan:
    """Opens base and adapters, sees whether they fit, and plans the output.

    The adapters' tensors are read, a piece at a time: NaN in them is told now. Raises the InputError
    that `merge` would.
    """
    if not adapters:
        raise AdapterError("no adapter was given", remedy="name one with -a")
    opened = tuple(open_adapter(adapter) for adapter in adapters)
    require_combinable(opened, spec)
    chosen = choose_base(str(base), opened, spec.base_precision)
    _require_unmerged(chosen.checkpoint.path, opened)
    checkpoint = replicated(chosen.checkpoint, opened)
    for adapter in opened:
        require_finite_adapter(adapter)
    if chosen.given:
        on_event(Noted(chosen.told()))
    names = Names(checkpoint)
    books = [_book(adapter, checkpoint, names, trust_remote_code) for adapter in opened]
    for book in books:
        for note in book.notes:
            on_event(Noted(note))
    layout = Layout(checkpoint, books, all_edits(books, spec), names, spec)
    sidecars, template = chosen_sidecars(checkpoint.path, opened, spec.tokenizer, on_event)
    sidecars.pop(Path("quantize_config.json"), None)  # the output is not quantized
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    tensors = layout.tensors()
    if layout.untied_by:
        on_event(Noted(f"tied embeddings: {layout.untied_by}, so that the output is not tied"))
        config = {**_with(config, "tie_word_embeddings", False), "tie_word_embeddings": False}
    resized = None
    if before := layout.vocabulary_rows:
        rows, why = rows_needed(before, books, sidecars, checkpoint.path)
        if rows != before:
            resized = (before, rows)
            on_event(Noted(f"vocabulary: {before} rows become {rows}, for {why}"))
            tensors = layout.resized(tensors, rows)
            config = _with(config, "vocab_size", rows)
    if spec.dtype:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config = _with({**config, key: spec.dtype}, key, spec.dtype)
    config = with_rope_scaling(config, spec)
    if spec.rope_scaling and spec.rope_factor:
        on_event(
            Noted(
                f"rotary scaling: {spec.rope_scaling} by {spec.rope_factor:g}, as rope_parameters in "
                "config.json, which transformers before 5 does not read"
            )
        )
    return MergePlan(
        base=chosen,
        adapters=opened,
        tensors=tuple(tensors),
        config=config,
        sidecars=sidecars,
        chat_template=template,
        vocabulary_rows=resized,
        passing=layout.passing,
    )


def _require_unmerged(base: Path, adapters: Sequence[Adapter]) -> None:
    marks = [fingerprint(adapter.path) for adapter in adapters]
    held = merged_adapters(base)
    for n, (adapter, mark) in enumerate(zip(adapters, marks, strict=True)):
        if adapter.weight is not None and adapter.weight < 0:
            continue  # taking a change back is what was asked for
        if mark in held or mark in marks[:n]:
            where = f"merged into {base} already" if mark in held else "named twice"
            raise AdapterError(
                f"{adapter.path} is {where}", expected="once: merging again doubles its change"
            )


def _book(adapter: Adapter, checkpoint: Checkpoint, names: Names, trust_remote_code: bool) -> EditBook:
    book = EditBook(adapter, checkpoint, names)
    if is_plain_lora(adapter):
        add_lora(book)
    else:
        add_by_peft(book, checkpoint, trust_remote_code=trust_remote_code)
    book.close()
    return book


def _with(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with `key` set wherever it stands: a multimodal model has a text_config below."""
    changed = {
        name: _with(inner, key, value) if name == "text_config" and isinstance(inner, dict) else inner
        for name, inner in config.items()
    }
    nested = isinstance(config.get("text_config"), dict) and key in config["text_config"]
    return {**changed, key: value} if key in config or not nested else changed
