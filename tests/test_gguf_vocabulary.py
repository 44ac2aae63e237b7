"""A model's tokenizer as GGUF settings and back: the judge of the ids is the real llama.cpp, opened by
cyllama."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.events import Event, Noted
from qexport.formats.gguf.container import Metadata, array, read_header, text
from qexport.formats.gguf.tokenizer.files import tokenizer_files
from qexport.formats.gguf.tokenizer.outline import KEY
from qexport.formats.gguf.tokenizer.pretokenizer_hashes import CHECK_TEXT, NAMES, name_by_hash
from qexport.formats.gguf.tokenizer.pretokenizers import PRETOKENIZERS, Pretokenizer, pretokenizer_name
from qexport.formats.gguf.tokenizer.vocabulary import vocabulary
from tests.conftest import shared

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp", reason="needs cyllama, the real llama.cpp")

HARD = (
    "",
    "Hello world",
    "I'M sure, don't, they'Re we'll 'tis O'Neill",
    "trailing  ",
    "a    b\t\tc\n\n\n  d\r\n \n",
    "1234567 3.14 1,000.5 x86_64 2nd",
    "def f(x):\n    return x**2  # y\n\tif (a==b) { c[0] += 1; }",
    "你好，世界 日本語のテキスト 東京2024年",
    "مرحبا بالعالم ٣٤٥",
    "नमस्ते दुनिया २०२४",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🚀🚀",
    "a\u00a0b\u3000c “curly’s” … ½",
    "camelCaseWords HTMLParser",
    "\n",
    "\x00\x7f",
    CHECK_TEXT,
)
MARKS = "e\u0301 ñ n\u0303 é"
LEADING = (" leading", "   ", "  two")
WORDS = "the cat and the dog they are there, 12 34 five six don't I'll 你好 мир\n\nthen\tthem  again " * 4

Ids = Callable[[str], list[int]]


def in_llama_cpp(metadata: Metadata, rows: int, path: Path) -> Ids:
    """Ids by llama.cpp, of a file with these settings and a tiny Llama of zeros (cyllama aborts on files
    without layers, vocab_only or not)."""
    width = 32
    writer = gguf.GGUFWriter(path, "llama")
    for key, typed in metadata.items():
        if typed.kind.startswith("["):
            writer.add_array(key, typed.value)
        else:
            kinds = {"u32": gguf.GGUFValueType.UINT32, "bool": gguf.GGUFValueType.BOOL}
            writer.add_key_value(key, typed.value, kinds.get(typed.kind, gguf.GGUFValueType.STRING))
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((rows, width), np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = llama_cpp.LlamaModel(str(path), llama_cpp.LlamaModelParams(), verbose=False)
    vocab = model.get_vocab()

    def ids(sentence: str, keep: Any = model) -> list[int]:
        return list(vocab.tokenize(sentence, True, True))

    return ids


def differing(one: Ids, other: Ids, texts: Sequence[str]) -> list[str]:
    return [sentence for sentence in texts if one(sentence) != other(sentence)]


def written(files: dict[str, str], directory: Path) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(content, encoding="utf-8")
    return directory


def rows_of(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text())["vocab_size"])


def byte_level(directory: Path, row: Pretokenizer, specials: Sequence[str] = (), **options: Any) -> Path:
    """A byte-level BPE trained on a few words, with the row's pre-tokenizer."""
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(row.steps)},
        "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": row.ignore_merges},
    }
    tokenizer = Tokenizer.from_str(json.dumps(content))
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>", *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, *HARD * 3], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return saved(tokenizer, directory, **{"bos_token": "<s>", "eos_token": "</s>", **options})


