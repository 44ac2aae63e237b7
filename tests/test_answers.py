"""Greedy answers: those of the plainest loop, whatever shares the batch; ends, templates and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from qexport.calibrate.texts import read_documents
from qexport.errors import CalibrationError, NonFiniteError
from qexport.events import Advanced, Event, Finished, Noted, Started
from qexport.packaged import embedded_base, heldout_pairs
from qexport.verification.answers import Answered, greedy_answers, prompt_tokens
from qexport.verification.prompts import Prompt, prompt_of, read_prompts
from tests.chat_templates import PUBLISHED
from tests.conftest import shared
from tests.tiny import edit_json, in_transformers, tiny_model
from tests.zoo import ROWLESS, ZOO, zoo_model

TEXTS = ("a", "a small model reads", "many words and many more words to read", "x", "hello there small model")
PROMPTS = tuple(prompt_of(text) for text in TEXTS)
NEW = 16
EOS = 1


def loaded(path: Path) -> tuple[Any, Any]:
    return in_transformers(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def answers(model: Any, tokenizer: Any, prompts: Any = PROMPTS, **options: Any) -> Answered:
    return greedy_answers(model, tokenizer, prompts, **{"max_new_tokens": NEW, "batch_size": 5, **options})


@torch.no_grad()
def naive(model: Any, tokenizer: Any, prompts: Any = PROMPTS, new: int = NEW) -> tuple[list[str], list[int]]:
    """One prompt at a time, the whole of it again for each token: no cache, no padding, no mask."""
    texts, counts = [], []
    for ids in prompt_tokens(tokenizer, prompts):
        row = list(ids)
        while len(row) < len(ids) + new and row[-1:] != [EOS]:
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        counts.append(len(row) - len(ids))
        texts.append(
            tokenizer.decode([i for i in row[len(ids) :] if i != EOS], skip_special_tokens=True).strip()
        )
    return texts, counts


_GEMMA: dict[str, Any] = {"tied": False, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
_LONG = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
MODELS: dict[str, Callable[[Path], Path]] = {
    **{
        name: ZOO[name]
        for name in ("llama", "mistral", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "mixtral")
    },
    "falcon": ROWLESS["falcon"],
    "mpt": lambda path: zoo_model(path, model_type="mpt", d_model=128, n_heads=4, n_layers=2),
    # untied: a random tied Gemma says one token for ever, whatever goes wrong
    "gemma2": lambda path: zoo_model(
        path, model_type="gemma2", layer_types=["sliding_attention", "full_attention"], **_GEMMA
    ),
    "gemma3_text": lambda path: zoo_model(
        path, model_type="gemma3_text", layer_types=["sliding_attention", "full_attention"], **_GEMMA
    ),
    # some answers pass the length at which its rotary factors change, some do not
    "phi3_longrope": lambda path: zoo_model(
        path, model_type="phi3", tied=False, original_max_position_embeddings=26, rope_scaling=_LONG
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_one_prompt_at_a_time_without_a_cache(name: str, tmp_path: Path) -> None:
    model, tokenizer = loaded(MODELS[name](tmp_path / "model"))
    texts, counts = naive(model, tokenizer)
    assert sum(len(set(text)) > 5 for text in texts) >= 3  # a random model may repeat itself
    for size in (1, 2, 5):
        found = answers(model, tokenizer, batch_size=size)
        assert (list(found.texts), list(found.tokens)) == (texts, counts), size


def test_answers_of_different_lengths_leave_the_batch_one_by_one(tmp_path: Path) -> None:
    """With a window that the rows pass, too: what is left of the cache must be the right rows'."""
    model, tokenizer = loaded(MODELS["mistral"](tmp_path / "model"))
    whole = answers(model, tokenizer, batch_size=1)
    with torch.no_grad():
        ids = prompt_tokens(tokenizer, PROMPTS)
        out = [model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=NEW) for row in ids]
    ends = [int(row[0, len(prompt) + n * 3]) for n, (row, prompt) in enumerate(zip(out, ids, strict=True))]
    alone = answers(model, tokenizer, batch_size=1, ends=ends)
    assert len(set(alone.tokens)) >= 4
    for size in (2, 5):
        found = answers(model, tokenizer, batch_size=size, ends=ends)
        assert (found.texts, found.tokens) == (alone.texts, alone.tokens)
    assert all(text.startswith(short) for text, short in zip(whole.texts, alone.texts, strict=True))


