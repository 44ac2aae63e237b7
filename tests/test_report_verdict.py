"""Fronts, words, scales, differences and plots of a report: what they must say, and what they must not."""

from __future__ import annotations

import io
import itertools
import random
import sys
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from qexport.errors import MissingDependencyError
from qexport.report.axes import AXES, cost_scale, loss_scale, measured, points
from qexport.report.columns import columns
from qexport.report.content import Comparison, Layers, Measure, Report, Row, Sample
from qexport.report.differences import sample_view, word_differences
from qexport.report.matrices import heat_map, pair_matrices
from qexport.report.palette import LEVELS
from qexport.report.pareto import pareto_front
from qexport.report.plots import plots
from qexport.report.verdict import keeps, verdict
from tests.report_content import realistic_report


def row(
    name: str,
    size: int,
    loss: float | None,
    error: float | None = 0.001,
    *,
    bits: float = 4.0,
    **more: Any,
) -> Row:
    return Row(
        variant=name,
        path=name,
        method="none" if loss is None else "gguf",
        bits=bits,
        bits_per_weight=bits + 0.5,
        size_bytes=size,
        perplexity=Measure(value=10 * (1 + (loss or 0))),
        loss=None if loss is None else Measure(value=loss, standard_error=error),
        **more,
    )


FULL = row("full", 1000, None, bits=16)


def tie(first: str, second: str, *, differ: bool = False, error: float | None = 0.01) -> Comparison:
    return Comparison(
        first=first, second=second, measure="log perplexity", difference=0.001, standard_error=error,
        more_than_noise=differ,
    )  # fmt: skip


def test_the_front_is_what_nothing_dominates() -> None:
    chance = random.Random(3)
    for count in (0, 1, 2, 9, 40):
        costs = [float(chance.randrange(12)) for _ in range(count)]
        losses = [float(chance.randrange(12)) for _ in range(count)]
        spots = list(zip(costs, losses, strict=True))
        # by the definition, pair by pair
        undominated = {
            spot
            for spot in spots
            if not any(a <= spot[0] and b <= spot[1] and (a, b) != spot for a, b in spots)
        }
        front = [spots[index] for index in pareto_front(costs, losses)]
        assert front == sorted(undominated)
    with pytest.raises(ValueError, match="shorter"):
        pareto_front([1.0], [])


def test_the_verdict_names_the_bargain_and_where_the_model_breaks() -> None:
    rows = (
        FULL,
        row("q4_k_m", 290, 0.0111),
        row("q2_k", 190, 2.1, 0.1, bits=2),
        row("q3_k", 240, 0.2, bits=3),
    )
    told = verdict(rows, ())
    assert "q4_k_m keeps 98.9 % at 29 % of the size: perplexity +1.1 % ±0.2." in told
    assert "Below 3 bits the model breaks (q2_k: perplexity +210 % ±20)." in told
    assert "tie" not in told


def test_a_difference_within_noise_is_a_tie() -> None:
    told = verdict((FULL, row("q6_k", 410, 0.001, 0.001), row("q8_0", 530, -0.0005, 0.001)), ())
    assert "q6_k at 41 % of the size is a tie with the full model" in told
    assert "so is q8_0" in told
    assert "keeps" not in told


def test_no_tie_is_claimed_where_the_error_is_unknown() -> None:
    told = verdict((FULL, row("q6_k", 410, 0.001, None)), (tie("q6_k", "q5", error=None),))
    assert "tie" not in told
    assert "keeps" not in told
    assert told.startswith("What q6_k loses cannot be told: how much of the perplexity is noise is not known")


def test_a_little_luck_does_not_keep_more_than_all() -> None:
    told = verdict((FULL, row("q8", 530, -0.02, 0.005)), ())
    assert "tie" in told
    assert keeps(row("q8", 530, -0.02, 0.005)) == 1
    # two tokens: perplexity fell to a third, and nobody knows how much of it is noise
    told = verdict((FULL, row("rtn-2bit", 530, -0.63, None)), ())
    assert told.startswith("What rtn-2bit loses cannot be told")
    assert "keeps" not in told


