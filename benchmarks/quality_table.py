"""The Markdown of benchmarks/quality.py: a table a model, a row a method, a column a width."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]  # as in the JSON file
_BITS = (8, 4, 3, 2)


def markdown(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """The tables of all models in `rows`, methods in the order of `methods`."""
    models = dict.fromkeys(row["model"] for row in rows)
    return (
        "\n\n".join(_table([row for row in rows if row["model"] == model], methods) for model in models)
        + "\n"
    )


def summary(rows: Sequence[Row], ours: Sequence[str]) -> str:
    """A row a model and width: the least KL divergence of a peer, and that of each method of `ours`."""
    labels = {row["method"]: row["label"] for row in rows if row["method"] in ours}
    ours = [method for method in ours if method in labels]
    heads = [labels[method].removeprefix("qexport ").partition(" under")[0] for method in ours]
    lines = [
        f"| model | bits | best peer | its KL | {' | '.join(heads)} |",
        "| --- | ---: | --- | ---: |" + " ---: |" * len(ours),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        for bits in _BITS:
            found = _by_method([row for row in rows if row["model"] == model], bits)
            peers = {own[0]["label"]: _mean(own, "kl") for own in found.values() if not own[0]["ours"]}
            mine = {method: _mean(found[method], "kl") for method in ours if method in found}
            if not peers or not mine:
                continue
            peer = min(peers, key=lambda label: peers[label])
            least = min(peers[peer], *mine.values())
            cells = [_figure(value, least) for value in (peers[peer], *map(mine.get, ours))]
            lines.append(f"| {model} | {bits} | {peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: float | None, least: float) -> str:
    """Three digits that count, bold where it is the least."""
    if value is None:
        return "–"
    told = f"{value:.{max(2 - math.floor(math.log10(value)), 0)}f}" if value > 0 else "0"
    return f"**{told}**" if value == least else told


def _table(rows: Sequence[Row], methods: Sequence[str]) -> str:
    full = next(row for row in rows if row["method"] == "full")
    told = f"perplexity {full['perplexity']:.3f} ± {full['perplexity_error']:.2f} on {full['tokens']} tokens"
    if "bleu" in full:
        told += f", BLEU {full['bleu']:.1f}"
    answers = "; BLEU" if "bleu" in full else ""
    lines = [
        f"**{full['model']}**: in full precision {told}. KL divergence to it in nats a token; rise of "
        f"perplexity{answers}; with standard errors, the mean of the seeds. Seconds, and CPU seconds, of the "
        "4-bit file.",
        "",
        "| method | group | " + " | ".join(f"{bits} bits" for bits in _BITS) + " | s (CPU s) |",
        "| --- | ---: |" + " ---: |" * (len(_BITS) + 1),
    ]
    reasons: dict[str, int] = {}
    least = {bits: _least(rows, bits) for bits in _BITS}
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        group = "row" if own[0]["group_size"] == -1 else str(own[0]["group_size"])
        cells = []
        for bits in _BITS:
            seeds = [row for row in own if row["bits"] == bits]
            cells.append(_cell(seeds, least[bits], reasons))
        lines.append(f"| {own[0]['label']} | {group} | {' | '.join(cells)} | {_seconds(own)} |")
    if notes := [f"{number}. {reason}" for reason, number in reasons.items()]:
        lines += ["", *notes]
    if spread := _spread(rows):
        lines += ["", spread]
    return "\n".join(lines)


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def _least(rows: Sequence[Row], bits: int) -> float | None:
    """The smallest divergence at this width, over the methods."""
    found = _by_method(rows, bits)
    return min((_mean(own, "kl") for own in found.values()), default=None)


def _by_method(rows: Sequence[Row], bits: int) -> Mapping[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("bits") == bits and row.get("kl") is not None:
            found.setdefault(row["method"], []).append(row)
    return found


def _cell(seeds: Sequence[Row], least: float | None, reasons: dict[str, int]) -> str:
    good = [row for row in seeds if row.get("kl") is not None]
    if not good:
        failed = next((row["error"] for row in seeds if row.get("error")), None)
        return f"({reasons.setdefault(failed, len(reasons) + 1)})" if failed else "–"
    kl = _mean(good, "kl")
    cell = _with_error(kl, _mean(good, "kl_error"))
    if kl == least:
        cell = f"**{cell}**"
    if all(row.get("rise") is not None for row in good):
        cell += f"; {100 * _mean(good, 'rise'):+.2f} ± {100 * _mean(good, 'rise_error'):.2f} %"
    if all("bleu" in row for row in good):
        cell += f"; {_mean(good, 'bleu'):.1f}"
    return cell


def _with_error(value: float, error: float) -> str:
    """Both with as many decimals as show the error's first digit, two at least and six at most."""
    decimals = min(max(-math.floor(math.log10(error)), 2), 6) if error > 0 else 6
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _seconds(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.get("seconds") is not None and row["bits"] == 4]
    if not found:
        return "–"
    least = min(found, key=lambda row: row["seconds"])
    return f"{least['seconds']:.1f} ({least['cpu_seconds']:.1f})"


def _spread(rows: Sequence[Row]) -> str:
    """How much the second choice of calibration windows matters."""
    gaps = []
    for bits in _BITS:
        for own in _by_method(rows, bits).values():
            if len(own) > 1:
                values = [row["kl"] for row in own]
                gaps.append((max(values) - min(values)) / statistics.fmean(values))
    if not gaps:
        return ""
    return (
        f"Between seeds the KL divergence differs by {statistics.median(gaps):.1%} of it in the median, "
        f"by {max(gaps):.1%} at most."
    )
