"""What an adapter does to one tensor: planned from names and shapes, loaded when the tensor comes by.

A change takes rows of the tensor in fp32, along its first side, and gives them back changed. Most
need nothing but those rows, so that a matrix goes through in pieces; a few need all of it (`whole`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qexport.merging.adapter import AdapterTensor
from qexport.merging.lora import product_square, with_magnitude


class Change(Protocol):
    """A loaded edit."""

    @property
    def delta_square(self) -> float | None:
        """The squared norm of what it adds, where that is known beforehand."""

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        """`rows` fp32, the first of them row `begin` of the tensor; may be changed in place."""


@dataclass(frozen=True)
class Loading:
    """Where an edit is loaded to.

    `rows` goes over the tensor as the edits before this one leave it: the first row's number and some rows
    fp32, from the front to the end, anew at every call.
    """

    device: torch.device
    rows: Callable[[], Iterator[tuple[int, torch.Tensor]]]

    def first(self, count: int) -> Loading:
        """The same for the first `count` rows alone."""

        def fewer() -> Iterator[tuple[int, torch.Tensor]]:
            for begin, rows in self.rows():
                if begin < count:
                    yield begin, rows[: count - begin]

        return Loading(self.device, fewer)


class Edit(Protocol):
    """A planned change of one tensor."""

    @property
    def whole(self) -> bool:
        """Whether it needs the whole tensor at once."""

    def load(self, at: Loading) -> Change:
        """Reads what it needs."""


@functools.lru_cache(maxsize=8)
def _read_shared(tensor: AdapterTensor) -> torch.Tensor:
    """A matrix that several tensors in a row need a part of: the experts of one layer."""
    return tensor.read().float()


def forget_shared() -> None:
    """Lets go of the matrices that were kept for the next tensor."""
    _read_shared.cache_clear()


@dataclass(frozen=True)
class AddLowRank:
    """W + scale * left @ right; `left` [n, r] is cut along with W's rows."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @functools.cached_property
    def delta_square(self) -> float:
        """See `Change`."""
        return self.scale**2 * product_square(self.left, self.right)

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        """See `Change`."""
        return rows.addmm_(self.left[begin : begin + len(rows)], self.right, alpha=self.scale)


def low_rank(a: torch.Tensor, b: torch.Tensor, scale: float, *, transposed: bool) -> AddLowRank:
    """scale * B A of `a` [r, in] and `b` [out, r], for a matrix [out, in] or one stored [in, out]."""
    left, right = (a.T, b.T) if transposed else (b, a)
    return AddLowRank(left.contiguous(), right.contiguous(), scale)


@dataclass(frozen=True)
class LoraEdit:
    """B A on a matrix [out, in], or its transpose on one that is stored [in, out]."""

    a: AdapterTensor
    b: AdapterTensor
    scale: float
    transposed: bool = False
    whole = False

    def load(self, at: Loading) -> AddLowRank:
        """See `Edit`."""
        a, b = self.a.read().float().to(at.device), self.b.read().float().to(at.device)
        return low_rank(a, b, self.scale, transposed=self.transposed)


@dataclass(frozen=True)
class _ScaleRows:
    add: AddLowRank
    magnitude: torch.Tensor
    delta_square = None

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        return with_magnitude(self.add.apply(rows, begin), self.magnitude[begin : begin + len(rows)])


@dataclass(frozen=True)
class _ScaleColumns:
    add: AddLowRank
    factor: torch.Tensor
    delta_square = None

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        return self.add.apply(rows, begin).mul_(self.factor)


@dataclass(frozen=True)
class DoraEdit:
    """LoRA, and every output's vector given its learned length.

    The outputs are the rows of [out, in] and the columns of what is stored the other way round; a column's
    length is known when all rows went by once.
    """

    lora: LoraEdit
    magnitude: AdapterTensor
    whole = False

    def load(self, at: Loading) -> _ScaleRows | _ScaleColumns:
        """See `Edit`."""
        magnitude = self.magnitude.read().float().reshape(-1).to(at.device)
        add = self.lora.load(at)
        if not self.lora.transposed:
            return _ScaleRows(add, magnitude)
        squares = torch.zeros(len(magnitude), dtype=torch.float64, device=at.device)
        for begin, rows in at.rows():
            squares += add.apply(rows, begin).square_().sum(dim=0)
        return _ScaleColumns(add, magnitude / squares.sqrt().float())


