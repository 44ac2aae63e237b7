"""`qexport compare` and `qexport report`: what is asked for is made, measured, told, and made only once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

import qexport
from qexport.errors import CorruptFileError, SpecError
from qexport.graph.variants import variant_specs
from qexport.report.content import SCHEMA, Report
from qexport.report.files import REPORT_FILES, read_report, write_report
from qexport.report.several import changes, merged
from qexport.specs import VerifySpec, spec_of
from tests.conftest import RunCli
from tests.tiny import tiny_model

QUICK = ("--window", "64", "--max-documents", "12", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    told = [
        {"prompt": f"a small model {word}", "reference": f"many words {word}"}
        for word in ["reads", "learns", "again"]
    ]
    path.write_text("\n".join(map(json.dumps, told)))
    return path


@pytest.fixture(scope="module")
def run(llama: Path, text: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of four variants and a finished file."""
    home = tmp_path_factory.mktemp("run")
    qexport.quantize(llama, home / "mine", spec_of("gguf", type="q4_0"))
    file = next((home / "mine").glob("*.gguf"))
    specs = [spec_of("bnb", bits=8), spec_of("rtn", bits=4), spec_of("rtn", bits=2)]
    spec = VerifySpec(
        text=str(text), pairs=str(pairs), window=64, max_documents=12, max_new_tokens=8, max_loss="100%"
    )
    qexport.compare(llama, home / "out", specs, candidates=[file], verify=spec, title="a comparison")
    return home / "out"


def by_name(report: Report) -> dict[str, Any]:
    return {row.variant: row for row in report.rows}


def test_the_report_tells_every_measure(run: Path, llama: Path, text: Path) -> None:
    report = read_report(run)
    rows = by_name(report)
    assert list(rows) == ["full", "bnb-8bit", "rtn-4bit", "rtn-2bit", next(n for n in rows if "Q4_0" in n)]
    full, eight, two, mine = (rows[name] for name in ("full", "bnb-8bit", "rtn-2bit", list(rows)[-1]))
    assert (full.loss, full.kl, full.text_full) == (None, None, None)
    assert full.text is not None
    assert eight.kl.value < rows["rtn-4bit"].kl.value < two.kl.value
    assert two.kl_p99 > two.kl.value > 0
    assert eight.same_top.value > two.same_top.value
    assert eight.text_full.bleu.low <= eight.text_full.bleu.value <= eight.text_full.bleu.high
    assert (mine.method, mine.format, mine.bits) == ("gguf", "gguf", 4)
    assert Path(mine.path).is_absolute()  # it lies elsewhere
    assert eight.path == "bnb-8bit"
    assert eight.seconds > 0
    # the scores are those of `evaluate`
    spec = VerifySpec(text=str(text), window=64, max_documents=12)
    alone = qexport.evaluate(run / "bnb-8bit", spec).perplexity
    assert eight.perplexity.value == alone.value
    assert full.perplexity.value == qexport.evaluate(llama, spec).perplexity.value
    assert eight.loss.value == pytest.approx(alone.value / full.perplexity.value - 1, abs=1e-12)


def test_pairs_layers_samples_and_recipes(run: Path) -> None:
    report = read_report(run)
    names = [row.variant for row in report.rows[1:]]
    found = {(c.first, c.second, c.measure): c for c in report.comparisons}
    assert len(found) == 2 * math.comb(len(names), 2)
    gap = found["bnb-8bit", "rtn-2bit", "kl"]
    assert gap.more_than_noise
    assert gap.difference > 0
    rows = by_name(report)
    assert gap.difference == pytest.approx(rows["rtn-2bit"].kl.value - rows["bnb-8bit"].kl.value, rel=1e-6)
    assert set(report.layers.errors) == set(names)
    for variant in names:  # GGUF's tensors go by transformers' names
        known = dict(zip(report.layers.names, report.layers.errors[variant], strict=True))
        assert 0 < (known["model.layers.0.self_attn.q_proj"] or 0) < 1
    assert [sample.reference for sample in report.samples] == [
        f"many words {w}" for w in ("reads", "learns", "again")
    ]
    assert set(report.samples[0].answers) == {"full", *names}
    assert set(report.recipes) == {"perplexity", "kl", "answers"}
    for recipe in report.recipes.values():
        assert {"data", "versions", "dtype"} <= set(recipe)
    assert "sig" not in report.verdict
    assert report.verdict


