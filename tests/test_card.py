"""Model cards of real outputs: the Hub's own reader takes them, their commands run, the user's words stay."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import qexport
from qexport.checkpoint.manifest import (
    add_figures,
    changed_files,
    read_figures,
    read_manifest,
    record_files,
    stands,
)
from qexport.checkpoint.staging import check_target
from qexport.errors import CorruptFileError, InputError, NotACheckpointError
from qexport.methods import FORMATS
from qexport.publishing.contents import plan_push
from qexport.publishing.spec import PushSpec
from qexport.quantization.quantize import quantize_recipe
from qexport.report.card import model_card, write_card
from qexport.report.card_facts import CardFacts, card_facts
from qexport.report.card_several import write_card_of_several
from qexport.report.content import Interval, Measure, Report, Row, TextScores
from qexport.report.licences import licence_of
from qexport.report.markdown import code, plain
from qexport.report.runtime_commands import READERS, commands, own_loader, shell_word
from qexport.specs import spec_of
from qexport.verification.runtimes import drivers
from qexport.verification.runtimes.support import SUPPORT
from tests.runtimes import python_of
from tests.tiny import edit_json, tiny_adapter, tiny_model

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("rtn", {}),
    "awq": ("rtn", {"format": "awq"}),
    "bitsandbytes": ("bnb", {}),
    "bnb8": ("bnb", {"bits": 8}),
    "compressed-tensors": ("rtn", {"format": "compressed-tensors"}),
    "mlx": ("mlx", {}),
    "hqq": ("hqq", {}),
    "eetq": ("eetq", {"bits": 8}),
    "gguf": ("gguf", {"type": "q8_0"}),
    "two": ("gguf", {"type": ("q5_0", "q8_0")}),
}


def with_sources(directory: Path, *sources: Path) -> Path:
    """As qexport.json is to tell what an output was made of: each source, and what that was made of."""
    records = []
    for source in sources:
        record: dict[str, Any] = {"path": str(source)}
        if "sources" in read_figures(source):
            record["sources"] = read_figures(source)["sources"]
        records.append(record)
    add_figures(directory, {"sources": records})
    return directory


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """An output of each kind, made of a local base and an adapter for it. Not to be changed."""
    home = tmp_path_factory.mktemp("outputs")
    base = tiny_model(home / "tiny-base")
    adapter = tiny_adapter(home / "tiny-adapter", base)
    merged = home / "merged"
    qexport.merge(base, [adapter], merged)
    found = {"merged": with_sources(merged, base, adapter)}
    for kind, (method, options) in KINDS.items():
        qexport.quantize(merged, home / kind, spec_of(method, **options))
        found[kind] = with_sources(home / kind, merged)
    (home / "lora").mkdir()
    qexport.convert_adapter(adapter, base, home / "lora" / "adapter.gguf")
    return {**found, "lora": home / "lora"}


@pytest.fixture
def output(outputs: Mapping[str, Path], tmp_path: Path) -> Path:
    """An output that can be changed."""
    return Path(shutil.copytree(outputs["gptq"], tmp_path / "gptq"))


def row(variant: str, path: str, loss: float | None = None, **values: Any) -> Row:
    return Row(
        variant=variant,
        path=path,
        method="none" if loss is None else "gptq",
        bits=16 if loss is None else 4,
        bits_per_weight=16.0 if loss is None else 4.25,
        size_bytes=1000,
        perplexity=Measure(value=3.0 * (1 + (loss or 0)), standard_error=0.1),
        loss=None if loss is None else Measure(value=loss, standard_error=0.01),
        **values,
    )


def report_of(*rows: Row, **values: Any) -> Report:
    recipes = {
        "perplexity": {"data": "ab" * 32, "text": "/home/me/secret/held.txt", "documents": 7, "window": 64},
        "kl": {"data": "ab" * 32, "documents": 7},
        "answers": {"data": "cd" * 32, "pairs": 5, "decoding": "greedy", "versions": {"python": "3.11"}},
    }
    told = {"title": "a run", "verdict": "gptq keeps 98 %.", "recipes": recipes, **values}
    return Report(qexport="0", rows=rows, **told)


FULL = row("full", "../merged")
TEXT = TextScores(**{name: Interval(value=41.5, low=39.0, high=44.0) for name in TextScores.model_fields})
SMALL = row("gptq-4bit", "gptq", 0.02, kl=Measure(value=0.0123, standard_error=0.001), text=TEXT)


def metadata(text: str) -> Any:
    """What the Hub's own reader makes of a card; it raises on what the Hub would not read."""
    return ModelCard(text).data