@dataclass(frozen=True)
class _AddEachExpert:
    left: torch.Tensor  # [experts, n, r]
    right: torch.Tensor  # [experts, r, m]
    scale: float
    delta_square = None

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        end = begin + len(rows)
        return rows.baddbmm_(self.left[begin:end], self.right[begin:end], alpha=self.scale)


@dataclass(frozen=True)
class FusedExpertsEdit:
    """LoRA on a parameter [experts, out, in], or [experts, in, out] when `transposed`.

    A is [experts * r, in]. B is [out, r * experts], the experts changing fastest (PEFT's ParamWrapper).
    """

    a: AdapterTensor
    b: AdapterTensor
    scale: float
    experts: int
    transposed: bool = False
    whole = False

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """left [experts, n, r] and right [experts, r, m] of the stored orientation, fp32."""
        a, b = _read_shared(self.a), _read_shared(self.b)
        right = a.reshape(self.experts, -1, a.shape[1])
        left = b.reshape(b.shape[0], -1, self.experts).permute(2, 0, 1)
        return (right.transpose(1, 2), left.transpose(1, 2)) if self.transposed else (left, right)

    def load(self, at: Loading) -> _AddEachExpert:
        """See `Edit`."""
        left, right = self.factors()
        return _AddEachExpert(left.contiguous().to(at.device), right.contiguous().to(at.device), self.scale)


@dataclass(frozen=True)
class ExpertEdit:
    """The rows `begin` to `end` of one expert of a fused parameter, as a tensor of its own."""

    fused: FusedExpertsEdit
    expert: int
    begin: int
    end: int
    whole = False

    def load(self, at: Loading) -> AddLowRank:
        """See `Edit`."""
        left, right = self.fused.factors()
        return AddLowRank(
            left[self.expert, self.begin : self.end].contiguous().to(at.device),
            right[self.expert].contiguous().to(at.device),
            self.fused.scale,
        )


@dataclass(frozen=True)
class _AddVector:
    vector: torch.Tensor
    delta_square = None

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        return rows.add_(self.vector[begin : begin + len(rows)])


@dataclass(frozen=True)
class BiasEdit:
    """LoRA's own bias (`lora_bias`): b + scale * the bias of B."""

    vector: AdapterTensor
    scale: float
    whole = False

    def load(self, at: Loading) -> _AddVector:
        """See `Edit`."""
        return _AddVector(self.vector.read().float().to(at.device) * self.scale)


@dataclass(frozen=True)
class _Replace:
    tensor: AdapterTensor
    device: torch.device
    delta_square = None

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        given = self.tensor.rows(begin, begin + len(rows)) if self.tensor.shape else self.tensor.read()
        return given.to(self.device, torch.float32).reshape(rows.shape)


@dataclass(frozen=True)
class ReplaceEdit:
    """A tensor that was trained as a whole: modules_to_save, biases, resized embeddings."""

    tensor: AdapterTensor
    whole = False

    def load(self, at: Loading) -> _Replace:
        """See `Edit`."""
        return _Replace(self.tensor, at.device)


@dataclass(frozen=True)
class _ReplaceRows:
    indices: torch.Tensor  # ascending
    values: torch.Tensor  # in their order
    delta_square = None

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        first, last = torch.searchsorted(self.indices, torch.tensor([begin, begin + len(rows)])).tolist()
        if first == last:
            return rows
        places = (self.indices[first:last] - begin).to(rows.device)
        return rows.index_copy_(0, places, self.values[first:last])


@dataclass(frozen=True)
class TokensEdit:
    """The rows of an embedding that were trained (trainable_token_indices)."""

    indices: tuple[int, ...]
    values: AdapterTensor
    whole = False

    def load(self, at: Loading) -> _ReplaceRows:
        """See `Edit`."""
        indices, order = torch.tensor(self.indices).sort()
        return _ReplaceRows(indices, self.values.read().float()[order].to(at.device))