def sentencepiece(directory: Path, kind: str, *, byte_tokens: bool = True, **options: Any) -> Path:
    """A BPE with byte fallback whose spaces are ▁, as Llama's, Gemma's and transformers 5's files have it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replaces = normalizers.Replace(" ", "▁")
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaces])
    elif kind == "gemma":
        tokenizer.normalizer = replaces
    elif kind == "always":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_tokens)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=specials, show_progress=False, max_token_length=12, limit_alphabet=80
    )
    tokenizer.train_from_iterator([WORDS, *HARD[:7]] * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return saved(tokenizer, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)


def saved(tokenizer: Any, directory: Path, *, opens: bool = True, **options: Any) -> Path:
    if opens and tokenizer.token_to_id("<s>") is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    kind: Any = PreTrainedTokenizerFast
    kind(tokenizer_object=tokenizer, **options).save_pretrained(directory)
    return directory


def count(directory: Path) -> int:
    return len(AutoTokenizer.from_pretrained(directory))


# ---------------------------------------------------------------- ids of real models

# Texts in which llama.cpp's tokenizer cannot do as transformers' does, and why.
STRUCTURAL = {
    # Metaspace "first": no second ▁ before a text that begins with a space, none after a special token.
    # llama.cpp: one before each text and after each special token.
    "tinystories-656k": {*LEADING, "a<|end_story|>b c"},
    # transformers prepends ▁ to spaces alone; llama.cpp's Unigram does so before the first other character.
    "babyllama-105": {"   "},
}


@pytest.mark.parametrize("name", ["stories260k", "captions22m", "tinystories-656k", "babyllama-105"])
def test_ids_of_the_shared_models(name: str, tmp_path: Path) -> None:
    directory = shared("models", name)
    hf = AutoTokenizer.from_pretrained(directory)
    found = vocabulary(directory, vocab_size=rows_of(directory))
    ids = in_llama_cpp(found.metadata, len(found.tokens), tmp_path / "v.gguf")
    eos = hf.eos_token
    stories = shared("text", "tinystories_eval200.txt").read_text()[:30_000].splitlines()
    texts = [*HARD, *LEADING, MARKS, *stories, f"a {eos}", f"a{eos}b c"]
    if name == "tinystories-656k":  # no byte tokens: llama.cpp would end with an exception
        assert any("no byte tokens" in note for note in found.notes)
        known = set("".join(hf.get_vocab())) | {" "}
        texts = [sentence for sentence in texts if set(sentence) <= known]
        assert len(texts) > 250
    assert set(differing(hf.encode, ids, texts)) == STRUCTURAL.get(name, set())
    assert bool(found.notes) == (name in STRUCTURAL)


def test_the_model_kinds_of_the_shared_models() -> None:
    def kind(name: str) -> tuple[str, str]:
        directory = shared("models", name)
        found = vocabulary(directory, vocab_size=rows_of(directory))
        return found.model, found.pre

    assert kind("stories260k") == ("llama", "default")
    assert kind("captions22m") == ("gpt2", "smollm")
    assert kind("babyllama-105") == ("t5", "default")  # single characters without byte tokens


@pytest.mark.parametrize("name", ["stories260k"])
def test_ids_from_tokenizer_model_alone(name: str, tmp_path: Path) -> None:
    """The judge beside llama.cpp is sentencepiece itself, on texts that its own normalizer leaves as they
    are."""
    pieces = pytest.importorskip("sentencepiece")
    source = shared("models", name)
    shutil.copy(source / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    found = vocabulary(tmp_path, vocab_size=rows_of(source))
    ids = in_llama_cpp(found.metadata, len(found.tokens), tmp_path / "v.gguf")
    judge = pieces.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    clean = [" ".join(sentence.split()) for sentence in HARD]
    assert differing(judge.encode, ids, [s for s in clean if "<" not in s]) == []


# ---------------------------------------------------------------- byte-level BPE


@pytest.mark.parametrize("row", PRETOKENIZERS, ids=lambda row: str(row.name))
def test_each_row_splits_as_llama_cpp_does(row: Pretokenizer, tmp_path: Path) -> None:
    directory = byte_level(tmp_path / "t", row)
    hf = AutoTokenizer.from_pretrained(directory)
    found = vocabulary(directory, vocab_size=count(directory))
    assert (found.model, found.pre) == ("gpt2", row.name)
    ids = in_llama_cpp(found.metadata, len(found.tokens), tmp_path / "v.gguf")
    texts = [*HARD, *LEADING, MARKS, "ПРИВЕТ École ÉCOLE приветМИР", "a</s>b c", " <s> "]
    # llama.cpp's regexes for these two know neither combining marks nor upper case outside ASCII.
    unlike = {HARD[9], CHECK_TEXT, texts[-3], MARKS} if row.differs else set()
    assert set(differing(hf.encode, ids, texts)) <= unlike
    assert bool(found.notes) == bool(row.differs)
    back = AutoTokenizer.from_pretrained(written(tokenizer_files(found.metadata), tmp_path / "back"))
    assert differing(hf.encode, back.encode, texts) == []
    bare = {key: typed for key, typed in found.metadata.items() if key != KEY}  # as another tool's file
    back = AutoTokenizer.from_pretrained(written(tokenizer_files(bare), tmp_path / "bare"))
    assert differing(hf.encode, back.encode, texts) == []


def test_llama_cpp_knows_each_name(tmp_path: Path) -> None:
    found = vocabulary(byte_level(tmp_path / "t", PRETOKENIZERS[0]), vocab_size=900)
    refused = []
    for name in {*NAMES, *(name for row in PRETOKENIZERS for name in (row.name, *row.same))}:
        metadata = {**found.metadata, "tokenizer.ggml.pre": text(name)}
        try:
            in_llama_cpp(metadata, len(found.tokens), tmp_path / "v.gguf")
        except Exception:
            refused.append(name)
    assert refused == []


def test_whole_words_before_merges(tmp_path: Path) -> None:
    """A word in the vocabulary that no merge makes: Llama 3 takes it whole, and llama-bpe too; smaug-bpe does
    not."""
    rows = {row.name: row for row in PRETOKENIZERS}
    for name in ("llama-bpe", "smaug-bpe"):
        directory = byte_level(tmp_path / name, rows[name])
        content = json.loads((directory / "tokenizer.json").read_text())
        content["model"]["vocab"]["Ġzyzzyva"] = len(content["model"]["vocab"])
        (directory / "tokenizer.json").write_text(json.dumps(content))
        hf = AutoTokenizer.from_pretrained(directory)
        found = vocabulary(directory, vocab_size=len(hf))
        ids = in_llama_cpp(found.metadata, len(found.tokens), tmp_path / f"{name}.gguf")
        assert found.pre == name
        assert differing(hf.encode, ids, ["a zyzzyva", *HARD]) == []
        assert (len(hf) - 1 in ids("a zyzzyva")) == (name == "llama-bpe")


def test_the_same_splits_in_other_words(tmp_path: Path) -> None:
    rows = {row.name: row for row in PRETOKENIZERS}
    step = json.loads(json.dumps(rows["qwen2"].steps[0]))
    step["pattern"]["Regex"] = step["pattern"]["Regex"].replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    )
    directory = byte_level(tmp_path / "t", replace(rows["qwen2"], steps=(step, rows["qwen2"].steps[1])))
    found = vocabulary(directory, vocab_size=900)
    assert found.pre == "qwen2"
    assert "check texts" in found.notes[0]


def test_an_unknown_pretokenizer_is_said_so_and_can_be_set(tmp_path: Path) -> None:
    step = {"type": "Split", "pattern": {"Regex": "[aeiou]+"}, "behavior": "Isolated", "invert": False}
    row = replace(PRETOKENIZERS[0], steps=(step, {**PRETOKENIZERS[0].steps[0], "use_regex": False}))
    directory = byte_level(tmp_path / "t", row)
    with pytest.raises(UnsupportedModelError, match=r"\[aeiou\].*gpt-2, smollm.*--pre-tokenizer NAME"):
        vocabulary(directory, vocab_size=900)
    assert vocabulary(directory, vocab_size=900, pre="gpt-2").pre == "gpt-2"
    with pytest.raises(SpecError, match=r"gtp-2.*one of"):
        vocabulary(directory, vocab_size=900, pre="gtp-2")


def test_a_unicode_form_is_noted_and_its_texts_are_the_only_ones_that_differ(tmp_path: Path) -> None:
    directory = byte_level(tmp_path / "t", next(row for row in PRETOKENIZERS if row.name == "qwen2"))
    content = json.loads((directory / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    hf = AutoTokenizer.from_pretrained(directory)
    found = vocabulary(directory, vocab_size=900)
    assert any("NFC" in note for note in found.notes)
    ids = in_llama_cpp(found.metadata, len(found.tokens), tmp_path / "v.gguf")
    assert differing(hf.encode, ids, [*HARD, MARKS]) == [MARKS]
    back = AutoTokenizer.from_pretrained(written(tokenizer_files(found.metadata), tmp_path / "back"))
    assert differing(hf.encode, back.encode, [*HARD, MARKS]) == []
    content["normalizer"] = {"type": "Lowercase"}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match="Lowercase"):
        vocabulary(directory, vocab_size=900)


# ---------------------------------------------------------------- SentencePiece-like BPE


@pytest.mark.parametrize("kind", ["prepend", "gemma", "always", "first"])
def test_ids_of_sentencepiece_from_tokenizer_json_alone(kind: str, tmp_path: Path) -> None:
    directory = sentencepiece(tmp_path / "t", kind)
    hf = AutoTokenizer.from_pretrained(directory)
    found = vocabulary(directory, vocab_size=count(directory))
    assert found.model == "llama"
    assert found.metadata["tokenizer.ggml.add_space_prefix"].value is (kind != "gemma")
    ids = in_llama_cpp(found.metadata, len(found.tokens), tmp_path / "v.gguf")
    texts = [*HARD, *LEADING, MARKS, WORDS, "a</s>", "a</s>b"]
    # Metaspace adds no second ▁ to a text that begins with a space, and with "first" none after a special
    # token.
    unlike = {"always": {*LEADING}, "first": {*LEADING, "a</s>b"}}.get(kind, set())
    assert set(differing(hf.encode, ids, texts)) == unlike
    assert bool(found.notes) == bool(unlike)
    back = AutoTokenizer.from_pretrained(written(tokenizer_files(found.metadata), tmp_path / "back"))
    assert differing(hf.encode, back.encode, texts) == []
    assert [back.decode(hf.encode(s)) for s in texts] == [hf.decode(hf.encode(s)) for s in texts]


def test_the_scores_are_what_makes_the_ids_right(tmp_path: Path) -> None:
    """With one score for all, as llama.cpp's converter writes it for tokenizer.json alone, the ids are
    wrong."""
    directory = sentencepiece(tmp_path / "t", "prepend")
    found = vocabulary(directory, vocab_size=count(directory))
    hf = AutoTokenizer.from_pretrained(directory)
    same = array("f32", [-1000.0] * len(found.tokens))
    metadata = {**found.metadata, "tokenizer.ggml.scores": same}
    ids = in_llama_cpp(metadata, len(found.tokens), tmp_path / "v.gguf")
    assert differing(hf.encode, ids, [*HARD, WORDS]) == [HARD[6], CHECK_TEXT, WORDS]


def test_types_of_tokens(tmp_path: Path) -> None:
    directory = sentencepiece(tmp_path / "t", "prepend", additional_special_tokens=["<|turn|>"])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<|odd|>", normalized=False)])
    tokenizer.add_tokens([AddedToken("two▁words", normalized=False)])
    tokenizer.save_pretrained(directory)
    size = len(tokenizer)
    found = vocabulary(directory, vocab_size=size + 2)
    kind = dict(zip(found.tokens, found.metadata["tokenizer.ggml.token_type"].value, strict=True))
    kinds = gguf.TokenType
    assert kind["<unk>"] == kinds.UNKNOWN
    assert {kind[word] for word in ("<s>", "</s>", "<|turn|>", "<|odd|>")} == {kinds.CONTROL}
    assert {kind[word] for word in ("<tool>", "two words")} == {kinds.USER_DEFINED}
    assert {kind["<0x00>"], kind["<0xFF>"]} == {kinds.BYTE}
    assert found.tokens[size:] == (f"[PAD{size}]", f"[PAD{size + 1}]")
    assert {kind[word] for word in found.tokens[size:]} == {kinds.UNUSED}
    ids = in_llama_cpp(found.metadata, size + 2, tmp_path / "v.gguf")
    texts = ["a<tool>b", "<tool>", "x <|turn|>y<|odd|> z", *HARD]
    assert differing(tokenizer.encode, ids, texts) == []
    back = AutoTokenizer.from_pretrained(written(tokenizer_files(found.metadata), tmp_path / "back"))
    assert len(back) == size
    assert differing(tokenizer.encode, back.encode, [*texts, "two▁words"]) == []
    assert back.added_tokens_decoder == tokenizer.added_tokens_decoder


# ---------------------------------------------------------------- rows, special tokens, templates


def test_a_token_without_a_row(tmp_path: Path) -> None:
    directory = byte_level(tmp_path / "t", PRETOKENIZERS[0])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    tokenizer.save_pretrained(directory)
    size = len(tokenizer) - 1
    found = vocabulary(
        directory, vocab_size=size
    )  # as Gemma 3's text models have one token for pictures more
    assert len(found.tokens) == size
    assert any("<picture>" in note for note in found.notes)
    tokenizer.chat_template = "{{ messages }}<picture>"
    tokenizer.save_pretrained(directory)
    with pytest.raises(SpecError, match=rf"\({size} rows\): <picture>; resize the model's embedding"):
        vocabulary(directory, vocab_size=size)
    with pytest.raises(SpecError, match="no row"):
        vocabulary(directory, vocab_size=size - 5)


def test_special_tokens(tmp_path: Path) -> None:
    names = [
        "<|im_end|>",
        "<|endoftext|>",
        "<|fim_prefix|>",
        "<fim-suffix>",
        "<own_end>",
        "<own_stop>",
        "<p>",
    ]
    directory = byte_level(tmp_path / "t", PRETOKENIZERS[0], names, pad_token="<p>")
    ids = {name: number for number, name in enumerate(["<s>", "</s>", *names])}
    ends = [ids["<|endoftext|>"], ids["</s>"], ids["<|im_end|>"], ids["<own_end>"], ids["<own_stop>"], 5000]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = vocabulary(directory, vocab_size=900)
    values = {key.removeprefix("tokenizer.ggml."): typed.value for key, typed in found.metadata.items()}
    assert (values["bos_token_id"], values["eos_token_id"]) == (0, 1)
    assert values["padding_token_id"] == ids["<p>"]
    assert values["eot_token_id"] == ids["<|im_end|>"]
    assert values["eom_token_id"] == ids["<own_end>"]  # a free place, for llama.cpp to stop there
    assert values["fim_pre_token_id"] == ids["<|fim_prefix|>"]
    assert values["fim_suf_token_id"] == ids["<fim-suffix>"]
    assert "unknown_token_id" not in values
    assert (values["add_bos_token"], values["add_eos_token"]) == (True, False)
    assert found.notes == (
        f"llama.cpp stops at three ids, not at these of generation_config.json: [{ids['<own_stop>']}]",
    )
    assert (found.special.bos, found.special.turn_end) == (0, ids["<|im_end|>"])


@pytest.mark.parametrize(
    ("single", "opens", "closes"),
    [("$A", False, False), ("$A </s>", False, True), ("<s> $A </s>", True, True)],
)
def test_what_is_added_to_texts_is_tried_out(single: str, opens: bool, closes: bool, tmp_path: Path) -> None:
    """Whatever tokenizer_config.json says: transformers goes by tokenizer.json."""
    directory = byte_level(tmp_path / "t", PRETOKENIZERS[0], opens=False, add_bos_token=not opens)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    hf = AutoTokenizer.from_pretrained(directory)
    found = vocabulary(directory, vocab_size=900)
    ids = in_llama_cpp(found.metadata, len(found.tokens), tmp_path / "v.gguf")
    assert differing(hf.encode, ids, HARD) == []
    back = AutoTokenizer.from_pretrained(written(tokenizer_files(found.metadata), tmp_path / "back"))
    assert differing(hf.encode, back.encode, HARD) == []


def test_chat_templates(tmp_path: Path) -> None:
    directory = byte_level(tmp_path / "t", PRETOKENIZERS[0])
    assert vocabulary(directory, vocab_size=900).chat_template is None
    (directory / "chat_template.jinja").write_text("one {{ messages }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("two {{ messages }}")
    found = vocabulary(directory, vocab_size=900)
    assert found.chat_template == "one {{ messages }}"
    assert found.metadata["tokenizer.chat_template"] == text("one {{ messages }}")
    assert found.metadata["tokenizer.chat_template.tools"] == text("two {{ messages }}")
    assert found.metadata["tokenizer.chat_templates"] == array("str", ["tools"])
    back = AutoTokenizer.from_pretrained(written(tokenizer_files(found.metadata), tmp_path / "back"))
    assert back.chat_template == {"default": "one {{ messages }}", "tools": "two {{ messages }}"}


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    plain = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    for name, tokenizer, found in (
        ("w", wordpiece, "WordPiece"),
        ("u", unigram, "Unigram"),
        ("p", plain, "neither works on bytes"),
    ):
        with pytest.raises(UnsupportedModelError, match=f"{found}.*known are byte-level BPE"):
            vocabulary(saved(tokenizer, tmp_path / name), vocab_size=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModelError, match="no tokenizer"):
        vocabulary(tmp_path / "empty", vocab_size=2)


def test_notes_are_events_too(tmp_path: Path) -> None:
    events: list[Event] = []
    directory = sentencepiece(tmp_path / "t", "first", byte_tokens=False)
    found = vocabulary(directory, vocab_size=count(directory), pre="gpt-2", on_event=events.append)
    assert [event.text for event in events if isinstance(event, Noted)] == [
        f"tokenizer: {note}" for note in found.notes
    ]
    assert any("std::out_of_range" in note for note in found.notes)
    assert any("gpt-2 is not used" in note for note in found.notes)


# ---------------------------------------------------------------- back


def read_metadata(path: Path) -> Metadata:
    """The tokenizer's settings."""
    found = read_header(path).metadata
    return {key: typed for key, typed in found.items() if key.startswith("tokenizer.")}


