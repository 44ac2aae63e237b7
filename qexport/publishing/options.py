"""Whether what a user asks of a push fits the outputs that are, or will be, there."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qexport.errors import SpecError
from qexport.publishing.spec import PushSpec

_MAIN = "main"
# a name that both git and the Hub take for a branch
_BRANCH = re.compile(r"(?!.*(\.\.|--|\.lock$|\.$))[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def check_options(spec: PushSpec, models: Sequence[str]) -> None:
    """Raises SpecError for a push that cannot go as asked, once the outputs `models` lie in the directory.

    Needs no files: a recipe's push is checked with it before anything is made.
    """
    if unknown := [name for name in spec.variant if name not in models]:
        raise SpecError(f"there is no variant {unknown[0]!r}", expected=f"known are {', '.join(models)}")
    check_revision(spec)
    if spec.layout != "branches":
        return
    if spec.revision is not None:
        raise SpecError(
            "--revision with --layout branches", expected="each variant's name is its branch's name"
        )
    chosen = spec.variant or models
    if unfit := [name for name in chosen if name == _MAIN or not _BRANCH.fullmatch(name)]:
        raise SpecError(
            f"the variant {unfit[0]!r} has a name that a branch of its own cannot have",
            remedy="rename its directory, or take --layout subfolders",
        )


def check_revision(spec: PushSpec) -> None:
    """Raises SpecError for a revision that cannot be a branch."""
    if spec.revision is not None and not _BRANCH.fullmatch(spec.revision):
        raise SpecError(
            f"--revision {spec.revision!r} is no name that a branch can have",
            expected="letters, digits, '_', '-' and '.', 100 at most, without '..' and '--'",
        )
