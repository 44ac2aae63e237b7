"""A LoRA adapter as a GGUF adapter, which llama.cpp adds to its base while it runs (`--lora`).

What llama.cpp has no place for is refused by name: such an adapter is to be merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from qexport.checkpoint.checkpoint import Checkpoint, local_path
from qexport.checkpoint.staging import check_target_file
from qexport.errors import AdapterError, InputError, first_of
from qexport.events import Noted, OnEvent, ignore
from qexport.formats.gguf.container import read_header
from qexport.formats.gguf.lora import LoraPair, adapter_metadata, check_dtype, write_lora
from qexport.formats.gguf.rows import row_of
from qexport.formats.gguf.tensors import GgufTensor, Part, gguf_tensors
from qexport.formats.gguf.text_model import text_model
from qexport.formats.opening import open_checkpoint
from qexport.merging.adapter import Adapter, open_adapter, require_finite_adapter
from qexport.merging.book import EditBook
from qexport.merging.edits import (
    BiasEdit,
    DoraEdit,
    Edit,
    ExpertEdit,
    FusedExpertsEdit,
    LoraEdit,
    ReplaceEdit,
    TokensEdit,
)
from qexport.merging.lora_adapter import add_lora
from qexport.merging.names import Names
from qexport.merging.settings import is_plain_lora, lora_settings
from qexport.modeling.skeleton import build_skeleton

_REMEDY = "merge the adapter into its base and convert the merged model"
_EXPECTED = "a GGUF adapter holds pairs of LoRA matrices only"
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class ConvertedAdapter:
    """What was written: pairs of matrices, bytes, and the alpha that the file tells."""

    path: Path
    pairs: int
    size_bytes: int
    alpha: float


@dataclass(frozen=True)
class _Factors:
    """scale * left [out, r] @ right [r, in], in transformers' order of rows."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float


