"""Public corpora as files of documents: which split and column, and how rows become documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qexport.calibrate.texts import read_documents
from qexport.errors import CalibrationError, MissingDependencyError, SpecError
from qexport.verification.corpora import corpus_file

# Rows as Hugging Face's Salesforce/wikitext has them.
WIKI = [
    "",
    " = Robert Boulter = \n",
    "",
    " Robert Boulter is an actor . He had a role in 2000 . \n",
    " In 2002 he landed another one . \n",
    "",
    " = = Career = = \n",
    "",
    " He went on . \n",
    " = Du Fu = \n",
    " Du Fu was a poet . \n",
]


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with all that it and we keep below `tmp_path`."""
    found = pytest.importorskip("datasets", reason="needs datasets (qexport[datasets])")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def dataset(directory: Path, **splits: Sequence[dict[str, Any]]) -> str:
    """The name of a local dataset of JSON lines."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return f"hf:{directory}"


def texts(*of: str) -> list[dict[str, Any]]:
    return [{"id": number, "text": text} for number, text in enumerate(of)]


@pytest.mark.usefixtures("datasets")
def test_rows_are_documents(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = ["one\n\ntwo", "  ", "drei \N{SNOWMAN}", " = no title =\nbut a table", ""]
    name = dataset(tmp_path / "web", train=texts("other"), test=texts(*rows))
    file = corpus_file(f"{name}:test")
    assert read_documents(file) == [row.strip() for row in rows if row.strip()]
    assert file.parent == tmp_path / "cache" / "qexport" / "corpora"
    assert "-web-test-rows-" in file.name
    assert capfd.readouterr() == ("", "")
    assert read_documents(corpus_file(f"{name}:train")) == ["other"]
    assert read_documents(corpus_file(f"{name}:test[:1]")) == ["one\n\ntwo"]
    assert corpus_file(name) != file
    assert read_documents(corpus_file(name)) == read_documents(file), "test, where no split is named"
    assert [path for path in file.parent.iterdir() if path.suffix != ".jsonl"] == []


@pytest.mark.usefixtures("datasets")
def test_lines_are_joined_as_published_perplexities_have_them(tmp_path: Path) -> None:
    name = dataset(tmp_path / "wiki", test=texts(*WIKI))
    file = corpus_file(name)
    (record,) = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert record["text"] == "\n\n".join(WIKI)  # GPTQ's get_wikitext2, Hugging Face's guide
    assert "-joined-" in file.name
    without_titles = texts("a line .", "", "another .", "a third .")
    file = corpus_file(dataset(tmp_path / "lines", test=without_titles))
    assert read_documents(file) == ["a line .\n\n\n\nanother .\n\na third ."]
    short = corpus_file(dataset(tmp_path / "short", test=texts("a line", "and one")))
    assert read_documents(short) == ["a line", "and one"], "nothing tells that these belong together"


def test_what_was_written_is_taken_again(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = dataset(tmp_path / "web", test=texts("first"))
    file = corpus_file(name)
    with monkeypatch.context() as without:
        without.setattr(datasets, "load_dataset", None)
        without.setattr(datasets, "get_dataset_config_names", None)
        assert corpus_file(name) == file
    dataset(tmp_path / "web", test=texts("first", "second"))
    assert read_documents(corpus_file(name)) == ["first", "second"]
    assert read_documents(file) == ["first"]


@pytest.mark.usefixtures("datasets")
def test_a_dataset_that_was_saved_to_disk(datasets: Any, tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"sentence": ["a", "b"], "n": [1, 2]})
    one.save_to_disk(tmp_path / "one")
    assert read_documents(corpus_file(f"hf:{tmp_path / 'one'}")) == ["a", "b"], "the only column of strings"
    datasets.DatasetDict(train=one, validation=one.select([1])).save_to_disk(tmp_path / "several")
    assert read_documents(corpus_file(f"hf:{tmp_path / 'several'}")) == ["b"]
    with pytest.raises(CalibrationError, match=r"no split 'dev'; one of train, validation$"):
        corpus_file(f"hf:{tmp_path / 'several'}:dev")
    with pytest.raises(CalibrationError, match=r"saved without splits"):
        corpus_file(f"hf:{tmp_path / 'one'}:train")


@pytest.mark.usefixtures("datasets")
def test_what_is_not_there_is_told_with_what_is(tmp_path: Path) -> None:
    name = dataset(tmp_path / "web", train=texts("a"), dev=texts("b"))
    pairs = dataset(tmp_path / "pairs", test=[{"prompt": "a", "answer": "b", "n": 1}])
    numbers = dataset(tmp_path / "numbers", test=[{"n": 1}])
    empty = dataset(tmp_path / "empty", test=texts("", " "))
    (tmp_path / "nothing").mkdir()
    cases = {
        f"{name}:valid": r"no split 'valid'; one of train, validation$",
        pairs: r"has 2 columns of strings and none named text \(it has prompt, answer, n\)",
        numbers: r"has no columns of strings .*\(it has n\)",
        empty: r"holds no text$",
        f"hf:{tmp_path / 'nowhere'}": r"there is no directory .*nowhere",
        f"hf:{tmp_path / 'nothing'}": r"nothing cannot be read: ",
    }
    for wrong, told in cases.items():
        with pytest.raises(CalibrationError, match=told) as caught:
            corpus_file(wrong)
        assert "\n" not in str(caught.value)
    for wrong in ("hf:", "hf:wikitext", "hf:a/b/c/d", "hf:a//b", "a/b"):
        with pytest.raises(SpecError, match=r"names no corpus; hf:OWNER/DATASET"):
            corpus_file(wrong)
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.usefixtures("datasets")
def test_several_splits_without_a_held_out_one(tmp_path: Path) -> None:
    name = dataset(tmp_path / "web", train=texts("a"))
    assert read_documents(corpus_file(name)) == ["a"], "the only one"
    (tmp_path / "web" / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: one\n"
        "  data_files: [{split: first, path: train.jsonl}, {split: last, path: train.jsonl}]\n"
        "---\n"
    )
    with pytest.raises(CalibrationError, match=r"none named test or validation; one of first, last$"):
        corpus_file(name)
    assert read_documents(corpus_file(f"{name}:last")) == ["a"]


@pytest.mark.slow
@pytest.mark.usefixtures("datasets")
def test_an_unreachable_hub(tmp_path: Path) -> None:
    code = (
        "from qexport.verification.corpora import corpus_file\n"
        "try: corpus_file('hf:Salesforce/wikitext/wikitext-2-raw-v1:test')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    home = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **home, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.startswith(
        "MachineError hf:Salesforce/wikitext/wikitext-2-raw-v1:test cannot be fetched"
    )
    assert ran.stdout.count("\n") == 1


def test_without_datasets_the_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qexport\[datasets\]'"):
        corpus_file("hf:Salesforce/wikitext/wikitext-2-raw-v1:test")