def test_what_predicts_other_text_is_changed_whatever_its_perplexity() -> None:
    far = row("rtn-4bit", 530, -0.029, 0.039, kl=Measure(value=0.92), same_top=Measure(value=0.32))
    told = verdict((FULL, far), ())
    assert told == (
        "rtn-4bit predicts other text than the full model (KL divergence 0.92, the same likeliest token 32 % "
        "of the time), whatever its perplexity."
    )
    bound = row("b", 530, 0.001, 0.001, kl=Measure(value=0.6), kl_at_least=True)
    top = row("a", 530, 0.001, 0.001, same_top=Measure(value=0.4))
    told = verdict((FULL, top, bound, row("q4", 290, 0.0111)), (tie("q4", "b"), tie("q4", "a")))
    assert "q4 keeps 98.9 %" in told
    assert "as well" not in told
    assert "a and b predict other text than the full model (b: KL divergence at least 0.60)" in told


def test_a_full_precision_candidate_is_a_variant_as_all_others() -> None:
    tuned = row("tuned", 1000, 0.011, bits=16, failures=("no",)).model_copy(update={"method": "none"})
    told = verdict((FULL, tuned), ())
    assert told == (
        "tuned keeps 98.9 % at 100 % of the size: perplexity +1.1 % ±0.2. "
        "1 of 1 variants fails a gate: tuned."
    )
    report = Report(qexport="1", title="t", verdict=told, rows=(FULL, tuned))
    assert measured(report)[0].key == "loss"
    assert [point.value for point in points(report, AXES[0])] == pytest.approx([0, 1.1])


def test_what_is_better_than_full_precision_is_another_model() -> None:
    told = verdict((FULL, row("other", 290, -0.6, 0.02), row("q4", 290, 0.02, 0.001)), ())
    assert told.startswith("other scores better than the full model (other: perplexity -60 % ±4)")
    assert "q4 keeps 98.0 %" in told
    luck = verdict((FULL, row("q8", 530, -0.002, 0.0005)), ())  # quantization's own
    assert "made of another one" not in luck


def test_wide_error_bars_are_no_praise() -> None:
    told = verdict((FULL, row("q4", 290, 0.02, 0.1)), ())
    assert "tie" not in told
    assert "keeps" not in told
    assert "What q4 loses cannot be told" in told
    assert "differences of perplexity below 20 % cannot be told from noise" in told


def test_what_ties_with_the_bargain_is_named_only_if_nothing_tells_them_apart() -> None:
    rows = (FULL, row("awq", 295, 0.0115), row("q4_k_m", 290, 0.0111), row("big", 600, 0.0110))
    pairs = (tie("awq", "q4_k_m"), tie("q4_k_m", "big"))
    told = verdict(rows, pairs)
    assert "awq does as well at about that size" in told
    assert "big" not in told
    assert "as well" not in verdict(rows, (*pairs, tie("awq", "q4_k_m", differ=True)))


def test_variants_that_break_at_bits_where_others_hold_are_named() -> None:
    told = verdict((FULL, row("hqq-3", 240, 3.0, bits=3), row("gptq-3", 240, 0.08, bits=3)), ())
    assert "hqq-3 breaks the model" in told
    assert "Below" not in told
    assert verdict((FULL, row("q2", 1, 40.0)), ()).startswith("Every variant breaks the model")


def test_gates_are_counted_and_nothing_is_said_about_nothing() -> None:
    told = verdict((FULL, row("a", 300, 0.01, failures=("no",)), row("b", 310, 0.01)), ())
    assert "1 of 2 variants fails a gate: a." in told
    assert verdict((FULL,), ()) == verdict((), ()) == "Nothing was compared with the full-precision model."


