"""An output directory appears under its name only when it is whole.

Work goes into a hidden directory beside the target (same file system, so that the last step is a
rename). Whatever happens before that rename, an error, Ctrl-C, kill -9, leaves nothing under the
target's name and the old content, if any, untouched.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from qexport.errors import OutputExistsError, StorageError
from qexport.sizes import format_size

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCK = ".lock"


@contextlib.contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turns the operating system's refusals into one clear line about `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"no space left while writing {target}",
                expected="nothing was written under that name",
                remedy="free some space, or choose another place with -o",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"no permission to write {error.filename or target}",
                remedy="choose another place with -o",
            ) from error
        if error.errno is None:
            raise
        raise StorageError(f"cannot write {target}: {error.strerror}") from error


class StagedDirectory:
    """`with StagedDirectory(target) as staged:` write into `staged.path`, then `staged.commit()`.

    Raises OutputExistsError when the target is there already and must not, or may not, be replaced.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()) -> None:
        self.target = target
        with storage_errors(target):
            parent = target.absolute().parent
            parent.mkdir(parents=True, exist_ok=True)
            _restore_set_aside(target)
            _check_target(target, overwrite, sources)
            _remove_abandoned(target)
            prefix = f".{target.name}.partial-"
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            _try_lock(self._lock)

    def __enter__(self) -> StagedDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._lock)
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def require_space(self, size: int) -> None:
        """Raises StorageError now rather than after an hour, when `size` bytes do not fit."""
        free = shutil.disk_usage(self.path).free
        if size > free:
            raise StorageError(
                f"{self.target} needs {format_size(size)}, the disk has {format_size(free)} free",
                remedy="free some space, or choose another place with -o",
            )

    def commit(self) -> None:
        """Gives the directory its final name. The only step that a reader can see."""
        with storage_errors(self.target):
            (self.path / _LOCK).unlink()
            # mkdtemp made it private; the finished model is as readable as any new directory
            mask = os.umask(0)
            os.umask(mask)
            self.path.chmod(0o777 & ~mask)
            _sync(self.path)
            if self.target.exists():
                aside = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.old-", dir=self.path.parent))
                self.target.rename(aside / "content")
                try:
                    self.path.rename(self.target)
                except BaseException:
                    (aside / "content").rename(self.target)
                    raise
                finally:
                    if self.target.exists():
                        shutil.rmtree(aside, ignore_errors=True)
            else:
                self.path.rename(self.target)
            _sync(self.path.parent)


def _check_target(target: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    resolved = target.resolve()
    for source in sources:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputExistsError(
                f"the output {target} is or holds the input {source}",
                remedy="choose another place with -o",
            )
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise OutputExistsError(
            f"{target} is there already and is no directory", remedy="choose another place with -o"
        )
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError(
            f"{target} is there already", remedy="add --overwrite, or choose another place with -o"
        )
    if target.is_symlink() or not any((target / name).is_file() for name in ("config.json", "qexport.json")):
        raise OutputExistsError(
            f"{target} is no model directory",
            expected="--overwrite replaces models only, lest something else be lost",
            remedy="choose another place with -o",
        )


def _try_lock(descriptor: int) -> bool:
    """Takes the lock that dies with its process; False when another process holds it."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there, abandoned directories are left to the user
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _siblings(target: Path, kind: str) -> list[Path]:
    return sorted(target.absolute().parent.glob(f".{glob.escape(target.name)}.{kind}-*"))


def _restore_set_aside(target: Path) -> None:
    """Undoes a replacement that was killed between its two renames."""
    for aside in _siblings(target, "old"):
        if not target.exists() and (aside / "content").is_dir():
            (aside / "content").rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Clears away what a killed run left beside the target: no living process holds its lock."""
    for left in _siblings(target, "partial"):
        try:
            descriptor = os.open(left / _LOCK, os.O_RDWR)
        except OSError:
            continue
        try:
            if _try_lock(descriptor):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)


def _sync(directory: Path) -> None:
    """Flushes a directory's entries to disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file_atomically(path: Path, content: str) -> None:
    """Writes a small text file whole or not at all."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
