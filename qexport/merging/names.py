"""From a module's name in the trained model to the tensors of the checkpoint, and to the likest of them."""

from __future__ import annotations

import bisect
import difflib
import re
from collections import defaultdict
from functools import cached_property

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.ties import vocabulary_names
from qexport.modeling.names import ExpertPart, StoredNames

_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")  # a part of a name between its dots


class Names:
    """Looks up the tensors of one checkpoint; either name of a tied pair is known."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._near: dict[str, str | None] = {}
        self.known = set(checkpoint.names())
        self.vocabulary = vocabulary_names(self.known, checkpoint.tie)
        if checkpoint.tie:
            self.known |= {checkpoint.tie.embedding, checkpoint.tie.head}
        self._stored = StoredNames({name: checkpoint.info(name).shape for name in self.known})

    def find(self, module: str, leaf: str = "weight") -> str | None:
        """The tensor `leaf` of `module`; None when the checkpoint has none."""
        return self._stored.find(f"{module}.{leaf}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that was found."""
        return self._checkpoint.info(name).shape

    def is_vocabulary(self, name: str) -> bool:
        """Whether the tensor has a row for every token."""
        return name in self.vocabulary

    def experts(self, module: str, parameter: str) -> list[ExpertPart]:
        """Where a fused parameter [experts, rows, columns] lies that is stored expert by expert."""
        return self._stored.experts(module, parameter)

    def near(self, module: str) -> str | None:
        """The module of the checkpoint whose name is most like `module`."""
        sort, numbers = _sort_of(module)
        if sort not in self._near:
            sorts = sorted(self._sorts)
            tail = sort.rsplit(".", 1)[-1]
            pool = [known for known in sorts if known.endswith(tail)] or sorts
            self._near[sort] = next(iter(difflib.get_close_matches(sort, pool, n=1, cutoff=0.3)), None)
        found = self._near[sort]
        if found is None:
            return None
        members = self._sorts[found]
        place = bisect.bisect_left(members, (numbers, ""))
        beside = members[max(place - 1, 0) : place + 1]
        return min(beside, key=lambda member: _apart(member[0], numbers))[1]

    @cached_property
    def _sorts(self) -> dict[str, list[tuple[tuple[int, ...], str]]]:
        """The modules by their names without numbers, which are few: tens of thousands of experts are one."""
        sorts: dict[str, list[tuple[tuple[int, ...], str]]] = defaultdict(list)
        for module in {name.rpartition(".")[0] for name in self.known}:
            sort, numbers = _sort_of(module)
            sorts[sort].append((numbers, module))
        return {sort: sorted(members) for sort, members in sorts.items()}


def _sort_of(module: str) -> tuple[str, tuple[int, ...]]:
    """A module's name with every number in it as 0, and the numbers."""
    return _NUMBER.sub("0", module), tuple(int(digits) for digits in _NUMBER.findall(module))


def _apart(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(abs(a - b) for a, b in zip(one, other, strict=False))