def test_the_tokenizers_padding_does_not_matter(llama: Path) -> None:
    model, tokenizer = loaded(llama)
    expected = answers(model, tokenizer)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        assert answers(model, tokenizer).texts == expected.texts
    tokenizer.pad_token = None
    assert answers(model, tokenizer).texts == expected.texts


def test_a_generation_config_does_not_change_what_is_most_likely(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model")
    expected = naive(*loaded(path))[0]
    edit_json(path / "generation_config.json", repetition_penalty=9.0, do_sample=True, temperature=2.0)
    assert list(answers(*loaded(path)).texts) == expected


class Fixed:
    """A model that answers every prompt with the same ids, and then with the last of them."""

    def __init__(self, tokenizer: Any, ids: list[int], config: Any) -> None:
        self.ids, self.size, self.config, self.step = ids, len(tokenizer), config, 0
        self.prompts: list[list[int]] = []

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> Any:
        raise NotImplementedError

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> Any:
        first = rest["past_key_values"] is None
        self.step = 0 if first else self.step + 1
        if first:
            self.prompts += [
                row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)
            ]
        logits = torch.zeros(*input_ids.shape, self.size)
        logits[..., self.ids[min(self.step, len(self.ids) - 1)]] = 1.0
        return type("Out", (), {"logits": logits, "past_key_values": self})()

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        """It is its own cache."""


@pytest.mark.parametrize(
    ("said", "one_line", "expected"),
    [
        ("yes it is\nand more</s>never", False, "yes it is\nand more"),
        ("yes it is\nand more</s>never", True, "yes it is"),
        (" \n\n yes\nno</s>", True, "yes"),  # a break before the first word ends nothing
        ("yes</s>\nno", True, "yes"),
        ("\n\n</s>", True, ""),
        ("</s>yes", False, ""),
    ],
)
def test_where_an_answer_ends(llama: Path, said: str, one_line: bool, expected: str) -> None:
    model, tokenizer = loaded(llama)
    ids = tokenizer(said, add_special_tokens=False).input_ids
    fixed = Fixed(tokenizer, ids, model.config)
    found = answers(fixed, tokenizer, PROMPTS[:2], max_new_tokens=60, one_line=one_line)
    assert found.texts == (expected, expected)
    end = ids.index(EOS) + 1
    assert all(count <= end for count in found.tokens)
    if not one_line:
        assert found.tokens == (end, end)
    assert found.seconds > 0
    assert found.tokens_per_second == pytest.approx(sum(found.tokens) / found.seconds)


def test_an_answer_is_at_most_as_long_as_allowed(llama: Path) -> None:
    model, tokenizer = loaded(llama)
    word = tokenizer("a", add_special_tokens=False).input_ids
    found = answers(Fixed(tokenizer, word, model.config), tokenizer, PROMPTS, max_new_tokens=7)
    assert found == Answered(("a" * 7,) * 5, (7,) * 5, found.seconds)
    comma = tokenizer("b", add_special_tokens=False).input_ids
    fixed = Fixed(tokenizer, [*word, *comma], model.config)
    assert answers(fixed, tokenizer, ends=comma).texts == ("a",) * 5  # not the tokenizer's own end alone


def test_progress_and_a_context_that_is_full(llama: Path) -> None:
    model, tokenizer = loaded(llama)
    word = tokenizer("a", add_special_tokens=False).input_ids
    long = prompt_of("QZJXK?" * 15)
    (ids,) = prompt_tokens(tokenizer, [long])
    assert 80 < len(ids) < 128
    events: list[Event] = []
    found = answers(
        Fixed(tokenizer, word, model.config),
        tokenizer,
        [*PROMPTS, long],
        max_new_tokens=60,
        on_event=events.append,
    )
    assert found.tokens == (60,) * 5 + (128 - len(ids),)
    assert events[0] == Started("answers", 6, "prompts")
    assert sum(event.steps for event in events if isinstance(event, Advanced)) == 6
    assert events[-2] == Finished()
    assert events[-1] == Noted("1 answers were cut where the model's context of 128 tokens was full")