def test_the_files(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= set(REPORT_FILES)
    assert not list((run / "scores").glob("*.logits"))  # they were needed until the end
    markdown = (run / "report.md").read_text()
    assert markdown.startswith("# a comparison\n")
    assert "| KL |" in markdown
    schema = Report.model_json_schema()
    content = json.loads((run / "report.json").read_text())
    assert set(content) == set(schema["properties"])


def test_a_second_run_measures_only_what_is_new(
    run: Path, llama: Path, text: Path, pairs: Path, tmp_path: Path, cli: RunCli
) -> None:
    out = shutil.copytree(run, tmp_path / "out")
    given = ("compare", llama, "-o", out, "--text", text, "--pairs", pairs, *QUICK, "--title", "a comparison")
    code, stdout, stderr = cli(*given, "--method", "bnb,rtn", "--bits", "8,4,2", "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    assert set(result["ran"]) == {"verify bnb-4bit", "bnb-4bit", "rtn-8bit", "verify rtn-8bit", "report"}
    assert [row["variant"] for row in result["report"]["rows"]] == [
        *("full", "bnb-8bit", "bnb-4bit", "rtn-8bit", "rtn-4bit", "rtn-2bit")
    ]
    assert "bnb is not made with 2 bits" in stderr


def test_the_gates(run: Path, llama: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    given = ("compare", llama, run / "bnb-8bit", run / "rtn-2bit", "--text", text, *QUICK)
    out, xml = tmp_path / "out", tmp_path / "gates.xml"
    code, stdout, stderr = cli(*given, "-o", out, "--max-kl", "0.01", "--max-loss", "5%", "--junit", xml)
    assert code == 1
    assert stderr.splitlines()[-1].startswith("error: rtn-2bit loses ")
    assert "rtn-2bit has a KL divergence of " in stderr.splitlines()[-1]
    assert [line.split("\t")[0] for line in stdout.splitlines()] == [
        "variant",
        "full",
        "bnb-8bit",
        "rtn-2bit",
    ]
    assert stdout.splitlines()[-1].endswith("\tFAILED")
    suite = Xml.parse(xml).getroot()[0]  # noqa: S314 - our own file
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failed = {case.get("name"): len(case.findall("failure")) for case in suite}
    assert failed == {"bnb-8bit": 0, "rtn-2bit": 1}
    # gates are no part of what determines the scores
    code, _, stderr = cli(*given, "-o", out, "--max-kl", "100")
    assert code == 0
    assert stderr.count(": stands") == 3


def test_wrong_asks(run: Path, llama: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b")
    wrong = {
        (): "nothing to compare with the model; --method METHODS",
        ("--method", "gptq,gguff"): "there is no method 'gguff'",
        ("--method", "bnb", "--bits", "7"): "--bits 7; some of 1,2,3,4,5,6,8",
        ("--method", "bnb", "--bits", "3,2"): "--method bnb has none of --bits 3,2",
        ("--method", "bnb", "--type", "q4_0"): "--type is for gguf alone",
        ("--method", "bnb", "--samples", "3"): "--samples is no option of bnb",
        ("--bits", "4", str(run / "bnb-8bit")): "--bits without --method",
        ("--method", "gptq", "--damp", "7"): "--damp 7.0: it should be less than 1",
        ("--method", "gguf", "--type", "q4_z"): "q4_z",
        (str(tmp_path / "none"),): "none",
        ("--method", "bnb", "--text", str(tmp_path / "none.txt")): "none.txt does not exist",
        ("--method", "bnb", "--text", str(short)): "tokens to score; at least 100",
        (
            "--method",
            "bnb",
            "--text",
            str(text),
            "--languages",
            "de",
        ): "--languages de; two, source and target",
        (str(run / "bnb-8bit"), str(run / "bnb-8bit"), "--text", str(text)): "is to be measured twice",
    }
    for options, pattern in wrong.items():
        code, stdout, stderr = cli("compare", llama, "-o", tmp_path / "out", *options)
        assert (code, stdout) == (2, ""), (options, stderr)
        assert pattern in stderr.splitlines()[-1], options
        assert not (tmp_path / "out").exists(), options


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, there 128"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, there 2"),
        ({"seed": 7}, "their embeddings have nothing in common"),
    ],
)
def test_a_candidate_of_another_base(
    llama: Path, text: Path, tmp_path: Path, cli: RunCli, changes: dict[str, Any], told: str
) -> None:
    other = tiny_model(tmp_path / "other", **changes)
    qexport.quantize(other, tmp_path / "candidate", spec_of("bnb", bits=8))
    given = ("--text", text, *QUICK)
    for call in (
        ("compare", llama, tmp_path / "candidate", "-o", tmp_path / "out"),
        ("verify", tmp_path / "candidate", "--reference", llama),
    ):
        code, stdout, stderr = cli(*call, *given)
        assert (code, stdout) == (2, "")
        assert f"candidate is no variant of {llama}: {told}" in stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_full_precision_candidate_is_a_variant(llama: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "copy")
    spec = VerifySpec(text=str(text), window=64, max_documents=12)
    report = qexport.compare(llama, tmp_path / "out", candidates=[tmp_path / "copy"], verify=spec)
    assert "copy at 100 % of the size is a tie with the full model" in report.verdict


def test_scores_that_somebody_changed_are_measured_again(
    run: Path, llama: Path, text: Path, pairs: Path, tmp_path: Path, cli: RunCli
) -> None:
    out = shutil.copytree(run, tmp_path / "out")
    before = read_report(out)
    scores = {name: out / "scores" / f"{name}.json" for name in ("bnb-8bit", "rtn-4bit", "rtn-2bit", "full")}
    better = json.loads(scores["rtn-2bit"].read_text())
    better["scores"]["divergence"]["mean"] = 1e-6
    scores["rtn-2bit"].write_text(json.dumps(better))
    scores["bnb-8bit"].write_text('{"key": 1}')
    scores["rtn-4bit"].write_text("[]")
    given = ("compare", llama, "-o", out, "--text", text, "--pairs", pairs, *QUICK, "--title", "a comparison")
    code, stdout, stderr = cli(*given, "--method", "bnb,rtn", "--bits", "8,4,2", "--json")
    assert code == 0, stderr
    ran = json.loads(stdout)["ran"]
    assert {"verify bnb-8bit", "verify rtn-4bit", "verify rtn-2bit"} <= set(ran)
    assert "verify full" not in ran
    assert by_name(read_report(out))["rtn-2bit"].kl == by_name(before)["rtn-2bit"].kl
    assert "are not there any more: computing them again" in stderr


def test_a_base_that_moved(llama: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    given = ("-o", tmp_path / "out", "--text", text, *QUICK, "--method", "rtn", "--bits")
    assert cli("compare", base, *given, "8")[0] == 0
    base.rename(tmp_path / "elsewhere")
    code, stdout, stderr = cli("compare", tmp_path / "elsewhere", *given, "8,4", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["skipped"] == ["verify full", "rtn-8bit", "verify rtn-8bit"]


def test_places_where_no_report_can_be(
    run: Path, llama: Path, text: Path, tmp_path: Path, cli: RunCli
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "file").write_text("x")
    given = ("compare", model, run / "bnb-8bit", "--text", text, *QUICK)
    for options, told in (
        (("-o", model), "is a model"),
        (("-o", tmp_path / "file"), "is no directory"),
        (("-o", tmp_path / "out", "--junit", tmp_path), "--junit"),
    ):
        code, stdout, stderr = cli(*given, *options)
        assert (code, stdout) == (2, "")
        assert told in stderr.splitlines()[-1]
    assert {file.name for file in model.iterdir()} == {file.name for file in llama.iterdir()}
    assert not (tmp_path / "out").exists()


def test_a_card_of_the_users_that_cannot_be_read_is_left_alone(
    llama: Path, text: Path, tmp_path: Path, cli: RunCli
) -> None:
    given = ("compare", llama, "-o", tmp_path / "out", "--text", text, *QUICK, "--method", "rtn", "--bits")
    assert cli(*given, "8")[0] == 0
    card = tmp_path / "out" / "rtn-8bit" / "README.md"
    card.write_text("---\nlicense: [mit\n---\n")
    code, _, stderr = cli(*given, "8,4", "--json")
    assert code == 0, stderr
    assert "no model card: " in stderr
    assert card.read_text() == "---\nlicense: [mit\n---\n"
    assert (tmp_path / "out" / "rtn-4bit" / "README.md").is_file()


def test_a_gguf_file_beside_somebody_elses_output_is_not_of_it(
    run: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(run / "bnb-8bit", tmp_path / "home")
    qexport.quantize(llama, tmp_path / "made", spec_of("gguf", type="q8_0"))
    file = next((tmp_path / "made").glob("*.gguf"))
    shutil.copy(file, tmp_path / "foreign.gguf")
    shutil.copy(run / "bnb-8bit" / "qexport.json", tmp_path / "qexport.json")
    spec = VerifySpec(text=str(text), window=64, max_documents=3)
    report = qexport.compare(
        llama, tmp_path / "out", candidates=[tmp_path / "foreign.gguf", home], verify=spec
    )
    rows = by_name(report)
    assert (rows["foreign"].method, rows["foreign"].seconds) == ("gguf", None)
    assert rows["home"].method == "bnb"
    # and figures that somebody broke are unknown, not fatal
    manifest = json.loads((home / "qexport.json").read_text())
    manifest["figures"] = {"seconds": "abc", "tensor_errors": 3}
    manifest["recipe"]["options"]["solver"] = ["x"]
    (home / "qexport.json").write_text(json.dumps(manifest))
    report = qexport.compare(llama, tmp_path / "out2", candidates=[home], verify=spec)
    assert by_name(report)["home"].seconds is None


def test_options_go_where_they_are_known() -> None:
    said: list[str] = []
    specs = variant_specs(
        ["rtn", "gptq", "gguf"], ["4"], ["q4_k_m", "q8_0"], [], {"group_size": 32, "samples": 7}, said.append
    )
    assert [(spec.method, spec.group_size) for spec in specs] == [
        *(("rtn", 32), ("gptq", 32), ("gguf", None), ("gguf", None))
    ]
    assert getattr(specs[1], "samples") == 7  # noqa: B009 - of the calibrated alone
    # as for `qexport quantize`: who gives samples wants GGUF to heed them
    assert [(spec.type, spec.solver) for spec in specs[2:]] == [
        *((("q4_k_m",), "importance"), (("q8_0",), "importance"))
    ]
    (plain,) = variant_specs(["gguf"], [], ["q4_k_m"], [], {"skip": ("x",)}, said.append)
    assert plain.solver == "search"
    assert not said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "gptq,awq", "--bits", "3.5"), "in an AWQ checkpoint"),
        (("--method", "gptq", "--bits", "1.5"), "an average from 2 to 8"),
    ],
)
def test_budgets_that_cannot_be_are_told_at_once(
    options: tuple[str, ...], told: str, llama: Path, text: Path, tmp_path: Path, cli: RunCli
) -> None:
    for dry in (("--dry-run",), ()):
        code, _, stderr = cli("compare", llama, "-o", tmp_path / "out", *options, "--text", text, *dry)
        assert code == 2, stderr
        assert told in " ".join(stderr.split())
        assert not (tmp_path / "out").exists()


