"""What a chart can show: the measures, each row's value with its 95 % bars, and scales that fit them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qexport.report.content import Interval, Measure, Report, Row, Z
from qexport.report.pareto import pareto_front

Triple = tuple[float, float, float]  # value, low, high
_MOST = 1e100  # what a broken model's numbers may exceed; scales do not bear the products


@dataclass(frozen=True)
class Axis:
    """A measure to draw: its words, its unit, which way is better, and a row's (value, low, high)."""

    key: str
    label: str
    unit: str
    better: Literal["lower", "higher"]
    of: Callable[[Row], Triple | None]

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class Point:
    """A row on a chart; `front` tells for each of the costs whether it is on the Pareto front."""

    row: Row
    value: float
    low: float
    high: float
    front: dict[str, bool]


@dataclass(frozen=True)
class Scale:
    """An axis with its ticks. 'symlog' is sign(v) log(1 + |v| / constant): it has room for 0 and below."""

    kind: Literal["linear", "symlog", "log"]
    constant: float
    domain: tuple[float, float]
    ticks: tuple[float, ...]

    def forward(self, value: float) -> float:
        """Where `value` lies, in units that are drawn evenly."""
        if self.kind == "log":
            return math.log(value)
        if self.kind == "linear":
            return value
        return math.copysign(math.log1p(abs(value) / self.constant), value)


def bars(measure: Measure | None, factor: float = 1.0) -> Triple | None:
    """A measure and its 95 % interval, times `factor`; no bars where the error is unknown."""
    if measure is None or not abs(measure.value) < _MOST:
        return None
    error = Z * (measure.standard_error or 0.0)
    error = error if error < _MOST else 0.0
    return factor * measure.value, factor * (measure.value - error), factor * (measure.value + error)


def _itself(row: Row, found: Triple | None, best: float) -> Triple | None:
    """The full model's distance to itself need not be measured."""
    return (best, best, best) if found is None and row.is_full else found


def _other_top(row: Row) -> Triple | None:
    found = bars(row.same_top, 100.0)
    turned = None if found is None else (100 - found[0], 100 - found[2], 100 - found[1])
    return _itself(row, turned, 0.0)


def _text(whose: str, score: str) -> Callable[[Row], Triple | None]:
    def of(row: Row) -> Triple | None:
        scores = getattr(row, whose)
        interval: Interval | None = None if scores is None else getattr(scores, score)
        found = None if interval is None else (interval.value, interval.low, interval.high)
        return _itself(row, found, 100.0) if whose == "text_full" else found

    return of


AXES = (
    Axis("loss", "Rise of perplexity", "%", "lower", lambda row: _itself(row, bars(row.loss, 100.0), 0.0)),
    Axis("kl", "KL divergence to full", "nats a token", "lower", lambda row: _itself(row, bars(row.kl), 0.0)),
    Axis("other_top", "Other most likely token than full", "% of tokens", "lower", _other_top),
    Axis("bleu_full", "BLEU against the full model’s answers", "", "higher", _text("text_full", "bleu")),
    Axis("chrf_full", "chrF against the full model’s answers", "", "higher", _text("text_full", "chrf")),
    Axis("bleu", "BLEU against the references", "", "higher", _text("text", "bleu")),
    Axis("chrf", "chrF against the references", "", "higher", _text("text", "chrf")),
    Axis("perplexity", "Perplexity", "", "lower", lambda row: bars(row.perplexity)),
)
COSTS: dict[str, Callable[[Row], float]] = {
    "bits": lambda row: row.bits_per_weight,
    "size": lambda row: float(row.size_bytes),
}


def measured(report: Report) -> list[Axis]:
    """The measures that some variant has, the usual one first; of a report without one, perplexity.

    Where divergences are lower bounds, their axis says so.
    """
    rows = [row for row in report.rows if not row.is_full]
    found = [axis for axis in AXES if any(axis.of(row) for row in rows)]
    if any(row.kl_at_least for row in rows):
        found = [
            replace(axis, label=f"{axis.label}, at least") if axis.key == "kl" else axis for axis in found
        ]
    return found or [axis for axis in AXES if axis.key == "perplexity"]


def points(report: Report, axis: Axis) -> list[Point]:
    """The rows that have the measure, in the report's order."""
    found = [(row, triple) for row in report.rows if (triple := axis.of(row)) is not None]
    sign = 1 if axis.better == "lower" else -1
    fronts = {
        name: set(pareto_front([cost(row) for row, _ in found], [sign * triple[0] for _, triple in found]))
        for name, cost in COSTS.items()
    }
    return [
        Point(row, *triple, front={name: index in front for name, front in fronts.items()})
        for index, (row, triple) in enumerate(found)
    ]


