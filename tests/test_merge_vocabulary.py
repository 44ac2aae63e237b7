"""What has a row for every token: tied pairs, sizes, tokenizers; and what a merge writes into config.json."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import qexport
from qexport.errors import AdapterError, SpecError
from qexport.events import Event, Noted
from qexport.specs import MergeSpec
from tests.adapters import BASES, make_adapter
from tests.conftest import RunCli
from tests.tiny import (
    TEMPLATE,
    edit_json,
    in_transformers,
    logits,
    tiny_adapter,
    tiny_model,
    tiny_tokenizer,
    tokens,
)

FULL = MergeSpec(dtype="float32")
ROWS = 320  # of every base here
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OTHER_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
TALK = [{"role": "user", "content": "read"}, {"role": "assistant", "content": "write"}]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tied") / "base", dtype=torch.float32, tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("untied") / "base", dtype=torch.float32, tied=False)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2") / "base"
    return BASES["gpt2"](path, dtype=torch.float32)  # type: ignore[call-arg]


@pytest.fixture
def cli(cli: RunCli, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """The command line, without what transformers printed before."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        return cli(*arguments)

    return call


@pytest.fixture
def bases(tied: Path, untied: Path, gpt2: Path) -> dict[str, Path]:
    return {"tied": tied, "untied": untied, "gpt2": gpt2}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PEFT warns of tied heads that are adapted, and of embeddings that it saves along."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_memory(path: Path) -> Any:
    return in_transformers(path, dtype=torch.float32)


def merged(
    base: Path, adapters: list[Path | str], out: Path, spec: MergeSpec = FULL
) -> tuple[dict[str, Any], list[str]]:
    """The output's config, and what was told on the way."""
    told: list[Event] = []
    qexport.merge(base, adapters, out, spec, on_event=told.append)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config, [event.text for event in told if isinstance(event, Noted)]