EXPECTED = {
    "merged": ("transformers", [], ["Transformers", "vLLM", "MLX"]),
    "gptq": ("transformers", ["gptq", "4-bit"], ["GPTQModel", "vLLM"]),
    "awq": ("transformers", ["awq", "4-bit"], ["GPTQModel", "vLLM"]),
    "bitsandbytes": ("transformers", ["bitsandbytes", "4-bit"], ["Transformers", "vLLM"]),
    "bnb8": ("transformers", ["bitsandbytes", "8-bit"], ["Transformers", "vLLM"]),
    "compressed-tensors": ("transformers", ["compressed-tensors", "4-bit"], ["Transformers", "vLLM"]),
    "mlx": ("mlx", ["mlx", "4-bit"], ["MLX"]),
    "hqq": ("hqq", ["hqq", "4-bit"], ["HQQ"]),
    "eetq": ("transformers", ["eetq", "8-bit"], ["Transformers, on a CUDA GPU"]),
    "gguf": ("gguf", ["gguf", "8-bit"], ["llama.cpp", "Ollama"]),
    "two": ("gguf", ["gguf"], ["llama.cpp", "Ollama"]),
    "lora": ("gguf", ["gguf", "lora"], ["llama.cpp"]),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_hub_reads_a_card_of_every_kind(outputs: Mapping[str, Path], kind: str) -> None:
    library, tags, runtimes = EXPECTED[kind]
    text = model_card(card_facts(outputs[kind]))
    data = metadata(text)
    assert data.library_name == library
    assert [tag for tag in data.tags if tag not in ("qexport", "conversational")] == tags
    assert data.pipeline_tag == "text-generation"
    assert data.license == (None if kind == "lora" else "apache-2.0")
    assert data.base_model is None  # a local base: no id is better than a wrong one
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == runtimes
    assert str(outputs[kind].parent) not in text  # nobody's directories
    assert text == model_card(card_facts(outputs[kind]))


def test_runtimes_are_those_that_are_known_to_read_the_format() -> None:
    for form, readers in READERS.items():
        for reader in readers:
            assert reader.supported is None or reader.supported in SUPPORT[form], (form, reader.runtime)
        claims = {reader.runtime for reader in readers}
        if form in FORMATS:
            assert ("vLLM" in claims) == ("vLLM" in FORMATS[form].runtimes), form


def test_no_runtime_is_named_for_an_architecture_that_it_does_not_read(
    outputs: Mapping[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(outputs["merged"], tmp_path / "m"))
    for model_type, found in (("opt", ["Transformers", "vLLM"]), ("nothing_known", ["Transformers"])):
        edit_json(path / "config.json", model_type=model_type)
        assert [command.runtime for command in commands(card_facts(path))] == found
    path = Path(shutil.copytree(outputs["gptq"], tmp_path / "q"))
    edit_json(path / "config.json", model_type="mixtral")
    assert [command.runtime for command in commands(card_facts(path))] == ["vLLM"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dynamic", [{}, {"-:lm_head": {}}, {"+:.*q_proj": {"bits": 8}}])
def test_gptqmodels_own_loader_is_named_where_its_driver_takes_it(
    output: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, dynamic: dict[str, Any]
) -> None:
    monkeypatch.syspath_prepend(drivers.__path__[0])  # where its script looks for the others
    driver = importlib.import_module("gptqmodel_loader")
    settings = {"quant_method": "gptq", "bits": 4, "dynamic": dynamic}
    edit_json(output / "config.json", model_type=model_type, quantization_config=settings)
    facts = card_facts(output)
    assert own_loader(facts) == driver._needs_own_loader(dict(facts.config))
    assert ("GPTQModel.load" in model_card(facts)) == own_loader(facts)


# Options of llama.cpp's tools (common/arg.cpp), and whether a value follows.
LLAMA_OPTIONS = {"-m": True, "-n": True, "-p": True, "--port": True, "--lora": True, "-no-cnv": False}


@pytest.mark.parametrize("kind", ["gguf", "two", "lora"])
def test_llamacpp_and_ollama_are_given_files_that_are_there(outputs: Mapping[str, Path], kind: str) -> None:
    directory = outputs[kind]
    asked = set()
    for command in commands(card_facts(directory)):
        for line in command.code.splitlines():
            tool, *words = shlex.split(line)
            if tool == "ollama":
                if words[0] == "create":
                    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", words[1])
                    told = (directory / words[words.index("-f") + 1]).read_text()
                    assert (directory / told.split("FROM ")[1].split("\n")[0]).is_file()
                continue
            assert tool in ("llama-cli", "llama-server", "llama-completion")
            while words:
                option = words.pop(0)
                value = words.pop(0) if LLAMA_OPTIONS[option] else ""
                if option in ("-m", "--lora") and value != "BASE.gguf":
                    assert (directory / value).is_file()
                    asked.add(value)
    assert asked == {file.name for file in directory.glob("*.gguf")}


def test_a_split_gguf_is_called_by_its_first_part(outputs: Mapping[str, Path], tmp_path: Path) -> None:
    qexport.quantize(
        outputs["merged"], tmp_path / "parts", spec_of("gguf", type="q8_0", max_shard_size="150KB")
    )
    facts = card_facts(tmp_path / "parts")
    assert len(facts.files) > 1
    lines = "\n".join(command.code for command in commands(facts))
    assert set(re.findall(r"-m (\S+)", lines)) == {facts.files[0].name}
    assert lines.count("ollama create") == 1


def snippet(directory: Path, runtime: str, language: str) -> str:
    """The last block of code under a runtime, out of the card's text."""
    part = model_card(card_facts(directory)).split(f"### {runtime}\n")[1].split("\n#")[0]
    return str(re.findall(rf"^```{language}\n(.*?)\n```$", part, re.MULTILINE | re.DOTALL)[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "runtime", "environment"),
    [
        ("merged", "Transformers", "transformers"),
        ("hqq", "HQQ", "hqq"),
        ("gptq", "GPTQModel", "gptqmodel"),
    ],
)
def test_a_cards_python_runs(
    outputs: Mapping[str, Path], kind: str, runtime: str, environment: str, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(snippet(outputs[kind], runtime, "python"))
    python = python_of(environment) or Path(sys.executable)
    ran = subprocess.run([python, script], cwd=outputs[kind], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip()  # the answer of a random model


@pytest.mark.slow
def test_a_cards_mlx_command_runs(outputs: Mapping[str, Path]) -> None:
    tool, *words = shlex.split(snippet(outputs["mlx"], "MLX", "sh"))
    program = Path(sys.executable).with_name(tool)
    ran = subprocess.run([program, *words], cwd=outputs["mlx"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "Generation:" in ran.stdout


def in_the_hubs_cache(home: Path, repository: str) -> Path:
    path = home / f"models--{repository.replace('/', '--')}" / "snapshots" / ("ab" * 20)
    tiny_model(path)
    return path


def test_a_model_of_the_hubs_is_the_base_and_its_card_goes_on(tmp_path: Path) -> None:
    base = in_the_hubs_cache(tmp_path, "Some-Org/Tiny-1.5")
    (base / "LICENSE").write_text("words of one's own")
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: LICENSE.txt\nlanguage: [no, en]\n"
        "datasets: [wikitext]\ntags: [chat, safetensors, gguf, 4-bit, 'base_model:x/y', translation]\n---\n"
    )
    quantized = tmp_path / "small"
    qexport.quantize(base, quantized, spec_of("mlx"))
    data = metadata(model_card(card_facts(with_sources(quantized, base))))
    assert (data.base_model, data["base_model_relation"]) == ("Some-Org/Tiny-1.5", "quantized")
    assert (data.license, data.license_name) == ("other", "tiny-licence")
    assert data.license_link == "https://huggingface.co/Some-Org/Tiny-1.5/blob/main/LICENSE.txt"
    assert data.language == ["no", "en"]
    assert data.datasets == ["wikitext"]
    assert data.tags == ["mlx", "4-bit", "conversational", "qexport", "chat", "translation"]

    adapter = in_the_hubs_cache(tmp_path, "me/cached-adapter").parent / "cd"
    tiny_adapter(adapter, base)
    (adapter / "README.md").write_text("---\ndatasets: [me/pairs]\nlicense: mit\n---\n")
    merged = tmp_path / "tuned"
    qexport.merge(base, [adapter], merged)
    with_sources(merged, base, adapter)
    qexport.quantize(merged, tmp_path / "tuned4", spec_of("rtn"))
    for directory in (merged, with_sources(tmp_path / "tuned4", merged)):
        text = model_card(card_facts(directory))
        data = metadata(text)
        assert (data.base_model, data["base_model_relation"]) == ("Some-Org/Tiny-1.5", "finetune")
        assert data["adapters"] == ["me/cached-adapter"]
        assert data.datasets == ["wikitext", "me/pairs"]
        assert data.license == "other"  # the base's goes before the adapter's
        assert "[Some-Org/Tiny-1.5](https://huggingface.co/Some-Org/Tiny-1.5)" in text
    shutil.rmtree(base)  # its id and revision are known by its path
    data = metadata(model_card(card_facts(tmp_path / "tuned4")))
    assert data.base_model == "Some-Org/Tiny-1.5"


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("Some-Org/Tiny", "Some-Org/Tiny"),
        ("out/base", None),
        ("Some-Org/here", None),  # a directory of that name lies beside the adapter
        ("./Some-Org/Tiny", None),
        ("/data/Tiny", None),
        ("Tiny", None),
        ("a/b/c", None),
        ("/x/models--Some-Org--Tiny/snapshots/ab", "Some-Org/Tiny"),
        ("https://evil.example/x", None),
    ],
)
def test_what_an_adapter_names_is_a_base_only_where_it_is_a_hub_id(
    outputs: Mapping[str, Path], tmp_path: Path, named: str, found: str | None
) -> None:
    adapter = tmp_path / "tiny-adapter"
    adapter.mkdir()
    (tmp_path / "Some-Org" / "here").mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=named)
    merged = Path(shutil.copytree(outputs["merged"], tmp_path / "merged"))
    data = metadata(model_card(card_facts(with_sources(merged, tmp_path / "gone", adapter))))
    assert data.base_model == found


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("  Apache License\n   Version 2.0, January 2004\n", "apache-2.0"),
        ("MIT License\n\nCopyright (c) 2025 X\n\nPermission is hereby granted", "mit"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version", "llama3.2"),
        ("GNU GENERAL PUBLIC LICENSE\n  Version 3, 29 June 2007", "gpl-3.0"),
        ("# Creative Commons Attribution-NonCommercial 4.0 International", "cc-by-nc-4.0"),
        ("Redistribution and use in source and binary forms, ... 3. Neither the name of", "bsd-3-clause"),
        ("Apache-2.0\n", "apache-2.0"),
        ("This is not under the terms that you know.", None),
    ],
)
def test_a_licence_is_known_by_its_text(tmp_path: Path, text: str, identifier: str | None) -> None:
    (tmp_path / "LICENSE").write_text(text)
    assert licence_of(tmp_path) == identifier


def test_a_licence_that_has_no_name_is_linked(output: Path) -> None:
    (output / "LICENSE").write_text("All of this is mine.")
    add_figures(output, {"sources": []})
    data = metadata(model_card(card_facts(output)))
    assert (data.license, data.license_link) == ("other", "LICENSE")


def test_measured_numbers_are_in_the_index_with_their_recipe(outputs: Mapping[str, Path]) -> None:
    text = model_card(card_facts(outputs["gptq"]), report_of(FULL, SMALL), "gptq-4bit")
    results = metadata(text).eval_results
    found = {result.metric_type: result for result in results}
    assert found["perplexity"].metric_value == 3.06
    assert found["perplexity"].metric_args == {"standard_error": 0.1}
    assert found["perplexity"].dataset_name == "held.txt"
    assert found["perplexity"].dataset_args == {"data": "ab" * 32, "documents": 7, "window": 64}
    assert found["perplexity_increase"].metric_value == 0.02
    assert found["kl_divergence"].metric_value == 0.0123
    assert found["bleu"].metric_args == {"low": 39.0, "high": 44.0}
    assert found["bleu"].dataset_name == "held-out prompts and references"
    assert metadata(text).model_name == "tiny-base + tiny-adapter, GPTQ 4-bit"
    assert "/home/me" not in text


def test_numbers_of_an_export_without_a_report_count_too(output: Path) -> None:
    recipe = {"data": "ef" * 32, "documents": 3, "window": 32, "versions": {}}
    figures = {"perplexity": 12.5, "perplexity_se": 0.5, "perplexity_recipe": recipe, "bleu": None}
    add_figures(output, figures)
    text = model_card(card_facts(output))
    assert "Perplexity 12.5 ±0.500" in text
    assert [one.metric_value for one in metadata(text).eval_results or ()] == [12.5]


def test_the_loss_table_marks_these_files_and_warns_where_they_are_bad(outputs: Mapping[str, Path]) -> None:
    facts = card_facts(outputs["gptq"])
    good = model_card(facts, report_of(FULL, SMALL))
    assert "| **gptq-4bit** |" in good
    assert "| full |" in good
    assert "Before you download" not in good
    assert "gptq keeps 98 %." in good
    bad = row("gptq-2bit", "x/gptq", 1.5, failures=("loses 150.00 % of perplexity, at most 8 % may be",))
    text = model_card(facts, report_of(FULL, SMALL.model_copy(update={"path": "other"}), bad))
    assert "> - It loses 150.00 % of perplexity" in text
    assert "Its perplexity is 150.00% above full precision's: the answers are not usable" in text
    assert "| **gptq-2bit** |" in text
    with pytest.raises(InputError, match=r"no variant 'gptq-3bit'.*did you mean"):
        model_card(facts, report_of(FULL, SMALL), "gptq-3bit")


def test_a_plot_is_linked_where_it_lies_or_is_given(output: Path) -> None:
    link = "](loss_vs_bits.png)"
    write_card(output, report_of(FULL, SMALL))
    assert link not in (output / "README.md").read_text()
    write_card(output, report_of(FULL, SMALL), plot=b"\x89PNG")
    assert (output / "loss_vs_bits.png").read_bytes() == b"\x89PNG"
    assert link in (output / "README.md").read_text()
    write_card(output, report_of(FULL, SMALL))
    assert link in (output / "README.md").read_text()


def test_a_card_leaves_the_output_whole(outputs: Mapping[str, Path], output: Path) -> None:
    spec = spec_of("rtn")
    key = quantize_recipe(outputs["merged"], spec).key
    assert stands(output, key)
    for loss in (0.02, 0.5):
        write_card(output, report_of(FULL, row("q", "gptq", loss)), plot=b"\x89PNG")
        assert changed_files(output) == []
        assert stands(output, key)
    write_card(outputs["merged"])
    assert quantize_recipe(outputs["merged"], spec).key == key  # what is made of it needs not be made anew
    (outputs["merged"] / "README.md").unlink()


@pytest.fixture
def several(outputs: Mapping[str, Path], tmp_path: Path) -> Path:
    """What compare leaves: outputs of a fine-tune of the Hub's Some-Org/Tiny, the plot."""
    home = tmp_path / "several"
    sources = [
        {"path": f"{tmp_path}/models--Some-Org--Tiny/snapshots/ab"},
        {"path": "/x/models--me--lora", "kind": "LORA"},
    ]
    for kind in ("gptq", "bnb8", "gguf", "two"):
        made = Path(shutil.copytree(outputs[kind], home / kind))
        (made / "LICENSE").write_text("All of this is mine.")
        records = {name: asdict(record) for name, record in record_files(made).items()}
        edit_json(made / "qexport.json", files=records)
        add_figures(made, {"sources": sources})
        write_card(made)
    (home / "scores").mkdir()
    (home / "loss_vs_bits.png").write_bytes(b"PNG")
    return home


OF_SEVERAL = (
    row("full", "/home/me/merged"),
    row("two-8bit", "two", 0.001),
    row("gptq-4bit", "gptq", 0.02, kl=Measure(value=0.0123, standard_error=0.001), kl_at_least=True),
    row("bnb-8bit", "bnb8", 1.7, failures=("loses 170 % of /home/me/merged, at most 8 % may be",)),
    row("elsewhere", "../gptq", 0.5),
)


def test_the_card_of_several_has_the_hubs_metadata_of_all(several: Path) -> None:
    write_card_of_several(several, report_of(*OF_SEVERAL))
    text = (several / "README.md").read_text()
    data = metadata(text)
    assert data.base_model == "Some-Org/Tiny"
    assert data["base_model_relation"] == "finetune"
    assert data["adapters"] == ["me/lora"]
    assert (data.license, data.license_link) == ("other", "two/LICENSE")
    assert data.library_name is None  # no one library reads them all
    assert data.pipeline_tag == "text-generation"
    assert {"gguf", "gptq", "bitsandbytes", "4-bit", "8-bit", "qexport"} <= set(data.tags)
    assert data.model_name == "Tiny + lora, 4 variants"
    found = {result.metric_name: result.metric_value for result in data.eval_results or ()}
    assert found["Rise of perplexity over full precision, gptq-4bit"] == 0.02
    assert found["KL divergence to full precision, at least, nats a token, gptq-4bit"] == 0.0123
    assert found["Perplexity, two-8bit"] == pytest.approx(3.003)
    assert not [name for name in found if name.endswith((", full", ", elsewhere"))]
    for told in ("gptq keeps 98 %.", "| **gptq-4bit** |", "| elsewhere |", "](loss_vs_bits.png)"):
        assert told in text
    assert "> - bnb-8bit: it loses 170 % of merged, at most" in text
    assert "> - bnb-8bit: its perplexity is 170.00% above" in text
    assert "/home/me" not in text

    write_card_of_several(several, report_of(*OF_SEVERAL))
    assert (several / "README.md").read_text() == text
    (several / "README.md").write_text(f"{text}\nMine.\n".replace("license: other", "license: mit"))
    write_card_of_several(several, report_of(*OF_SEVERAL[:2]))
    text = (several / "README.md").read_text()
    assert text.endswith("\nMine.\n")
    assert metadata(text).license == "mit"
    assert "| **gptq-4bit** |" not in text


def links_and_commands(text: str) -> set[str]:
    """The files that a card names: targets of links, arguments of commands."""
    targets = set(re.findall(r"\]\((?!https:)([^)]+)\)", text))
    return targets | set(re.findall(r"(?:-m|-f) (\S+)", text))


@pytest.mark.parametrize("layout", [None, "subfolders", "branches"])
def test_the_card_of_several_names_what_is_there(several: Path, layout: str | None) -> None:
    report = report_of(*OF_SEVERAL)
    (several / "report.json").write_text(report.model_dump_json())
    if layout is None:
        write_card_of_several(several, report)
        text = (several / "README.md").read_text()
        there = {file.relative_to(several).as_posix() for file in several.rglob("*")}
    else:  # even of a directory that has no card yet; what a push of some tells of is these
        chosen = ("gptq", "two")
        plan = plan_push(several, PushSpec.model_validate({"layout": layout, "variant": chosen}))
        (upload,) = [upload for upload in plan.uploads if upload.revision is None]
        items = {item.path_in_repo: item for item in upload.items}
        assert items["README.md"].content
        text, there = items["README.md"].content.decode(), set(items)
        assert "| **bnb-8bit** |" not in text
        assert not (several / "README.md").exists()
    named = links_and_commands(text)
    assert named <= there
    assert "loss_vs_bits.png" in named
    ggufs = {name for name in named if name.endswith(".gguf")}
    assert len(ggufs) == {None: 3, "subfolders": 2, "branches": 0}[layout]
    assert {"/" in name for name in ggufs} == {None: {True}, "subfolders": {False}, "branches": set()}[layout]
    assert metadata(text).base_model == "Some-Org/Tiny"
    (fetched,) = re.findall(r"^hf download REPOSITORY (.*) --local-dir", text, re.MULTILINE)
    if layout == "branches":
        assert fetched in {f"--revision {name}" for name in chosen}
        assert metadata(text).license_link is None
    else:
        assert "[card](gptq/README.md)" in text
        assert set(fetched.split()) <= there or fetched.startswith("--include ")


def test_a_card_of_several_that_is_the_users_goes_as_it_lies(several: Path) -> None:
    (several / "README.md").write_text("# Mine\n")
    (upload,) = plan_push(several, PushSpec(layout="subfolders")).uploads
    (card,) = [item for item in upload.items if item.path_in_repo == "README.md"]
    assert card.content == b"# Mine\n"
    (several / "README.md").unlink()  # and without a report there is less to tell
    (upload,) = plan_push(several, PushSpec(layout="subfolders")).uploads
    (card,) = [item for item in upload.items if item.path_in_repo == "README.md"]
    data = metadata((card.content or b"").decode())
    assert (data.base_model, data.eval_results) == ("Some-Org/Tiny", None)
    (upload,) = plan_push(several, PushSpec(layout="subfolders", exclude=("README.md",))).uploads
    assert not [item for item in upload.items if item.path_in_repo.endswith("README.md")]


def test_a_card_tells_no_paths_of_this_machine(outputs: Mapping[str, Path], output: Path) -> None:
    manifest = read_manifest(output)
    manifest["recipe"]["options"] |= {"samples_file": "/home/me/a b/c.txt", "text": "hf:/home/me/held:test"}
    manifest["figures"]["perplexity_recipe"] = {"data": "ab" * 32, "cache": "/home/me/cache"}
    manifest["figures"] |= {"perplexity": 3.5}
    edit_json(output / "qexport.json", **manifest)
    text = model_card(card_facts(output))
    assert "samples_file=c.txt" in text
    assert "/home/me" not in text
    worse = row("gptq-4bit", "gptq", 0.02, failures=("is worse than ../secret/base",))
    told = report_of(FULL, worse, verdict="Of /home/me/x.", recipe_lines=("~/secret/data, 3 tokens",))
    text = model_card(card_facts(output), told)
    assert "Of x." in text
    assert "/home/me" not in text
    assert "secret" not in text


USERS = """---
# what we know
language: de  # by hand
license: mit
tags:
- mine
my_key: {a: [1, 2]}
---
# My model

Words. `<b>`  \r
<!-- a comment -->
\ttab, no line break at the end"""


def test_what_a_user_wrote_stays(output: Path) -> None:
    path = output / "README.md"
    path.write_bytes(USERS.encode())
    write_card(output)
    text = path.read_bytes().decode()
    front, body = USERS.split("---\n", 2)[1:]
    assert text.startswith("---\n" + front)  # comments and order too
    begin, end = text.index("<!-- qexport:begin"), text.index("<!-- qexport:end -->")
    assert text[:begin].endswith(body + "\n\n")
    assert text[end:] == "<!-- qexport:end -->\n"
    data = metadata(text)
    assert (data.language, data.license, data.tags, data["my_key"]) == ("de", "mit", ["mine"], {"a": [1, 2]})
    assert data.library_name == "transformers"  # was absent
    assert "\n# tiny-base" not in text  # the user's title is the title

    added = text.replace("<!-- qexport:begin", "Before.\n<!-- qexport:begin") + "\nAfter.\n"
    path.write_bytes(added.encode())
    write_card(output, report_of(FULL, SMALL))
    new = path.read_bytes().decode()
    assert new.split("<!-- qexport:begin")[0].endswith(body + "\n\nBefore.\n")
    assert new.endswith("<!-- qexport:end -->\n\nAfter.\n")
    assert "gptq-4bit" in new
    assert new.count("qexport:begin") == 1
    assert len(metadata(new).eval_results or ()) == 7


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "\n",
        "# Only words\n",
        "no line break",
        USERS,
        "\ufeff---\nlicense: mit\n---\nBOM\n",
        "---\r\nlicense: mit\r\n---\r\n\r\n# Windows\r\n",
        "---\n---\n",
        "---\n# nothing\n---\nbody\n",
        "---\n{license: mit, tags: [a]}\n---\nbody",
        "---\nlicense: mit\n---",
        "\n\n---\nlicense: mit\n---\n",
    ],
)
def test_writing_again_changes_nothing(output: Path, text: str | None) -> None:
    path = output / "README.md"
    if text is not None:
        path.write_bytes(text.encode())
    write_card(output, report_of(FULL, SMALL), plot=b"\x89PNG")
    once = path.read_bytes()
    write_card(output, report_of(FULL, SMALL), plot=b"\x89PNG")
    assert path.read_bytes() == once
    if text and "\r\n" in text and text.count("\n") == text.count("\r\n"):
        assert once.count(b"\n") == once.count(b"\r\n")
    data = metadata(once.decode("utf-8-sig"))
    assert data.license == ("mit" if text and "mit" in text else "apache-2.0")
    if text and "---" not in text:
        assert text.strip() in once.decode()


