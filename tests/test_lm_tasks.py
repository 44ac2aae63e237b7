"""Tasks of lm_eval on our own model: its scores are those computed by hand from the log-likelihoods."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qexport.errors import CalibrationError, MissingDependencyError, SpecError
from qexport.events import Advanced, Event, Finished, Started
from qexport.formats.opening import open_checkpoint
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.modeling.whole import load_whole
from qexport.verification import lm_tasks
from qexport.verification.lm_tasks import run_tasks

WORDS = ("small", "model", "reads", "many", "words", "and", "learns", "to", "write", "them")
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
  cache_dir: "{cache}"
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3.0}}
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
  cache_dir: "{cache}"
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["\\n\\n"], do_sample: false}}
filter_list:
  - name: first
    filter: [{{function: take_first}}]
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def lm_eval() -> None:
    pytest.importorskip("lm_eval", reason="needs lm_eval (qexport[tasks])")


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    chance = random.Random(7)
    return [
        {
            "question": " ".join(chance.choices(WORDS, k=5)),
            "choices": [" ".join(chance.choices(WORDS, k=1 + k)) for k in range(4)],
            "gold": chance.randrange(4),
        }
        for _ in range(30)
    ]


@pytest.fixture(scope="module")
def tasks(questions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two tasks over one local file."""
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        filled = text.format(data=data, cache=directory / "cache", metric="exact_match")
        (directory / f"{name}.yaml").write_text(filled)
    return directory


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    """The model with a head of its own, though its config ties it: as a quantized head is stored."""
    found = load_whole(build_skeleton(llama), open_checkpoint(llama))
    scale = torch.linspace(0.5, 1.5, found.lm_head.weight.shape[0])[:, None]
    found.lm_head.weight = nn.Parameter(found.lm_head.weight.detach() * scale)
    return found


def likelihoods(model: Any, tokenizer: Any, question: dict[str, Any]) -> list[float]:
    """log p(" " + choice | question), one choice at a time, unpadded."""
    found = []
    for choice in question["choices"]:
        start = len(tokenizer(question["question"]).input_ids)
        ids = torch.tensor(tokenizer(f"{question['question']} {choice}").input_ids)
        with torch.no_grad():
            logs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        told = logs.gather(1, ids[1:, None])[start - 1 :]
        found.append(float(told.double().sum()))
    return found


def share(hits: Sequence[bool]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.mean(hits), statistics.stdev(map(int, hits)) / math.sqrt(len(hits))


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval")
def test_scores_are_those_of_the_log_likelihoods(
    model: Any, llama: Path, tasks: Path, questions: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(llama)
    tokenizer.pad_token = None
    head, events = model.lm_head.weight.detach().clone(), list[Event]()
    random.seed(1)
    before = random.getstate(), torch.get_rng_state(), os.environ.get("DISABLE_MULTIPROC")
    result = run_tasks(model, tokenizer, [str(tasks)], batch_size=8, on_event=events.append)
    assert torch.equal(model.lm_head.weight, head)
    assert "tie_weights" not in vars(model)
    assert tokenizer.pad_token is None
    assert (random.getstate(), os.environ.get("DISABLE_MULTIPROC")) == (before[0], before[2])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert capsys.readouterr() == ("", "")

    logs = [likelihoods(model, tokenizer, question) for question in questions]
    hits = [max(range(4), key=row.__getitem__) == q["gold"] for row, q in zip(logs, questions, strict=True)]
    normed = [
        max(range(4), key=lambda k: row[k] / len(q["choices"][k])) == q["gold"]
        for row, q in zip(logs, questions, strict=True)
    ]
    assert 0 < sum(hits) != sum(normed) > 0, "the questions tell nothing"
    assert result.scores.keys() == {
        "tiny_choice/acc",
        "tiny_choice/acc_norm",
        "tiny_answer/exact_match,first",
    }
    for name, expected in (("acc", share(hits)), ("acc_norm", share(normed))):
        score = result.scores[f"tiny_choice/{name}"]
        assert (score.value, score.standard_error) == pytest.approx(expected)
    assert result.recipe["tasks"] == {
        "tiny_choice": {"version": 3.0, "shots": 0, "documents": 30},
        "tiny_answer": {"version": 1.0, "shots": 0, "documents": 30},
    }
    assert result.recipe["versions"]["lm_eval"]
    started = [event.total for event in events if isinstance(event, Started)]
    assert sorted(started) == [30, 120]
    assert sum(event.steps for event in events if isinstance(event, Advanced)) == 150
    assert sum(isinstance(event, Finished) for event in events) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval")
def test_one_file_and_its_first_documents(
    model: Any, llama: Path, tasks: Path, questions: list[dict[str, Any]]
) -> None:
    tokenizer = load_tokenizer(llama)
    result = run_tasks(model, tokenizer, [str(tasks / "choice.yaml")], limit=9, batch_size=4)
    logs = [likelihoods(model, tokenizer, question) for question in questions[:9]]
    hits = [
        max(range(4), key=row.__getitem__) == q["gold"] for row, q in zip(logs, questions[:9], strict=True)
    ]
    score = result.scores["tiny_choice/acc"]
    assert (score.value, score.standard_error) == pytest.approx(share(hits))
    assert result.recipe["limit"] == 9
    assert result.recipe["tasks"]["tiny_choice"]["documents"] == 9


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval")
def test_what_cannot_be_run_is_told_in_a_line(
    model: Any, llama: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(llama)

    def told(content: str, **values: str) -> str:
        file = tmp_path / "task.yaml"
        data = {"data": str(tasks / "questions.jsonl"), "cache": str(tmp_path / "cache")}
        file.write_text(content.format(**{**data, "metric": "exact_match", **values}))
        with pytest.raises((SpecError, CalibrationError)) as caught:
            run_tasks(model, tokenizer, [str(file)])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    no_file = told(CHOICE, data=str(tmp_path / "no.jsonl"))
    assert no_file.startswith(f"the data of the task {tmp_path / 'task.yaml'} cannot be read: ")
    assert "no.jsonl" in no_file
    assert "needs the metric code_eval, code from the Hub" in told(ANSWER, metric="code_eval")
    assert "runs code that the model writes" in told(ANSWER + "unsafe_code: true\n")
    assert "lm_eval cannot run the task" in told(CHOICE.replace("question}", "nothing.of.it}"))
    assert "cannot run the task" in told("output_type: multiple_choice\n")
    assert "cannot run the task" in told("task: [\n")
    with pytest.raises(SpecError, match="does not exist"):
        run_tasks(model, tokenizer, [str(tmp_path / "none.yaml")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="holds no task"):
        run_tasks(model, tokenizer, [str(tmp_path / "empty")])

    # lm_eval's own 14,000 files take it many seconds to read: a few stand for them
    manager = lm_tasks._manager((tasks,), False, ())
    monkeypatch.setattr(lm_tasks, "_manager", lambda directories, defaults, state: manager)
    with pytest.raises(SpecError, match=r"no task 'tiny_chioce'; did you mean 'tiny_choice'\?"):
        run_tasks(model, tokenizer, ["tiny_chioce"])


def test_without_lm_eval_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qexport\[tasks\]'"):
        run_tasks(None, None, ["arc_easy"])