def convert_adapter(
    adapter: str | Path,
    base: str | Path | None,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> ConvertedAdapter:
    """Writes a PEFT LoRA ("PATH" or "PATH:WEIGHT") as one GGUF file for llama.cpp's files of `base`.

    llama.cpp multiplies each pair by alpha / rank, with one alpha for all. Where the adapter's own scale is
    another (rsLoRA, alpha_pattern, rank_pattern, a weight), the difference is put into lora_b, so that the
    effect is the same. fp32 by default: training leaves values below fp16's reach in lora_b. Of the base only
    names and shapes are read; it may be quantized; None is the one that the adapter names. The inputs are not
    changed.

    Raises AdapterError for what is no plain LoRA, NonFiniteError for values that `dtype` cannot hold,
    UnsupportedModelError, OutputExistsError, SpecError, StorageError.
    """
    check_dtype(dtype)
    out = Path(out)
    opened = open_adapter(adapter)
    _require_lora(opened)
    base = _base_of(opened) if base is None else base
    whole = open_checkpoint(base)
    checkpoint = text_model(whole)
    given = local_path(base)
    check_out = partial(
        check_target_file,
        out,
        "GGUF adapter",
        _is_gguf_adapter,
        overwrite=overwrite,
        sources=[opened.path, checkpoint.path] if given is None else [opened.path, given, checkpoint.path],
    )
    check_out()
    require_finite_adapter(opened)
    book = EditBook(opened, checkpoint, Names(checkpoint))
    add_lora(book)
    book.close()
    for note in book.notes:
        on_event(Noted(note))
    _require_same_vocabulary(book, checkpoint)
    config = None if checkpoint is whole else checkpoint.config
    skeleton = build_skeleton(checkpoint, config=config, trust_remote_code=trust_remote_code)
    tensors = gguf_tensors(checkpoint, skeleton)
    _require_places(book, checkpoint, tensors)
    changed = [tensor for tensor in tensors if any(part.name in book.edits for part in tensor.parts)]
    alpha = lora_settings(opened).alpha or 1.0  # llama.cpp takes an alpha of 0 for none at all
    metadata = adapter_metadata(row_of(skeleton.model_type).arch, alpha, opened.path.name, opened.base_name)
    pairs = (_pair(tensor, book, opened.weight, alpha) for tensor in changed)
    shapes = [(tensor.name, *_pair_shapes(tensor, book)) for tensor in changed]
    check_out()  # somebody may have put something there since
    size = write_lora(out, metadata, shapes, pairs, dtype)
    return ConvertedAdapter(out, len(changed), size, alpha)


def _is_gguf_adapter(path: Path) -> bool:
    try:
        return read_header(path).plain().get("general.type") == "adapter"
    except InputError:
        return False


def _base_of(adapter: Adapter) -> str:
    if adapter.base_name is None:
        raise AdapterError(f"{adapter.path} names no base", remedy="name it: --base DIR")
    return adapter.base_name


def _require_lora(adapter: Adapter) -> None:
    """Raises AdapterError for what the config alone tells not to be a plain LoRA."""
    config = adapter.config
    reason = ""
    if adapter.kind != "LORA":
        reason = f"it is a {adapter.kind} adapter"
    elif not is_plain_lora(adapter):
        reason = "it is a variant of LoRA whose arithmetic llama.cpp does not do"
        if isinstance(init := config.get("init_lora_weights"), str):
            reason = f"its initialisation ({init}) changed the base"
    elif config.get("use_dora"):
        reason = "it is a DoRA, which also sets the length of every output's weights"
    elif config.get("layer_replication"):
        reason = "it was trained on replicated layers, which the base does not have"
    if reason:
        raise _unheld(adapter, reason)


def _unheld(adapter: Adapter, reason: str) -> AdapterError:
    return AdapterError(
        f"{adapter.path} cannot become a GGUF adapter: {reason}", expected=_EXPECTED, remedy=_REMEDY
    )


def _require_same_vocabulary(book: EditBook, checkpoint: Checkpoint) -> None:
    """PEFT saves the embedding along, changed or not, when it was resized or is adapted."""
    if book.rows is not None:
        rows = f"its vocabulary has {book.rows} rows, the base's has another number"
        raise _unheld(book.adapter, rows)
    for name, copy in book.copies.items():
        given, own = copy.tensor, checkpoint.read(name)
        if given.shape != tuple(own.shape) or not torch.equal(given.read().float(), own.float()):
            raise _unheld(book.adapter, f"it brings another {name} than the base has")


_HELD_BACK: tuple[tuple[type, str], ...] = (
    (DoraEdit, "it is a DoRA, which also sets the length of every output's weights"),
    (BiasEdit, "it trained biases"),
    (TokensEdit, "it trained single tokens of {name}"),
    (ReplaceEdit, "it trained {name} as a whole (modules_to_save, bias)"),
)


def _require_places(book: EditBook, checkpoint: Checkpoint, tensors: Sequence[GgufTensor]) -> None:
    """Raises AdapterError for an edit that is no pair, or whose tensor llama.cpp does not add to."""
    homes: dict[str, list[GgufTensor]] = {}
    for tensor in tensors:
        for part in tensor.parts:
            homes.setdefault(part.name, []).append(tensor)
    tie = checkpoint.tie
    for name, edits in book.edits.items():
        for edit in edits:
            for kind, reason in _HELD_BACK:
                if isinstance(edit, kind):
                    raise _unheld(book.adapter, reason.format(name=name))
        if len(edits) > 1 or not isinstance(edits[0], (LoraEdit, ExpertEdit, FusedExpertsEdit)):
            raise _unheld(book.adapter, f"it changes {name} by more than one pair")
        if tie and name in (tie.embedding, tie.head):
            raise _unheld(
                book.adapter, f"it changes {name}, and in the base one matrix is embedding and output head"
            )
        if name not in homes:
            raise _unheld(book.adapter, f"{name} has no place in a GGUF file")
    for tensor in tensors:
        loose = [part.name for part in tensor.parts if part.name in book.edits]
        if loose and len(tensor.shape) != (2 if tensor.parts[0].expert is None else 3):
            raise _unheld(book.adapter, f"{first_of(loose)} lies in {tensor.name}, which is no matrix")


def _pair_shapes(tensor: GgufTensor, book: EditBook) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of lora_a and lora_b, before a value is read."""
    rank = max(_rank(book.edits[part.name][0]) for part in tensor.parts if part.name in book.edits)
    outs, ins = tensor.shape[-2:]
    if tensor.name == _EMBEDDING:
        return (outs, rank), (ins, rank)
    experts = tensor.shape[:-2]
    return (*experts, rank, ins), (*experts, outs, rank)


def _rank(edit: Edit) -> int:
    if isinstance(edit, LoraEdit):
        return edit.a.shape[0]
    fused = edit.fused if isinstance(edit, ExpertEdit) else edit
    assert isinstance(fused, FusedExpertsEdit)  # noqa: S101 - nothing else came through
    return fused.a.shape[0] // fused.experts


def _pair(tensor: GgufTensor, book: EditBook, weight: float | None, alpha: float) -> LoraPair:
    """The pair of one tensor, scaled so that alpha / rank is right, its rows in the file's order."""
    shape_a, shape_b = _pair_shapes(tensor, book)
    order = tensor.row_order()
    rank = shape_b[-1]
    a, b = torch.zeros(shape_a), torch.zeros(shape_b)
    for part in tensor.parts:
        if part.name not in book.edits:
            continue  # an expert that was not trained: zeros
        factors = _factors(book.edits[part.name][0], part, tensor)
        left, right = factors.left, factors.right
        scale = factors.scale * (1.0 if weight is None else weight) * rank / alpha
        if order is not None:
            left = left[order]
        if not math.isclose(scale, 1.0, rel_tol=1e-12):  # what is right as it is keeps its bits
            left = left * scale
        if tensor.name == _EMBEDDING:  # rows of A are looked up: it lies the other way round
            return LoraPair(tensor.name, left.contiguous(), right.T.contiguous())
        own_a, own_b = (a, b) if part.expert is None else (a[part.expert], b[part.expert])
        held = right.shape[0]  # experts of a lower rank leave zeros
        own_a[:held], own_b[:, :held] = right, left
    return LoraPair(tensor.name, a, b)


def _factors(edit: Edit, part: Part, tensor: GgufTensor) -> _Factors:
    if isinstance(edit, LoraEdit):
        left, right, scale = edit.b.read().float(), edit.a.read().float(), edit.scale
        if tensor.name == _EMBEDDING:  # W + (B A)^T: the rows are the tokens
            left, right = right.T, left.T
    elif isinstance(edit, ExpertEdit):
        lefts, rights = edit.fused.factors()
        left, right = lefts[edit.expert, edit.begin : edit.end], rights[edit.expert]
        scale = edit.fused.scale
    else:
        assert isinstance(edit, FusedExpertsEdit)  # noqa: S101 - nothing else came through
        lefts, rights = edit.factors()
        assert part.source_expert is not None  # noqa: S101 - it lies fused
        left, right, scale = lefts[part.source_expert], rights[part.source_expert], edit.scale
    return _Factors(left if part.rows is None else left[part.rows], right, scale)
