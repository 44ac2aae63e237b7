"""The report as one self-contained HTML file.

Charts are drawn in the browser by Vega (BSD-3-Clause), whose minified code vl-convert-python carries and
which becomes part of the file: 0.9 MB, a fifth of plotly's, and it draws SVG with ARIA roles and labels.
Everything else is plain HTML that works without scripts. The page asks nothing of any network, and its
content security policy lets none through; it runs the very scripts that are hashed there and no others,
so that a text that slipped through the escaping still would not run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qexport.errors import MissingDependencyError
from qexport.report.axes import COSTS, Axis, Point, cost_scale, loss_scale, measured, points, size_unit
from qexport.report.columns import columns, number, said
from qexport.report.content import Report
from qexport.report.differences import sample_view
from qexport.report.matrices import heat_map, pair_matrices
from qexport.report.palette import INK, Style, ramp, styles
from qexport.results import plain
from qexport.sizes import format_size

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_SAMPLES = 40  # more than anyone reads; report.json has them all


def page(report: Report) -> str:
    """The HTML of `report`, which any browser opens from a file; all texts in it are escaped.

    Raises MissingDependencyError without vl-convert-python.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from jinja2.utils import htmlsafe_json_dumps
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("qexport.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    scripts = [_vega(), *(_source(environment, name) for name in ("charts.js", "page.js"))]
    looks = styles(row.method for row in report.rows)
    style = environment.get_template("page.css").render(
        ink=INK, looks=list(looks.values()), ramps=(ramp(dark=False), ramp(dark=True))
    )
    full = next((row for row in report.rows if row.is_full), None)
    variants = [row.variant for row in report.rows]
    axes = measured(report)
    html = environment.get_template("page.html.jinja").render(
        report=report,
        full=full,
        facts=_facts(report),
        axes=axes,
        looks=looks,
        places={method: place for place, method in enumerate(looks)},
        columns=columns(report),
        failing=any(row.failures for row in report.rows),
        bounds=any(row.kl_at_least for row in report.rows),
        heat=heat_map(report.layers, variants),
        pairs=pair_matrices(report.comparisons, variants),
        samples=[
            sample_view(sample, full.variant if full else None, variants)
            for sample in report.samples[:MOST_SAMPLES]
        ],
        most_samples=MOST_SAMPLES,
        recipes={name: _flat(recipe) for name, recipe in report.recipes.items()},
        data=htmlsafe_json_dumps(plain(_chart_data(report, axes, looks)), dumps=_compact),
        style=Markup(style),  # noqa: S704 (our own templates, in which no text of the report stands)
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        policy=_policy(scripts),
    )
    # half surrogates, which a model's answer may hold, have no UTF-8
    return html.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _vega() -> str:
    """Vega and vega-embed as one script; reading it takes about two seconds."""
    try:
        import vl_convert
    except ImportError as error:
        raise MissingDependencyError(
            "vl-convert-python is not installed, which has the page's charts",
            remedy="pip install 'qexport[report]'",
        ) from error
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")


def _unbroken(text: str) -> str:
    """`text` in which no line ends before a per cent sign or an error."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace(" ±", "\N{NO-BREAK SPACE}±")


def _source(environment: Environment, name: str) -> str:
    """A script as it stands: jinja's braces mean other things in JavaScript."""
    loader = environment.loader
    return loader.get_source(environment, name)[0] if loader else ""


def _compact(data: Any, **options: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False, **options)


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy that admits these scripts and nothing from outside of the file."""
    hashes = (
        base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode() for script in scripts
    )
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _chart_data(report: Report, axes: list[Axis], looks: dict[str, Style]) -> dict[str, Any]:
    """What charts.js draws: per measure its points and scale; names, fronts and places of each point."""
    unit, divisor = size_unit(report.rows)
    divisors = {"bits": 1.0, "size": divisor}
    titles = {"bits": "Bits a weight", "size": f"Size ({unit})"}
    across = {
        name: cost_scale([cost(row) / divisors[name] for row in report.rows], name)
        for name, cost in COSTS.items()
    }
    return {
        "costs": [
            {"key": name, "title": titles[name], "domain": scale.domain, "ticks": scale.ticks}
            for name, scale in across.items()
        ],
        "looks": [
            {"method": look.method, "colour": f"var(--method{place})", "path": look.path}
            for place, look in enumerate(looks.values())
        ],
        "measures": [_measure_data(report, axis, divisors) for axis in axes],
    }


def _measure_data(report: Report, axis: Axis, divisors: dict[str, float]) -> dict[str, Any]:
    drawn = points(report, axis)
    scale = loss_scale(drawn, axis)
    return {
        "key": axis.key,
        "title": axis.title,
        "label": axis.label,
        "better": axis.better,
        "scale": {"type": scale.kind, "constant": scale.constant, "domain": scale.domain},
        "ticks": scale.ticks,
        "points": [
            {
                "variant": point.row.variant,
                "method": point.row.method,
                "full": point.row.is_full,
                "value": point.value,
                "low": point.low,
                "high": point.high,
                "bars": point.high > point.low,
                **{name: cost(point.row) / divisors[name] for name, cost in COSTS.items()},
                "front": point.front,
                "tip": [
                    ["method", said(point.row)],
                    [axis.label, _told(point, axis)],
                    *([["95 %", f"{_short(point.low)} to {_short(point.high)}"]]
                      if point.high > point.low else []),
                    ["bits a weight", f"{point.row.bits_per_weight:.2f}"],
                    ["size", format_size(point.row.size_bytes)],
                    *([["gates", "fails"]] if point.row.failures else []),
                ],
            }
            for point in drawn
        ],
    }  # fmt: skip


def _told(point: Point, axis: Axis) -> str:
    bound = "≥ " if axis.key == "kl" and point.row.kl_at_least else ""
    return f"{bound}{_short(point.value)} {axis.unit}".strip()


def _short(value: float) -> str:
    shown = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return shown.replace("-", "−")


def _facts(report: Report) -> list[tuple[str, str]]:
    """The head of the page: a few figures with their names."""
    full = next((row for row in report.rows if row.is_full), None)
    others = [row for row in report.rows if not row.is_full]
    facts = []
    if full is not None:
        facts += [
            ("Full precision", format_size(full.size_bytes)),
            ("Its perplexity", number(full.perplexity.value)),
        ]
    facts.append(("Variants", str(len(others))))
    if others:
        facts.append(("Smallest", format_size(min(row.size_bytes for row in others))))
    if any(row.failures for row in others):
        facts.append(("Fail a gate", str(sum(bool(row.failures) for row in others))))
    return facts


def _flat(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """A recipe's entries as words; what is nested becomes JSON."""
    return [
        (key, value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False, default=str))
        for key, value in recipe.items()
    ]
