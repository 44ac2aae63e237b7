"""All edits that one adapter makes, by tensor, and what of it found no place."""

from __future__ import annotations

from collections.abc import Sequence

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import AdapterError
from qexport.merging.adapter import Adapter
from qexport.merging.edits import Edit, ReplaceEdit, TokensEdit, alike
from qexport.merging.names import Names


class EditBook:
    """The edits of one adapter, while they are collected.

    `edits` are by the tensor's name in the checkpoint; `copies` are the base's own matrices that PEFT saves
    along when it resized or adapted them; `rows` is how many rows the adapter's vocabulary
    has, None when it leaves the base's. What finds no place is told, all of it, by `close`.
    """

    def __init__(self, adapter: Adapter, checkpoint: Checkpoint, names: Names) -> None:
        self.adapter, self.names = adapter, names
        self.edits: dict[str, list[Edit]] = {}
        self.copies: dict[str, ReplaceEdit] = {}
        self.rows: int | None = None
        self.least_rows = 0
        self.notes: list[str] = []
        self._checkpoint = checkpoint
        self._strangers: list[str] = []
        self._misfits: list[str] = []

    @property
    def sizes_vocabulary(self) -> bool:
        """Whether it holds something that has a row, or a column, for every token."""
        return any(
            self.names.is_vocabulary(name) and not replaces_rows(edits) for name, edits in self.edits.items()
        )

    def keeps_tie(self, module: str) -> bool:
        """Whether the adapter was trained to change both sides of the tied pair alike.

        PEFT does so for modules of these names only (its EMBEDDING_LAYER_NAMES), not for GPT-2's.
        """
        known = module.rpartition(".")[2] in ("embed_tokens", "lm_head")
        asked = bool(self.adapter.config.get("ensure_weight_tying"))
        return known and asked and self._checkpoint.tie is not None

    @property
    def model_type(self) -> str:
        """The base's model type."""
        return str(self._checkpoint.config.get("model_type"))

    def add(self, name: str, edit: Edit, *, both: bool = False) -> None:
        """Enters an edit of a tensor; of both sides of the tied pair when it is `both` and one of them."""
        for side in self.sides(name) if both else (name,):
            entered = self.edits.setdefault(side, [])
            given = next((other for other in entered if type(other) is type(edit)), None)
            if given is None or not isinstance(edit, (ReplaceEdit, TokensEdit)):
                entered.extend([] if edit in entered else [edit])
            elif not alike(edit, given):
                raise AdapterError(
                    f"conflicting tied edits: {self.adapter.path} was trained to keep "
                    f"{' and '.join(self.sides(name))} tied, and its values for them differ"
                    if both
                    else f"{self.adapter.path} holds two different {name}",
                    expected="one and the same, as PEFT saves it",
                )

    def add_copy(self, name: str, edit: ReplaceEdit) -> None:
        """Enters what the adapter's file says the base itself was, under both names of a tied pair."""
        for side in self.sides(name):
            self.copies.setdefault(side, edit)

    def sides(self, name: str) -> tuple[str, ...]:
        """Both names of the tied pair for one of them; else the name alone."""
        tie = self._checkpoint.tie
        return (tie.embedding, tie.head) if tie and name in (tie.embedding, tie.head) else (name,)

    def fits(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the adapter's `shape` is that of the tensor, or its vocabulary resized."""
        found = self.names.shape(name)
        if tuple(shape) == found:
            return True
        if not self.names.is_vocabulary(name) or tuple(shape[1:]) != found[1:] or not shape[0]:
            self.misfit(name, shape)
            return False
        if self.rows not in (None, shape[0]):
            raise AdapterError(
                f"{self.adapter.path} holds vocabularies of {self.rows} and of {shape[0]} rows",
                expected="one size for embedding and output head",
            )
        self.rows = shape[0]
        return True

    def misfit(self, name: str, shape: Sequence[int]) -> None:
        """Remembers a tensor whose shape is another in the adapter."""
        found = list(self.names.shape(name))
        self._misfits.append(f"{name} is {found} in the base, {list(shape)} in the adapter")

    def stranger(self, name: str) -> None:
        """Remembers a key, or a module, that matches no tensor."""
        self._strangers.append(name)

    def close(self) -> None:
        """Raises AdapterError for everything that found no place."""
        adapter = self.adapter
        total = len(self._strangers) + len(self._misfits) + sum(map(len, self.edits.values()))
        if self._strangers:
            told = [
                f"{name} (nearest: {near})" if (near := self.names.near(name)) else name
                for name in sorted(set(self._strangers))
            ]
            raise AdapterError(
                f"{adapter.path} was made for another base{adapter.trained_on}: {len(told)} of its "
                f"{total} modules are not in {self._checkpoint.path}: {', '.join(told)}"
            )
        if self._misfits:
            raise AdapterError(
                f"{adapter.path} was made for another base{adapter.trained_on}: {len(self._misfits)} of its "
                f"{total} tensors have other shapes; {self._misfits[0]}"
            )
        if not self.edits:
            raise AdapterError(f"{adapter.path} changes nothing", expected="an adapter with trained tensors")


def replaces_rows(edits: Sequence[Edit]) -> bool:
    """Whether all of them touch single rows, whatever the number of the others."""
    return all(isinstance(edit, TokensEdit) for edit in edits)
