"""The tensors of an adapter that are no low-rank factors: those that were trained, or resized, whole."""

from __future__ import annotations

import re
from typing import Any

from qexport.errors import AdapterError
from qexport.merging.adapter import AdapterTensor
from qexport.merging.book import EditBook
from qexport.merging.edits import ReplaceEdit, TokensEdit
from qexport.merging.settings import is_plain_lora, not_converted

_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
_COPY = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<leaf>weight|bias)")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.[^.]+)?)?\.(?P<leaf>[^.]+)")
# what some trainers save beside the trained values: what was there before
_ORIGINAL = re.compile(r".+\.original_module\..+|.+\.trainable_tokens_original(\..+)?")


def add_trained(book: EditBook, name: str, tensor: AdapterTensor) -> None:
    """Enters `modules_to_save`, a bias, token rows or a resized embedding; else a stranger."""
    if _ORIGINAL.fullmatch(name):
        return
    if match := _TOKENS.fullmatch(name):
        _add_tokens(book, match["module"], tensor)
    elif match := _COPY.fullmatch(name):
        # PEFT saves the base's own matrix along when an embedding or the output head is adapted: it
        # matters when the vocabulary was resized. In a tied model both names mean the same matrix.
        if not _is_residual(book, match["module"], tensor):
            _replace(book, match["module"], match["leaf"], tensor, own=False)
    elif match := _SAVED.fullmatch(name):
        config = book.adapter.config
        saved = [str(module) for module in config.get("modules_to_save") or ()]
        own = any(match["module"].endswith(module) for module in saved)
        if book.keeps_tie(match["module"]):  # PEFT saves the one trained matrix under both names
            own = own or any(map(book.keeps_tie, saved))
        _replace(book, match["module"], match["leaf"], tensor, own=own)
    else:
        book.stranger(name)


def _is_residual(book: EditBook, module: str, tensor: AdapterTensor) -> bool:
    """Whether it is what an initialisation such as PiSSA's left of the base, which is taken from it anew.

    Raises AdapterError where the base that it was taken from is not to be had.
    """
    adapter, name = book.adapter, book.names.find(module)
    init = adapter.config.get("init_lora_weights")
    changed = adapter.config.get("kasa_config") or (isinstance(init, str) and not is_plain_lora(adapter))
    if adapter.kind != "LORA" or not changed or name is None:
        return False
    if len(book.sides(name)) == 2 or tensor.shape != book.names.shape(name):
        raise not_converted(
            f"{adapter.path} holds what its initialisation ({init}) left of {name}, which is tied or "
            "was resized"
        )
    return True


def _replace(book: EditBook, module: str, leaf: str, tensor: AdapterTensor, *, own: bool) -> None:
    """A module's `own` trained tensor; else, of a vocabulary, the base's own as it was when it was saved."""
    name = book.names.find(module, leaf)
    if name is None:
        book.stranger(module if leaf == "weight" else f"{module}.{leaf}")
    elif not tensor.dtype.is_floating_point:
        raise AdapterError(f"{book.adapter.path}: {tensor.name} holds {tensor.dtype}", expected="floats")
    elif book.fits(name, tensor.shape):
        edit = ReplaceEdit(tensor)
        if book.names.is_vocabulary(name) and not own:
            book.add_copy(name, edit)
        else:
            book.add(name, edit, both=book.keeps_tie(module))


def _add_tokens(book: EditBook, module: str, tensor: AdapterTensor) -> None:
    name = book.names.find(module)
    if name is None:
        book.stranger(module)
        return
    by_module = _token_indices(book)
    indices = next((found for target, found in by_module.items() if module.endswith(target)), ())
    if not indices and len(by_module) == 1 and len(book.sides(name)) == 2:
        indices = next(iter(by_module.values()))  # the head's are the embedding's, which alone is named
    expected = (len(indices), *book.names.shape(name)[1:])
    if not tensor.dtype.is_floating_point or len(set(indices)) != len(indices):
        raise AdapterError(
            f"{book.adapter.path}: the trained rows of {module} are {tensor.dtype}, of "
            f"{len(set(indices))} different tokens",
            expected=f"floats, a row for each of {len(indices)} tokens",
        )
    if tensor.shape != expected or not indices:
        raise AdapterError(
            f"{book.adapter.path}: the trained rows of {module} are {list(tensor.shape)}",
            expected=f"{list(expected)}, a row for each index in its config",
        )
    # PEFT ties the head's rows to the embedding's in a tied model, unless each has indices of its own
    edit = TokensEdit(indices, tensor)
    book.add(name, edit, both=len(set(by_module.values())) == 1)
    book.least_rows = max(book.least_rows, max(indices) + 1)


def _token_indices(book: EditBook) -> dict[str, tuple[int, ...]]:
    """End of a module's name -> the indices that were trained there."""
    config = book.adapter.config
    found: Any = config.get("trainable_token_indices") or config.get("token_indices")
    by_module = found if isinstance(found, dict) else {"": found}
    for indices in by_module.values():
        if not isinstance(indices, list) or not all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in indices
        ):
            raise AdapterError(
                f"{book.adapter.path} names no token indices that could be: {str(indices)[:80]}",
                expected="a list of whole numbers",
            )
    return {str(module): tuple(indices) for module, indices in by_module.items()}
