"""How near answers come to references: BLEU, chrF, ROUGE-L and exact match, with bootstrap intervals.

All scores are 0 to 100. BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacrebleu's, with its
signatures. An interval holds 95 % of the resamples: the bootstrap draws prompts with replacement, and scores
each draw from the prompts' own counts (Koehn 2004, "Statistical significance tests for machine translation
evaluation", section 3).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qexport.errors import CalibrationError
from qexport.results import Interval, TextScores

Tokenization = Literal["13a", "zh", "char", "intl", "none"]
_LEVEL = 95  # per cent
_DRAWN_AT_ONCE = 1 << 22  # counts of a block of resamples: 32 MiB
# Han, kana and the letters of South-East Asia stand without spaces: there a letter is a word, as in
# sacrebleu's `zh` and `char`. Marks belong to the letters before them (Hindi's vowels).
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[{_UNSPACED}]\p{{M}}*|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+"

Floats = npt.NDArray[np.float64]


def score_texts(
    answers: Sequence[str],
    references: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
    tokenize: Tokenization = "13a",
) -> TextScores:
    """The scores of `answers`, each against the reference at its place.

    `tokenize` is sacrebleu's for BLEU: "13a" wants words with spaces between them, "zh" is for Chinese,
    "char" for Japanese. A single prompt's interval is its value alone. Raises CalibrationError when there is
    nothing to score and when the two are not as many.
    """
    measures = _measures(answers, references, tokenize)
    draws = functools.partial(_draws, len(answers), resamples, seed)
    found = {name: _interval(measure.value, measure.scores(draws)) for name, measure in measures.items()}
    signatures = {name: measure.signature for name, measure in measures.items()}
    signatures["interval"] = _interval_signature(resamples, seed)
    return TextScores(**found, signatures=signatures)


def paired_difference(
    first: Sequence[str],
    second: Sequence[str],
    references: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
    tokenize: Tokenization = "13a",
) -> TextScores:
    """Second's scores minus first's, each resample drawing the same prompts for both.

    A difference is more than noise where its interval does not hold 0 (Koehn 2004, section 4, two-sided).
    Raises as `score_texts`.
    """
    ours, theirs = (_measures(answers, references, tokenize) for answers in (first, second))
    draws = functools.partial(_draws, len(references), resamples, seed)
    found = {
        name: _interval(theirs[name].value - mine.value, theirs[name].scores(draws) - mine.scores(draws))
        for name, mine in ours.items()
    }
    signatures = {name: measure.signature for name, measure in ours.items()}
    signatures["interval"] = _interval_signature(resamples, seed) + "|paired"
    return TextScores(**found, signatures=signatures)


@dataclass(frozen=True)
class _Measure:
    """A score that is a function of sums over prompts.

    `counts` [prompts, k] are a prompt's own, and `of_sums` gives the score of their sums [k].
    """

    counts: Floats
    of_sums: Callable[[list[float]], float]
    signature: str

    @property
    def value(self) -> float:
        """The score of all prompts."""
        return self.of_sums(self.counts.sum(axis=0).tolist())

    def scores(self, draws: Callable[[], Any]) -> Floats:
        """The score of every resample [resamples]."""
        return np.array([self.of_sums(sums) for drawn in draws() for sums in (drawn @ self.counts).tolist()])


def _measures(
    answers: Sequence[str], references: Sequence[str], tokenize: Tokenization
) -> dict[str, _Measure]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if len(answers) != len(references):
        raise CalibrationError(
            f"{len(answers)} answers and {len(references)} references", expected="one for each"
        )
    if not answers:
        raise CalibrationError("there are no answers to score", expected="at least one")
    count = len(answers)

    def mean(sums: list[float]) -> float:
        return 100 * sums[0] / count

    rouge = [rouge_l(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    exact = [float(a.strip() == r.strip()) for a, r in zip(answers, references, strict=True)]
    return {
        "bleu": _by_sacrebleu(BLEU(tokenize=tokenize, force=True), answers, references),
        "chrf": _by_sacrebleu(CHRF(), answers, references),
        "rouge_l": _Measure(np.array(rouge)[:, None], mean, "f1|mean of prompts|lower|words:letters+digits"),
        "exact_match": _Measure(np.array(exact)[:, None], mean, "mean of prompts|case:mixed|stripped"),
    }


def _by_sacrebleu(metric: Any, answers: Sequence[str], references: Sequence[str]) -> _Measure:
    # the counts that sacrebleu's own tests of significance resample, and the score that it makes of them
    counts = metric._extract_corpus_statistics(list(answers), [list(references)])

    def score(sums: list[float]) -> float:
        return float(metric._compute_score_from_stats([round(value) for value in sums]).score)

    return _Measure(np.array(counts, dtype=np.float64), score, str(metric.get_signature()))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L of one answer, 0 to 1: F1 of the longest common subsequence of words (Lin 2004, section 3.1).

    Precision and recall weigh the same (the paper's beta is 1). Words are lower-cased runs of letters, marks
    and digits, in scripts without spaces single letters; the text is composed (NFC) before. Without words on
    either side it is 0. No stemming: on ASCII text it is rouge-score's.
    """
    found, wanted = _words(answer), _words(reference)
    common = _common_subsequence(found, wanted)
    # 2PR / (P + R) with P = common / found, R = common / wanted
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    words: list[str] = _pattern().findall(unicodedata.normalize("NFC", text).lower())
    return words


@functools.cache
def _pattern() -> Any:
    import regex

    return regex.compile(_WORD)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one integer.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited", figure 2: V' = (V + (V & M)) | (V & ~M),
    where M has a bit for every place of the word in `first`; the zeros of the last V are the length.
    """
    places: dict[str, int] = {}
    for n, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << n
    everything = (1 << len(first)) - 1
    v = everything
    for word in second:
        matches = v & places.get(word, 0)
        v = ((v + matches) | (v - matches)) & everything
    return len(first) - v.bit_count()


def _draws(prompts: int, resamples: int, seed: int) -> Any:
    """How often each resample draws each prompt: blocks [some resamples, prompts], the same for a seed."""
    generator = np.random.default_rng(seed)
    step = max(_DRAWN_AT_ONCE // prompts, 1)
    shares = np.full(prompts, 1 / prompts)
    for begin in range(0, resamples, step):
        yield generator.multinomial(prompts, shares, size=min(step, resamples - begin)).astype(np.float64)


def _interval(value: float, scores: Floats) -> Interval:
    low, high = np.percentile(scores, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _interval_signature(resamples: int, seed: int) -> str:
    return f"percentile bootstrap over prompts|level:{_LEVEL}|resamples:{resamples}|seed:{seed}"
