"""Which layers take part, and with how many bits: the user's patterns over the model's names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qexport.errors import SpecError

FULL = 16  # an override to this many bits leaves the layer as it is


@dataclass(frozen=True)
class Override:
    """Other bits for the layers that `pattern` matches; `group_size` None keeps the common one."""

    pattern: str
    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        group = "" if self.group_size is None else f":{self.group_size}"
        return f"{self.pattern}={self.bits}{group}"


def parse_override(text: str) -> Override:
    """'PATTERN=BITS' or 'PATTERN=BITS:GROUP_SIZE'. Raises SpecError for anything else."""
    pattern, found, value = text.rpartition("=")
    bits, colon, group = value.partition(":")
    if (
        not (found and pattern and _is_whole(bits))
        or (colon and not _is_whole(group))
        or int(bits) not in (*range(1, 9), FULL)
    ):
        raise SpecError(
            f"--override {text!r}",
            expected=f"'PATTERN=BITS' or 'PATTERN=BITS:GROUP_SIZE', bits 1 to 8, or {FULL} to keep the layer",
            remedy="for example 'model.layers.0.*=8'",
        )
    return Override(pattern, int(bits), int(group) if colon else None)


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """The names that a pattern with *, ? and [...] matches as a whole, or as a module that holds them."""
    return [
        name
        for name in names
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
    ]


def require_match(option: str, text: str, pattern: str, names: Collection[str]) -> list[str]:
    """The names that a pattern of an option matches. SpecError with the nearest name when it matches none."""
    found = matching(pattern, names)
    if not found:
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
        raise SpecError(
            f"{option} {text!r} matches no layer of the model",
            expected=f"names such as {near[0] if near else next(iter(names), 'none')}",
        )
    return found


def chosen_bits(names: Sequence[str], overrides: Sequence[str]) -> dict[str, Override]:
    """The override that counts for each layer that any of them matches: the last one.

    Raises SpecError for a text that is no override, and for one that matches nothing.
    """
    chosen: dict[str, Override] = {}
    known = set(names)
    for text in overrides:
        override = parse_override(text)
        if override.pattern in known:  # a plan names every layer: thousands, where there are experts
            chosen[override.pattern] = override
            continue
        for name in require_match("--override", text, override.pattern, names):
            chosen[name] = override
    return chosen


def skipped(names: Sequence[str], patterns: Sequence[str], optional: Collection[str]) -> set[str]:
    """The layers that the patterns leave out. SpecError for one that matches nothing.

    `optional` are layers that stay as they are unless they are asked for: naming one is no mistake.
    """
    left: set[str] = set()
    for pattern in patterns:
        if matching(pattern, optional):
            left.update(matching(pattern, names))
        else:
            left.update(require_match("--skip", pattern, pattern, names))
    return left