def test_reports_render_again_merge_and_compare(
    run: Path, tmp_path: Path, cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (run / name).read_bytes() for name in REPORT_FILES}
    again = shutil.copytree(run, tmp_path / "again")
    for name in REPORT_FILES[1:]:
        (again / name).unlink()
    code, stdout, _ = cli("report", again)
    assert code == 0
    assert {name: (again / name).read_bytes() for name in REPORT_FILES} == before
    assert stdout.startswith("variant\t")
    # two runs with the same names go apart, and keep their numbers
    code, _, stderr = cli("report", run, again, "-o", tmp_path / "both", "--title", "both")
    assert code == 0, stderr
    both = read_report(tmp_path / "both")
    assert len(both.rows) == 2 * len(read_report(run).rows) - 1
    assert {"rtn-2bit (out)", "rtn-2bit (again)"} <= {row.variant for row in both.rows}
    # against a baseline
    report = read_report(run)
    worse = [
        row.model_copy(update={"kl": row.kl.model_copy(update={"value": 3 * row.kl.value})})
        if row.kl
        else row
        for row in report.rows
    ]
    write_report(report.model_copy(update={"rows": tuple(worse)}), tmp_path / "worse")
    code, stdout, stderr = cli("report", tmp_path / "worse", "--baseline", run, "--fail-on-regression")
    assert code == 1
    assert "worse than the baseline: bnb-8bit (KL)" in stderr
    code, stdout, _ = cli("report", run, "--baseline", tmp_path / "worse", "--json")
    assert code == 0
    assert {c["better"] for c in json.loads(stdout)["changes"] if c["measure"] == "KL"} == {True}
    assert cli("report", run, "--baseline", run, "--fail-on-regression")[0] == 0