@pytest.mark.parametrize("name", ["ggml-vocab-gpt-2", "ggml-vocab-llama-spm", "ggml-vocab-phi-3"])
def test_files_of_others_vocabularies(name: str, tmp_path: Path) -> None:
    """Files that llama.cpp made: the tokenizer written from them gives llama.cpp's ids, and goes forth
    again."""
    metadata = read_metadata(shared("gguf", f"{name}.gguf"))
    rows = len(metadata["tokenizer.ggml.tokens"].value)
    directory = written(tokenizer_files(metadata), tmp_path / "t")
    hf = AutoTokenizer.from_pretrained(directory)
    ids = in_llama_cpp(metadata, rows, tmp_path / "v.gguf")
    texts = [*HARD, *LEADING, MARKS, "a <s>b</s> c<|endoftext|> d", "<|user|> hi<|end|>\n<|assistant|>"]
    assert differing(hf.encode, ids, texts) == []
    if name == "ggml-vocab-gpt-2":  # known by the published hash, whatever the structure says
        assert name_by_hash(hf.encode(CHECK_TEXT)) == "gpt-2"
        assert pretokenizer_name(hf, {"pre_tokenizer": {"type": "Whitespace"}, "model": {}}) == ("gpt-2", [])
    again = vocabulary(directory, vocab_size=rows)
    if name == "ggml-vocab-llama-spm":  # other scores in the same order
        ids = in_llama_cpp(again.metadata, rows, tmp_path / "w.gguf")
        assert differing(hf.encode, ids, texts) == []
    assert again.tokens == tuple(metadata["tokenizer.ggml.tokens"].value)


