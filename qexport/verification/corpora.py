"""Text of a public corpus for `--text hf:NAME[/CONFIG][:SPLIT]`, through the library `datasets`.

It is written once as JSON lines into the user's cache, under a name that tells what it is, and read from
there afterwards. No code of a dataset is run: `datasets` 4 and later cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from qexport.checkpoint.disk import exists, write_errors
from qexport.checkpoint.user_cache import user_cache
from qexport.errors import (
    CalibrationError,
    MachineError,
    MissingDependencyError,
    QexportError,
    SpecError,
    first_of,
)

PREFIX = "hf:"
_SPLITS = ("test", "validation")  # what is held out; taken in this order where no split is named
_JOINED = "\n\n"
_HEADING = re.compile(r"\s*= [^=].*[^=] =\s*")  # WikiText's titles of articles
_EMPTY_SHARE = 0.1
_FORM = "1"  # of the cached files; another way to join rows is another number


@dataclass(frozen=True)
class _Source:
    """What a name says; `split` is empty where it names none."""

    path: str
    config: str | None
    split: str
    local: bool


def corpus_file(name: str) -> Path:
    """The JSON-lines file, a {"text": ...} a document, of the corpus `hf:NAME[/CONFIG][:SPLIT]`.

    NAME is OWNER/DATASET on the Hub, or a local directory: of data files, or as `save_to_disk` leaves one.
    Without SPLIT it is "test", else "validation", else the only one; `test[:100]` takes the first rows.
    The text is the column "text", or the only one of strings. A row is a document, but where rows are lines
    of running text (no row has a line break in it, and titles as WikiText's or a tenth of empty rows stand
    between them) all are one text, joined by empty lines: what GPTQ's `get_wikitext2` and Hugging Face's
    "Perplexity of fixed-length models" do, and most published perplexities with them. The file's name ends
    in "-rows" or "-joined", then a hash of `name` and, for a local directory, its files' times and sizes.

    A cached file is taken without asking the Hub; it lies in $XDG_CACHE_HOME/qexport/corpora (~/.cache).
    Raises SpecError for a name of another form, MissingDependencyError without `datasets`, CalibrationError
    for a dataset, configuration, split or column that is not there, telling those that are, and for one
    without text; MachineError where the Hub cannot be reached, StorageError where nothing can be written.
    """
    source = _parsed(name)
    directory = user_cache("corpora")
    stem = re.sub(r"[^\w.-]+", "-", name.removeprefix(PREFIX)).strip("-.")[-80:]
    key = blake3(json.dumps([_FORM, name, _state(source)]).encode()).hexdigest(length=8)
    for form in ("rows", "joined"):
        found = directory / f"{stem}-{form}-{key}.jsonl"
        if exists(found):
            return found
    datasets = _library()
    with dataset_errors(name), without_bars():
        rows, column = _text_rows(datasets, source, name)
        joined = _are_lines(rows, column)
        texts: Iterable[str] = _strings(rows, column)
        out = directory / f"{stem}-{'joined' if joined else 'rows'}-{key}.jsonl"
        _write(out, [_JOINED.join(texts)] if joined else texts, name)
    return out


def _parsed(name: str) -> _Source:
    rest = name.removeprefix(PREFIX)
    path, _, split = rest.partition(":")
    place = Path(path).expanduser()
    if path and place.is_dir():
        return _Source(str(place.absolute()), None, split, True)
    if path.startswith((".", "/", "~")):
        raise CalibrationError(f"{name}: there is no directory {place}", expected="one of a dataset")
    parts = path.split("/")
    if not name.startswith(PREFIX) or len(parts) not in (2, 3) or not all(parts):
        raise SpecError(
            f"{name!r} names no corpus",
            expected="hf:OWNER/DATASET[/CONFIG][:SPLIT], or hf:DIRECTORY[:SPLIT]",
        )
    return _Source("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split, False)


def _state(source: _Source) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local dataset's files: what changes with its content."""
    if not source.local:
        return []
    files = sorted(path for path in Path(source.path).rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"--text {PREFIX}... needs the package datasets", remedy="pip install 'qexport[datasets]'"
        ) from error
    return datasets


