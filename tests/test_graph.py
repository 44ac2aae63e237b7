"""Recipes and their tasks: wrong keys are told, standing results are skipped, changed ones made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import qexport
from qexport.checkpoint.manifest import MANIFEST_FILE
from qexport.errors import AdapterError, OutputExistsError, RecipeError, SpecError
from qexport.graph.build import build, plan
from qexport.graph.recipe import AnyRecipe, parse_recipe
from qexport.graph.run import ExportResult
from qexport.graph.tasks import QuantizeTask
from qexport.report.content import Row
from tests.conftest import RunCli
from tests.tiny import tiny_adapter

STEPS = [
    "merge",
    "shard",
    "verify full",
    "bnb-8bit",
    "verify bnb-8bit",
    "gptq-3bit-g32",
    "verify gptq-3bit-g32",
    "report",
]


@pytest.fixture
def content(llama: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe with every kind of task, on the tiny model."""
    return {
        "base": str(llama),
        "adapters": str(tiny_adapter(tmp_path / "adapter", llama)),
        "output": str(tmp_path / "out"),
        "shard": {"max_shard_size": "300KB"},
        "quantize": [
            {"method": "bnb", "bits": [8]},
            {
                "method": "gptq",
                "bits": 3,
                "group_size": 32,
                "calibration": str(text),
                "samples": 8,
                "sequence_length": 32,
            },
        ],
        "verify": {"text": str(text), "window": 32, "max_documents": 12},
    }


def parsed(content: dict[str, Any]) -> AnyRecipe:
    return parse_recipe(yaml.safe_dump(content), "recipe.yaml")


def rows(result: ExportResult) -> tuple[Row, ...]:
    assert result.report is not None
    return result.report.rows