def test_keys_are_ours_until_the_user_changes_them(output: Path) -> None:
    path = output / "README.md"
    write_card(output, report_of(FULL, SMALL))
    text = path.read_text()
    assert metadata(text)["license"] == "apache-2.0"
    # the user's hand: another licence, a further tag, a key of their own; the pipeline taken out
    changed = text.replace("license: apache-2.0", "license: openrail  # asked")
    changed = changed.replace("- qexport\n", "- qexport\n- mine\n").replace(
        "pipeline_tag: text-generation\n", "extra: 1\n"
    )
    path.write_text(changed)
    (output / "LICENSE").write_text("MIT License")
    edit_json(output / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    write_card(output)
    data = metadata(path.read_text())
    assert "license: openrail  # asked\n" in path.read_text()
    assert data.tags[-1] == "mine"
    assert "awq" not in data.tags  # the whole list is the user's now
    assert data["extra"] == 1
    assert data.eval_results is None  # ours, and no longer told
    assert data.pipeline_tag == "text-generation"


def test_what_belongs_to_a_key_of_the_users_is_not_added(output: Path) -> None:
    (output / "LICENSE").write_text("All of this is mine.")
    add_figures(output, {"sources": []})
    (output / "README.md").write_text("---\nlicense: mit\n---\n")
    write_card(output)
    assert metadata((output / "README.md").read_text()).license_link is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"---\nlicense: [mit\n---\nbody\n", "YAML is broken in line"),
        (b"---\n\tlicense: mit\n---\n", "YAML is broken"),
        (b"---\n- a\n- b\n---\n", "no mapping"),
        (b"---\nlicense: mit\nlicense: gpl\n---\n", "license twice"),
        (b"---\nlicense: mit\n\nno end\n", "does not end"),
        (b"---\nlicense: !!python/object/apply:os.system ['true']\n---\n", "YAML is broken"),
        (b"# caf\xe9\n", "not UTF-8"),
        (b"words\n<!-- qexport:begin -->\nno end\n", "no pair"),
        (b"<!-- qexport:end -->\n<!-- qexport:begin -->\n", "no pair"),
        (b"x" * (1 << 20) + b"yy", "bytes"),
    ],
)
def test_a_card_that_cannot_be_read_is_left_alone(output: Path, text: bytes, found: str) -> None:
    path = output / "README.md"
    path.write_bytes(text)
    with pytest.raises(CorruptFileError, match=found) as caught:
        write_card(output, plot=b"\x89PNG")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == text
    assert not (output / "loss_vs_bits.png").exists()


