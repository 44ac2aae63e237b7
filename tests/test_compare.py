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
    wrong = {
        (): "nothing to compare with the model; --method METHODS",
        ("--method", "gptq,gguff"): "there is no method 'gguff'",
        ("--method", "bnb", "--bits", "7"): "--bits 7; some of 1,2,3,4,5,6,8",
        ("--method", "bnb", "--bits", "3,2"): "--method bnb has none of --bits 3,2",
        ("--method", "bnb", "--type", "q4_0"): "--type is for gguf alone",
        ("--method", "bnb", "--samples", "3"): "--samples is no option of bnb",
        ("--bits", "4", str(run / "bnb-8bit")): "--bits without --method",
        ("--method", "gptq", "--damp", "7"): "--damp: ",
        ("--method", "gguf", "--type", "q4_z"): "q4_z",
        (str(tmp_path / "none"),): "none",
        ("--method", "bnb", "--text", str(tmp_path / "none.txt")): "none.txt does not exist",
    }
    for options, pattern in wrong.items():
        code, stdout, stderr = cli("compare", llama, "-o", tmp_path / "out", *options)
        assert (code, stdout) == (2, ""), (options, stderr)
        assert pattern in stderr.splitlines()[-1], options
        assert not (tmp_path / "out").exists(), options


def test_a_candidate_of_another_base(run: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    other = Path(qexport.__file__).parent / "embedded" / "base"
    code, _, stderr = cli("compare", other, run / "bnb-8bit", "-o", tmp_path / "out", "--text", text, *QUICK)
    assert code == 2
    assert "cut the text into different tokens" in stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "report.json").exists()


def test_options_go_where_they_are_known() -> None:
    said: list[str] = []
    specs = variant_specs(
        ["rtn", "gptq", "gguf"], ["4"], ["q4_k_m", "q8_0"], [], {"group_size": 32, "samples": 7}, said.append
    )
    assert [(spec.method, spec.group_size) for spec in specs] == [
        *(("rtn", 32), ("gptq", 32), ("gguf", None), ("gguf", None))
    ]
    assert getattr(specs[1], "samples") == 7  # noqa: B009 - of the calibrated alone
    assert specs[2].type == ("q4_k_m",)
    assert not said


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
