"""What the numbers come to, in plain words, and no more than they bear.

A variant "keeps" perplexity(full) / perplexity(variant): the share that is left, as the geometric mean over
tokens, of the probability that the model gives to the right next token; never more than all of it. What
differs by no more than 1.96 standard errors is a tie, where these are small; of a short text nothing is said.
A variant whose predictions are others' is "changed", whatever its perplexity: a text may suit it by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qexport.report.content import Comparison, Row, Z
from qexport.report.pareto import pareto_front

SMALL = 0.03  # a rise of perplexity up to here is a small price
BROKEN = 0.5  # from here on the model is another one
BROKEN_FOR_SURE = 9.0  # tenfold: no noise does that
CHANGED = 0.5  # KL divergence, nats a token, or the share of tokens whose likeliest one is another
COARSE = 0.05  # an error bar as wide as this cannot tell a good variant from a fair one
NEAR = 1.1  # sizes up to this ratio are about the same


def verdict(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """Sentences on what ties with the full model, what is the best bargain, what ties with it, what breaks,
    what is changed, what cannot be told and what fails its gates. `rows` are in any order; one without a
    loss takes no part."""
    full = next((row for row in rows if row.is_full), None)
    lossy = [row for row in rows if not row.is_full and row.loss is not None]
    if not lossy:
        return "Nothing was compared with the full-precision model."
    strangers = [row for row in lossy if _is_stranger(row)]
    known = [row for row in lossy if row not in strangers]
    broken = [row for row in known if _is_broken(row)]
    changed = [row for row in known if row not in broken and _is_changed(row)]
    whole = [row for row in known if row not in broken and row not in changed]
    sure = [row for row in whole if _is_sure(row)]
    told = [
        *_told_strangers(strangers),
        *_ties(sure, full),
        *_bargain(sure, full, comparisons),
        *_breaks(broken, changed, whole),
        *_told_changed(changed),
        *_untold([row for row in whole if row not in sure]),
        *_gates([row for row in rows if not row.is_full]),
    ]
    return " ".join(told)


def keeps(row: Row) -> float:
    """The share that the variant keeps of the full model, 1 / (1 + rise of perplexity), at most all."""
    return 1 / (1 + max(_loss(row), 0.0))


def _loss(row: Row) -> float:
    return row.loss.value if row.loss and math.isfinite(row.loss.value) else math.inf


def _noise(row: Row) -> float | None:
    """The half width of the 95 % interval of the loss; None where it is unknown."""
    error = row.loss.standard_error if row.loss else None
    return None if error is None or not math.isfinite(error) else Z * error


def _is_sure(row: Row) -> bool:
    """Whether the noise is known and small enough to say anything."""
    noise = _noise(row)
    return noise is not None and noise < COARSE


def _is_tie(row: Row) -> bool:
    noise = _noise(row)
    return noise is not None and _loss(row) <= noise < COARSE


def _is_broken(row: Row) -> bool:
    """Lost BROKEN or more even at the near end of the error bar."""
    loss, noise = _loss(row), _noise(row)
    if noise is None:
        return loss >= BROKEN_FOR_SURE
    return loss - min(noise, loss) >= BROKEN


def _is_changed(row: Row) -> bool:
    kl, same = row.kl, row.same_top
    return bool((kl and kl.value > CHANGED) or (same and same.value < 1 - CHANGED))


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
    if not rows:
        return []
    front = [rows[i] for i in pareto_front([row.size_bytes for row in rows], [_loss(row) for row in rows])]
    good = [row for row in front if _loss(row) <= SMALL]
    best = good[0] if good else min(front, key=_loss)
    if _loss(best) >= BROKEN:
        return []
    if _is_tie(best):
        told = []
    else:
        told = [
            f"{best.variant} keeps {100 * keeps(best):.1f} % at {_share(best, full)}: "
            f"perplexity {rise(best)}."
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


def _breaks(broken: Sequence[Row], changed: Sequence[Row], whole: Sequence[Row]) -> list[str]:
    """Which variants are broken; below how many bits, where all that hold have more."""
    if not broken:
        return []
    worst = max(broken, key=_loss)
    if not whole and not changed:
        return [f"Every variant breaks the model (the best one: {rise(min(broken, key=_loss))})."]
    if whole and max(row.bits for row in broken) < (edge := min(row.bits for row in whole)):
        return [f"Below {edge:g} bits the model breaks ({worst.variant}: perplexity {rise(worst)})."]
    names = _listed([row.variant for row in broken])
    verb = "breaks" if len(broken) == 1 else "break"
    return [f"{names} {verb} the model (perplexity {rise(worst)}{' at worst' if len(broken) > 1 else ''})."]


def _told_changed(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    worst = max(rows, key=lambda row: (row.kl.value if row.kl else 0, row.variant))
    told = []
    if worst.kl:
        told.append(f"KL divergence {'at least ' if worst.kl_at_least else ''}{worst.kl.value:.2f}")
    if worst.same_top:
        told.append(f"the same likeliest token {100 * worst.same_top.value:.0f} % of the time")
    whose = f"{worst.variant}: " if len(rows) > 1 else ""
    one = len(rows) == 1
    names = _listed([row.variant for row in rows])
    verb, its = ("predicts", "its") if one else ("predict", "their")
    found = f"{whose}{', '.join(told)}"
    return [f"{names} {verb} other text than the full model ({found}), whatever {its} perplexity."]


def _untold(rows: Sequence[Row]) -> list[str]:
    """Of which variants the text tells too little."""
    if not rows:
        return []
    noises = [noise for row in rows if (noise := _noise(row)) is not None]
    names = _listed([row.variant for row in rows])
    begin = f"What {names} {'loses' if len(rows) == 1 else 'lose'} cannot be told"
    if not noises:
        return [f"{begin}: how much of the perplexity is noise is not known, with a single piece of text."]
    return [
        f"{begin}: the text is short, differences of perplexity below {100 * min(noises):.0f} % cannot be "
        "told from noise."
    ]


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