def adapter_on(base: Path, adapter: Path, ids: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    model = in_memory(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    return logits(adapted.eval(), ids)


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    change(held)
    save_file({name: value.contiguous() for name, value in held.items()}, file, metadata={"format": "pt"})


# ---- tied pairs


@pytest.mark.parametrize(
    ("kind", "stays"),
    [
        ("lora", True),
        ("embedding", False),
        ("head", False),
        ("embedding_and_head", False),
        ("dora_embedding", False),
        ("saved_embedding", False),
        ("saved_head", False),
        ("saved_embedding_and_head", False),
        ("token_indices", True),  # PEFT itself ties the head's rows to them
        ("token_indices_dict", True),
        ("tied_saved", True),
        ("tied_targets", True),
        ("tied_token_indices", True),
    ],
)
def test_a_pair_is_untied_where_one_side_alone_is_changed(
    tied: Path, tmp_path: Path, kind: str, stays: bool
) -> None:
    adapter = make_adapter(kind, tied, tmp_path / "adapter")
    config, told = merged(tied, [adapter], tmp_path / "out")
    assert config["tie_word_embeddings"] is stays
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert (HEAD in held) is not stays
    assert [text for text in told if text.startswith("tied embeddings: ")] == told
    assert len(told) == (not stays)
    expected = adapter_on(tied, adapter, tokens())
    assert (expected - logits(in_memory(tied), tokens())).abs().max() > 0.05
    found = in_memory(tmp_path / "out")
    one, other = found.get_input_embeddings().weight, found.get_output_embeddings().weight
    assert (one.data_ptr() == other.data_ptr()) is stays
    torch.testing.assert_close(logits(found, tokens()), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["embedding", "head", "saved_embedding", "saved_head"])
def test_gpt2s_pair_is_untied(gpt2: Path, tmp_path: Path, kind: str) -> None:
    """Its class ties by default: the output's config must say that it does not."""
    adapter = make_adapter(kind, gpt2, tmp_path / "adapter")
    config, _ = merged(gpt2, [adapter], tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    found = logits(in_memory(tmp_path / "out"), tokens())
    torch.testing.assert_close(found, adapter_on(gpt2, adapter, tokens()), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("weight", ["", ":1", ":0.5"])
def test_equal_replacements_of_both_keep_the_tie(tied: Path, tmp_path: Path, weight: str) -> None:
    adapter = make_adapter("saved_embedding_and_head", tied, tmp_path / "adapter")

    def alike(held: dict[str, torch.Tensor]) -> None:
        names = [name for name in held if "embed_tokens" in name or "lm_head" in name]
        assert len(names) == 2
        held[names[1]] = held[names[0]].clone()

    def differ(held: dict[str, torch.Tensor]) -> None:
        name = next(name for name in held if "lm_head" in name)
        held[name] = held[name].clone()
        held[name][7, 7] += 1

    rewrite(adapter, alike)
    config, told = merged(tied, [f"{adapter}{weight}"], tmp_path / "out")
    assert config["tie_word_embeddings"] is True
    assert told == []
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    rewrite(adapter, differ)  # one value is enough
    config, told = merged(tied, [f"{adapter}{weight}"], tmp_path / "differs")
    assert config["tie_word_embeddings"] is False
    assert told == [
        f"tied embeddings: {EMBEDDING} and {HEAD} are changed differently, so that the output is not tied"
    ]


@pytest.mark.parametrize("kind", ["tied_saved", "tied_targets", "tied_token_indices"])
def test_a_pair_that_was_to_stay_tied_and_differs_is_refused(
    tied: Path, tmp_path: Path, cli: RunCli, kind: str
) -> None:
    adapter = make_adapter(kind, tied, tmp_path / "adapter")

    def differ(held: dict[str, torch.Tensor]) -> None:
        trained = [name for name in held if "lm_head" in name and "base_layer" not in name]
        if not trained:  # PEFT saves the rows once, some trainers under both names
            name = next(name for name in held if "trainable_tokens_delta" in name)
            trained = [name.replace("model.embed_tokens", "lm_head")]
            held[trained[0]] = held[name]
        held[trained[0]] = held[trained[0]] + 1

    rewrite(adapter, differ)
    code, stdout, stderr = cli("merge", tied, "-a", adapter, "-o", tmp_path / "out")
    assert (code, stdout) == (2, ""), stdout
    assert stderr.startswith(f"error: conflicting tied edits: {adapter} was trained to keep ")
    assert stderr.count("\n") == 1


def test_nothing_is_to_stay_tied_in_a_model_that_is_not(untied: Path, tmp_path: Path) -> None:
    """PEFT then leaves ensure_weight_tying aside."""
    both: dict[str, dict[str, Any]] = {
        "lora": {"modules": ("embed_tokens", "lm_head")},
        "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    }
    for name, options in both.items():
        adapter = tiny_adapter(tmp_path / name, untied, ensure_weight_tying=True, **options)

        def train(held: dict[str, torch.Tensor]) -> None:
            for key in held:
                held[key] = held[key] + 0.1 * torch.randn_like(held[key])

        if name == "saved":
            rewrite(adapter, train)
        merged(untied, [adapter], tmp_path / f"{name} out")
        found = logits(in_memory(tmp_path / f"{name} out"), tokens())
        torch.testing.assert_close(found, adapter_on(untied, adapter, tokens()), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_share_of_what_is_saved_under_two_names(untied: Path, tmp_path: Path, weight: float) -> None:
    """PEFT does so where the vocabulary was resized: it is one share, not two."""
    adapter = resized_adapter(
        untied, tmp_path / "adapter", ROWS - 9, modules_to_save=["embed_tokens", "lm_head"]
    )
    held = load_file(adapter / "adapter_model.safetensors")
    assert sum("lm_head" in name and "original" not in name for name in held) == 2
    merged(untied, [f"{adapter}:{weight}"], tmp_path / "out")
    old, new = (load_file(path / "model.safetensors")[HEAD] for path in (untied, tmp_path / "out"))
    trained = held["base_model.model.lm_head.weight"]
    expected = old[: ROWS - 9] + weight * (trained - old[: ROWS - 9])
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-6)


def test_two_values_for_one_matrix_are_refused(untied: Path, tmp_path: Path) -> None:
    adapter = make_adapter("saved_head", untied, tmp_path / "adapter")

    def twice(held: dict[str, torch.Tensor]) -> None:
        name = next(name for name in held if "lm_head" in name)
        held[name.replace("lm_head.", "lm_head.modules_to_save.")] = held[name] + 1

    rewrite(adapter, twice)
    with pytest.raises(AdapterError, match=r"holds two different lm_head\.weight; one and the same"):
        qexport.merge(untied, [adapter], tmp_path / "out")


def test_a_second_adapter_unties_what_the_first_kept(tied: Path, tmp_path: Path) -> None:
    keeps = make_adapter("tied_targets", tied, tmp_path / "keeps")
    head = make_adapter("head", tied, tmp_path / "head")
    with pytest.raises(
        AdapterError, match=r"conflicting tied edits: .*keeps was trained to keep .* tied, and"
    ):
        qexport.merge(tied, [keeps, head], tmp_path / "out")


# ---- resized vocabularies


def resized_adapter(base: Path, out: Path, rows: int, seed: int = 1, **options: Any) -> Path:
    """As users make one: resize the model, put the adapter on, train, save."""
    torch.manual_seed(seed)
    model = in_memory(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    if "token_indices" in options:
        config: Any = TrainableTokensConfig(**options)
    else:
        query = "c_attn" if model.config.model_type == "gpt2" else "q_proj"
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": [query], "task_type": "CAUSAL_LM", **options}
        )
    adapted: Any = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(str(out))
    return out


def some_ids(rows: int) -> torch.Tensor:
    """Old tokens and, where there are some, every new one."""
    ids = torch.randint(0, min(rows, ROWS), (2, 24), generator=torch.Generator().manual_seed(3))
    ids[:, -10:] = torch.arange(rows - 10, rows)
    ids[:, 3] = 5
    return ids


WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "saved both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": "new"},
    "tokens of the embedding": {"trainable_token_indices": {"embed_tokens": "new"}},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": "new", "lm_head": "new"}},
    "lora on embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora on embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "lora tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "trainable tokens": {"token_indices": "new", "target_modules": ["embed_tokens"]},
    "gpt2 lora": {},
    "gpt2 saved": {"modules_to_save": ["wte"]},
    "gpt2 embedding": {"target_modules": ["wte", "c_attn"]},
}


def _resizings() -> Iterator[Any]:
    for way in WAYS:
        which = ("gpt2",) if way.startswith("gpt2") else ("tied", "untied")
        for base in which:
            if base == "untied" and "ensure_weight_tying" in WAYS[way]:
                continue
            for rows in (ROWS + 13, ROWS - 30):
                yield pytest.param(base, way, rows, id=f"{base}-{way}-{rows}")


@pytest.mark.parametrize(("which", "way", "rows"), [*_resizings()])
def test_a_resized_vocabulary(
    bases: dict[str, Path], tmp_path: Path, which: str, way: str, rows: int
) -> None:
    base = bases[which]
    new = [5, *range(rows - 4, rows)]
    options = json.loads(json.dumps(WAYS[way]).replace('"new"', json.dumps(new)))
    adapter = resized_adapter(base, tmp_path / "adapter", rows, **options)
    config, told = merged(base, [adapter], tmp_path / "out")
    assert config["vocab_size"] == rows
    assert f"vocabulary: {ROWS} rows become {rows}, for {adapter} was trained with that many" in told
    held = load_file(tmp_path / "out" / "model.safetensors")
    named = [name for name in held if "embed_tokens" in name or "lm_head" in name or "wte" in name]
    assert named
    assert all(len(held[name]) == rows for name in named)
    ids = some_ids(rows)
    expected = adapter_on(base, adapter, ids, rows)
    found = logits(in_memory(tmp_path / "out"), ids)
    assert found.shape == expected.shape
    # PEFT saves an untied head only where the embedding is not adapted: else no one knows its new rows
    saved = any("lm_head" in name for name in load_file(adapter / "adapter_model.safetensors"))
    known = rows if saved or which != "untied" else min(rows, ROWS)
    torch.testing.assert_close(found[..., :known], expected[..., :known], rtol=1e-4, atol=2e-4)
    plain = in_memory(base)
    plain.resize_token_embeddings(rows, mean_resizing=False)
    before = logits(plain, ids[:, :14])
    assert (expected[:, :14, :known] - before[..., :known]).abs().max() > 0.05


def test_new_rows_that_no_one_saved_are_the_mean(untied: Path, tmp_path: Path) -> None:
    adapter = resized_adapter(
        untied, tmp_path / "adapter", ROWS + 5, target_modules=["q_proj", "embed_tokens"]
    )
    merged(untied, [adapter], tmp_path / "out")
    head = load_file(tmp_path / "out" / "model.safetensors")[HEAD]
    old = load_file(untied / "model.safetensors")[HEAD]
    assert torch.equal(head[:ROWS], old)
    torch.testing.assert_close(head[ROWS:], old.double().mean(dim=0).float().expand(5, -1))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_head(untied: Path, tied: Path, tmp_path: Path, init: str) -> None:
    """PEFT saves what is left of the head beside the factors: the base itself it is not."""
    options: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": init}
    adapter = resized_adapter(untied, tmp_path / "adapter", ROWS, **options)
    assert any("lm_head.base_layer" in name for name in load_file(adapter / "adapter_model.safetensors"))
    merged(untied, [adapter], tmp_path / "out")
    found = logits(in_memory(tmp_path / "out"), tokens())
    torch.testing.assert_close(found, adapter_on(untied, adapter, tokens()), rtol=1e-4, atol=2e-4)
    for name, base, rows in (("tied", tied, ROWS), ("resized", untied, ROWS + 3)):
        adapter = resized_adapter(base, tmp_path / name, rows, **options)
        with pytest.raises(
            AdapterError, match=rf"\({init}\) left of .* is tied or was resized; .* converted"
        ):
            qexport.merge(base, [adapter], tmp_path / "none")


def test_two_adapters_of_one_resized_vocabulary(untied: Path, tmp_path: Path) -> None:
    first = resized_adapter(untied, tmp_path / "first", ROWS + 8)
    second = tiny_adapter(tmp_path / "second", untied, seed=2)  # it does not look at the vocabulary
    config, _ = merged(untied, [first, second], tmp_path / "out")
    assert config["vocab_size"] == ROWS + 8
    model = in_memory(untied)
    model.resize_token_embeddings(ROWS + 8, mean_resizing=False)
    model = PeftModel.from_pretrained(model, str(first)).merge_and_unload()
    expected = logits(PeftModel.from_pretrained(model, str(second)).eval(), some_ids(ROWS + 8))
    found = logits(in_memory(tmp_path / "out"), some_ids(ROWS + 8))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_two_adapters_of_different_vocabularies_are_refused(
    untied: Path, tmp_path: Path, cli: RunCli
) -> None:
    first = resized_adapter(untied, tmp_path / "first", ROWS + 8)
    for name, second, told in (
        ("more", resized_adapter(untied, tmp_path / "more", ROWS + 9), f"to {ROWS + 9}"),
        ("as it is", make_adapter("saved_head", untied, tmp_path / "as it is"), f"leaves it at {ROWS}"),
    ):
        for two in ((first, second), (second, first)):
            code, stdout, stderr = cli("merge", untied, "-a", two[0], "-a", two[1], "-o", tmp_path / "out")
            assert (code, stdout) == (2, ""), name
            assert stderr.startswith("error: two adapters resize the vocabulary differently: ")
            assert told in stderr
            assert stderr.count("\n") == 1
    other = resized_adapter(untied, tmp_path / "other", ROWS + 8, seed=2)  # as many rows, other values
    with pytest.raises(AdapterError, match=f"were trained on different {EMBEDDING}; adapters of one base"):
        qexport.merge(untied, [first, other], tmp_path / "out")


NESTED = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "model_type": "llama",
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "model_type": "clip_vision_model",
    "projection_dim": 32,
}


def tiny_llava(directory: Path, *, is_tied: bool) -> Path:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=NESTED, vision_config=VISION, image_token_index=310, tie_word_embeddings=is_tied
    )
    LlavaForConditionalGeneration(config).save_pretrained(directory)
    tiny_tokenizer(directory)
    return directory


def text_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def multimodal(path: Path) -> Any:
    kind: Any = AutoModelForImageTextToText
    model, loading = kind.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not any(loading.values()), loading
    return model.eval()


def test_rope_scaling_of_a_nested_text_model(tmp_path: Path) -> None:
    base = tiny_llava(tmp_path / "base", is_tied=False)
    adapted: Any = get_peft_model(multimodal(base), LoraConfig(target_modules=r".*language_model.*q_proj"))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    spec = MergeSpec(rope_scaling="linear", rope_factor=2)
    config, _ = merged(base, [tmp_path / "adapter"], tmp_path / "out", spec)
    assert "rope_parameters" not in config
    plain, found = (multimodal(path).model.language_model.rotary_emb for path in (base, tmp_path / "out"))
    torch.testing.assert_close(found.inv_freq * 2, plain.inv_freq)


@pytest.mark.parametrize(
    ("way", "is_tied"),
    [
        pytest.param("saved", True),
        pytest.param("saved", False),
        pytest.param("embedding", True),
        ("embedding", False),
    ],
)
def test_the_vocabulary_of_a_nested_text_model(tmp_path: Path, is_tied: bool, way: str) -> None:
    base = tiny_llava(tmp_path / "base", is_tied=is_tied)
    rows = ROWS + 6 if way == "saved" else ROWS
    torch.manual_seed(1)
    model = multimodal(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    layers = r".*language_model.*q_proj"
    if way == "saved":
        config = LoraConfig(target_modules=layers, modules_to_save=["embed_tokens", "lm_head"])
    else:
        config = LoraConfig(target_modules=rf"{layers}|.*embed_tokens")
    adapted: Any = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    expected = text_logits(adapted.eval(), tokens())
    written, _ = merged(base, [tmp_path / "adapter"], tmp_path / "out")
    assert written["text_config"]["vocab_size"] == rows
    assert "vocab_size" not in written
    found = text_logits(multimodal(tmp_path / "out"), tokens())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


# ---- tokenizers


def tokenizer_at(path: Path) -> Any:
    kind: Any = AutoTokenizer
    return kind.from_pretrained(path)


def give_tokenizer(
    adapter: Path, base: Path, *, added: int = 0, template: str | None = TEMPLATE, inline: bool = False
) -> Path:
    """Puts a tokenizer beside an adapter, as trainers do."""
    tokenizer = tokenizer_at(base)
    tokenizer.add_tokens([f"<|new{number}|>" for number in range(added)])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(adapter)
    if inline:
        (adapter / "chat_template.jinja").unlink()
        edit_json(adapter / "tokenizer_config.json", chat_template=template)
    return adapter


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_tokens_that_only_the_tokenizer_has(bases: dict[str, Path], tmp_path: Path, which: str) -> None:
    base = bases[which]
    adapter = tiny_adapter(tmp_path / "adapter", base)
    known = len(tokenizer_at(base))
    give_tokenizer(adapter, base, added=ROWS - known)  # the padding takes them
    config, told = merged(base, [adapter], tmp_path / "fits")
    assert config["vocab_size"] == ROWS
    assert not any("vocabulary" in text for text in told)
    give_tokenizer(adapter, base, added=ROWS - known + 3)
    config, told = merged(base, [adapter], tmp_path / "out")
    rows = ROWS + 3
    assert config["vocab_size"] == rows
    reason = f"vocabulary: {ROWS} rows become {rows}, for the adapter's tokenizer gives ids up to {rows - 1}"
    assert reason in told
    tokenizer = tokenizer_at(tmp_path / "out")
    assert len(tokenizer) == rows
    assert tokenizer("<|new0|>", add_special_tokens=False).input_ids == [known]
    model = in_memory(tmp_path / "out")
    found = logits(model, tokens())
    assert found.shape[-1] == rows
    expected = adapter_on(base, adapter, tokens())
    torch.testing.assert_close(found[..., :ROWS], expected, rtol=1e-4, atol=2e-4)
    for embedding in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        mean = embedding[:ROWS].double().mean(dim=0).float()
        torch.testing.assert_close(embedding[ROWS:], mean.expand(3, -1), rtol=1e-4, atol=1e-6)
    config, _ = merged(base, [adapter], tmp_path / "base's", FULL.model_copy(update={"tokenizer": "base"}))
    assert config["vocab_size"] == ROWS
    assert len(tokenizer_at(tmp_path / "base's")) == known


def test_a_base_whose_own_tokenizer_is_too_large_is_left_as_it_is(untied: Path, tmp_path: Path) -> None:
    base = shutil.copytree(untied, tmp_path / "base")
    give_tokenizer(base, untied, added=100)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    give_tokenizer(adapter, base)  # the same
    config, told = merged(base, [adapter], tmp_path / "out")
    assert (config["vocab_size"], told) == (ROWS, [])


@pytest.mark.parametrize("wanted", ["base", "adapter", None])
@pytest.mark.parametrize("brings", ["all", "template", "nothing new", "nothing"])
def test_whose_tokenizer(untied: Path, tmp_path: Path, cli: RunCli, brings: str, wanted: str | None) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", untied)
    if brings == "all":
        give_tokenizer(adapter, untied, added=2, template=OTHER_TEMPLATE)
    elif brings == "template":
        (adapter / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    elif brings == "nothing new":
        for file in untied.glob("*token*"):
            shutil.copy(file, adapter)
        shutil.copy(untied / "chat_template.jinja", adapter)
    out = tmp_path / "out"
    option = () if wanted is None else ("--tokenizer", wanted)
    code, stdout, stderr = cli("merge", untied, "-a", adapter, *option, "-o", out)
    if brings == "nothing" and wanted == "adapter":
        assert (code, stdout) == (2, "")
        assert stderr.startswith(
            "error: --tokenizer adapter, but no adapter brings a tokenizer; files such as "
        )
        assert stderr.count("\n") == 1
        return
    assert code == 0
    own = wanted != "base" and brings in ("all", "template")
    tokenizer, base_tokenizer = tokenizer_at(out), tokenizer_at(untied)
    assert tokenizer.chat_template == (OTHER_TEMPLATE if own else TEMPLATE)
    expected = "[user]read[assistant]write" if own else "<s><|user|>read</s><|assistant|>write</s>"
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == expected
    assert len(tokenizer) == len(base_tokenizer) + 2 * (own and brings == "all")
    assert (out / "LICENSE").read_text() == (untied / "LICENSE").read_text()
    notes = [line for line in stderr.splitlines() if "template" in line or "tokenizer" in line]
    assert bool(notes) is own


@pytest.mark.parametrize("inline", [False, True], ids=["file", "in tokenizer_config.json"])
def test_a_tokenizer_without_a_template_keeps_the_bases(untied: Path, tmp_path: Path, inline: bool) -> None:
    base = shutil.copytree(untied, tmp_path / "base")
    give_tokenizer(base, untied, inline=inline)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    give_tokenizer(adapter, untied, added=2, template=None)
    assert tokenizer_at(adapter).chat_template is None
    _, told = merged(base, [adapter], tmp_path / "out")
    tokenizer = tokenizer_at(tmp_path / "out")
    assert len(tokenizer) == len(tokenizer_at(base)) + 2
    assert tokenizer.chat_template == TEMPLATE
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert f"{adapter} brings a tokenizer without a chat template: the base's template is kept" in told


@pytest.mark.parametrize("inline", [False, True], ids=["file", "in tokenizer_config.json"])
def test_the_adapters_template_wins_wherever_it_stands(untied: Path, tmp_path: Path, inline: bool) -> None:
    """transformers prefers chat_template.jinja to tokenizer_config.json: the base's must not stay."""
    adapter = tiny_adapter(tmp_path / "adapter", untied)
    give_tokenizer(adapter, untied, template=OTHER_TEMPLATE, inline=inline)
    merged(untied, [adapter], tmp_path / "out")
    assert tokenizer_at(tmp_path / "out").chat_template == OTHER_TEMPLATE


def test_a_template_alone_wins_over_one_in_the_config(untied: Path, tmp_path: Path) -> None:
    base = shutil.copytree(untied, tmp_path / "base")
    give_tokenizer(base, untied, inline=True)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    (adapter / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    _, told = merged(base, [adapter], tmp_path / "out")
    assert tokenizer_at(tmp_path / "out").chat_template == OTHER_TEMPLATE
    assert told == [f"chat template: chat_template.jinja of {adapter}, tokenizer: the base's"]


def test_two_adapters_with_tokenizers(untied: Path, tmp_path: Path, cli: RunCli) -> None:
    one, two, bare = (tiny_adapter(tmp_path / name, untied, seed=n) for n, name in enumerate(("1", "2", "3")))
    for adapter, template in ((one, OTHER_TEMPLATE), (two, OTHER_TEMPLATE + "!")):
        give_tokenizer(adapter, untied, template=template)
    given = ("merge", untied, "-a", one, "-a", two, "-o", tmp_path / "out")
    for option in ((), ("--tokenizer", "adapter")):
        code, stdout, stderr = cli(*given, *option)
        assert (code, stdout) == (2, "")
        assert stderr == (
            f"error: {one} and {two} bring different tokenizers; choose --tokenizer base, or merge one after "
            "the other\n"
        )
    code, _, _ = cli(*given, "--tokenizer", "base")
    assert code == 0
    assert tokenizer_at(tmp_path / "out").chat_template == TEMPLATE
    give_tokenizer(two, untied, template=OTHER_TEMPLATE)
    for name, adapters in (("same", [one, two]), ("one has none", [bare, one])):
        merged(untied, [*adapters], tmp_path / name)
        assert tokenizer_at(tmp_path / name).chat_template == OTHER_TEMPLATE


# ---- config.json: dtype and rotary scaling


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype(untied: Path, tmp_path: Path, dtype: str, key: str) -> None:
    base = shutil.copytree(untied, tmp_path / "base")
    edit_json(base / "config.json", **{"dtype": None, key: "float32"})
    adapter = tiny_adapter(tmp_path / "adapter", base)
    spec = MergeSpec.model_validate({"dtype": dtype})
    config, _ = merged(base, [adapter], tmp_path / "out", spec)
    assert config[key] == dtype
    assert ("dtype" in config) + ("torch_dtype" in config) == 1
    wanted = getattr(torch, dtype)
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {wanted}
    found = in_transformers(tmp_path / "out")
    assert found.dtype == wanted
    expected = adapter_on(base, adapter, tokens())
    error = (logits(in_memory(tmp_path / "out"), tokens()) - expected).norm() / expected.norm()
    assert error < {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}[dtype]


def test_dtype_of_a_nested_text_model(tmp_path: Path) -> None:
    base = tiny_llava(tmp_path / "base", is_tied=False)
    edit_json(base / "config.json", text_config={**NESTED, "dtype": "float32"})
    model = multimodal(base)
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj"))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    config, _ = merged(base, [tmp_path / "adapter"], tmp_path / "out", MergeSpec(dtype="bfloat16"))
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What transformers warns of."""
    handler, logger = _Heard(), logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="module")
def lora(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(tmp_path_factory.mktemp("lora") / "adapter", untied)


BY_HAND: dict[str, dict[str, Any]] = {  # for factor 4 and 128 positions, theta 10 000
    "linear": {"max_position_embeddings": 512},
    "dynamic": {"max_position_embeddings": 128},
    "yarn": {"max_position_embeddings": 512, "original": 128},
    "llama3": {
        "max_position_embeddings": 512,
        "original": 128,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("form", ["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("kind", list(BY_HAND))
def test_rope_scaling(
    untied: Path, lora: Path, tmp_path: Path, heard: list[str], kind: str, form: str
) -> None:
    base, theta = untied, 10_000.0
    if form == "rope_theta":  # as transformers 4 wrote it
        base, theta = shutil.copytree(untied, tmp_path / "base"), 50_000.0
        edit_json(base / "config.json", rope_parameters=None, rope_theta=theta, rope_scaling=None)
    spec = MergeSpec.model_validate({"rope_scaling": kind, "rope_factor": 4, "dtype": "float32"})
    config, _ = merged(base, [lora], tmp_path / "out", spec)
    assert "rope_scaling" not in config
    assert "rope_theta" not in config
    hand = dict(BY_HAND[kind])
    parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": theta}
    length = hand.pop("max_position_embeddings")
    if original := hand.pop("original", None):
        parameters["original_max_position_embeddings"] = original
    heard.clear()
    config_class: Any = AutoConfig
    made = config_class.from_pretrained(untied)
    given = {**made.to_dict(), "rope_parameters": {**parameters, **hand}, "max_position_embeddings": length}
    maker: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    wanted = maker.from_config(type(made)(**given), dtype=torch.float32).model.rotary_emb
    model = in_transformers(tmp_path / "out")
    assert heard == []
    found = model.model.rotary_emb
    assert found.rope_type == kind
    torch.testing.assert_close(found.inv_freq, wanted.inv_freq, rtol=0, atol=0)
    assert found.attention_scaling == wanted.attention_scaling
    plain = in_transformers(base).model.rotary_emb
    assert plain.config.rope_parameters["rope_theta"] == theta
    if kind == "dynamic":  # sets in beyond the length that the model was made for
        torch.testing.assert_close(found.inv_freq, plain.inv_freq)
        ids = tokens(1, 200)
        for rotary in (found, wanted, plain):
            rotary(torch.zeros(1, 200, 32), torch.arange(200)[None])
        torch.testing.assert_close(found.inv_freq, wanted.inv_freq, rtol=0, atol=0)
        assert torch.isfinite(logits(model, ids)).all()
    assert (found.inv_freq != plain.inv_freq).any()
    assert model.config.max_position_embeddings == length


def test_transformers_warnings_are_heard(untied: Path, tmp_path: Path, heard: list[str]) -> None:
    base = shutil.copytree(untied, tmp_path / "base")
    edit_json(base / "config.json", rope_parameters={"rope_type": "linear", "factor": -1, "rope_theta": 1e4})
    in_transformers(base)
    assert any("factor" in line for line in heard)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rope-scaling", "yarn"), "--rope-scaling and --rope-factor belong together; --rope-scaling yarn"),
        (("--rope-factor", "2"), "--rope-scaling and --rope-factor belong together"),
        (("--rope-scaling", "yarn", "--rope-factor", "1"), "--rope-factor 1"),
        (("--rope-scaling", "yarn", "--rope-factor", "nan"), "--rope-factor nan"),
        (("--rope-scaling", "yarn", "--rope-factor", "inf"), "--rope-factor inf"),
        (("--rope-scaling", "longrope", "--rope-factor", "2"), "Invalid value for '--rope-scaling'"),
        (("--dtype", "int8"), "Invalid value for '--dtype'"),
        (("--tokenizer", "mine"), "Invalid value for '--tokenizer'"),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense(
    untied: Path, lora: Path, tmp_path: Path, cli: RunCli, options: tuple[str, ...], told: str
) -> None:
    code, stdout, stderr = cli("merge", untied, "-a", lora, *options, "-o", tmp_path / "out")
    assert (code, stdout) == (2, "")
    assert told in stderr
    assert stderr.count("\n") == 1 or "Usage" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_a_scaled_base_is_refused(untied: Path, lora: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    base = shutil.copytree(untied, tmp_path / "base")
    edit_json(base / "config.json", **config)
    spec = MergeSpec(rope_scaling="yarn", rope_factor=2)
    with pytest.raises(SpecError, match=r"the base is scaled already \(linear\); an unscaled base"):
        qexport.merge(base, [lora], tmp_path / "out", spec)
    qexport.merge(base, [lora], tmp_path / "out")  # and as it is it stays
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(written.get(key) == value for key, value in config.items())


def test_gpt2_has_no_rotary_embedding(gpt2: Path, tmp_path: Path) -> None:
    adapter = make_adapter("lora", gpt2, tmp_path / "adapter")
    with pytest.raises(SpecError, match="a gpt2 model's config names no rotary embedding"):
        qexport.merge(gpt2, [adapter], tmp_path / "out", MergeSpec(rope_scaling="yarn", rope_factor=2))