def test_a_second_run_does_nothing(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = parsed(content)
    first = qexport.export(recipe)
    assert list(first.ran) == STEPS
    assert [row.variant for row in rows(first)] == ["full", "bnb-8bit", "gptq-3bit-g32"]
    report = (tmp_path / "out" / "report.json").read_bytes()
    again = qexport.export(recipe)
    assert list(again.skipped) == STEPS[:-1]
    assert rows(again) == rows(first)
    assert (tmp_path / "out" / "report.json").read_bytes() == report


def test_only_what_changed_is_made_anew(content: dict[str, Any], tmp_path: Path) -> None:
    qexport.export(parsed(content))
    content["quantize"][1]["damp"] = 0.05
    assert list(qexport.export(parsed(content)).ran) == ["gptq-3bit-g32", "verify gptq-3bit-g32", "report"]
    # a byte of an output changes: it does not stand any more, and is made anew as it was
    weights = tmp_path / "out" / "bnb-8bit" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert list(qexport.export(parsed(content)).ran) == ["bnb-8bit", "report"]
    assert weights.read_bytes() == whole
    # the text changes: all scores go, no model does
    text = tmp_path / "other.txt"
    text.write_text("a small model reads many words " * 20)
    content["verify"]["text"] = str(text)
    assert list(qexport.export(parsed(content)).ran) == [
        s for s in STEPS if s.startswith(("verify", "report"))
    ]


def test_an_output_of_somebody_elses_is_not_replaced(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out" / "merged").mkdir(parents=True)
    (tmp_path / "out" / "merged" / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="is there already and was not made by qexport"):
        qexport.export(parsed(content))


def test_a_stray_weights_file_is_noticed(content: dict[str, Any], tmp_path: Path, llama: Path) -> None:
    qexport.export(parsed(content))
    # a single file counts before an index: it would be read in the place of what was written
    (tmp_path / "out" / "sharded" / "model.safetensors").write_bytes(
        (llama / "model.safetensors").read_bytes()
    )
    again = qexport.export(parsed(content))
    assert "shard" in again.ran
    assert "bnb-8bit" in again.skipped
    assert not (tmp_path / "out" / "sharded" / "model.safetensors").exists()


def test_a_report_of_somebody_elses_is_not_replaced(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("mine")
    with pytest.raises(OutputExistsError, match="is no report of qexport's"):
        qexport.export(parsed(content))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]


def test_outputs_carry_their_recipe_and_figures(content: dict[str, Any], tmp_path: Path) -> None:
    result = qexport.export(parsed(content))
    for name in ("merged", "sharded", "bnb-8bit", "gptq-3bit-g32"):
        manifest = json.loads((tmp_path / "out" / name / MANIFEST_FILE).read_text())
        assert set(manifest) == {"qexport", "key", "recipe", "versions", "figures", "files"}
        assert manifest["figures"]["peak_bytes"] > 0
    assert manifest["recipe"]["options"]["group_size"] == 32
    assert manifest["figures"]["perplexity"] == rows(result)[-1].perplexity.value
    assert manifest["figures"]["perplexity_recipe"]["documents"] == 12
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["full", "bnb-8bit", "gptq-3bit-g32"]
    assert report["rows"][0]["loss"] is None
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert markdown.count("\n| ") == 5
    assert "| bnb-8bit | bnb | 8 |" in markdown


def test_planned_sizes_are_the_written_ones(content: dict[str, Any]) -> None:
    recipe = parsed(content)
    job = build(recipe)
    planned = plan(job)
    assert [step.task.name for step in planned] == STEPS
    assert all(step.runs for step in planned)
    qexport.export(recipe)
    for step in planned:
        if step.size_bytes is not None:
            assert qexport.open_checkpoint(step.task.out).weights_size == step.size_bytes
    assert [step.runs for step in plan(job)] == [False] * 7 + [True]


def test_everything_is_checked_before_anything_runs(
    content: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    content["quantize"][1]["group_size"] = 48
    with pytest.raises(SpecError, match="group size 48"):
        qexport.export(parsed(content))
    content["quantize"] = []
    content["adapters"] = [str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterError):
        qexport.export(parsed(content))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outptu": "x"}, "unknown key 'outptu'; did you mean 'output'?"),
        ({"zzz": 1}, "unknown key 'zzz'; known are base, adapters, output"),
        ({"base": None}, "the key 'base' is missing"),
        ({"output": ""}, "output: string should have at least 1 character"),
        (
            {"shard": {"max_shard_size": "5 elephants"}},
            "shard.max_shard_size: '5 elephants' is not a size",
        ),
        ({"verify": None, "merge": 3}, "merge: input should have keys of its own, found 3"),
        ({"verify": {"windw": 3}}, "unknown key 'verify.windw'; did you mean 'window'?"),
        ({"quantize": [{"method": "gtpq"}]}, "unknown method 'gtpq'; did you mean 'gptq'?"),
        (
            {"quantize": [{"bits": 4}]},
            "unknown method None; known are rtn, bnb, eetq, hqq, mlx, gguf, gptq, awq",
        ),
        (
            {"quantize": [{"method": "bnb", "bits": [4, 7]}]},
            "quantize.1.rtn.bits: input should be 1, 2, 3, 4, 5, 6 or 8, found 7",
        ),
        ({"quantize": [{"method": "bnb", "damp": 1}]}, "unknown key 'quantize.0.rtn.damp'; known are"),
        ({"quantize": "bnb"}, "quantize: input should be a list, found 'bnb'"),
        ({"verify": {"max_loss": 5}}, "write a share with its sign"),
    ],
)
def test_wrong_recipes(content: dict[str, Any], change: dict[str, Any], message: str) -> None:
    content.update(change)
    with pytest.raises(RecipeError) as raised:
        parsed({key: value for key, value in content.items() if value is not None})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["base: [", "", "- a\n- b", "!!python/object/apply:os.system ['true']", "a: &a [*a]\nb: *c"]
)
def test_what_is_no_recipe(text: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(text, "recipe.yaml")
    assert "\n" not in str(raised.value)


def test_names_that_cannot_be(content: dict[str, Any]) -> None:
    content["quantize"] = [{"method": "bnb", "bits": [4, 4]}]
    with pytest.raises(RecipeError, match="asks for bnb-4bit twice"):
        build(parsed(content))
    content["output"] = "a\0b"
    with pytest.raises(RecipeError, match="is no name that a directory can have"):
        build(parsed(content))


def test_cli(content: dict[str, Any], tmp_path: Path, cli: RunCli) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    code, stdout, stderr = cli("export", recipe, "--dry-run")
    assert code == 0
    assert [line.split("\t")[0] for line in stdout.splitlines()] == ["task", *STEPS]
    assert stderr.endswith("would be written\n")
    assert not (tmp_path / "out").exists()
    code, stdout, stderr = cli("export", recipe, "--json")
    assert code == 0
    assert json.loads(stdout)["ran"] == STEPS
    content["verify"]["max_loss"] = "0.0001%"
    recipe.write_text(yaml.safe_dump(content))
    code, stdout, stderr = cli("export", recipe)
    assert code == 1
    assert stdout.startswith("variant\tmethod\tbits")
    assert "bnb-8bit loses" in stderr.splitlines()[-1]
    assert "gptq-3bit-g32: stands\n" in stderr  # the gate is no part of what determines a result
    code, _, stderr = cli("export", tmp_path / "none.yaml")
    assert (code, stderr) == (2, f"error: the recipe {tmp_path / 'none.yaml'} does not exist\n")


def test_variants_that_differ_in_what_no_name_tells_are_numbered(content: dict[str, Any]) -> None:
    content["quantize"] = [
        {"method": "rtn", "bits": 4},
        {"method": "rtn", "bits": 4, "symmetric": False},
        {"method": "rtn", "bits": 4, "format": "mlx"},
        {"method": "mlx", "solver": "gptq", "bits": 3, "group_size": 32},
    ]
    names = [task.name for task in build(parsed(content)).models if isinstance(task, QuantizeTask)]
    assert names == ["rtn-4bit", "rtn-4bit-2", "rtn-4bit-mlx", "mlx-3bit-g32-gptq"]
