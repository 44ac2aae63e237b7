"""From a module's name in memory to the tensors of a checkpoint.

transformers renames some modules while it loads: a prefix comes or goes, experts are fused. A model in
memory, and an adapter trained on it, know the names in memory, a checkpoint those on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

# (in memory, on disk): the base model's prefix, which some checkpoints leave out, and multimodal nestings
_RENAMED = (
    ("transformer.", ""),
    ("model.", ""),
    ("gpt_neox.", ""),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("lm_head.", "embed_out."),
    ("model.language_model.", "model."),
    ("model.", "model.language_model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", ""),
)
_RENAMED_WITHIN = ((".mlp.gate.", ".block_sparse_moe.gate."),)
# where a fused expert parameter's rows lie on disk, for each expert: (module in memory, on disk, parts)
_EXPERTS = {
    "gate_up_proj": (
        ("experts", "experts", ("gate_proj", "up_proj")),
        ("experts", "experts", ("w1", "w3")),
        ("mlp.experts", "block_sparse_moe.experts", ("w1", "w3")),
    ),
    "down_proj": (
        ("experts", "experts", ("down_proj",)),
        ("experts", "experts", ("w2",)),
        ("mlp.experts", "block_sparse_moe.experts", ("w2",)),
    ),
}
# where such a parameter lies that is fused on disk too
_FUSED = (("mlp.experts", "mlp.experts"), ("mlp.experts", "block_sparse_moe.experts"), ("experts", "experts"))


@dataclass(frozen=True)
class ExpertPart:
    """A tensor on disk that holds rows `begin` to `end` of one expert of a fused parameter."""

    name: str
    expert: int
    begin: int
    end: int


class StoredNames:
    """Looks up tensors by their names in memory among those that a checkpoint holds, `shapes`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def find(self, name: str, taken: Collection[str] = ()) -> str | None:
        """The name on disk of a tensor, none of those `taken`; None when there is none."""
        found = (name for name in candidates(name) if name in self._shapes and name not in taken)
        return next(found, None)

    def experts(self, module: str, parameter: str) -> list[ExpertPart]:
        """Where a fused parameter [experts, rows, columns] lies that is stored expert by expert."""
        for memory, disk, parts in _EXPERTS.get(parameter, ()):
            if not _ends_with(module, memory):
                continue
            for stem in candidates(module.removesuffix(memory) + disk):
                found = list(self._expert_parts(stem, parts))
                if found:
                    return found
        return []

    def fused(self, module: str, parameter: str) -> str | None:
        """Where a fused parameter [experts, rows, columns] lies that is stored as one tensor."""
        for memory, disk in _FUSED:
            if _ends_with(module, memory):
                found = self.find(f"{module.removesuffix(memory)}{disk}.{parameter}")
                if found and len(self._shapes[found]) == 3:
                    return found
        return None

    def _expert_parts(self, stem: str, parts: tuple[str, ...]) -> Iterator[ExpertPart]:
        expert = 0
        while all(self._is_matrix(f"{stem}.{expert}.{part}.weight") for part in parts):
            row = 0
            for part in parts:
                name = f"{stem}.{expert}.{part}.weight"
                rows = self._shapes[name][0]
                yield ExpertPart(name, expert, row, row + rows)
                row += rows
            expert += 1

    def _is_matrix(self, name: str) -> bool:
        return len(self._shapes.get(name, ())) == 2


def _ends_with(module: str, tail: str) -> bool:
    return f".{module}".endswith(f".{tail}")


def candidates(name: str) -> Iterator[str]:
    """Names that a tensor may have on disk, the likeliest first."""
    yield name
    for memory, disk in _RENAMED:
        if name.startswith(memory):
            yield disk + name.removeprefix(memory)
    for memory, disk in _RENAMED_WITHIN:
        if memory in name:
            yield name.replace(memory, disk)
    yield f"model.{name}"
    yield f"transformer.{name}"
