"""What the numbers come to, in plain words, and no more than they bear.

A variant "keeps" perplexity(full) / perplexity(variant): the share that is left, as the geometric mean over
tokens, of the probability that the model gives to the right next token. What differs by no more than 1.96
standard errors is a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qexport.report.axes import Z, is_full
from qexport.report.content import Comparison, Row
from qexport.report.pareto import pareto_front

SMALL = 0.03  # a rise of perplexity up to here is a small price
BROKEN = 0.5  # from here on the model is another one
COARSE = 0.05  # an error bar as wide as this cannot tell a good variant from a fair one
NEAR = 1.1  # sizes up to this ratio are about the same


def verdict(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """Sentences on what ties with the full model, what is the best bargain, what ties with it, what breaks
    and what fails its gates. `rows` are in any order; one without a loss takes no part."""
    full = next((row for row in rows if is_full(row)), None)
    lossy = [row for row in rows if not is_full(row) and row.loss is not None]
    if not lossy:
        return "Nothing was compared with the full-precision model."
    strangers = [row for row in lossy if _is_stranger(row)]
    lossy = [row for row in lossy if row not in strangers]
    told = _told_strangers(strangers)
    if not lossy:
        return " ".join([*told, *_gates(strangers)])
    told += [
        *_ties(lossy, full),
        *_bargain(lossy, full, comparisons),
        *_breaks(lossy),
        *_coarse(lossy),
        *_gates([row for row in rows if not is_full(row)]),
    ]
    return " ".join(told)


def keeps(row: Row) -> float:
    """The share that the variant keeps of the full model, 1 / (1 + rise of perplexity)."""
    return 1 / (1 + _loss(row))


def _loss(row: Row) -> float:
    return row.loss.value if row.loss and math.isfinite(row.loss.value) else math.inf


def _noise(row: Row) -> float | None:
    """The half width of the 95 % interval of the loss; None where it is unknown."""
    error = row.loss.standard_error if row.loss else None
    return None if error is None or not math.isfinite(error) else Z * error


def _is_tie(row: Row) -> bool:
    noise = _noise(row)
    return noise is not None and _loss(row) <= noise and noise < COARSE


def _share(row: Row, full: Row | None) -> str:
    """'29 % of the size', or the bits where there is no full model to compare with."""
    if full is None or not full.size_bytes:
        return f"{row.bits_per_weight:.1f} bits a weight"
    return f"{100 * row.size_bytes / full.size_bytes:.0f} % of the size"


def rise(row: Row) -> str:
    """'+1.1 % ±0.2': the loss with the half width of its 95 % interval."""
    loss, noise = _loss(row), _noise(row)
    if loss >= 9:
        return "more than tenfold"
    digits = 0 if abs(loss) >= 0.2 else 1 if abs(loss) >= 0.002 or loss == 0 else 2
    error = "" if noise is None else f" ±{100 * noise:.{digits}f}"
    return f"{100 * loss:+.{digits}f} %{error}"


def _is_stranger(row: Row) -> bool:
    """Whether it beats the full model by more than noise, and by more than quantization ever does."""
    noise = _noise(row)
    return noise is not None and _loss(row) < -max(noise, SMALL)


def _told_strangers(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    best = min(rows, key=_loss)
    verb = "scores" if len(rows) == 1 else "score"
    return [
        f"{_listed([row.variant for row in rows])} {verb} better than the full model "
        f"({best.variant}: perplexity {rise(best)}): made of another one, and nothing to compare with it."
    ]


def _ties(rows: Sequence[Row], full: Row | None) -> list[str]:
    ties = sorted((row for row in rows if _is_tie(row)), key=lambda row: row.size_bytes)
    if not ties:
        return []
    small = ties[0]
    others = _listed([row.variant for row in ties[1:]])
    also = f"; so {'is' if len(ties) == 2 else 'are'} {others}" if others else ""
    return [
        f"{small.variant} at {_share(small, full)} is a tie with the full model "
        f"(perplexity {rise(small)}, within noise){also}."
    ]


def _bargain(rows: Sequence[Row], full: Row | None, comparisons: Sequence[Comparison]) -> list[str]:
    """The smallest variant on the Pareto front whose loss is small; if none is, the one that lost least."""
    front = [rows[i] for i in pareto_front([row.size_bytes for row in rows], [_loss(row) for row in rows])]
    good = [row for row in front if _loss(row) <= SMALL]
    best = good[0] if good else min(front, key=_loss)
    if _loss(best) >= BROKEN:
        return []
    if _is_tie(best):
        told = []
    else:
        noise = " (how much of it is noise is not known)" if _noise(best) is None else ""
        told = [
            f"{best.variant} keeps {100 * keeps(best):.1f} % at {_share(best, full)}: "
            f"perplexity {rise(best)}{noise}."
        ]
    near = {row.variant for row in rows if row is not best and _about_as_large(row, best)}
    as_good = sorted(_tied_with(best.variant, comparisons) & near)
    if as_good:
        verb = "does" if len(as_good) == 1 else "do"
        told.append(
            f"{_listed(as_good)} {verb} as well at about that size: a difference to {best.variant} "
            "within noise."
        )
    return told


def _about_as_large(row: Row, other: Row) -> bool:
    sizes = sorted((max(row.size_bytes, 1), max(other.size_bytes, 1)))
    return sizes[1] <= NEAR * sizes[0]


def _tied_with(variant: str, comparisons: Sequence[Comparison]) -> set[str]:
    """The variants that no comparison tells from this one, and at least one, with a known error, ties."""
    differ, tied = set(), set()
    for pair in comparisons:
        if variant in (pair.first, pair.second):
            other = pair.second if pair.first == variant else pair.first
            if pair.more_than_noise:
                differ.add(other)
            elif pair.standard_error is not None:
                tied.add(other)
    return tied - differ


def _breaks(rows: Sequence[Row]) -> list[str]:
    """Which variants are broken: lost BROKEN or more even at the near end of the error bar."""
    broken = [row for row in rows if _loss(row) - min(_noise(row) or 0.0, _loss(row)) >= BROKEN]
    if not broken:
        return []
    whole = [row for row in rows if row not in broken]
    worst = max(broken, key=_loss)
    if not whole:
        return [f"Every variant breaks the model (the best one: {rise(min(broken, key=_loss))})."]
    if max(row.bits for row in broken) < (edge := min(row.bits for row in whole)):
        return [f"Below {edge:g} bits the model breaks ({worst.variant}: perplexity {rise(worst)})."]
    names = _listed([row.variant for row in broken])
    verb = "breaks" if len(broken) == 1 else "break"
    return [f"{names} {verb} the model (perplexity {rise(worst)}{' at worst' if len(broken) > 1 else ''})."]


def _coarse(rows: Sequence[Row]) -> list[str]:
    noises = [noise for row in rows if _loss(row) < BROKEN and (noise := _noise(row)) is not None]
    if noises and min(noises) >= COARSE:
        return [
            f"The text is short: differences of perplexity below {100 * min(noises):.0f} % cannot be told "
            "from noise."
        ]
    return []


def _gates(rows: Sequence[Row]) -> list[str]:
    failed = [row.variant for row in rows if row.failures]
    if not failed:
        return []
    return [f"{len(failed)} of {len(rows)} variants {'fails' if len(failed) == 1 else 'fail'} a gate: "
            f"{_listed(failed)}."]  # fmt: skip


def _listed(names: Sequence[str], most: int = 4) -> str:
    """'a, b and c'; past `most`, how many more."""
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
