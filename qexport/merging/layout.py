"""Which tensors the output has, where each comes from, and which edits each gets: ties, sizes, dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.disk import read_errors
from qexport.checkpoint.hashing import PassingHash
from qexport.checkpoint.safetensors_file import StoredTensor
from qexport.checkpoint.tensors import TensorInfo
from qexport.errors import AdapterError
from qexport.formats.opening import float_dtype
from qexport.merging.book import EditBook
from qexport.merging.edits import Edit, ReplaceEdit, alike, on_first_rows
from qexport.merging.names import Names
from qexport.merging.sources import DecodedSource, ResizedSource, Source, StoredSource
from qexport.merging.stream import PlannedTensor
from qexport.specs import MergeSpec


class Layout:
    """Lays out the tensors of a merge. `untied_by` says, after `tensors`, why a tied pair was untied."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        books: Sequence[EditBook],
        edits: Mapping[str, Sequence[Edit]],
        names: Names,
        spec: MergeSpec,
    ) -> None:
        self._checkpoint, self._books, self._edits = checkpoint, books, edits
        self._numbered = list(enumerate(books, start=1))
        self._dtype: torch.dtype | None = getattr(torch, spec.dtype) if spec.dtype else None
        self._names = names
        self._passing: dict[str, PassingHash] = {}
        self._copies = {name: self._copy(name) for name in self._names.vocabulary}
        self.untied_by = ""

    @property
    def passing(self) -> tuple[PassingHash, ...]:
        """The hashes of the base's files, which are known when they have been read."""
        return tuple(self._passing.values())

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding as the base has it; 0 when it is not known where that is."""
        names = self._names.vocabulary
        return self._names.shape(names[0])[0] if names else 0

    def tensors(self) -> list[PlannedTensor]:
        """Every tensor of the output, in the base's order; both of a pair that is no longer tied."""
        tie = self._checkpoint.tie
        planned = []
        for name in self._checkpoint.names():
            planned.append(self._planned(name))
            if tie and name == tie.embedding and self._is_untied():
                planned.append(self._planned(tie.head))
        return planned

    def resized(self, tensors: Sequence[PlannedTensor], rows: int) -> list[PlannedTensor]:
        """The same with `rows` rows in every tensor of the vocabulary."""
        return [self._resized(planned, rows) for planned in tensors]

    def _planned(self, name: str) -> PlannedTensor:
        info = self._checkpoint.info(name)
        # what was codes comes out in the dtype that the rest of the model has
        dtype = float_dtype(self._checkpoint) if self._checkpoint.is_quantized(name) else info.dtype
        if dtype.is_floating_point and self._dtype:
            dtype = self._dtype
        edits = tuple(self._edits.get(name, ()))
        adapters = {number for number, book in self._numbered if name in book.edits}
        if copy := self._copies.get(name):
            edits = (copy[1], *edits)
            adapters.add(copy[0])
        return PlannedTensor(
            TensorInfo(name, dtype, info.shape), self._source(name), edits, tuple(sorted(adapters))
        )

    def _source(self, name: str) -> Source:
        if self._checkpoint.is_quantized(name):
            return DecodedSource(self._checkpoint, name, float_dtype(self._checkpoint))
        tie = self._checkpoint.tie
        stored = self._checkpoint.stored.get(tie.embedding if tie and name == tie.head else name)
        if stored is None:  # a GGUF file has other names, and rows in another order
            return DecodedSource(self._checkpoint, name, self._checkpoint.info(name).dtype)
        return StoredSource(stored, self._hash_of(stored))

    def _hash_of(self, stored: StoredTensor) -> PassingHash:
        """The running hash of a tensor's file, its header gone by already."""
        key = str(stored.file)
        if key not in self._passing:
            first = min(t.offset for t in self._checkpoint.stored.values() if t.file == stored.file)
            with read_errors(stored.file), stored.file.open("rb") as file:
                header = file.read(first)
            self._passing[key] = PassingHash(stored.file)
            self._passing[key].add(0, header)
        return self._passing[key]

    def _copy(self, name: str) -> tuple[int, ReplaceEdit] | None:
        """What an adapter's file says that this tensor of the base was, where that is something else."""
        found: tuple[int, ReplaceEdit] | None = None
        for number, book in self._numbered:
            copy = book.copies.get(name)
            if copy is None or self._is_base(name, copy):
                continue
            if found is None:
                found = (number, copy)
            elif not found[1].tensor.same_values(copy.tensor):
                if found[1].tensor.shape != copy.tensor.shape:
                    continue  # two sizes: told where the vocabulary's rows are counted
                raise AdapterError(
                    f"{found[1].tensor.file.parent} and {book.adapter.path} were trained on different {name}",
                    expected="adapters of one base",
                )
        return found

    def _is_base(self, name: str, copy: ReplaceEdit) -> bool:
        if copy.tensor.shape != self._names.shape(name):
            return False
        source, begin = self._source(name), 0
        for piece in copy.tensor.pieces():
            rows = source.silent_rows(begin, begin + len(piece))
            if not torch.equal(piece.float(), rows.float()):
                return False
            begin += len(piece)
        return True

    def _is_untied(self) -> bool:
        tie = self._checkpoint.tie
        assert tie is not None  # noqa: S101 - the caller looked
        one, other = list(self._edits.get(tie.embedding, ())), list(self._edits.get(tie.head, ()))
        if len(one) == len(other) and all(map(alike, one, other)):
            return False
        kept = [b.adapter for b in self._books if b.adapter.config.get("ensure_weight_tying")]
        if kept and one and other:
            raise AdapterError(
                f"conflicting tied edits: {kept[0].path} was trained to keep {tie.embedding} and {tie.head} "
                "tied, and the two are changed differently",
                expected="one change for both, or adapters without ensure_weight_tying",
            )
        sides = [name for name, edits in ((tie.embedding, one), (tie.head, other)) if edits]
        how = "alone is changed" if len(sides) == 1 else "are changed differently"
        self.untied_by = f"{' and '.join(sides)} {how}"
        return True

    def _resized(self, planned: PlannedTensor, rows: int) -> PlannedTensor:
        info = planned.info
        if not self._names.is_vocabulary(info.name) or info.shape[0] == rows:
            return planned
        own = {number: book.rows or info.shape[0] for number, book in self._numbered}
        trained = max((own[number] for number in planned.adapters), default=rows)
        edits = planned.edits
        if trained < rows:  # rows that came in later, with a tokenizer or another adapter's tokens
            edits = tuple(on_first_rows(edit, trained) for edit in edits)
        return replace(
            planned,
            info=replace(info, shape=(rows, *info.shape[1:])),
            source=ResizedSource(planned.source, rows),
            edits=edits,
        )
