"""Sizes and shares as people write them: `5GB`, `500MB`, `2GiB`, `8%`."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes of `text`; decimal units as on the Hub (5GB = 5e9), binary ones as GiB.

    Raises ValueError on anything that is not a positive size.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ValueError(f"a size is a number with a unit such as 5GB or 500MB, not {text!r}")
    match = _SIZE.fullmatch(str(text))
    unit = match.group(2).upper() if match else "?"
    if unit and not unit.endswith("B"):
        unit += "B"
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it as 5GB, 500MB or 2GiB")
    size = int(Fraction(match.group(1)) * _UNITS[unit])
    if size <= 0:
        raise ValueError(f"a size must be positive, not {text!r}")
    if size >= 1 << 63:
        raise ValueError("a size of more than 2^63 bytes is none")
    return size


def format_size(size: float) -> str:
    """`size` bytes in decimal units, three significant digits: 3.09 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if abs(size) < 999.5 else f"{size:.0f} TB"


def format_share(share: float) -> str:
    """`share` in per cent, as many digits as tell: 3%, 0.0001%, 12.35%."""
    percent = 100 * share
    return f"{percent:.4g}%" if abs(percent) < 9999.5 else f"{percent:.0f}%"


def parse_share(text: str | float) -> float:
    """A share as a fraction: `8%` and `0.08` are both 0.08.

    Raises ValueError on anything else, and on a bare number of 1 or more, which is ambiguous.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        share = float(text)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(text))
        if match is None:
            raise ValueError(f"{text!r} is not a share; write it as 8% or 0.08")
        if match.group(2):
            return float(match.group(1)) / 100
        share = float(match.group(1))
    if not 0 <= share < 1:
        raise ValueError(f"{text!r} is ambiguous; write a share with its sign, as in 8%")
    return share
