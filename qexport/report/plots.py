"""The two pictures of a report, loss against bits and against size, as PNG and SVG by matplotlib."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qexport.errors import MissingDependencyError
from qexport.report.axes import (
    COSTS,
    Axis,
    Point,
    Scale,
    cost_scale,
    loss_scale,
    measured,
    points,
    size_unit,
)
from qexport.report.content import Report
from qexport.report.palette import INK, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INCHES = (8.0, 4.6)
_DPI = 160
_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same picture everywhere
    "font.size": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "qexport",  # ids in the SVG come from this instead of from a random number
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a variant's name is no formula
}


def plots(report: Report) -> dict[str, bytes]:
    """`loss_vs_bits` and `loss_vs_size` as .png and .svg; the same bytes for the same report.

    What is drawn is the first measure that the report has, the rise of perplexity as a rule, on a white
    ground. Raises MissingDependencyError without matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is not installed, which draws the plots", remedy="pip install 'qexport[report]'"
        ) from error
    files = {}
    with mpl.rc_context():
        mpl.rcdefaults()  # the user's own settings must not change the picture
        for name, value in _SETTINGS.items():
            mpl.rcParams[name] = value  # type: ignore[index,unused-ignore]
        for cost in COSTS:
            figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
            FigureCanvasAgg(figure)
            _draw(figure, report, measured(report)[0], cost)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, metadata=metadata)
                files[f"loss_vs_{cost}.{kind}"] = buffer.getvalue()
    return files


def _draw(figure: Figure, report: Report, axis: Axis, cost: str) -> None:
    drawn = points(report, axis)
    unit, divisor = size_unit(report.rows) if cost == "size" else ("bits a weight", 1.0)
    places = [(COSTS[cost](point.row) / divisor, point) for point in drawn]
    across, up = cost_scale([x for x, _ in places], cost), loss_scale(drawn, axis)
    ink, muted, line = (INK[name][0] for name in ("ink", "muted", "line"))
    plane = figure.add_subplot()
    _scaled(plane, "x", across)
    _scaled(plane, "y", up)
    plane.grid(color=line, linewidth=0.7)
    plane.set_axisbelow(True)
    plane.spines[:].set_color(line)
    plane.tick_params(colors=muted, length=0)
    plane.set_xlabel("Bits a weight" if cost == "bits" else f"Size ({unit})", color=ink)
    plane.set_ylabel(axis.title, color=ink)
    front = sorted((x, point.value) for x, point in places if point.front[cost])
    plane.step(
        [x for x, _ in front], [y for _, y in front], where="post", color=muted, linewidth=1.2,
        linestyle=(0, (4, 3)), zorder=2, label="Pareto front",
    )  # fmt: skip
    for method, style in styles(row.method for row in report.rows).items():
        own = [(x, point) for x, point in places if point.row.method == method]
        if not own:
            continue
        for x, point in own:
            if point.high > point.low:
                plane.vlines(x, point.low, point.high, color=style.colours[0], linewidth=1.3, zorder=3)
        plane.scatter(
            [x for x, _ in own], [point.value for _, point in own],
            s=110 if method == "none" else 52, marker=style.marker, color=style.colours[0],
            edgecolors="white", linewidths=0.8, zorder=4,
            label="full precision" if method == "none" else _readable(method),
        )  # fmt: skip
    _name(plane, places, across, up, cost)
    better = "lower" if axis.better == "lower" else "higher"
    plane.set_title(
        f"{axis.label} against {'bits' if cost == 'bits' else 'size'}; {better} and further left is better",
        loc="left", fontsize=10, color=ink,
    )  # fmt: skip
    plane.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=ink, fontsize=9,
        borderaxespad=0,
    )  # fmt: skip


def _scaled(plane: Axes, which: str, scale: Scale) -> None:
    import numpy as np

    def forward(values: Any) -> Any:
        if scale.kind == "symlog":
            return np.sign(values) * np.log1p(np.abs(values) / scale.constant)
        # matplotlib asks about places outside of the axis too
        return np.log(np.maximum(values, 1e-12)) if scale.kind == "log" else values

    def back(values: Any) -> Any:
        if scale.kind == "symlog":
            return np.sign(values) * scale.constant * np.expm1(np.abs(values))
        return np.exp(values) if scale.kind == "log" else values

    set_scale, set_limits, set_ticks = (
        getattr(plane, f"set_{which}{what}") for what in ("scale", "lim", "ticks")
    )
    set_scale("function", functions=(forward, back))
    set_limits(*scale.domain)
    set_ticks(scale.ticks, labels=[f"{tick:g}".replace("-", "−") for tick in scale.ticks])


def _name(plane: Axes, places: list[tuple[float, Point]], across: Scale, up: Scale, cost: str) -> None:
    """The names of the points, where one does not lie on another: first full precision and the front."""

    def unit(value: float, scale: Scale) -> float:
        start, end = (scale.forward(edge) for edge in scale.domain)
        return (scale.forward(value) - start) / (end - start)

    spots = [(unit(x, across), unit(point.value, up)) for x, point in places]
    # a label's width in shares of the axis: about 0.0115 a letter at this size and font
    taken = [(u - 0.012, v - 0.02, u + 0.012, v + 0.02) for u, v in spots]
    order = sorted(zip(places, spots, strict=True), key=lambda item: (not item[0][1].front[cost], item[1][0]))
    for (_, point), (u, v) in order:
        text = _readable(point.row.variant)
        width, height = 0.0118 * len(text), 0.042
        for du, dv, side in ((0.014, 0.030, "left"), (-0.014, 0.030, "right"),
                             (0.014, -0.030, "left"), (-0.014, -0.030, "right")):  # fmt: skip
            left = u + du - (width if side == "right" else 0)
            box = (left, v + dv - height / 2, left + width, v + dv + height / 2)
            if box[0] >= 0 and box[2] <= 1 and box[1] >= 0 and box[3] <= 1 and _free(box, taken):
                plane.text(
                    u + du, v + dv, text, transform=plane.transAxes, ha=side, va="center", fontsize=8,
                    color=INK["ink" if point.front[cost] or point.row.is_full else "muted"][0], zorder=5,
                )  # fmt: skip
                taken.append(box)
                break


def _free(box: Sequence[float], taken: Iterable[Sequence[float]]) -> bool:
    return all(
        box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
        for other in taken
    )


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that the font has."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _readable(text: str) -> str:
    """A name as the picture can show it: in characters that the font has, and not long."""
    shown = "".join(letter if letter.isprintable() and ord(letter) in _glyphs() else "?" for letter in text)
    return shown if len(shown) <= 28 else f"{shown[:27]}…"