def test_what_cannot_go_back() -> None:
    events: list[Event] = []
    for metadata, found in (
        ({"tokenizer.ggml.model": text("bert")}, "'bert'"),
        ({"tokenizer.ggml.model": text("gpt2"), "tokenizer.ggml.pre": text("kimi-k2")}, "'kimi-k2'"),
        ({}, "None"),
    ):
        assert tokenizer_files(metadata, events.append) == {}
        assert found in str(events[-1])


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.tokens": array("str", ["a", "a"])},
        {"tokenizer.ggml.tokens": text("a")},
        {"tokenizer.ggml.token_type": array("i32", [1])},
        {"tokenizer.ggml.scores": array("f32", [1.0])},
        {KEY: text("{}")},
        {KEY: text("[" * 100_000)},
        {KEY: text('{"steps": 3}')},
        {"tokenizer.ggml.model": text("gpt2"), "tokenizer.ggml.merges": array("str", ["ab"])},
    ],
    ids=["twice", "no list", "types", "scores", "outline", "deep", "steps", "merge"],
)
def test_hostile_settings(change: Metadata) -> None:
    metadata = {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("gpt-2"),
        "tokenizer.ggml.tokens": array("str", ["<unk>", "a", "b"]),
        "tokenizer.ggml.token_type": array("i32", [2, 1, 1]),
        "tokenizer.ggml.scores": array("f32", [0.0, 0.0, 0.0]),
    }
    assert tokenizer_files(metadata)
    with pytest.raises(CorruptFileError):
        tokenizer_files({**metadata, **change})