def test_scales_hold_every_bar_and_their_ticks_lie_apart() -> None:
    report = realistic_report()
    for axis in measured(report):
        drawn = points(report, axis)
        scale = loss_scale(drawn, axis)
        start, end = (scale.forward(edge) for edge in scale.domain)
        for point in drawn:
            assert scale.domain[0] <= point.low <= point.value <= point.high <= scale.domain[1]
        assert 3 <= len(scale.ticks) <= 12
        places = [(scale.forward(tick) - start) / (end - start) for tick in scale.ticks]
        assert places[0] >= 0
        assert places[-1] <= 1
        assert all(after - before > 0.05 for before, after in itertools.pairwise(places))


def test_losses_over_decades_are_told_apart_with_zero_on_the_axis() -> None:
    report = realistic_report()
    scale = loss_scale(points(report, AXES[0]), AXES[0])
    assert scale.kind == "symlog"
    assert 0.0 in scale.ticks
    start, end = (scale.forward(edge) for edge in scale.domain)
    q4, q5 = ((scale.forward(loss) - start) / (end - start) for loss in (1.34, 0.44))
    assert q4 - q5 > 0.05


@pytest.mark.parametrize("values", [[1.0], [4.5, 4.5], [2.5, 16.0], [1e-3, 1e6], [0.0, 3.0]])
def test_a_scale_of_costs_holds_them(values: list[float]) -> None:
    for cost in ("bits", "size"):
        scale = cost_scale(values, cost)
        assert 0 < scale.domain[0] < scale.domain[1]
        assert max(values) <= scale.domain[1]


def test_word_differences_rebuild_both_texts() -> None:
    chance = random.Random(1)
    words = ["the", "train", "leaves", ",", "at", "eight", " ", "\n", "Uhr", "über"]
    for _ in range(60):
        old, new = (" ".join(chance.choices(words, k=chance.randrange(14))) for _ in range(2))
        pieces = word_differences(old, new)
        assert "".join(text for kind, text in pieces if kind != "added") == old
        assert "".join(text for kind, text in pieces if kind != "removed") == new
    assert word_differences("a b c d", "a x y d") == [
        ("same", "a "), ("removed", "b c"), ("added", "x y"), ("same", " d"),
    ]  # fmt: skip


def test_equal_answers_stand_together_and_other_ones_are_not_patched_up() -> None:
    answers = {
        "full": "one two three",
        "a": "one two three",
        "b": "one 2 three",
        "c": "one two three",
        "d": "no",
    }
    view = sample_view(Sample(prompt="p", reference=None, answers=answers), "full", list("abcd"))
    assert [answer.variants for answer in view.answers] == [("a", "c"), ("b",), ("d",)]
    assert (view.same, view.variants) == (2, 4)
    same, patched, other = view.answers
    assert same.same
    assert (patched.changed_words, patched.other) == (1, False)
    assert other.other
    assert other.pieces == (("added", "no"),)


def test_the_heat_map_shades_by_magnitude() -> None:
    layers = Layers(names=("m.0.q.weight", "m.1.q.weight"), errors={"a": (0.001, 0.5), "b": (None, 0.02)})
    found = heat_map(layers, ["full", "b", "a"])
    assert found is not None
    assert found.variants == ("b", "a")
    assert [r.short for r in found.rows] == ["0", "1"]
    assert [[cell.level for cell in r.cells] for r in found.rows] == [[None, 0], [3, LEVELS - 1]]
    assert [[cell.text for cell in r.cells] for r in found.rows] == [[None, "0.10"], ["2.0", "50"]]
    assert found.worst == ("m.1.q.weight", "a", "50")
    assert heat_map(Layers(), ["a"]) is None


def test_a_pair_reads_the_same_from_both_sides() -> None:
    pair = Comparison(
        first="a", second="b", measure="log perplexity", difference=0.01, standard_error=0.001,
        more_than_noise=True,
    )  # fmt: skip
    (matrix,) = pair_matrices((pair,), ["a", "b", "c"])
    assert matrix.variants == ("a", "b")
    (none, better), (worse, _) = matrix.cells
    assert none is None
    assert better
    assert worse
    assert (better.kind, better.text) == ("better", "−1.0 %")  # e^-0.01 - 1
    assert (worse.kind, worse.text) == ("worse", "+1.0 %")
    assert worse.sentence.startswith("b against a: perplexity +1.0 %, ±0.2; worse")