def test_prompts_that_leave_no_room_are_refused_before_any_answer(tmp_path: Path) -> None:
    model, tokenizer = loaded(ZOO["gpt2"](tmp_path / "model"))  # its position table ends there
    events: list[Event] = []
    long = Prompt(({"role": "user", "content": "x " * 200},), None, "record 7 of set.jsonl")
    pattern = r"2 of 7 prompts leave no room .* context of 128 tokens: record 7 of set.jsonl has \d+;"
    with pytest.raises(CalibrationError, match=pattern):
        answers(model, tokenizer, [*PROMPTS, long, long], on_event=events.append)
    assert events == []


def test_what_a_template_is_given(llama: Path) -> None:
    _, tokenizer = loaded(llama)
    prompt = Prompt(
        (
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "q"},
        ),
        "reference",
    )

    def written(template: str | None) -> str:
        tokenizer.chat_template = template
        return str(tokenizer.decode(prompt_tokens(tokenizer, [prompt])[0]))

    usual = tokenizer.chat_template
    assert written(usual) == "<s><|system|>S</s><|user|>Q</s><|assistant|>A</s><|user|>q</s><|assistant|>"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + usual
    assert written(refusing) == ("<s><|user|>S\n\nQ</s><|assistant|>A</s><|user|>q</s><|assistant|>")
    assert written(None) == "<s>S\nQ\nA\nq"  # the tokenizer's BOS, once
    with pytest.raises(CalibrationError, match=r"template fails on a prompt: never; a conversation that"):
        written("{{ raise_exception('never') }}")


def test_gemmas_own_template_gets_a_system_prompt(llama: Path) -> None:
    _, tokenizer = loaded(llama)
    published = next(row for row in PUBLISHED if "System role not supported" in row.template)
    tokenizer.chat_template = published.template
    prompt = Prompt(({"role": "system", "content": "S"}, {"role": "user", "content": "Q"}), None)
    assert "S\n\nQ" in tokenizer.decode(prompt_tokens(tokenizer, [prompt])[0])


def test_a_tokenizer_that_closes_its_texts(llama: Path) -> None:
    """No answer comes after EOS; one that the prompt itself ends with stays."""
    _, tokenizer = loaded(llama)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    open_ids, closed_ids = prompt_tokens(tokenizer, [prompt_of("a"), prompt_of("a</s>")])
    assert (open_ids[0], open_ids[-1] != EOS) == (0, True)
    assert closed_ids[-1] == EOS


def test_prompts_without_tokens_and_ids_that_the_model_lacks(llama: Path) -> None:
    model, tokenizer = loaded(llama)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(CalibrationError, match="a prompt has no tokens; a prompt with words"):
        answers(model, tokenizer, [prompt_of("")])
    tokenizer.add_tokens([f"<extra{n}>" for n in range(60)])
    with pytest.raises(CalibrationError, match=r"the tokenizer gives id \d+, the model knows 320 ids"):
        answers(model, tokenizer, [prompt_of("<extra59>")])


def test_logits_that_are_no_numbers(llama: Path) -> None:
    model, tokenizer = loaded(llama)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        answers(model, tokenizer)


def test_a_trained_model_answers_as_in_transformers() -> None:
    model, tokenizer = loaded(embedded_base())
    prompts = read_prompts(heldout_pairs())[:24]
    alone, few, many = (
        answers(model, tokenizer, prompts, batch_size=size, max_new_tokens=40) for size in (1, 5, 24)
    )
    assert alone.texts == few.texts == many.texts
    assert len(set(alone.texts)) > 5
    for prompt, text in list(zip(prompts, alone.texts, strict=True))[:6]:
        ids = torch.tensor(prompt_tokens(tokenizer, [prompt]))
        out = model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("name", ["stories260k", "tinystories-656k"])
def test_story_models_go_on_as_in_transformers(name: str) -> None:
    model, tokenizer = loaded(shared("models", name))
    stories = read_documents(shared("text", "tinystories_eval200.txt"))
    prompts = [prompt_of(" ".join(story.split()[: 3 + 4 * n])) for n, story in enumerate(stories[:7])]
    found = answers(model, tokenizer, prompts, max_new_tokens=40, batch_size=7)
    for prompt, text in zip(prompts, found.texts, strict=True):
        ids = torch.tensor(prompt_tokens(tokenizer, [prompt]))
        out = model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True).strip() == text
