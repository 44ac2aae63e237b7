"""Whose tokenizer goes into the output, and how many rows the vocabulary needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import is_file
from qexport.checkpoint.hashing import file_hash
from qexport.checkpoint.sidecars import sidecars_of
from qexport.errors import AdapterError
from qexport.events import Noted, OnEvent
from qexport.merging.adapter import Adapter
from qexport.merging.book import EditBook

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_CHAT = ("chat_template.jinja", "chat_template.json")


def _is_tokenizer_file(file: Path) -> bool:
    return (
        file.suffix in (".jinja", ".model", ".tiktoken")
        or file.name in ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
        or file.name.startswith(("tokenizer", "vocab."))
    )


def tokenizer_files(directory: Path) -> dict[Path, Path]:
    """Name -> place of the tokenizer's and the chat template's files beside a model."""
    return {name: place for name, place in sidecars_of(directory).items() if _is_tokenizer_file(name)}


def chosen_sidecars(
    base: Path, adapters: Sequence[Adapter], wanted: str | None, on_event: OnEvent
) -> tuple[dict[Path, Path], str | None]:
    """The small files of the output: the base's, with the adapter's tokenizer where it brings one.

    The text beside them is a chat template that has to become a file of its own, or None.

    `wanted` is "base", "adapter" or None, the adapter's if there. Raises AdapterError when no adapter
    brings one that was asked for, and when two bring different ones.
    """
    files = sidecars_of(base)
    own = tokenizer_files(base)
    brought = {adapter.path: tokenizer_files(adapter.path) for adapter in adapters}
    brought = {path: found for path, found in brought.items() if found}
    if wanted == "base" or not brought:
        if wanted == "adapter":
            raise AdapterError(
                "--tokenizer adapter, but no adapter brings a tokenizer",
                expected=f"files such as {_TOKENIZER_FILES[0]} beside {adapters[0].path}",
            )
        return files, None
    path, found = next(iter(brought.items()))
    for other, others in brought.items():
        if not _same(found, others):
            raise AdapterError(
                f"{path} and {other} bring different tokenizers",
                remedy="choose --tokenizer base, or merge one after the other",
            )
    if all(name in own and _same_file(place, own[name]) for name, place in found.items()):
        return files, None
    if not any(name.name in _TOKENIZER_FILES for name in found):
        on_event(Noted(f"chat template: {', '.join(map(str, found))} of {path}, tokenizer: the base's"))
        return {**files, **found}, None
    kept = {name: place for name, place in files.items() if name not in own}
    template = None
    if not _has_template(found) and _has_template(own):
        on_event(Noted(f"{path} brings a tokenizer without a chat template: the base's template is kept"))
        kept |= {name: place for name, place in own.items() if name.name in _CHAT}
        if not any(name.name in _CHAT for name in own):
            template = _template_in_config(own)
    on_event(Noted(f"tokenizer and chat template: those of {path}, which differ from the base's"))
    return {**kept, **found}, template


def _template_in_config(files: Mapping[Path, Path]) -> str | None:
    """The chat template that stands in tokenizer_config.json, as older versions of transformers wrote it."""
    config = files.get(Path("tokenizer_config.json"))
    found = read_json(config).get("chat_template") if config else None
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found else None


def _has_template(files: Mapping[Path, Path]) -> bool:
    if any(name.suffix == ".jinja" or name.name in _CHAT for name in files):
        return True
    return _template_in_config(files) is not None


def _same(one: Mapping[Path, Path], other: Mapping[Path, Path]) -> bool:
    return one.keys() == other.keys() and all(_same_file(one[name], other[name]) for name in one)


def _same_file(one: Path, other: Path) -> bool:
    return is_file(one) and is_file(other) and file_hash(one) == file_hash(other)


def rows_needed(
    rows: int, books: Sequence[EditBook], sidecars: Mapping[Path, Path], base: Path
) -> tuple[int, str]:
    """How many rows the vocabulary gets, from the base's `rows`, and why; the reason is empty if as many.

    Raises AdapterError when two adapters were trained with vocabularies of different sizes.
    """
    sized = [(book.rows, book) for book in books if book.rows is not None]
    for count, book in sized[1:]:
        if count != sized[0][0]:
            raise AdapterError(
                f"two adapters resize the vocabulary differently: {sized[0][1].adapter.path} to "
                f"{sized[0][0]} rows, {book.adapter.path} to {count}",
                expected="adapters of one vocabulary",
            )
    for _, book in sized:
        plain = [other for other in books if other.rows is None and other.sizes_vocabulary]
        if plain:
            raise AdapterError(
                f"two adapters resize the vocabulary differently: {book.adapter.path} to {book.rows} rows, "
                f"{plain[0].adapter.path} leaves it at {rows}",
                expected="adapters of one vocabulary",
            )
    needed, reason = rows, ""
    if sized:
        needed, reason = sized[0][0] or rows, f"{sized[0][1].adapter.path} was trained with that many"
    own = tokenizer_files(base)
    taken_along = any(own.get(name) != place for name, place in sidecars.items() if _is_tokenizer_file(name))
    if not taken_along and all(book.least_rows <= needed for book in books):
        return needed, reason  # nothing asks for a look into the tokenizer, which may be large
    largest = _largest_id(sidecars)
    for book in books:
        if book.least_rows > max(needed, largest + 1):
            raise AdapterError(
                f"{book.adapter.path} trained the token {book.least_rows - 1}, which neither the base with "
                f"its {rows} rows nor the tokenizer has",
                remedy="put the tokenizer that the fine-tune was trained with beside the adapter",
            )
        if book.least_rows > needed:
            needed, reason = book.least_rows, f"{book.adapter.path} trained the token {book.least_rows - 1}"
    # some tokenizers have ids that their model has no rows for, and never uses
    if largest >= needed and largest > _largest_id(own):
        needed, reason = largest + 1, f"the adapter's tokenizer gives ids up to {largest}"
    return needed, reason


def _largest_id(sidecars: Mapping[Path, Path]) -> int:
    """The largest token id that the tokenizer's files name; -1 when none does."""
    largest = -1
    if place := sidecars.get(Path("tokenizer.json")):
        content = read_json(place)
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            largest = max([largest, *(n for n in vocabulary.values() if isinstance(n, int))])
        elif isinstance(vocabulary, list):
            largest = max(largest, len(vocabulary) - 1)
        added = content.get("added_tokens") or []
        ids = (token.get("id") for token in added if isinstance(token, dict))
        largest = max([largest, *(n for n in ids if isinstance(n, int))])
    if place := sidecars.get(Path("added_tokens.json")):
        largest = max([largest, *(n for n in read_json(place).values() if isinstance(n, int))])
    return largest