def test_reports_that_do_not_fit(run: Path, tmp_path: Path, cli: RunCli) -> None:
    report = read_report(run)
    text = {**report.recipes["perplexity"], "data": "another"}
    other = report.model_copy(update={"recipes": {"perplexity": text}})
    with pytest.raises(SpecError, match=r"measured otherwise: data .* and another"):
        merged([("a", report), ("b", other)])
    first = report.rows[0].model_copy(update={"perplexity": report.rows[1].perplexity})
    with pytest.raises(SpecError, match="other full-precision models"):
        merged([("a", report), ("b", report.model_copy(update={"rows": (first, *report.rows[1:])}))])
    alone = report.model_copy(update={"rows": report.rows[:1]})
    with pytest.raises(SpecError, match="no variant in common"):
        changes(report, alone)
    told = {
        (): "no directory with a report",
        (str(run), str(run)): "several reports; -o DIR",
        (str(tmp_path),): "holds no report.json",
        (str(run), "--fail-on-regression"): "--fail-on-regression; --baseline DIR",
    }
    for options, pattern in told.items():
        code, _, stderr = cli("report", *options)
        assert code == 2
        assert pattern in stderr
    assert json.loads(cli("report", "--schema")[1])["title"] == "Report"


def test_damaged_reports(run: Path, tmp_path: Path) -> None:
    content = json.loads((run / "report.json").read_text())
    file = tmp_path / "report.json"
    for change, pattern in (
        ({"schema_version": SCHEMA + 1}, "no report of this version"),
        ({"rows": [{"variant": "full"}]}, "rows.0.path: field required"),
        ({"extra": 1}, "extra: extra inputs"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(CorruptFileError, match=pattern):
            read_report(tmp_path)
    file.write_text("{")
    with pytest.raises(CorruptFileError):
        read_report(tmp_path)


def test_a_broken_models_perplexity_is_infinite(run: Path, tmp_path: Path) -> None:
    report = read_report(run)
    broken = report.rows[-1].model_copy(
        update={"perplexity": report.rows[-1].perplexity.model_copy(update={"value": math.inf})}
    )
    write_report(report.model_copy(update={"rows": (*report.rows[:-1], broken)}), tmp_path / "out")
    assert read_report(tmp_path / "out").rows[-1].perplexity.value == math.inf
    json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