_ROOM = 0.06  # free at either end, as a share of what is drawn
_SPREAD = 20.0  # from this ratio of largest to smallest value on, a linear scale hides the small ones


def loss_scale(drawn: Sequence[Point], axis: Axis) -> Scale:
    """A scale for the measure: symmetric-logarithmic where values span more than a decade."""
    values = [point.value for point in drawn]
    lows, highs = [point.low for point in drawn], [point.high for point in drawn]
    low, high = min(lows, default=0.0), max(highs, default=1.0)
    if axis.better == "lower" and axis.key != "perplexity":
        low = min(low, 0.0)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    positive = [value for value in values if value > 0]
    spread = axis.better == "lower" and bool(positive) and max(positive) / min(positive) > _SPREAD
    # not below a thousandth of the largest: what lies there is noise, and it would fill the chart
    constant = max(min(positive), max(positive) / 1000) if spread else 1.0
    kind: Literal["linear", "symlog"] = "symlog" if spread else "linear"
    plain = Scale(kind, constant, (low, high), ())
    start, end = plain.forward(low), plain.forward(high)
    room = _ROOM * (end - start)
    domain = (_back(plain, start - room), _back(plain, end + room))
    ticks = _decades(domain, constant) if spread else _even(domain)
    return Scale(kind, constant, domain, _thinned(plain, domain, ticks) if spread else tuple(ticks))


def _back(scale: Scale, place: float) -> float:
    if scale.kind == "linear":
        return place
    return math.copysign(scale.constant * math.expm1(abs(place)), place)


def _decades(domain: tuple[float, float], constant: float) -> list[float]:
    """0, then 1 and 3 times the powers of ten: the most important first."""
    top = max(abs(domain[0]), abs(domain[1]), constant)
    powers = range(math.floor(math.log10(constant)), math.ceil(math.log10(top)) + 1)
    ones = [float(f"1e{power}") for power in powers]
    sides = [ones, [-one for one in ones], [float(f"3e{power}") for power in powers]]
    return [0.0, *(tick for side in sides for tick in side if domain[0] <= tick <= domain[1])]


def _even(domain: tuple[float, float], count: int = 6) -> list[float]:
    """About `count` round numbers: 1, 2 or 5 times a power of ten apart."""
    raw = (domain[1] - domain[0]) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.ceil(domain[0] / step), math.floor(domain[1] / step)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _thinned(
    scale: Scale, domain: tuple[float, float], ticks: Sequence[float], share: float = 0.09
) -> tuple[float, ...]:
    """The ticks that stand at least `share` of the axis apart; the earlier ones go first."""
    length = scale.forward(domain[1]) - scale.forward(domain[0])
    kept: list[float] = []
    for tick in ticks:
        if all(abs(scale.forward(tick) - scale.forward(other)) >= share * length for other in kept):
            kept.append(tick)
    return tuple(sorted(kept))


_BITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 3.0, 6.0, 5.0, 12.0, 24.0, 1.5, 2.5, 4.5, 3.5, 7.0)
_FACTORS = (1.0, 2.0, 5.0, 3.0, 1.5, 7.0, 4.0, 2.5, 6.0, 8.0, 9.0)


def cost_scale(values: Sequence[float], cost: str) -> Scale:
    """A logarithmic scale for bits a weight, or for sizes in whatever unit `values` are."""
    low, high = min(values, default=1.0), max(values, default=2.0)
    low = max(low, high / 1e6, 1e-9)
    room = max(math.log(high / low) * 0.05, math.log(1.06))
    domain = (low * math.exp(-room), high * math.exp(room))
    plain = Scale("log", 1.0, domain, ())
    if cost == "bits":
        ticks: Sequence[float] = _BITS
    else:
        powers = range(math.floor(math.log10(domain[0])), math.ceil(math.log10(domain[1])) + 1)
        ticks = [float(f"{factor * 10.0**power:.6g}") for factor in _FACTORS for power in powers]
    inside = [tick for tick in ticks if domain[0] <= tick <= domain[1]]
    return Scale("log", 1.0, domain, _thinned(plain, domain, inside, 0.1))


def size_unit(rows: Sequence[Row]) -> tuple[str, float]:
    """The unit that the largest row is told in, and its bytes."""
    largest = max((row.size_bytes for row in rows), default=1)
    for name, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if largest >= size:
            return name, size
    return "B", 1.0
