"""An output, a directory or a single file, appears under its name only when it is whole.

Work goes into a hidden directory beside the target (same file system, so that the last step is a
rename). Whatever happens before that rename, an error, Ctrl-C, kill -9, leaves nothing under the
target's name and the old content, if any, untouched. A working directory is locked by its process; one
whose lock is free was left by a process that died, and the next run into the same target removes it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from qexport.checkpoint.disk import write_errors
from qexport.checkpoint.sidecars import strangers
from qexport.errors import OutputExistsError, StorageError
from qexport.sizes import format_size

_PARTIAL, _OLD, _NEW = "qexport-partial", "qexport-old", "qexport-new"
_CONTENT = "content"
_CARD = "README.md"


class StagedDirectory:
    """`with StagedDirectory(target) as staged:` write into `staged.path`, then `staged.commit()`.

    Raises OutputExistsError when the target is there already and must not, or may not, be replaced.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()) -> None:
        self.target = target
        self._final = Path(os.path.abspath(target))  # noqa: PTH100 - lexical: `..` of a link is not followed
        self._overwrite, self._sources = overwrite, sources
        with write_errors(target):
            self._made_parents = _make_parents(self._final.parent)
            _restore_set_aside(self._final)
            check_target(target, overwrite=overwrite, sources=sources)
            _remove_abandoned(self._final)
            self.path, self._lock = _locked_directory(self._final, _PARTIAL)

    def __enter__(self) -> StagedDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)
        _remove_empty(self._made_parents)

    def commit(self) -> None:
        """Gives the directory its final name. The only step that a reader can see."""
        # somebody may have put something there since
        check_target(self.target, overwrite=self._overwrite, sources=self._sources)
        with write_errors(self.target):
            self.path.chmod(0o777 & ~_umask())  # it was private while it grew
            _sync(self.path)
            if self._final.exists():
                self._keep_card()
                self._replace()
            else:
                self.path.rename(self._final)
            _sync(self._final.parent)

    def _keep_card(self) -> None:
        """The model card of what is replaced stays: people write in it."""
        card, new = self._final / _CARD, self.path / _CARD
        if card.is_file() and not new.exists():
            shutil.copyfile(card, new)

    def _replace(self) -> None:
        """The old content goes aside, the new takes its name; killed in between, the next run undoes it."""
        aside, lock = _locked_directory(self._final, _OLD)
        try:
            self._final.rename(aside / _CONTENT)
            try:
                self.path.rename(self._final)
            except BaseException:
                (aside / _CONTENT).rename(self._final)
                raise
        finally:
            if self._final.exists():
                shutil.rmtree(aside, ignore_errors=True)
            os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _make_parents(parent: Path) -> list[Path]:
    """Makes the missing directories above the target; those that were made, the deepest first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
    return missing


def _remove_empty(made: Sequence[Path]) -> None:
    """Takes back what `_make_parents` made; a directory that holds anything stays."""
    for parent in made:
        with contextlib.suppress(OSError):
            parent.rmdir()


def require_space(target: Path, size: int) -> None:
    """Raises StorageError now rather than after an hour, when `size` bytes do not fit beside `target`."""
    there = Path(os.path.abspath(target))  # noqa: PTH100
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if size > free:
        raise StorageError(
            f"{target} needs {format_size(size)}, the disk has {format_size(free)} free",
            remedy="free some space, or choose another place with -o",
        )


def check_target(target: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()) -> None:
    """Raises OutputExistsError when the target is there already and must not, or may not, be replaced."""
    final = Path(os.path.abspath(target))  # noqa: PTH100 - lexical: `..` of a link is not followed
    resolved, here = final.resolve(), Path.cwd()
    # a GGUF model's directory has links to its files
    linked = [file for source in sources if source.is_dir() for file in source.glob("*.gguf")]
    for source in (*sources, *linked):
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputExistsError(
                f"the output {target} is or holds the input {source}",
                remedy="choose another place with -o",
            )
        if source.resolve() in resolved.parents and (source / "config.json").is_file():
            raise OutputExistsError(
                f"the output {target} lies within the model {source}",
                remedy="choose another place with -o",
            )
    if resolved == here or resolved in here.parents:
        raise OutputExistsError(
            f"the output {target} is or holds the working directory",
            expected="a directory that can be made, or replaced, as a whole",
            remedy="choose another place with -o",
        )
    if not final.exists() and not final.is_symlink():
        return
    if not final.is_dir():
        raise OutputExistsError(
            f"{target} is there already and is no directory", remedy="choose another place with -o"
        )
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError(
            f"{target} is there already", remedy="add --overwrite, or choose another place with -o"
        )
    if final.is_symlink() or not any((final / name).is_file() for name in ("config.json", "qexport.json")):
        raise OutputExistsError(
            f"{target} is no model directory",
            expected="models only are replaced, lest something else be lost",
            remedy="choose another place with -o",
        )
    if others := strangers(final):
        raise OutputExistsError(
            f"{target} holds {others[0]}" + (f" and {len(others) - 1} more" if len(others) > 1 else ""),
            expected="a directory is replaced only when all in it belongs to a model, lest something be lost",
            remedy="move that away, or choose another place with -o",
        )


def check_target_file(
    target: Path,
    kind: str,
    is_kind: Callable[[Path], bool],
    *,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
) -> None:
    """Raises OutputExistsError when a file must not be made, or made anew, under the target's name.

    `sources` are the inputs, files and directories: none of them, nothing within them and nothing that they
    link to is written to. What lies there is replaced when `overwrite` and `is_kind` say so: a file of the
    same `kind` ("importance matrix"), or an empty one. Raises StorageError where nothing can be written.
    """
    final = Path(os.path.abspath(target))  # noqa: PTH100 - lexical: `..` of a link is not followed
    elsewhere = "choose another name with -o"
    with write_errors(target):
        resolved = final.resolve()
        for source in sources:
            own = source.resolve()
            # a GGUF model's directory has links to its files, one of the Hub's cache too
            linked = [file.resolve() for file in own.iterdir()] if own.is_dir() else []
            if resolved == own or resolved in linked or own in resolved.parents:
                how = "is" if resolved == own else "is a file of" if resolved in linked else "lies within"
                raise OutputExistsError(f"the output {target} {how} the input {source}", remedy=elsewhere)
        if final.is_dir():
            raise OutputExistsError(
                f"{target} is a directory", expected=f"a name for one file, the {kind}", remedy=elsewhere
            )
        if final.is_symlink() or (final.exists() and not final.is_file()):
            what = "a link" if final.is_symlink() else "no regular file"
            raise OutputExistsError(f"{target} is there already and is {what}", remedy=elsewhere)
        if not final.exists():
            _require_writable(final.parent)
            return
        if not overwrite:
            raise OutputExistsError(f"{target} is there already", remedy=f"add --overwrite, or {elsewhere}")
        if final.stat().st_size and not is_kind(final):
            raise OutputExistsError(
                f"{target} is there already and is no {kind}",
                expected="a file is replaced only by one of its kind, lest something else be lost",
                remedy=elsewhere,
            )
        _require_writable(final.parent)


def _require_writable(parent: Path) -> None:
    """Raises OSError now rather than after an hour, when no file can be made in a directory to be made."""
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))


def _locked_directory(final: Path, kind: str) -> tuple[Path, int]:
    """A new directory beside the target, and the lock on it, which dies with this process.

    It is locked under a name that no other run looks for, and then gets the one that they do.
    """
    made = Path(tempfile.mkdtemp(prefix=f".{final.name}.{_NEW}-", dir=final.parent))
    lock = os.open(made, os.O_RDONLY)
    _try_lock(lock)
    path = made.with_name(made.name.replace(f".{_NEW}-", f".{kind}-"))
    made.rename(path)
    return path, lock


def _try_lock(descriptor: int) -> bool:
    """Takes the lock; False when a living process holds it."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there, abandoned directories are left to the user
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _abandoned(final: Path, kind: str) -> Iterator[Path]:
    """Directories of this kind beside the target whose process is gone; locked while they are handled."""
    name = re.compile(rf"\.{re.escape(final.name)}\.{kind}-[a-z0-9_]{{8}}")
    for left in sorted(final.parent.glob(f".{glob.escape(final.name)}.{kind}-*")):
        if not name.fullmatch(left.name) or left.is_symlink():
            continue
        try:
            descriptor = os.open(left, os.O_RDONLY)
        except OSError:
            continue
        try:
            if _try_lock(descriptor):
                yield left
        finally:
            os.close(descriptor)


def _remove_abandoned(final: Path) -> None:
    for left in _abandoned(final, _PARTIAL):
        shutil.rmtree(left, ignore_errors=True)


def _restore_set_aside(final: Path) -> None:
    """Undoes, or finishes, a replacement that was killed between its two renames."""
    for aside in _abandoned(final, _OLD):
        if (aside / _CONTENT).is_dir() and not final.exists():
            (aside / _CONTENT).rename(final)
        shutil.rmtree(aside, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Flushes a directory's entries to disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, beside `path`; it takes that name, and the place of what is there, at the end.

    An error within leaves what was there. Missing directories above it are made. Raises StorageError.
    """
    with write_errors(path):
        made_parents = _make_parents(path.absolute().parent)
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            made = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                made.chmod(0o666 & ~_umask())  # mkstemp's are private
                made.replace(path)
            except BaseException:
                made.unlink(missing_ok=True)
                raise
        finally:
            _remove_empty(made_parents)


def write_file_atomically(path: Path, content: str) -> None:
    """Writes a small text file whole or not at all."""
    encoded = content.encode("utf-8")
    with whole_file(path) as file:
        file.write(encoded)
