"""The page's two matrices: layers by variants (errors), and variants by variants (more than noise?)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qexport.report.columns import decimals
from qexport.report.content import Comparison, Layers, Z
from qexport.report.palette import LEVELS


@dataclass(frozen=True)
class HeatCell:
    """A matrix's error in per cent as text, and its shade, 0 to LEVELS - 1; None where it has none."""

    text: str | None
    level: int | None


@dataclass(frozen=True)
class HeatRow:
    """A matrix: its name, the part of it that tells it from the others, and a cell a variant."""

    name: str
    short: str
    cells: tuple[HeatCell, ...]


@dataclass(frozen=True)
class HeatMap:
    """`edges` are the LEVELS + 1 borders of the shades in per cent, evenly apart on a logarithmic scale."""

    variants: tuple[str, ...]
    rows: tuple[HeatRow, ...]
    edges: tuple[str, ...]
    worst: tuple[str, str, str] | None  # matrix, variant, per cent


def heat_map(layers: Layers, variants: Sequence[str]) -> HeatMap | None:
    """The errors of `variants` in their order, of those that have any; None where nothing was recorded."""
    shown = tuple(variant for variant in variants if variant in layers.errors)
    values = [
        (value, layers.names[index], variant)
        for variant in shown
        for index, value in enumerate(layers.errors[variant])
        if value is not None and math.isfinite(value)
    ]
    if not values:
        return None
    largest = max(values)
    # four decades at most: what is smaller is exact for all that can be seen
    low = max(min((value for value, _, _ in values if value > 0), default=1e-4), largest[0] / 1e4, 1e-9)
    high = max(largest[0], low * 1.01)
    step = math.log(high / low) / LEVELS

    def cell(value: float | None) -> HeatCell:
        if value is None or not math.isfinite(value):
            return HeatCell(None, None)
        level = 0 if value <= low else min(int(math.log(value / low) / step), LEVELS - 1)
        return HeatCell(percent(value), level)

    shorts = _without_what_all_share(layers.names)
    rows = tuple(
        HeatRow(name, short, tuple(cell(layers.errors[variant][index]) for variant in shown))
        for index, (name, short) in enumerate(zip(layers.names, shorts, strict=True))
    )
    edges = tuple(percent(low * math.exp(step * number)) for number in range(LEVELS + 1))
    return HeatMap(shown, rows, edges, (largest[1], largest[2], percent(largest[0])))


def percent(value: float) -> str:
    """A share in per cent with two digits at least: 0.42, 8.1, 34."""
    value *= 100
    return (
        f"{value:.0f}"
        if value >= 10
        else f"{value:.1f}"
        if value >= 1
        else f"{value:.2f}"
        if value >= 0.1
        else f"{value:.2g}"
    )


def _without_what_all_share(names: Sequence[str]) -> list[str]:
    """The names without common beginnings and ends, cut at dots: 0.self_attn.q_proj."""
    if len(names) < 2:
        return list(names)
    parts = [name.split(".") for name in names]
    ahead, behind = _shared(parts), _shared([part[::-1] for part in parts])
    if any(len(part) <= ahead + behind for part in parts):
        return list(names)
    return [".".join(part[ahead : len(part) - behind]) for part in parts]


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """How many first items all the lists have in common."""
    count = 0
    for items in zip(*lists, strict=False):
        if len(set(items)) > 1:
            break
        count += 1
    return count


@dataclass(frozen=True)
class PairCell:
    """The row's variant against the column's: what it comes to, its number, and the whole in a sentence."""

    kind: Literal["better", "worse", "tie"]
    text: str
    sentence: str


@dataclass(frozen=True)
class PairMatrix:
    """All comparisons of one measure; `cells[i][j]` is None on the diagonal and where none was made."""

    measure: str
    heading: str
    variants: tuple[str, ...]
    cells: tuple[tuple[PairCell | None, ...], ...]


_HEADINGS = {"log perplexity": "Perplexity", "kl": "KL divergence to full"}


def pair_matrices(comparisons: Sequence[Comparison], variants: Sequence[str]) -> list[PairMatrix]:
    """A matrix a measure, in the order in which the measures come; variants in theirs."""
    matrices = []
    for measure in dict.fromkeys(pair.measure for pair in comparisons):
        found: dict[tuple[str, str], PairCell] = {}
        for pair in comparisons:
            if pair.measure == measure:
                found[pair.second, pair.first] = _pair_cell(pair, 1)
                found[pair.first, pair.second] = _pair_cell(pair, -1)
        named = {name for names in found for name in names}
        shown = tuple(variant for variant in variants if variant in named)
        cells = tuple(tuple(found.get((row, column)) for column in shown) for row in shown)
        matrices.append(PairMatrix(measure, _HEADINGS.get(measure, measure), shown, cells))
    return matrices


def _pair_cell(pair: Comparison, sign: int) -> PairCell:
    """The cell of the second variant's row (sign 1), or of the first one's (-1)."""
    row, column = (pair.second, pair.first)[::sign]
    difference = sign * pair.difference
    error = None if pair.standard_error is None else Z * pair.standard_error
    if pair.measure == "log perplexity":
        # a difference of logarithms is a ratio: told as per cent of perplexity
        text = f"{100 * math.expm1(min(difference, 20.0)):+.1f} %"
        noise = "" if error is None else f", ±{100 * error:.1f}"
        what = "perplexity"
    else:
        digits = decimals(difference, 4)
        text = f"{difference:+.{digits}f}"
        noise = "" if error is None else f", ±{error:.{digits}f}"
        what = "KL divergence" if pair.measure == "kl" else pair.measure
    text = text.replace("-", "−")
    unit = " nats a token" if pair.measure == "kl" else ""
    if not pair.more_than_noise:
        why = "its noise is not known" if error is None else "within noise: a tie"
        return PairCell("tie", text, f"{row} against {column}: {what} {text}{unit}{noise}; {why}")
    kind: Literal["better", "worse"] = "better" if difference < 0 else "worse"
    return PairCell(kind, text, f"{row} against {column}: {what} {text}{unit}{noise}; {kind}, beyond noise")