HOSTILE = (
    "a|b`c`*d*<script>alert(1)</script>[x](http://evil.example)\n\n# owned\n<!-- qexport:end -->\n---\n&lt;"
)


def test_names_from_elsewhere_are_text_and_nothing_else(outputs: Mapping[str, Path], output: Path) -> None:
    hostile = row(HOSTILE, "gptq", 2.0, failures=(HOSTILE,))
    add_figures(output, {"sources": [{"path": f"/x/{HOSTILE.replace('/', '')}"}]})
    (output / "x`|\n<!-- qexport:end -->\n```.safetensors").write_bytes(b"")
    write_card(output, report_of(FULL, hostile, verdict=HOSTILE, recipe_lines=(HOSTILE,)))
    once = (output / "README.md").read_bytes()
    write_card(output, report_of(FULL, hostile, verdict=HOSTILE, recipe_lines=(HOSTILE,)))
    assert (output / "README.md").read_bytes() == once
    body = ModelCard(once.decode()).text
    markdown = MarkdownIt("commonmark", {"linkify": False}).enable("table")
    tokens = markdown.parse(body)
    html = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert len(html) == 2  # our two comments
    assert all(re.fullmatch(r"<!-- qexport:\w+.*-->", one) for one in html)
    inner = [child for token in tokens for child in token.children or ()]
    assert not [child for child in inner if child.type in ("html_inline", "link_open", "em_open", "image")]
    headings = [tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "heading_open"]
    assert "owned" not in headings
    # each row has as many cells as its head
    counts: list[int] = []
    for token in tokens:
        if token.type == "tr_open":
            counts.append(0)
        elif token.type in ("th_open", "td_open"):
            counts[-1] += 1
    assert counts == [5, 5, 5, 3, 3, 3]
    shown = "".join(child.content for child in inner if child.type == "text")
    assert "<script>alert(1)</script>[x](http://evil.example)" in shown