def _text_rows(datasets: Any, source: _Source, name: str) -> tuple[Any, str]:
    """The rows of the split, and the column that holds text."""
    if source.local and any(exists(Path(source.path) / f) for f in ("state.json", "dataset_dict.json")):
        rows = _saved(datasets, source, name)
    else:
        config = _config(datasets, source, name)
        split = _split(datasets.get_dataset_split_names(source.path, config), source, name)
        rows = datasets.load_dataset(source.path, config, split=split)
    strings = [key for key, kind in rows.features.items() if _is_string(kind)]
    if "text" in strings:
        return rows, "text"
    if len(strings) != 1:
        told = ", ".join(rows.features)
        raise CalibrationError(
            f"{name} has {len(strings) or 'no'} columns of strings and none named text (it has {told})",
            expected="a column text, or one of strings",
        )
    return rows, strings[0]


def _is_string(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _saved(datasets: Any, source: _Source, name: str) -> Any:
    """What `save_to_disk` left: one split, or several by name."""
    found = datasets.load_from_disk(source.path)
    if not isinstance(found, dict):
        if source.split:
            raise CalibrationError(f"{name}: this dataset was saved without splits", expected="no :SPLIT")
        return found
    return found[_split(list(found), source, name)]


def _config(datasets: Any, source: _Source, name: str) -> str:
    known = list(datasets.get_dataset_config_names(source.path))
    config = source.config or ("default" if "default" in known or len(known) > 1 else known[0])
    if config not in known:
        told = f"no configuration {source.config!r}" if source.config else "several configurations"
        raise CalibrationError(f"{name}: the dataset has {told}", expected=f"one of {first_of(known, 20)}")
    return config


def _split(known: Sequence[str], source: _Source, name: str) -> str:
    if source.split:
        if source.split.partition("[")[0] in known:
            return source.split
        told = f"no split {source.split!r}"
    else:
        if chosen := next((split for split in _SPLITS if split in known), None):
            return chosen
        if len(known) == 1:
            return known[0]
        told = "several splits, and none named test or validation"
    raise CalibrationError(f"{name}: the dataset has {told}", expected=f"one of {first_of(known, 20)}")


def _strings(rows: Any, column: str) -> Iterator[str]:
    for row in rows.select_columns([column]):
        yield row[column] or ""


def _are_lines(rows: Any, column: str) -> bool:
    """Whether the rows are the lines of running text. See `corpus_file`."""
    empty = headings = count = 0
    for text in _strings(rows, column):
        line = text.strip()
        if "\n" in line:
            return False
        count += 1
        empty += not line
        headings += _HEADING.fullmatch(text) is not None
    return count > 1 and (headings > 0 or empty >= _EMPTY_SHARE * count)


def _write(out: Path, texts: Iterable[str], name: str) -> None:
    """All documents that are not empty, under a name of their own until the last one is written."""
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=out.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                count = 0
                for text in filter(str.strip, texts):
                    # escaped, as a string out of Arrow may hold what UTF-8 cannot
                    file.write(json.dumps({"text": text}) + "\n")
                    count += 1
            if not count:
                raise CalibrationError(f"{name} holds no text")
            Path(temporary).replace(out)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def dataset_errors(what: str) -> Iterator[None]:
    """Within it, whatever the library `datasets` raises on `what` becomes one clear line.

    MachineError where the Hub cannot be reached, CalibrationError otherwise.
    """
    try:
        yield
    except (QexportError, MemoryError):
        raise
    except Exception as error:  # it raises what its readers of a dozen formats do
        told = dataset_error(what, error)
        raise told from error


def dataset_error(what: str, error: Exception) -> QexportError:
    """The one clear line."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, (ConnectionError, TimeoutError)):  # OfflineModeIsEnabled is one
        return MachineError(
            f"{what} cannot be fetched: {reason}",
            expected="a connection to the Hub, or data that was fetched before",
            remedy="name a file or a directory of your own",
        )
    return CalibrationError(f"{what} cannot be read: {reason}", expected="a dataset that you may read")


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Within it, no bar of tqdm is drawn: `datasets` and lm_eval draw theirs whatever they are told."""
    from tqdm import tqdm

    original = tqdm.__init__

    def disabled(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original
