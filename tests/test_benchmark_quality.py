"""benchmarks/quality.py: equal windows for every tool, rows that are kept, the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.peers import Job, run
from benchmarks.quality import Case, cases, keep, read_rows
from benchmarks.quality_models import LENGTH, MODELS, SAMPLES, calibration
from benchmarks.quality_table import Row, markdown, summary
from qexport.calibrate.texts import read_documents
from qexport.calibrate.windows import text_tokens
from qexport.modeling.tokenizer import load_tokenizer

EMBEDDED = MODELS["embedded"]


def test_seed_zero_takes_the_first_tokens_in_the_order_of_the_documents(tmp_path: Path) -> None:
    _, windows = calibration("embedded", EMBEDDED.base, 0, tmp_path)
    tokenizer = load_tokenizer(EMBEDDED.base)
    stream: list[int] = []
    for document in read_documents(EMBEDDED.calibration):
        stream += text_tokens(document, tokenizer)
    assert [len(window) for window in windows] == [LENGTH] * SAMPLES
    at = 0
    for window in windows:  # one that begins within a document is opened with BOS
        room = window if stream[at] == tokenizer.bos_token_id else window[1:]
        assert window[0] == tokenizer.bos_token_id
        assert room == stream[at : at + len(room)]
        at += len(room)


def test_another_seed_takes_other_windows_and_always_the_same(tmp_path: Path) -> None:
    made = [calibration("embedded", EMBEDDED.base, seed, tmp_path)[1] for seed in (0, 1, 1)]
    assert made[0] != made[1] == made[2]


def test_seeds_are_for_calibrated_methods_and_widths_for_those_that_have_them() -> None:
    found = cases(["embedded"], ["bnb", "q-gptq"], [8, 4, 3], [0, 1])
    bnb = [case for case in found if case.method == "bnb"]
    assert [(case.bits, case.seed) for case in bnb] == [(8, 0), (4, 0)]
    assert len(found) - len(bnb) == 3 * 2


def test_a_row_takes_the_place_of_the_one_that_it_repeats(tmp_path: Path) -> None:
    file = tmp_path / "results" / "quality.json"
    case = {"model": "m", "method": "rtn", "bits": 4, "seed": 0}
    keep(file, {**case, "error": "out of luck"})
    keep(file, {**case, "bits": 3, "kl": 0.2})
    keep(file, {**case, "kl": float("nan")})
    assert read_rows(file) == [{**case, "bits": 3, "kl": 0.2}, {**case, "kl": None}]


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "quality.json"
    keep(file, {"model": "embedded", "method": "rtn", "bits": 4, "seed": 0, "kl": 0.1})
    wanted = cases(["embedded"], ["rtn"], [4], [0])
    monkeypatch.setattr(quality, "Bench", None)  # it would be called
    quality.measure(wanted, file, tmp_path, again=False)
    with pytest.raises(TypeError):
        quality.measure(wanted, file, tmp_path, again=True)


def test_the_table_has_means_of_seeds_the_best_in_bold_and_reasons() -> None:
    full: Row = {"model": "m", "method": "full", "perplexity": 20.0, "perplexity_error": 0.5, "tokens": 1000}
    common: Row = {"model": "m", "group_size": 32, "rise": 0.05, "rise_error": 0.01, "kl_error": 0.001}

    def took(seconds: float, cpu_seconds: float) -> Row:
        return {"seconds": seconds, "cpu_seconds": cpu_seconds}

    rows = [
        full,
        {**common, "method": "a", "label": "A", "bits": 4, "seed": 0, "kl": 0.02} | took(4.0, 7.0),
        {**common, "method": "a", "label": "A", "bits": 4, "seed": 1, "kl": 0.04} | took(5.0, 9.0),
        {**common, "method": "b", "label": "B", "bits": 4, "seed": 0, "kl": 0.05} | took(0.96, 1.0),
        {"model": "m", "method": "b", "label": "B", "bits": 3, "seed": 0, "group_size": 32, "error": "No: 3"},
    ]
    table = markdown(rows, ["b", "a"]).splitlines()
    assert "| B | 32 | – | 0.050 ± 0.001; +5.00 ± 1.00 % | (1) | – | 1.0 (1.0) |" in table
    assert "| A | 32 | – | **0.030 ± 0.001**; +5.00 ± 1.00 % | – | – | 4.0 (7.0) |" in table
    assert "1. No: 3" in table
    assert "66.7%" in table[-1]  # (.04 - .02) / .03


def test_the_summary_puts_the_best_peer_beside_ours() -> None:
    def row(method: str, ours: bool, kl: float, bits: int = 4) -> Row:
        return {"model": "m", "method": method, "label": method, "ours": ours, "bits": bits, "kl": kl}

    rows = [row("a", False, 0.0412), row("b", False, 0.03), row("q", True, 0.0123), row("b", False, 0.02, 2)]
    rows += [row("b", False, 0.05), row("r", True, 3.456, 3)]
    table = summary(rows, ["q", "nothing", "r"]).splitlines()
    assert table[0] == "| model | bits | best peer | its KL | q | r |"
    assert table[2:] == ["| m | 4 | b | 0.0400 | **0.0123** | – |"]


def test_allotted_bits_are_given_the_uniform_ones_size() -> None:
    case = Case("m", "q-allotted", 3, 1)
    rows: list[Row] = [
        {"model": "m", "method": "q-gptq", "bits": 3, "seed": 0, "size_bytes": 5},
        {"model": "m", "method": "q-gptq", "bits": 3, "seed": 1, "size_bytes": 7},
    ]
    assert quality._budget(case, rows) == {"target_size": 7}
    assert quality._budget(replace(case, method="q-gptq"), rows) == {}
    with pytest.raises(SystemExit, match="run that first"):
        quality._budget(replace(case, bits=2), rows)


@pytest.mark.slow
def test_a_model_is_quantized_by_qexport_and_by_a_peer_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hqq", reason="needs hqq")
    little = replace(EMBEDDED, adapter=None, answers=None, documents=60)
    monkeypatch.setitem(MODELS, "embedded", little)
    bench = quality.Bench("embedded", tmp_path)
    ours, theirs = (bench.measure(Case("embedded", method, 4, 0), []) for method in ("q-gptq", "rtn"))
    assert "error" not in ours
    assert "error" not in theirs
    assert 0 < ours["kl"] < theirs["kl"]
    assert ours["seconds"] > 0
    assert {"hqq", "torch"} <= set(theirs["versions"])


def test_a_tool_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    job: Job = {
        "model": str(tmp_path / "nothing"),
        "out": str(tmp_path / "out"),
        "bits": 4,
        "group_size": 32,
        "options": {"method": "rtn"},
        "ids": [[1, 2]],
        "calibration": "",
        "seed": 0,
    }
    outcome = run("ours", job, tmp_path / "log")
    assert "nothing" in outcome["error"]
    assert "Traceback" in (tmp_path / "log").read_text()