def test_plots_are_pictures_and_the_same_each_time() -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'qexport[report]'")
    from PIL import Image

    report = realistic_report()
    files = plots(report)
    assert set(files) == {f"loss_vs_{cost}.{kind}" for cost in ("bits", "size") for kind in ("png", "svg")}
    assert files == plots(report)
    for cost in ("bits", "size"):
        with Image.open(io.BytesIO(files[f"loss_vs_{cost}.png"])) as picture:
            assert picture.width >= 1000
            assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
        assert ET.fromstring(files[f"loss_vs_{cost}.svg"]).tag.endswith("svg")  # noqa: S314 (our own)


def test_names_that_look_like_formulas_are_drawn_as_they_are() -> None:
    pytest.importorskip("matplotlib")
    report = Report(
        qexport="1", title="t", verdict="v",
        rows=(FULL, row("$x^{2$ <b>&\n\x00", 300, 0.01), row("日本", 310, 0.2)),
    )  # fmt: skip
    ET.fromstring(plots(report)["loss_vs_size.svg"])  # noqa: S314


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qexport\[report\]'"):
        plots(realistic_report())


def test_lower_bounds_of_the_divergence_are_told_as_such() -> None:
    bound = row("q4", 290, 0.01, kl=Measure(value=0.03), kl_p99=0.2, kl_at_least=True)
    report = Report(qexport="1", title="t", verdict="v", rows=(FULL, bound, row("q5", 300, 0.01)))
    found = {column.key: column.cell(bound) for column in columns(report)}
    assert (found["kl"].text, found["kl"].order) == ("≥\N{NO-BREAK SPACE}0.0300", 0.03)
    assert found["kl_p99"].text == "≥\N{NO-BREAK SPACE}0.200"
    assert "KL divergence to full, at least" in [axis.label for axis in measured(report)]
    whole = report.model_copy(update={"rows": (FULL, bound.model_copy(update={"kl_at_least": False}))})
    assert "KL divergence to full" in [axis.label for axis in measured(whole)]


def test_numbers_past_all_scales_are_told_and_not_drawn() -> None:
    huge = row("q2", 200, 1e304, 1e304, bits=2, kl=Measure(value=float("inf")), kl_p99=float("inf"))
    report = Report(qexport="1", title="t", verdict="v", rows=(FULL, row("q4", 290, 0.01), huge))
    for axis in measured(report):
        scale = loss_scale(points(report, axis), axis)
        assert all(abs(edge) < 1e99 for edge in scale.domain)
    found = {column.key: column.cell(huge) for column in columns(report)}
    assert (found["kl"].text, found["kl_p99"].text) == ("∞", "∞")
    assert all(len(cell.text or "") + len(cell.extra) < 20 for cell in found.values())
    pair = tie("q4", "q2").model_copy(update={"measure": "kl", "difference": float("inf")})
    assert pair_matrices((pair,), ["q4", "q2"])


def test_what_is_not_finite_breaks_the_model_and_nothing_else() -> None:
    broken = row("q2", 200, float("inf"), float("nan"), bits=2)
    report = Report(qexport="1", title="t", verdict="v", rows=(FULL, row("q4", 290, 0.01), broken))
    assert "Below 4 bits the model breaks (q2: perplexity more than tenfold)." in verdict(report.rows, ())
    assert [point.row.variant for point in points(report, AXES[0])] == ["full", "q4"]
    (perplexity,) = (column for column in columns(report) if column.key == "perplexity")
    endless = broken.model_copy(update={"perplexity": Measure(value=float("inf"))})
    assert perplexity.cell(endless).text == "∞"
