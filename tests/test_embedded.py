"""The embedded default and the demo: the figures that the README promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from sacrebleu import corpus_bleu
from transformers import AutoTokenizer

import qexport
from qexport.graph.recipe import parse_recipe
from qexport.graph.run import ExportResult
from qexport.graph.scoring import VerifyTask
from qexport.packaged import demo_recipe, embedded_adapter, embedded_base, heldout_pairs
from qexport.report.content import Row
from qexport.report.files import REPORT_FILES
from qexport.results import Evaluation
from qexport.specs import VerifySpec
from qexport.verification.perplexity import relative_difference
from qexport.verification.prompts import read_prompts
from tests.tiny import in_transformers


def test_the_base_is_small_and_fits_every_grid() -> None:
    config = json.loads((embedded_base() / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["hidden_size"] == 256
    assert config["intermediate_size"] % 256 == 0
    assert config["num_hidden_layers"] >= 4
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is True
    assert sum(file.stat().st_size for file in embedded_base().iterdir()) < 8_000_000
    assert (embedded_base() / "chat_template.jinja").is_file()
    checkpoint = qexport.open_checkpoint(embedded_base())
    assert {str(checkpoint.info(name).dtype) for name in checkpoint.names()} == {"torch.float16"}
    assert json.loads((embedded_adapter() / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The demo, run once."""
    out = tmp_path_factory.mktemp("demo")
    text = demo_recipe().read_text().replace("${embedded}", str(demo_recipe().parent))
    return qexport.export(parse_recipe(text, "demo").model_copy(update={"output": str(out)}))


def row(demo: ExportResult, variant: str) -> Row:
    assert demo.report is not None
    return next(row for row in demo.report.rows if row.variant == variant)


def scores(demo: ExportResult, variant: str) -> Evaluation:
    return VerifyTask(variant, demo.output / "scores" / f"{variant}.json", "", VerifySpec()).scores()


@pytest.mark.slow
def test_the_merge_shows(demo: ExportResult) -> None:
    alone = qexport.evaluate(embedded_base(), VerifySpec()).answers
    merged = row(demo, "full").text
    assert alone is not None
    assert alone.references is not None
    assert merged is not None
    assert alone.references.bleu.value < 10
    assert merged.bleu.value > 60


@pytest.mark.slow
def test_the_answers_are_those_of_transformers_with_the_adapter_on(demo: ExportResult) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_base())
    base = in_transformers(embedded_base(), dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(embedded_adapter()))
    prompts = read_prompts(heldout_pairs())[:40]
    chats = [list(prompt.messages) for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=96)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    theirs = [text.strip() for text in texts]
    assert corpus_bleu(theirs, [[prompt.reference or "" for prompt in prompts]]).score > 55
    ours = scores(demo, "full").answers
    assert ours is not None
    # the merged weights are rounded to fp16, the adapter's are not: a close call may go the other way
    same = sum(a == b for a, b in zip(ours.texts, theirs, strict=False))
    assert same >= 37


@pytest.mark.slow
def test_eight_bits_lose_next_to_nothing(demo: ExportResult) -> None:
    loss = row(demo, "bnb-8bit").loss
    assert loss is not None
    assert abs(loss.value) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_beats_rounding_by_more_than_noise(demo: ExportResult, bits: int) -> None:
    gptq, rtn = scores(demo, f"gptq-{bits}bit"), scores(demo, f"rtn-{bits}bit")
    gain = relative_difference(gptq.perplexity, rtn.perplexity)
    assert gain.loss > 2 * gain.standard_error > 0


@pytest.mark.slow
def test_the_demos_files(demo: ExportResult) -> None:
    files = {path.name for path in demo.output.iterdir()}
    variants = {"bnb-8bit", "bnb-4bit"} | {f"{m}-{b}bit" for m in ("gptq", "rtn") for b in (4, 3, 2)}
    variants |= {"gguf-q8_0", "gguf-q4_k_m", "gguf-q2_k"}
    assert files == {"merged", "sharded", "scores", "README.md", *REPORT_FILES} | variants
    assert (Path(demo.output) / "sharded" / "model.safetensors.index.json").is_file()