@dataclass(frozen=True)
class _Share:
    inner: Change
    weight: float
    delta_square = None

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        before = rows.clone()
        return torch.lerp(before, self.inner.apply(rows, begin), self.weight)


@dataclass(frozen=True)
class WeightedEdit:
    """W + weight * (W' - W), for an edit that makes W' of W and is no plain sum."""

    inner: Edit
    weight: float

    @property
    def whole(self) -> bool:
        """See `Edit`."""
        return self.inner.whole

    def load(self, at: Loading) -> _Share:
        """See `Edit`."""
        return _Share(self.inner.load(at), self.weight)


@dataclass(frozen=True)
class _Shares:
    parts: tuple[tuple[Change, float], ...]
    delta_square = None

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        before = rows.clone()
        for change, weight in self.parts:
            rows = rows.add_(change.apply(before.clone(), begin).sub_(before), alpha=weight)
        return rows


@dataclass(frozen=True)
class SharesEdit:
    """W + sum of weight * (T - W) over several T, tensors or rows, that were each trained in W's place."""

    shares: tuple[WeightedEdit, ...]

    @property
    def whole(self) -> bool:
        """See `Edit`."""
        return any(share.whole for share in self.shares)

    def load(self, at: Loading) -> _Shares:
        """See `Edit`."""
        return _Shares(tuple((share.inner.load(at), share.weight) for share in self.shares))


@dataclass(frozen=True)
class _OnFirst:
    inner: Change
    count: int

    @property
    def delta_square(self) -> float | None:
        return self.inner.delta_square

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        if begin < self.count:
            mine = rows[: self.count - begin]
            mine.copy_(self.inner.apply(mine, begin))
        return rows


@dataclass(frozen=True)
class FirstRowsEdit:
    """An edit that was trained with fewer rows than the tensor has now."""

    inner: Edit
    count: int

    @property
    def whole(self) -> bool:
        """See `Edit`."""
        return self.inner.whole

    def load(self, at: Loading) -> _OnFirst:
        """See `Edit`."""
        return _OnFirst(self.inner.load(at.first(self.count)), self.count)


def on_first_rows(edit: Edit, count: int) -> Edit:
    """The edit on the first `count` rows, those of single rows as they are."""
    if isinstance(edit, TokensEdit):
        return edit
    if isinstance(edit, WeightedEdit):
        return _share_on_first_rows(edit, count)
    if isinstance(edit, SharesEdit):
        return SharesEdit(tuple(_share_on_first_rows(share, count) for share in edit.shares))
    return FirstRowsEdit(edit, count)


def _share_on_first_rows(share: WeightedEdit, count: int) -> WeightedEdit:
    return WeightedEdit(on_first_rows(share.inner, count), share.weight)


def alike(one: Edit, other: Edit) -> bool:
    """Whether both do the same: what PEFT saved of one matrix may stand in its file under two names."""
    if isinstance(one, ReplaceEdit) and isinstance(other, ReplaceEdit):
        return one.tensor.same_values(other.tensor)
    if isinstance(one, TokensEdit) and isinstance(other, TokensEdit):
        return one.indices == other.indices and one.values.same_values(other.values)
    if isinstance(one, WeightedEdit) and isinstance(other, WeightedEdit):
        return one.weight == other.weight and alike(one.inner, other.inner)
    if isinstance(one, SharesEdit) and isinstance(other, SharesEdit):
        return len(one.shares) == len(other.shares) and all(map(alike, one.shares, other.shares))
    return one == other


def in_one(changes: Sequence[Change]) -> tuple[Change, ...]:
    """Several products to add become one, of all their columns: one pass over the tensor, one norm."""
    if len(changes) < 2 or not all(isinstance(change, AddLowRank) for change in changes):
        return tuple(changes)
    products = [change for change in changes if isinstance(change, AddLowRank)]
    left = torch.cat([product.left * product.scale for product in products], dim=1)
    return (AddLowRank(left, torch.cat([product.right for product in products]), 1.0),)
