"""`NAME:WEIGHT`, as people write it of adapters and of calibration texts."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from qexport.checkpoint.disk import exists
from qexport.errors import InputError


def split_weighted(
    source: str, error: type[InputError], words: Collection[str] = ()
) -> tuple[str, float | None]:
    """`A:0.7` as A and 0.7. A name that exists with its colon is taken as it stands.

    A tail that is no number is part of the name, unless what stands before it exists or is one of `words`.
    Raises `error` then, and for a number that is not finite.
    """
    name, colon, tail = source.rpartition(":")
    if not colon or not name or exists(Path(source)):
        return source, None
    try:
        weight = float(tail)
    except ValueError:
        if name in words or exists(Path(name)):
            raise error(f"the weight of {name} is {tail!r}", expected="a number, as in A:0.7") from None
        return source, None
    if not abs(weight) < float("inf"):
        raise error(f"the weight of {name} is {tail}", expected="a finite number, as in A:0.7")
    return name, weight
