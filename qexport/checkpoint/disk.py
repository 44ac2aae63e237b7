"""The operating system's refusals as one clear line each."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from qexport.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Within it, an OSError becomes a StorageError about writing `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"no space left while writing {target}",
                expected="nothing was written under that name",
                remedy="free some space, or choose another place with -o",
            ) from error
        if error.errno in _FORBIDDEN:
            raise StorageError(
                f"no permission to write {error.filename or target}",
                remedy="choose another place with -o",
            ) from error
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Within it, an OSError becomes a StorageError about reading `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def exists(path: Path) -> bool:
    """Whether something is there; a name that no file can have is not there either."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is not there either."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
