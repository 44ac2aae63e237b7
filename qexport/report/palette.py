"""The colours and shapes of the page and the plots: told apart without colour vision, in light and dark.

The hues of the methods follow M. Okabe and K. Ito, "Color Universal Design" (2008), darkened until they
stand 3 : 1 on white and lightened until they do on the dark ground (WCAG 2.2, 1.4.11); each method has a
shape of its own too. Text stands at 4.5 : 1 or better (1.4.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# name -> light, dark; `_text` colours are read on `_fill` colours of the same name
INK = {
    "ground": ("#ffffff", "#12161b"),
    "raised": ("#f5f6f8", "#1b2128"),
    "line": ("#d5dae0", "#353d47"),
    "edge": ("#7b8591", "#7b8591"),  # the border of what can be operated
    "ink": ("#1a1f26", "#e8ebee"),
    "muted": ("#545e6a", "#a3adb8"),
    "accent": ("#0a5aa8", "#7cbcff"),
    "better_fill": ("#dcebf9", "#17395a"),
    "better_text": ("#0b3f75", "#cfe5ff"),
    "worse_fill": ("#fde6d3", "#55300f"),
    "worse_text": ("#7a3600", "#ffdcbd"),
    "fail_fill": ("#fbe3e1", "#551f1d"),
    "fail_text": ("#8f1d15", "#ffd3cf"),
}
FULL = ("#1a1f26", "#e8ebee")
_METHODS = (
    ("#0072b2", "#5ab4ec"),
    ("#d05400", "#ff9148"),
    ("#00845f", "#35c9a0"),
    ("#a8487f", "#ea9cc8"),
    ("#8a6a00", "#e8c54a"),
    ("#5d4bb3", "#b3a5ff"),
    ("#7a4b2a", "#cfa07d"),
    ("#56606b", "#b6bfc9"),
)
# (SVG path in the square from -1 to 1, matplotlib's marker)
_SHAPES = (
    ("M0-.9A.9.9 0 1 1 0 .9A.9.9 0 1 1 0-.9Z", "o"),
    ("M-.8-.8H.8V.8H-.8Z", "s"),
    ("M0-1L.95.75H-.95Z", "^"),
    ("M0-1L1 0L0 1L-1 0Z", "D"),
    ("M0 1L.95-.75H-.95Z", "v"),
    ("M-.35-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z", "P"),
    ("M0-1L.95-.31L.59.81H-.59L-.95-.31Z", "p"),
    ("M-1 0L.75-.95V.95Z", "<"),
)
_FULL_SHAPE = ("M0-1L.26-.36L.95-.31L.42.14L.59.81L0 .44L-.59.81L-.42.14L-.95-.31L-.26-.36Z", "*")


@dataclass(frozen=True)
class Style:
    """How a method's points look: (light, dark), an SVG path in the square from -1 to 1, a marker."""

    method: str
    colours: tuple[str, str]
    path: str
    marker: str


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style for each method in its order; 'none', full precision, is a star in the colour of text.

    Past eight methods colours repeat with another shape.
    """
    found: dict[str, Style] = {}
    for method in methods:
        if method == "none":
            found[method] = Style(method, FULL, *_FULL_SHAPE)
        elif method not in found:
            count = len(found) - ("none" in found)
            turn, place = divmod(count, len(_METHODS))
            found[method] = Style(method, _METHODS[place], *_SHAPES[(place + 3 * turn) % len(_SHAPES)])
    return found


_RAMPS = (("#eef3f9", "#6fa6d8", "#0a3a78"), ("#1d2631", "#2f74b5", "#d8ebff"))  # least, middle, most
LEVELS = 8


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two #rrggbb colours, 1 to 21 (WCAG 2.2, "contrast ratio")."""
    one, two = sorted((_luminance(first), _luminance(second)))
    return (two + 0.05) / (one + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ramp(dark: bool) -> list[tuple[str, str]]:
    """(background, text) of the heat map's LEVELS, least first; the text is what stands out more."""
    low, middle, high = _RAMPS[dark]
    levels = []
    for level in range(LEVELS):
        at = 2 * level / (LEVELS - 1)
        ground = _mixed(low, middle, at) if at <= 1 else _mixed(middle, high, at - 1)
        levels.append((ground, max(("#000000", "#ffffff"), key=lambda text: contrast(text, ground))))
    return levels


def _mixed(first: str, second: str, share: float) -> str:
    mixed = (
        round((1 - share) * int(first[place : place + 2], 16) + share * int(second[place : place + 2], 16))
        for place in (1, 3, 5)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)
