"""Scores of texts: sacrebleu's and rouge-score's values, and intervals that hold what they say."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sacrebleu import corpus_bleu, corpus_chrf
from sacrebleu.metrics.bleu import BLEU

from qexport.errors import CalibrationError
from qexport.verification.text_scores import paired_difference, rouge_l, score_texts

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "my", "big", "red", "house")
SCORES = ("bleu", "chrf", "rouge_l", "exact_match")


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 14))) + "." for _ in range(count)]


def noisy(texts: list[str], share: float, seed: int) -> list[str]:
    """`texts` with a share of their words replaced."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(WORDS) if draw.random() < share else word for word in text.split())
        for text in texts
    ]


def test_values_and_signatures_are_sacrebleus() -> None:
    references = sentences(40, seed=0)
    answers = noisy(references, 0.3, seed=1)
    answers[3] = ""
    found = score_texts(answers, references)
    assert found.bleu.value == pytest.approx(corpus_bleu(answers, [references]).score, rel=1e-12)
    assert found.chrf.value == pytest.approx(corpus_chrf(answers, [references]).score, rel=1e-12)
    assert 5 < found.bleu.value < 95
    assert found.signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert found.signatures["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert found.signatures["interval"].endswith("resamples:1000|seed:0")


# F-measures by Google's rouge-score 0.1.2 (rougeL, no stemmer); the second and third are Lin's own example
# (2004, section 3.1)
ROUGE_SCORE = [
    ("A quick brown dog jumped over the lazy fox!", "The quick brown fox jumps over the lazy dog.", 5 / 9),
    ("police kill the gunman", "police killed the gunman", 0.75),
    ("the gunman kill police", "police killed the gunman", 0.5),
    ("a man sits on his bench in 1 park", "A man, 35, sits on a park-bench.", 0.5882352941176471),
    ("", "one two three", 0.0),
    ("?!", "...", 0.0),
]


@pytest.mark.parametrize(("answer", "reference", "expected"), ROUGE_SCORE)
def test_rouge_l_is_rouge_scores(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_against_the_table_of_the_text_book() -> None:
    """The longest common subsequence by dynamic programming, cell by cell, also past 64 words."""
    draw = random.Random(2)
    for _ in range(60):
        one, other = (draw.choices("abcdef", k=draw.randint(1, 90)) for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        common = table[-1][-1]
        p, r = common / len(one), common / len(other)
        expected = 2 * p * r / (p + r) if common else 0.0
        assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_of_other_scripts() -> None:
    """rouge-score knows ASCII alone, and would find these empty or broken."""
    assert rouge_l("Der Bär läuft", "der bär rennt") == pytest.approx(2 / 3)
    assert rouge_l("läuft", "la\u0308uft") == 1.0  # composed and not composed
    assert rouge_l("我爱猫", "我爱狗。") == pytest.approx(2 / 3)  # a letter is a word
    assert rouge_l("これは本です", "これはペンです") == pytest.approx(10 / 13)  # 5 of 6 and of 7
    assert rouge_l("मैं किताब पढ़ता हूँ", "मैं किताब लिखता हूँ") == pytest.approx(3 / 4)  # vowel signs do not cut
    assert rouge_l("고양이가 좋아요", "고양이가 싫어요") == pytest.approx(1 / 2)


def test_exact_match_counts_texts_without_the_space_around_them() -> None:
    found = score_texts([" yes\n", "no", "Yes", ""], ["yes", "no", "yes", "x"]).exact_match
    assert found.value == 50.0
    assert 0 <= found.low <= 50 <= found.high <= 100


def test_chinese_wants_its_own_tokens() -> None:
    answers, references = ["我今天去学校上课。"], ["我今天去学校学习。"]
    assert score_texts(answers, references).bleu.value < 10  # one word each, and not the same
    chinese = score_texts(answers, references, tokenize="zh")
    assert chinese.bleu.value == pytest.approx(corpus_bleu(answers, [references], tokenize="zh").score)
    assert "tok:zh" in chinese.signatures["bleu"]


def test_resamples_are_scored_as_sacrebleu_scores_them_anew() -> None:
    """Against drawing the texts themselves, with the same counts of each prompt."""
    references = sentences(12, seed=3)
    answers = noisy(references, 0.4, seed=4)
    counts = np.random.default_rng(7).multinomial(12, [1 / 12] * 12, size=50)
    bleus, rouges = [], []
    for drawn in counts:
        rows = np.repeat(np.arange(12), drawn)
        some, theirs = [answers[n] for n in rows], [references[n] for n in rows]
        bleus.append(BLEU().corpus_score(some, [theirs]).score)
        rouges.append(np.mean([100 * rouge_l(a, r) for a, r in zip(some, theirs, strict=True)]))
    found = score_texts(answers, references, seed=7, resamples=50)
    for interval, scores in ((found.bleu, bleus), (found.rouge_l, rouges)):
        assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(scores, [2.5, 97.5])))


def test_intervals_hold_the_true_score_about_as_often_as_they_say() -> None:
    """Samples of 60 from 3000 prompts whose exact match and ROUGE-L are known."""
    references = sentences(3000, seed=5)
    answers = [
        a if n % 3 else r for n, (a, r) in enumerate(zip(noisy(references, 0.4, 6), references, strict=True))
    ]
    rouge = np.array([rouge_l(a, r) for a, r in zip(answers, references, strict=True)])
    draw = random.Random(8)
    held = {"exact_match": 0, "rouge_l": 0}
    truth = {
        "exact_match": 100 * np.mean([a == r for a, r in zip(answers, references, strict=True)]),
        "rouge_l": 100 * rouge.mean(),
    }
    for trial in range(60):
        rows = draw.sample(range(3000), 60)
        found = score_texts(
            [answers[n] for n in rows], [references[n] for n in rows], seed=trial, resamples=200
        )
        for name, value in truth.items():
            interval = getattr(found, name)
            held[name] += interval.low <= value <= interval.high
    assert all(52 <= count <= 60 for count in held.values()), held  # 57 expected, 1.7 is one sigma


def test_a_seed_says_which_prompts_are_drawn() -> None:
    references = sentences(20, seed=0)
    answers = noisy(references, 0.3, seed=1)
    assert score_texts(answers, references, seed=3) == score_texts(answers, references, seed=3)
    assert score_texts(answers, references, seed=3).bleu != score_texts(answers, references, seed=4).bleu


def test_more_prompts_give_narrower_intervals() -> None:
    def width(count: int) -> float:
        references = sentences(count, seed=9)
        interval = score_texts(noisy(references, 0.3, seed=1), references).chrf
        assert interval.low < interval.value < interval.high
        return interval.high - interval.low

    assert width(25) / width(400) == pytest.approx(4, rel=0.4)  # the square root of 16


def test_a_single_prompt_has_no_spread() -> None:
    found = score_texts(["the cat sat on a mat"], ["the cat sat on the mat"])
    for name in SCORES:
        interval = getattr(found, name)
        assert interval.low == interval.value == interval.high, name


def test_paired_differences_are_less_noisy_than_their_parts() -> None:
    references = sentences(150, seed=0)
    first = noisy(references, 0.3, seed=1)
    second = [" ".join(text.split()[:-1]) if n % 4 == 0 else text for n, text in enumerate(first)]
    apart = score_texts(first, references), score_texts(second, references)
    found = paired_difference(first, second, references)
    for name in ("bleu", "chrf", "rouge_l"):
        one, other, difference = (getattr(scores, name) for scores in (*apart, found))
        assert difference.value == pytest.approx(other.value - one.value)
        assert difference.high < 0, name  # worse, and more than noise
        assert other.high > one.low, name  # which the two intervals apart do not tell
    assert found.signatures["interval"].endswith("|paired")
    same = paired_difference(first, first, references)
    assert (same.bleu.low, same.bleu.value, same.bleu.high) == (0, 0, 0)


def test_noise_is_told_from_differences() -> None:
    references = sentences(100, seed=0)
    found = paired_difference(noisy(references, 0.3, 1), noisy(references, 0.3, 2), references)
    for name in ("bleu", "chrf", "rouge_l"):
        difference = getattr(found, name)
        assert difference.low < 0 < difference.high, name


def test_what_cannot_be_scored() -> None:
    with pytest.raises(CalibrationError, match="2 answers and 1 references; one for each"):
        score_texts(["a", "b"], ["a"])
    with pytest.raises(CalibrationError, match="no answers"):
        score_texts([], [])
    with pytest.raises(CalibrationError, match="1 answers and 2 references"):
        paired_difference(["a", "b"], ["a"], ["a", "b"])
    empty = score_texts(["", ""], ["a b", "c"])
    assert [getattr(empty, name).value for name in SCORES] == [0, 0, 0, 0]