@pytest.mark.parametrize(
    "text", ["- a", "1. a", "=", "+x", "a_b", "_a_", "0.1.0", "Q4_K_M", "", "a\u2028b\x00c"]
)
def test_escaped_text_renders_as_itself(text: str) -> None:
    markdown = MarkdownIt("commonmark").enable("table")
    wanted = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    tokens = markdown.parse(f"x\n\n{plain(text)}\n")[3:]
    assert [token.type for token in tokens] == (
        ["paragraph_open", "inline", "paragraph_close"] if wanted else []
    )
    assert "".join(child.content for token in tokens for child in token.children or ()) == wanted
    assert plain("Q4_K_M 0.1.0") == "Q4_K_M 0.1.0"  # readable as it is


@pytest.mark.parametrize("text", ["a", "a`b", "``", "a|b", "`", "x y"])
def test_code_renders_as_itself(text: str) -> None:
    markdown = MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(f"{code(text)}\n\n| h |\n| --- |\n| {code(text, cell=True)} |\n")
    found = [
        child.content for token in tokens for child in token.children or () if child.type == "code_inline"
    ]
    assert found == [text, text]


@pytest.mark.parametrize(
    "name", ["a.gguf", "-x.gguf", "a b'c.gguf", "a\nb\\'.gguf", "$(x)`y`.gguf", "ü\u2028.gguf"]
)
def test_a_file_is_one_word_of_the_shell(name: str) -> None:
    word = shell_word(name)
    assert "\n" not in word
    ran = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert ran.stdout.decode() in (name, f"./{name}")
    assert not ran.stdout.startswith(b"-")


