"""Reports as data and as files: what is refused, merged, told as a regression, written and escaped."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from markdown_it import MarkdownIt

from qexport.checkpoint import staging
from qexport.cli import report_table
from qexport.cli.output import Output
from qexport.cli.report import _apart
from qexport.errors import CorruptFileError, OutputExistsError, SpecError
from qexport.report import files as files_module
from qexport.report import page as page_module
from qexport.report.content import (
    Comparison,
    Interval,
    Layers,
    Measure,
    Report,
    Row,
    Sample,
    TextScores,
)
from qexport.report.files import PLOTS, REPORT_FILES, read_report, require_own, write_report
from qexport.report.junit import junit
from qexport.report.recipes import recipe_lines
from qexport.report.rows import Variant, make_report
from qexport.report.several import Change, changes, merged, moved
from qexport.report.tables import report_markdown, table
from qexport.results import Answers, Divergence, Evaluation, Perplexity, TaskScore
from qexport.specs import VerifySpec
from tests.conftest import RunCli
from tests.report_content import realistic_report

HOSTILE = "a|b\n<script>alert(1)</script> **x** [y](http://evil.example) `z`"
RECIPES: dict[str, dict[str, Any]] = {
    "perplexity": {"data": "d1", "tokens": "t1", "window": 64, "stride": 32, "versions": {"torch": "2.13"}},
    "kl": {"data": "d1", "tokens": "t1", "window": 64, "stride": 32, "kept_logits": 320, "vocabulary": 320},
    "answers": {
        "data": "p1",
        "pairs": 3,
        "max_new_tokens": 8,
        "signatures": {"bleu": "nrefs:1|tok:13a|version:2.5.0"},
    },
    "tasks": {"tasks": {"arc": {"version": 1, "shots": 0, "documents": 10}}, "limit": 10},
}


def measure(value: float, error: float | None = 0.001) -> Measure:
    return Measure(value=value, standard_error=error)


def texts(value: float, half: float = 2.0) -> TextScores:
    found = Interval(value=value, low=value - half, high=value + half)
    return TextScores(**dict.fromkeys(TextScores.model_fields, found))


def row(name: str, loss: float | None = None, **more: Any) -> Row:
    told: dict[str, Any] = {
        "path": name,
        "method": "none" if loss is None else "gptq",
        "bits": 4,
        "bits_per_weight": 4.5,
        "size_bytes": 1000,
        "perplexity": measure(10 * (1 + (loss or 0)), 0.1),
        "loss": None if loss is None else measure(loss),
        **more,
    }
    return Row(variant=name, **told)


def q4(name: str = "q4", **more: Any) -> Row:
    told = {
        "kl": measure(0.03),
        "same_top": measure(0.9),
        "text": texts(30),
        "text_full": texts(70),
        "tasks": {"arc/acc": measure(0.5, 0.01), "wiki/word_perplexity": measure(12, 0.1)},
        **more,
    }
    return row(name, told.pop("loss_value", 0.01), **told)


def report(*rows: Row, **more: Any) -> Report:
    lines = ("perplexity: on a text", "answers: of prompts")
    told = {"title": "t", "verdict": "v", "recipes": RECIPES, "recipe_lines": lines, **more}
    return Report(qexport="1", rows=(row("full"), *rows), **told)


def altered(base: Report, measure_name: str, **values: Any) -> Report:
    recipes = {**base.recipes, measure_name: {**base.recipes[measure_name], **values}}
    return base.model_copy(update={"recipes": recipes})


# what is refused


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *places, last = (int(part) if part.isdigit() else part for part in path.split("."))
        here: Any = content
        for place in places:
            here = here[place]
        here[last] = value

    return change


GHOST = {"prompt": "p", "reference": None, "answers": {"ghost": "boo"}}
DAMAGE: Mapping[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "ghost in comparisons": (
        _set("comparisons.0.first", "ghost"),
        "comparisons: 'ghost' is none of the rows",
    ),
    "ghost in samples": (_set("samples", [GHOST]), "samples: 'ghost' is none of the rows"),
    "ghost in layers": (_set("layers.errors.ghost", [0.1]), "layers: 'ghost' is none of the rows"),
    "no rows": (_set("rows", []), "rows: the first is not 'full'"),
    "another first": (_set("rows.0.variant", "base"), "rows: the first is not 'full'"),
    "twice": (_set("rows.2.variant", "q4"), "rows: 'q4' stands there twice"),
    "short layers": (_set("layers.errors.q4", []), "layers: 'q4' has 0 errors for 1 names"),
    "negative size": (_set("rows.1.size_bytes", -5), "rows.1.size_bytes: "),
    "no size": (_set("rows.0.size_bytes", 0), "rows.0.size_bytes: "),
    "huge size": (_set("rows.1.size_bytes", 10**400), "rows.1.size_bytes: "),
    "huge bits": (_set("rows.1.bits", 10**400), "rows.1.bits: "),
    "no bits a weight": (_set("rows.1.bits_per_weight", 0), "rows.1.bits_per_weight: "),
    "not a number": (_set("rows.1.kl.value", "NaN"), "rows.1.kl.value: "),
    "a negative error": (_set("rows.1.kl.standard_error", -1), "rows.1.kl.standard_error"),
    "an endless score": (_set("rows.1.text.bleu.high", "Infinity"), "rows.1.text.bleu.high: "),
    "an endless speed": (_set("rows.1.tokens_per_second", {"x": "Infinity"}), "rows.1.tokens_per_second.x: "),
    "endless time": (_set("rows.1.seconds", "Infinity"), "rows.1.seconds: "),
    "deep": (_set("recipes.x", json.loads('{"a":' + "[" * 300 + "]" * 300 + "}")), "recipes: more than 16"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_report_that_does_not_fit_together_is_refused(damage: str, tmp_path: Path, cli: RunCli) -> None:
    pair = Comparison(
        first="q4", second="q5", measure="kl", difference=0.1, standard_error=0.1, more_than_noise=False
    )
    whole = report(q4(), q4("q5"), comparisons=(pair,), layers=Layers(names=("m",), errors={"q4": (0.1,)}))
    content = json.loads(whole.model_dump_json())
    change, told = DAMAGE[damage]
    change(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(CorruptFileError) as caught:
        read_report(tmp_path)
    assert told in str(caught.value)
    code, stdout, stderr = cli("report", tmp_path)
    assert (code, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "report.md").exists()


def test_errors_that_are_not_finite_are_unknown() -> None:
    assert Measure(value=math.inf, standard_error=math.nan).standard_error is None
    assert Measure(value=1, standard_error=math.inf).standard_error is None


# several


def test_measures_that_were_made_otherwise_are_not_merged() -> None:
    first = report(q4(), samples=(Sample(prompt="p", reference=None, answers={"full": "x", "q4": "y"}),))
    pairs = tuple(
        Comparison(first="q5", second="q6", measure=name, difference=0.1, standard_error=0.1,
                   more_than_noise=False) for name in ("kl", "log perplexity")
    )  # fmt: skip
    second = report(
        q4("q5"),
        q4("q6"),
        comparisons=pairs,
        samples=(Sample(prompt="p", reference=None, answers={"q5": "z"}),),
    )
    second = altered(second, "answers", max_new_tokens=64)
    second = altered(second, "kl", kept_logits=64)
    second = altered(second, "tasks", limit=None)
    found = merged([("a", first), ("b", second)])
    rows = {one.variant: one for one in found.rows}
    for name in ("q5", "q6"):
        other = rows[name]
        assert (other.text, other.text_full, other.kl, other.same_top, other.tasks) == (*[None] * 4, {})
        assert other.loss is not None
    assert rows["q4"] == first.rows[1]
    assert [pair.measure for pair in found.comparisons] == ["log perplexity"]
    assert [sample.answers for sample in found.samples] == [{"full": "x", "q4": "y"}]
    assert found.recipes == first.recipes
    assert found.recipe_lines[:2] == first.recipe_lines
    told = "\n".join(found.recipe_lines[2:])
    assert "KL of b left out: measured otherwise, kept_logits 64 and not 320" in told
    assert "answers of b left out: measured otherwise, max_new_tokens 64 and not 8" in told
    assert "arc/acc of b left out: measured otherwise, limit None and not 10" in told
    # another release of sacrebleu is no other measure
    newer = altered(report(q4("q5")), "answers", signatures={"bleu": "nrefs:1|tok:13a|version:2.6.0"})
    assert merged([("a", first), ("b", newer)]).rows[2].text is not None


def test_what_only_a_later_run_measured_comes_with_its_recipe() -> None:
    without = row("q4", 0.01, kl=measure(0.03))
    lean = report(without, recipes={key: RECIPES[key] for key in ("perplexity", "kl")})
    lean = lean.model_copy(update={"recipe_lines": ("perplexity: on a text",)})
    rich = report(q4("q5"))
    rich = rich.model_copy(update={"rows": (row("full", text=texts(35)), *rich.rows[1:])})
    found = merged([("a", lean), ("b", rich)])
    assert found.recipe_lines == ("perplexity: on a text", "answers: of prompts")
    assert found.recipes["answers"] == RECIPES["answers"]
    assert found.rows[0].text == texts(35)


def test_equal_prompts_with_other_references_stay_apart() -> None:
    def one(reference: str, **answers: str) -> Sample:
        return Sample(prompt="p", reference=reference, answers=answers)

    first = report(q4(), samples=(one("r1", q4="a"), one("r2", q4="b")))
    second = report(q4("q5"), samples=(one("r1", q5="c"), one("r2", q5="d")))
    found = merged([("a", first), ("b", second)]).samples
    assert [(sample.reference, sample.answers) for sample in found] == [
        ("r1", {"q4": "a", "q5": "c"}),
        ("r2", {"q4": "b", "q5": "d"}),
    ]


def test_names_of_merged_runs_never_clash() -> None:
    first = report(q4(), q4("q4 (b)"), q4("q4 (a)"))
    found = merged([("a", first), ("b", report(q4()))])
    names = [one.variant for one in found.rows]
    assert len(set(names)) == len(names) == 5
    assert _apart(["a", "a", "b"]) == ["a-1", "a-2", "b"]
    assert len(set(_apart(["a", "a", "a-1", "a-2", "b"]))) == 5


def test_rows_point_to_the_same_files_from_elsewhere(tmp_path: Path, cli: RunCli) -> None:
    outside = tmp_path / "elsewhere" / "x.gguf"
    within = tmp_path / "home" / "b" / "q6"
    source = report(q4(path="q4"), q4("q5", path=str(outside)), q4("q6", path=str(within)))
    write = tmp_path / "home" / "a"
    write_report(source, write)
    found = moved(source, write, tmp_path / "home" / "b")
    assert [one.path for one in found.rows[1:]] == ["../a/q4", str(outside), "q6"]
    assert moved(source, write, write) == source
    code, _, stderr = cli("report", write, "-o", tmp_path / "home" / "c" / "d")
    assert code == 0, stderr
    assert read_report(tmp_path / "home" / "c" / "d").rows[1].path == "../../a/q4"
    second = tmp_path / "home" / "z"
    write_report(report(q4("q7")), second)
    assert cli("report", write, second, "-o", tmp_path / "home" / "e")[0] == 0
    assert [one.path for one in read_report(tmp_path / "home" / "e").rows[1:]] == [
        "../a/q4",
        str(outside),
        str(within),
        "../z/q7",
    ]


# the later against the earlier


def kinds(before: Row, after: Row) -> dict[str, str]:
    return {one.measure: one.kind for one in changes(report(before), report(after)) if one.variant == "q4"}


def test_a_baseline_that_was_measured_otherwise_is_refused() -> None:
    now = report(q4())
    for name, values, told in (
        ("perplexity", {"data": "d2"}, "perplexity, data d2, now d1"),
        ("kl", {"kept_logits": 64}, "kl, kept_logits 64, now 320"),
        ("answers", {"max_new_tokens": 64}, "answers, max_new_tokens 64, now 8"),
        ("tasks", {"limit": 5}, "arc/acc, limit 5, now 10"),
    ):
        with pytest.raises(SpecError, match=told):
            changes(altered(now, name, **values), now)
    changes(altered(now, "perplexity", versions={"torch": "3"}), now)


def test_every_measure_is_judged_by_its_noise() -> None:
    assert set(kinds(q4(), q4()).values()) == {""}
    worse = q4(
        loss_value=0.1,
        kl=measure(0.1),
        same_top=measure(0.5),
        size_bytes=1011,
        text=texts(20),
        text_full=texts(60),
        tasks={"arc/acc": measure(0.4, 0.01), "wiki/word_perplexity": measure(14, 0.1)},
    )
    found = kinds(q4(), worse)
    assert set(found.values()) == {"worse"}
    assert {"loss", "KL", "same top token", "size", "BLEU", "chrF", "BLEU to full", "arc/acc"} <= set(found)
    assert set(kinds(worse, q4()).values()) == {"better"}
    # within noise, by hand: 1.96 sqrt(2) 0.001 = 0.00277
    assert kinds(q4(), q4(loss_value=0.0127))["loss"] == ""
    assert kinds(q4(), q4(loss_value=0.0129))["loss"] == "worse"
    assert kinds(q4(), q4(text=texts(27.5)))["BLEU"] == ""  # 2.5 < sqrt(2) 2
    assert kinds(q4(), q4(size_bytes=1009))["size"] == ""


def test_what_is_gone_is_worse_and_what_is_unknown_is_told(tmp_path: Path, cli: RunCli) -> None:
    before = report(q4(), q4("q5"))
    found = changes(before, report(q4(kl=None, tasks={})))
    gone = {(one.variant, one.measure) for one in found if one.worse}
    assert gone == {("q5", "variant"), ("q4", "KL"), ("q4", "arc/acc"), ("q4", "wiki/word_perplexity")}
    assert changes(report(q4(kl=None)), report(q4())) == changes(report(q4(kl=None)), report(q4(kl=None)))
    unknown = measure(0.01, None)
    assert kinds(q4(kl=unknown), q4(kl=measure(0.02, None)))["KL"] == "unknown"
    assert kinds(q4(kl=unknown), q4(kl=unknown))["KL"] == ""
    assert kinds(q4(text=texts(40, 0)), q4(text=texts(20, 0)))["BLEU"] == "unknown"  # a single prompt
    # the command
    write_report(before, tmp_path / "before")
    write_report(report(q4(kl=unknown)), tmp_path / "after")
    given = ("report", tmp_path / "after", "--baseline", tmp_path / "before", "--fail-on-regression")
    code, stdout, stderr = cli(*given)
    assert code == 1
    assert "worse than the baseline: q5 (variant is gone)" in stderr
    assert "q5\tvariant\t\t\tgone: worse" in stdout
    assert "q4\tKL\t0.03\t0.01\tnoise not known" in stdout


def test_infinite_losses_are_worse_than_all_and_equal_to_themselves() -> None:
    broken = row("q4", 0.01).model_copy(update={"loss": Measure(value=math.inf)})
    fine = row("q4", 0.01)
    assert kinds(fine, broken)["loss"] == "worse"
    assert kinds(broken, fine)["loss"] == "better"
    assert kinds(broken, broken)["loss"] == ""


def test_a_baseline_and_an_output(tmp_path: Path, cli: RunCli) -> None:
    for name in ("a", "b"):
        write_report(report(q4(f"q-{name}"), q4()), tmp_path / name)
    out = tmp_path / "out"
    code, stdout, stderr = cli("report", tmp_path / "a", "--baseline", tmp_path / "b", "-o", out, "--json")
    assert code == 0, stderr
    found = json.loads(stdout)["changes"]
    assert {"variant", "measure", "before", "after", "kind", "worse", "better"} == set(found[0])
    assert read_report(out).rows[1].path == "../a/q-a"
    both = (tmp_path / "a", tmp_path / "b")
    code, _, stderr = cli("report", *both, "--baseline", tmp_path / "b", "--fail-on-regression")
    assert code == 1
    assert "q4 (variant is gone)" in stderr  # it is q4 (a) and q4 (b) now
    code, _, stderr = cli("report", tmp_path / "a", "--baseline", tmp_path / "b", "--title", "x")
    assert code == 2
    assert "-o DIR" in stderr


# files


def test_a_first_write_that_is_cut_off_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = staging.whole_file

    class Killed(BaseException):
        pass

    def cut_off(path: Path) -> Any:
        if len(written) == 2:
            raise Killed
        written.append(path.name)
        return real(path)

    monkeypatch.setattr(files_module, "whole_file", cut_off)
    with pytest.raises(Killed):
        write_report(report(q4()), tmp_path)
    assert written[0] == "report.json"
    monkeypatch.undo()
    require_own(tmp_path)
    write_report(report(q4()), tmp_path)
    assert read_report(tmp_path) == report(q4())
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(OutputExistsError):
        write_report(report(q4()), tmp_path)


@pytest.mark.parametrize(("missing", "gone"), [("vl_convert", ["report.html"]), ("matplotlib", list(PLOTS))])
def test_what_cannot_be_drawn_anew_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    missing: str, gone: list[str],
) -> None:  # fmt: skip
    pytest.importorskip(missing)
    for name in REPORT_FILES[2:]:
        (tmp_path / name).write_text("old")
    (tmp_path / "report.json").write_text('{"qexport": "0"}')
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setitem(sys.modules, missing, None)
    page_module._vega.cache_clear()
    notes: list[str] = []
    write_report(report(q4()), tmp_path, lambda event: notes.append(str(event)))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*REPORT_FILES, "mine.txt"} - set(gone)
    assert all((tmp_path / name).read_bytes() != b"old" for name in left)
    assert len(notes) == 1
    assert missing.replace("_", "-") in notes[0]
    report_table.show_report(report(q4()), Output(), {}, tmp_path)
    shown = "report.md" if "report.html" in gone else "report.html"
    assert capsys.readouterr().err.endswith(f"report: {tmp_path / shown}\n")


# words


def test_the_markdown_is_of_text_and_nothing_else() -> None:
    bad = q4(HOSTILE, method=HOSTILE, failures=(HOSTILE,), tokens_per_second={HOSTILE: 1.0},
             tasks={HOSTILE: measure(0.5)})  # fmt: skip
    told = report_markdown(report(bad, title=HOSTILE, verdict=HOSTILE, recipe_lines=(HOSTILE,)))
    tokens = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(told)
    inner = [child for token in tokens for child in token.children or ()]
    assert not [token for token in tokens if token.type == "html_block"]
    kinds_found = {child.type for child in inner}
    assert kinds_found <= {"text", "softbreak", "text_special"}
    counts: list[int] = []
    for token in tokens:
        if token.type == "tr_open":
            counts.append(0)
        elif token.type in ("th_open", "td_open"):
            counts[-1] += 1
    assert len(counts) == 3
    assert len(set(counts)) == 1
    shown = "".join(child.content for child in inner)
    assert shown.count("<script>alert(1)</script>") == 9  # title, verdict, recipe, gate 2, table 4


def test_the_markdown_has_every_score_and_bounds_are_bounds() -> None:
    titles, lines = table(report(q4(kl_at_least=True, kl_p99=0.5)).rows)
    found = dict(zip(titles, lines[1], strict=True))
    for title in ("BLEU", "chrF", "ROUGE-L", "exact match"):
        assert found[title] == "30.0 ±2.0"
        assert found[f"{title} to full"] == "70.0 ±2.0"
    assert (found["KL"], found["KL 99 %"]) == ("≥0.0300 ±0.0010", "≥0.5000")
    short, _ = table(report(q4()).rows, short=True)
    assert {"chrF", "BLEU to full", "KL 99 %"}.isdisjoint(short)
    assert "≥" in report_markdown(report(q4(kl_at_least=True)))
    assert "≥" not in report_markdown(report(q4()))


def test_junit_has_a_case_for_each_variant() -> None:
    bad = row("tuned", 0.1, failures=("loses\x00much",)).model_copy(update={"method": "none"})
    (suite,) = Xml.fromstring(junit(report(q4(), bad)))  # noqa: S314 (our own)
    assert [case.get("name") for case in suite] == ["q4", "tuned"]
    assert suite.get("failures") == "1"


# from scores


def evaluation(**more: Any) -> Evaluation:
    recipe = {**RECIPES["perplexity"], "documents": 2, "dtype": "float32", "data": "d" * 64}
    perplexity = Perplexity(3.0, 0.1, 20, (10.0, 11.0), (10, 10), recipe)
    told: dict[str, Any] = {"divergence": None, "answers": None, **more}
    return Evaluation("m", 1000, 4.5, 3, perplexity, **told)


def divergence(kept: int, mean: float = 0.1) -> Divergence:
    recipe = {**RECIPES["kl"], "kept_logits": kept}
    return Divergence(mean, 0.01, 0.5, 0.9, 0.01, 20, (1.0, 1.0), (10, 10), recipe)


def test_every_measure_has_its_line_and_bounds_are_told() -> None:
    recipe = {"pairs": 3, "max_new_tokens": 8, "data": "e" * 64}
    answers = Answers(("x",), 3, 1.0, None, None, recipe)
    tasks = {**RECIPES["tasks"], "versions": {"lm_eval": "0.4.9"}}
    whole = evaluation(
        answers=answers,
        tasks={"arc/acc": TaskScore(0.5, 0.1)},
        task_recipe=tasks,
        speeds={"llama.cpp": 30.0},
        speed_recipe={"runtime": "llama.cpp", "threads": 2, "prompt": (1, 2), "generated": (3,)},
    )
    lines = recipe_lines(evaluation(), evaluation(divergence=divergence(64)), whole)
    assert [line.partition(":")[0] for line in lines] == ["perplexity", "KL", "answers", "tasks", "tokens/s"]
    assert lines[1] == "KL: at least, from the 64 likeliest of 320 tokens, on the same text"
    assert "arc (version 1, 0 shots, 10 documents); lm-evaluation-harness 0.4.9" in lines[3]
    assert "llama.cpp" in lines[4]
    assert "2 threads" in lines[4]
    assert recipe_lines(evaluation(divergence=divergence(320)))[1].startswith("KL: over all 320 tokens")
    for kept, bound in ((64, True), (320, False)):
        variant = Variant("q4", "q4", {"method": "rtn"}, evaluation(divergence=divergence(kept)))
        made = make_report("t", Variant("full", "full", {}, whole), [variant], [], VerifySpec())
        assert made.rows[1].kl_at_least is bound
        assert any("at least" in line for line in made.recipe_lines) is bound
        assert set(made.recipes) == {"perplexity", "kl", "answers", "tasks", "tokens/s"}


def test_figures_that_somebody_broke_are_unknown() -> None:
    scores = evaluation(divergence=divergence(320, math.nan))
    odd = Variant("q4", "q4", {"bits": 10**9}, scores, {"seconds": math.inf, "peak_bytes": -3})
    made = make_report(
        "t", Variant("full", "full", {}, evaluation()), [odd, odd_named(odd)], [], VerifySpec()
    )
    found = made.rows[1]
    assert (found.bits, found.seconds, found.peak_bytes) == (4, None, None)
    assert found.kl is not None
    assert found.kl.value == math.inf
    assert Report.model_validate_json(made.model_dump_json()) == made


def odd_named(variant: Variant) -> Variant:
    return Variant("other", "other", variant.settings, variant.scores, variant.costs)


def test_the_realistic_report_is_its_own_reading() -> None:
    whole = realistic_report()
    assert Report.model_validate_json(whole.model_dump_json()) == whole
    assert isinstance(changes(whole, whole)[0], Change)


def test_a_narrow_terminal_goes_without_some_columns() -> None:
    rows = realistic_report().rows
    whole, _ = table(rows, short=True)
    for width in (200, 140, 100, 80):
        titles, lines = table(rows, short=True, width=width)
        assert {"variant", "loss", "KL", "gate"} <= set(titles) <= set(whole)
        longest = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
        assert sum(longest) + 2 * len(longest) <= width
    assert table(rows, short=True, width=200)[0] == whole
