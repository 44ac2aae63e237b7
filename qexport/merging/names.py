"""From a module's name in the trained model to the tensors of the checkpoint.

transformers renames some modules while it loads: a prefix comes or goes, experts are fused. An
adapter knows the names in memory, the checkpoint those on disk.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.ties import vocabulary_names

# (in memory, on disk): the base model's prefix, which some checkpoints leave out, and multimodal nestings
_RENAMED = (
    ("transformer.", ""),
    ("model.", ""),
    ("gpt_neox.", ""),
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.", "model.language_model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", ""),
)
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
        while all(f"{stem}.{expert}.{part}.weight" in self.known for part in parts):
            row = 0
            for part in parts:
                name = f"{stem}.{expert}.{part}.weight"
                rows = self.shape(name)[0]
                yield ExpertPart(name, expert, row, row + rows)
                row += rows
            expert += 1

    def near(self, module: str) -> str | None:
        """The module of the checkpoint whose name is most like `module`."""
        modules = sorted({name.rpartition(".")[0] for name in self.known})
        tail = module.rsplit(".", 1)[-1]
        pool = [name for name in modules if name.endswith(tail)] or modules
        found = difflib.get_close_matches(module, pool, n=1, cutoff=0.3)
        return found[0] if found else None


def _candidates(name: str) -> Iterator[str]:
    yield name
    for memory, disk in _RENAMED:
        if name.startswith(memory):
            yield disk + name.removeprefix(memory)
    yield f"model.{name}"
    yield f"transformer.{name}"
