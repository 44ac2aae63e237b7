"""The edits of several adapters on one tensor: weighted, combined, or in conflict."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qexport.errors import AdapterError, SpecError
from qexport.merging.adapter import Adapter
from qexport.merging.book import EditBook
from qexport.merging.combine import Combining, Pair, combine
from qexport.merging.edits import (
    AddLowRank,
    BiasEdit,
    BlendEdit,
    Edit,
    ExpertEdit,
    FusedExpertsEdit,
    LoraEdit,
    ReplaceEdit,
    TokensEdit,
    WeightedEdit,
)
from qexport.merging.settings import is_plain_lora, lora_settings
from qexport.specs import MergeSpec

_PRUNING = ("ties", "dare", "magnitude")


def all_edits(books: Sequence[EditBook], spec: MergeSpec) -> dict[str, list[Edit]]:
    """What is done to each tensor, in the adapters' order.

    Raises AdapterError when one adapter would undo what another did, or cannot be combined.
    """
    names = dict.fromkeys(name for book in books for name in book.edits)
    if spec.combine and len(books) > 1:
        return {name: [_combined(name, books, spec)] for name in names}
    return {name: _in_turn(name, books) for name in names}


def _in_turn(name: str, books: Sequence[EditBook]) -> list[Edit]:
    edits: list[Edit] = []
    before: list[EditBook] = []
    for book in books:
        mine = book.edits.get(name, [])
        if mine:
            for other in before:
                _require_no_conflict(name, other, book)
            before.append(book)
        edits += [_weighted(edit, book.adapter.weight) for edit in mine]
    return _blended(edits)


def _require_no_conflict(name: str, one: EditBook, other: EditBook) -> None:
    """`other` comes after `one`: it must not put its own values where `one` changed some."""
    if one.adapter.weight is not None and other.adapter.weight is not None:
        return  # shares of both were asked for
    rows = {row for e in one.edits[name] if isinstance(e, TokensEdit) for row in e.indices}
    for edit in other.edits[name]:
        undone = isinstance(edit, ReplaceEdit) or (
            isinstance(edit, TokensEdit)
            and (bool(rows & set(edit.indices)) or any(isinstance(e, ReplaceEdit) for e in one.edits[name]))
        )
        if undone:
            raise AdapterError(
                f"conflicting edits: {one.adapter.path} changes {name}, and {other.adapter.path} puts "
                "values of its own there, which would undo that",
                expected="adapters that train different tensors, or a share of each (A:0.5, B:0.5)",
            )


def _weighted(edit: Edit, weight: float | None) -> Edit:
    if weight is None or weight == 1:
        return edit
    if isinstance(edit, (LoraEdit, FusedExpertsEdit, BiasEdit)):
        return replace(edit, scale=edit.scale * weight)
    if isinstance(edit, ExpertEdit):
        return replace(edit, fused=replace(edit.fused, scale=edit.fused.scale * weight))
    return WeightedEdit(edit, weight)


def _blended(edits: list[Edit]) -> list[Edit]:
    """Shares of several replacements are shares of the base's change, not of each other's result."""
    shares = [e for e in edits if isinstance(e, WeightedEdit) and isinstance(e.inner, ReplaceEdit)]
    if len(shares) < 2:
        return edits
    return [BlendEdit(tuple(shares)), *(edit for edit in edits if edit not in shares)]


def require_combinable(adapters: Sequence[Adapter], spec: MergeSpec) -> None:
    """Raises SpecError or AdapterError when `spec.combine` cannot be done with these adapters."""
    if spec.combine is None:
        if spec.density is not None or spec.svd_rank is not None:
            option = "--density" if spec.density is not None else "--svd-rank"
            raise SpecError(
                f"{option} without --combine", expected="a combination to use it in, such as ties"
            )
        return
    if spec.density is None and spec.combine.startswith(_PRUNING):
        raise SpecError(
            f"--combine {spec.combine} needs --density", expected="the share of values to keep, e.g. 0.5"
        )
    if spec.density is not None and not spec.combine.startswith(_PRUNING):
        raise SpecError(
            f"--density is no option of --combine {spec.combine}", expected="ties, dare_* or magnitude_prune"
        )
    if spec.svd_rank is not None and not spec.combine.endswith("svd"):
        raise SpecError(f"--svd-rank is no option of --combine {spec.combine}", expected="svd or *_svd")
    for adapter in adapters:
        if not is_plain_lora(adapter) or adapter.config.get("use_dora"):
            raise AdapterError(
                f"{adapter.path} is no plain LoRA and cannot be combined by {spec.combine}",
                expected="LoRA and rsLoRA",
                remedy="merge the adapters one after the other: leave --combine out",
            )


@dataclass(frozen=True)
class CombinedEdit:
    """One LoRA out of several adapters' (`combine`), on a matrix [out, in] or its transpose."""

    name: str
    pairs: tuple[tuple[LoraEdit, float], ...]
    how: Combining
    seed: int
    whole = False

    def load(self, device: torch.device) -> AddLowRank:
        """See `Edit`. What DARE drops depends on the seed and the tensor's name alone."""
        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        pairs = [Pair(e.a.read().float(), e.b.read().float(), e.scale, weight) for e, weight in self.pairs]
        a, b = (factor.to(device) for factor in combine(pairs, self.how, generator))
        left, right = (a.T, b.T) if self.pairs[0][0].transposed else (b, a)
        return AddLowRank(left.contiguous(), right.contiguous(), 1.0)


def _combined(name: str, books: Sequence[EditBook], spec: MergeSpec) -> CombinedEdit:
    pairs: list[tuple[LoraEdit, float]] = []
    for book in books:
        for edit in book.edits.get(name, []):
            if not isinstance(edit, LoraEdit):
                raise AdapterError(
                    f"{book.adapter.path} does more to {name} than LoRA does and cannot be combined by "
                    f"{spec.combine}",
                    expected="lora_A and lora_B pairs only",
                    remedy="merge the adapters one after the other: leave --combine out",
                )
            weight = 1.0 if book.adapter.weight is None else book.adapter.weight
            pairs.append((edit, weight))
    assert spec.combine is not None  # noqa: S101 - the caller asked
    largest = [_largest_rank(book.adapter) for book in books]
    if spec.combine not in ("cat", "svd") and not spec.combine.endswith("_svd") and len(set(largest)) > 1:
        raise AdapterError(
            f"--combine {spec.combine} needs adapters of one rank, these have "
            + ", ".join(map(str, largest)),
            remedy="choose cat, svd or a *_svd combination",
        )
    how = Combining(spec.combine, spec.svd_rank or max(largest), spec.density or 1.0, spec.majority_sign)
    return CombinedEdit(name, tuple(pairs), how, spec.seed)


def _largest_rank(adapter: Adapter) -> int:
    settings = lora_settings(adapter)
    return max([settings.rank, *(rank for rank in settings.ranks.values() if isinstance(rank, int))])
