"""The edits of several adapters on one tensor: weighted, combined, or in conflict."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from qexport.errors import AdapterError, SpecError
from qexport.merging.adapter import Adapter
from qexport.merging.book import EditBook, replaces_rows
from qexport.merging.combine import Combining, Pair, combine
from qexport.merging.edits import (
    AddLowRank,
    BiasEdit,
    Edit,
    ExpertEdit,
    FusedExpertsEdit,
    Loading,
    LoraEdit,
    ReplaceEdit,
    SharesEdit,
    TokensEdit,
    WeightedEdit,
    low_rank,
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
    shares: list[WeightedEdit] = []  # of the base's change, not of what came before: they come first
    before: list[EditBook] = []
    for book in books:
        mine, weight = book.edits.get(name, []), book.adapter.weight
        if mine:
            for other in before:
                _require_no_conflict(name, other, book)
            before.append(book)
        for edit in mine:
            if weight is not None and (_replaces(edit, book) or isinstance(edit, TokensEdit)):
                shares.append(WeightedEdit(edit, weight))
            else:
                edits.append(_weighted(edit, weight))
    return [SharesEdit(tuple(shares)), *edits] if len(shares) > 1 else [*shares, *edits]


def _replaces(edit: Edit, book: EditBook) -> bool:
    """Whether all that was there is gone: LN tuning, too, trains a copy of the norm."""
    return isinstance(edit, ReplaceEdit) or book.adapter.kind == "LN_TUNING"


def _require_no_conflict(name: str, one: EditBook, other: EditBook) -> None:
    """`other` comes after `one`: it must not put its own values where `one` changed some."""
    if one.adapter.weight is not None and other.adapter.weight is not None:
        return  # shares of both were asked for
    rows = {row for e in one.edits[name] if isinstance(e, TokensEdit) for row in e.indices}
    for edit in other.edits[name]:
        undone = _replaces(edit, other) or (
            isinstance(edit, TokensEdit)
            and (not replaces_rows(one.edits[name]) or bool(rows & set(edit.indices)))
        )
        if undone:
            raise AdapterError(
                f"conflicting edits: {one.adapter.path} changes {name}, and {other.adapter.path} puts "
                "values of its own there, which would undo that",
                expected="adapters that train different tensors, or a share of each (A:0.5, B:0.5)",
            )


def _weighted(edit: Edit, weight: float | None) -> Edit:
    if weight is None:
        return edit
    if isinstance(edit, (LoraEdit, FusedExpertsEdit, BiasEdit)):
        return replace(edit, scale=edit.scale * weight)
    if isinstance(edit, ExpertEdit):
        return replace(edit, fused=replace(edit.fused, scale=edit.fused.scale * weight))
    return WeightedEdit(edit, weight)


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
    """One LoRA out of several adapters' (`combine`), on a matrix [out, in] or its transpose.

    Two of the same pairs are equal whatever their names: the sides of a tied pair.
    """

    name: str = field(compare=False)
    pairs: tuple[tuple[LoraEdit, float], ...]
    how: Combining
    seed: int

    @property
    def whole(self) -> bool:
        """A product is decomposed as a whole, whatever becomes of the tensor's rows."""
        return self.how.method.endswith("_svd")

    def load(self, at: Loading) -> AddLowRank:
        """See `Edit`. What DARE drops depends on the seed and the tensor's name alone."""
        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        pairs = [
            Pair(e.a.read().float().to(at.device), e.b.read().float().to(at.device), e.scale, weight)
            for e, weight in self.pairs
        ]
        a, b = combine(pairs, self.how, generator)
        return low_rank(a, b, 1.0, transposed=self.pairs[0][0].transposed)


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
    by_factors = spec.combine not in ("cat", "svd") and not spec.combine.endswith("_svd")
    ranks = largest if len(set(largest)) > 1 else [edit.a.shape[0] for edit, _ in pairs]
    if by_factors and len(set(ranks)) > 1:
        raise AdapterError(
            f"--combine {spec.combine} needs adapters of one rank, these have {', '.join(map(str, ranks))}"
            + ("" if ranks is largest else f" on {name}"),
            remedy="choose cat, svd or a *_svd combination",
        )
    how = Combining(spec.combine, spec.svd_rank or max(largest), spec.density or 1.0, spec.majority_sign)
    return CombinedEdit(name, tuple(pairs), how, spec.seed)


def _largest_rank(adapter: Adapter) -> int:
    settings = lora_settings(adapter)
    return max([settings.rank, *(rank for rank in settings.ranks.values() if isinstance(rank, int))])