def test_a_directory_without_a_model_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="holds no model"):
        write_card(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_damaged_manifest_is_no_obstacle(output: Path) -> None:
    manifest = read_manifest(output)
    manifest["figures"] = {"sources": [3, {"path": None}, {"path": "x", "sources": "y"}], "adapters": "z"}
    manifest["recipe"] = []
    edit_json(output / "qexport.json", **manifest)
    assert "4-bit" in (metadata(model_card(card_facts(output))).tags or ())


def test_a_source_that_was_made_of_itself_ends(output: Path) -> None:
    with_sources(output, output)
    add_figures(output, {"sources": [{"path": str(output)}]})
    assert isinstance(card_facts(output), CardFacts)


def test_no_text_of_the_card_is_yaml_by_accident(outputs: Mapping[str, Path], output: Path) -> None:
    card = "---\nlicense: mit\nlanguage: ['en: *x', 'no', \"a\\nb: c\"]\ntags: ['---', '#x', '!!x']\n---\n"
    source = output.parent / "source"
    source.mkdir()
    (source / "README.md").write_text(card)
    text = model_card(card_facts(with_sources(output, source)))
    data = yaml.safe_load(text.split("\n---\n")[0])
    assert data["language"] == ["en: *x", "no", "a\nb: c"]
    assert data["tags"][-3:] == ["---", "#x", "!!x"]


def test_an_output_with_a_card_may_be_replaced(output: Path) -> None:
    write_card(output)
    check_target(output, overwrite=True)


def test_what_was_decoded_from_codes_is_told(outputs: Mapping[str, Path], tmp_path: Path) -> None:
    qexport.convert(outputs["gptq"], tmp_path / "back")
    card = model_card(card_facts(tmp_path / "back"))
    assert "decoded from codes (float16): what their quantization lost stays lost." in card
    assert "not quantized" not in card
    assert "not quantized" in model_card(card_facts(outputs["merged"]))
