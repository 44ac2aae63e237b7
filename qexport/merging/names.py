"""From a module's name in the trained model to the tensors of the checkpoint.

transformers renames some modules while it loads: a prefix comes or goes, experts are fused. An
adapter knows the names in memory, the checkpoint those on disk.
"""

from __future__ import annotations

import bisect
import difflib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.ties import vocabulary_names

# (in memory, on disk): the base model's prefix, which some checkpoints leave out, and multimodal nestings
_RENAMED = (
    ("transformer.", ""),
    ("model.", ""),
    ("gpt_neox.", ""),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "model."),
    ("model.", "model.language_model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", ""),
)
_RENAMED_WITHIN = ((".mlp.gate.", ".block_sparse_moe.gate."),)
# where a fused expert parameter's rows lie on disk, for each expert: (module in memory, on disk, parts)
_EXPERTS = {
    "gate_up_proj": (
        ("mlp.experts", "mlp.experts", ("gate_proj", "up_proj")),
        ("mlp.experts", "block_sparse_moe.experts", ("w1", "w3")),
        ("block_sparse_moe.experts", "block_sparse_moe.experts", ("w1", "w3")),
    ),
    "down_proj": (
        ("mlp.experts", "mlp.experts", ("down_proj",)),
        ("mlp.experts", "block_sparse_moe.experts", ("w2",)),
        ("block_sparse_moe.experts", "block_sparse_moe.experts", ("w2",)),
    ),
}
_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")  # a part of a name between its dots


@dataclass(frozen=True)
class ExpertPart:
    """A tensor on disk that holds rows `begin` to `end` of one expert of a fused parameter."""

    name: str
    expert: int
    begin: int
    end: int


class Names:
    """Looks up the tensors of one checkpoint; either name of a tied pair is known."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._near: dict[str, str | None] = {}
        self.known = set(checkpoint.names())
        self.vocabulary = vocabulary_names(self.known, checkpoint.tie)
        if checkpoint.tie:
            self.known |= {checkpoint.tie.embedding, checkpoint.tie.head}

    def find(self, module: str, leaf: str = "weight") -> str | None:
        """The tensor `leaf` of `module`; None when the checkpoint has none."""
        return next((name for name in _candidates(f"{module}.{leaf}") if name in self.known), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that was found."""
        return self._checkpoint.info(name).shape

    def is_vocabulary(self, name: str) -> bool:
        """Whether the tensor has a row for every token."""
        return name in self.vocabulary

    def experts(self, module: str, parameter: str) -> list[ExpertPart]:
        """Where a fused parameter [experts, rows, columns] lies that is stored expert by expert."""
        for memory, disk, parts in _EXPERTS.get(parameter, ()):
            if not module.endswith(memory):
                continue
            for stem in _candidates(module.removesuffix(memory) + disk):
                found = list(self._expert_parts(stem, parts))
                if found:
                    return found
        return []

    def _expert_parts(self, stem: str, parts: tuple[str, ...]) -> Iterator[ExpertPart]:
        expert = 0
        while all(self._is_matrix(f"{stem}.{expert}.{part}.weight") for part in parts):
            row = 0
            for part in parts:
                name = f"{stem}.{expert}.{part}.weight"
                rows = self.shape(name)[0]
                yield ExpertPart(name, expert, row, row + rows)
                row += rows
            expert += 1

    def _is_matrix(self, name: str) -> bool:
        return name in self.known and len(self.shape(name)) == 2

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


def _candidates(name: str) -> Iterator[str]:
    yield name
    for memory, disk in _RENAMED:
        if name.startswith(memory):
            yield disk + name.removeprefix(memory)
    for memory, disk in _RENAMED_WITHIN:
        if memory in name:
            yield name.replace(memory, disk)
    yield f"model.{name}"
    yield f"transformer.{name}"
