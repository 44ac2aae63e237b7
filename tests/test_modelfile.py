"""The Modelfile: what Ollama would send a model is, character by character, what transformers would."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qexport.errors import SpecError
from qexport.ollama import chat_rendering
from qexport.ollama.chat_families import FAMILIES
from qexport.ollama.chat_reading import assistant, fold, system, user
from qexport.ollama.modelfile import LONGEST_CONTEXT, ChatTokens, ModelfileResult, modelfile
from tests.chat_templates import PUBLISHED, Published
from tests.go_template import GoTemplateError, ollama_text
from tests.modelfile_grammar import ModelfileError, parse_modelfile

BY_NAME = {published.name: published for published in PUBLISHED}
TODAY = datetime.date.today()
SYSTEM = system('Answer in "verse".\n\nNever use {{braces}} or </s>, 谢谢.')
TURNS = [user("Who are you?\nAnd why?"), assistant("I'm <b>no one</b>."), user("2 + 2 = {x}")]
CONVERSATIONS = {
    "system, user": [SYSTEM, TURNS[0]],
    "user": TURNS[:1],
    "three turns": TURNS,
    "system and three": [SYSTEM, *TURNS],
    "system and five": [SYSTEM, *TURNS, assistant("4"), user("Danke!")],
}
REFUSE_SYSTEM = {"Mistral 0.2", "Mixtral", "Gemma"}
IGNORE_SYSTEM = {"Phi-3"}
DATES = {"Llama 3.2": "%d %b %Y", "Granite 3.1": "%B %d, %Y"}


@cache
def made(name: str) -> ModelfileResult:
    published = BY_NAME[name]
    tokens = ChatTokens(published.bos, published.eos, adds_bos=bool(published.bos))
    return modelfile("model.gguf", published.template, tokens, {})


def values(text: str) -> dict[str, str]:
    """A Modelfile's commands; of those given more than once the last."""
    return dict(parse_modelfile(text))


def theirs(published: Published, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
    """transformers' rendering without the BOS, which llama.cpp adds; dates in the form that Ollama has."""
    variables = {"add_generation_prompt": True, **variables}
    texts: Sequence[str] = render_jinja_template(
        [[dict(message) for message in messages]],
        chat_template=published.template,
        bos_token=published.bos,
        eos_token=published.eos,
        **variables,
    )[0]
    text = texts[0].removeprefix(published.bos)
    return text.replace(TODAY.strftime(DATES.get(published.name, "%Y-%m-%d")), TODAY.isoformat())


def ours(result: ModelfileResult, messages: Sequence[Mapping[str, str]], *, think: bool | None = None) -> str:
    """What Ollama sends, reading the Modelfile as it does: a SYSTEM comes first where there is none."""
    commands = values(result.text)
    if "system" in commands and messages[0]["role"] != "system":
        messages = [system(commands["system"]), *messages]
    return ollama_text(commands["template"], messages, think=think, date=TODAY.isoformat())


@pytest.mark.parametrize("name", BY_NAME)
def test_the_same_text_as_transformers(name: str) -> None:
    published, result = BY_NAME[name], made(name)
    assert result.family == published.family, result.notes
    for what, messages in CONVERSATIONS.items():
        spoken = fold(messages) if name in REFUSE_SYSTEM else messages
        assert ours(result, messages) == theirs(published, spoken), (name, what)
    assert any("refuses a system" in note for note in result.notes) == (name in REFUSE_SYSTEM)
    assert any("leaves a system message out" in note for note in result.notes) == (name in IGNORE_SYSTEM)
    assert any("today's date" in note for note in result.notes) == (name in {*DATES, "Mistral Small 3"})


@pytest.mark.parametrize("name", ["Qwen2.5", "Llama 3.1", "Mistral Nemo", "Gemma 3", "Llama 2", "Zephyr"])
def test_an_answer_at_the_end_is_left_open(name: str) -> None:
    """Ollama continues it: the text is what was sent for the question, and the answer's beginning."""
    messages = [SYSTEM, *TURNS, assistant("It is")]
    before = ours(made(name), messages[:-1])
    space = " " if name == "Llama 2" else ""  # its template writes one before an answer, but none to ask
    assert ours(made(name), messages) == f"{before}{space}It is"


def test_a_later_system_message_stands_where_it_is_where_the_template_has_it_so() -> None:
    messages = [SYSTEM, *TURNS[:2], system("Now in prose."), TURNS[2]]
    for name in ("Hermes", "Llama 3", "GLM-4", "Megrez"):
        assert ours(made(name), messages) == theirs(BY_NAME[name], messages)


def test_default_system_messages_are_in_system() -> None:
    expected = {
        "Qwen2": "You are a helpful assistant.",
        "Qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "DBRX": "You are DBRX.",
        "DeepSeek Coder": "You are DeepSeek Coder.\n",
        "Alpaca": "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        "Vicuna": "A chat between a curious user and an artificial intelligence assistant.",
    }
    for name, text in expected.items():
        assert values(made(name).text)["system"] == text
    for name in ("Hermes", "Llama 3.1", "Gemma 3", "Granite 3.1"):  # none, a bare head, none, one with a date
        assert "system" not in values(made(name).text)


def test_thinking_is_switched_as_the_template_does() -> None:
    published, result = BY_NAME["Qwen3"], made("Qwen3")
    for think in (True, False):
        assert ours(result, TURNS, think=think) == theirs(published, TURNS, enable_thinking=think)
    assert ours(result, TURNS, think=False).endswith("<think>\n\n</think>\n\n")
    reasoned = {**assistant("4."), "thinking": "Two and two.", "reasoning_content": "Two and two."}
    whole = theirs(published, [*TURNS, reasoned], add_generation_prompt=False)
    assert ours(result, [*TURNS, reasoned]) == whole.removesuffix("<|im_end|>\n")
    older = [TURNS[0], reasoned, TURNS[2]]
    assert ours(result, older) == theirs(published, older)
    # Ollama's thinking/template.go takes the texts at the ends of the block around .Thinking for its tags
    assert "<think>\n{{ .Thinking }}\n</think>\n\n{{ end }}" in str(result.template)


def test_stop_texts() -> None:
    def stops(name: str) -> list[str]:
        return [value for key, value in parse_modelfile(made(name).text) if key == "stop"]

    assert stops("Qwen2.5") == ["<|im_end|>", "<|im_start|>user"]
    assert stops("DBRX") == ["<|endoftext|>", "<|im_end|>", "<|im_start|>user"]
    assert stops("Llama 2") == ["</s>", "[INST]"]
    assert stops("Llama 3, always asking") == ["<|eot_id|>", "<|start_header_id|>user<|end_header_id|>"]
    assert stops("Vicuna") == ["</s>", "USER:"]
    assert stops("Gemma") == ["<eos>", "<end_of_turn>", "<start_of_turn>user"]
    assert stops("AlphaMonarch") == ["</s>"]  # a turn of the user's starts with `user`: a word, no mark


def test_a_bos_that_nobody_else_adds_stays_in_the_template() -> None:
    published = BY_NAME["Llama 3"]
    kept = modelfile("m.gguf", published.template, ChatTokens(published.bos, published.eos), {})
    assert ours(kept, TURNS).startswith(published.bos)
    assert ours(kept, TURNS) == published.bos + theirs(published, TURNS)
    added = ChatTokens("<s>", "<|im_end|>", adds_bos=True)
    told = modelfile("m.gguf", BY_NAME["Qwen2"].template, added, {}).notes
    assert any("puts <s> before the text" in note for note in told)


def test_every_named_family_is_tried() -> None:
    tried = {published.family for published in PUBLISHED}
    untried = {family.name for family in FAMILIES} - tried
    assert untried == {
        *("Llama 4", "GLM-Edge", "Granite code", "Falcon", "ChatQA", "Orion", "EXAONE 3"),
    }


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}[Round {{ loop.index }}] {{ m.content }}\n{% endfor %}",
            "differs from turn",
        ),
        ("{{ messages[-1].content }}", "leaves turns out"),
        ("{% for m in messages | reverse %}{{ m.role }}: {{ m.content }};{% endfor %}", "another order"),
        ("{% for m in messages %}{{ m.role }}{{ m.content | upper }}{% endfor %}", "leaves turns out"),
        ("{% for m in messages %}{{ m.content | replace('2', 'two') }};{% endfor %}", "no rule that we know"),
        ("{% for m in messages", "fails on a plain conversation"),
        ("{{ raise_exception('never') }}", "(never)"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_another_shape_has_no_template_made_up(template: str, reason: str) -> None:
    result = modelfile("m.gguf", template, ChatTokens(eos="</s>"), {"temperature": 0.5})
    assert result.template is None
    assert result.family is None
    (note,) = result.notes
    assert reason in note
    assert "https://docs.ollama.com/template" in note
    assert f"# {note}" in result.text
    assert parse_modelfile(result.text) == [
        *(("from", "./m.gguf"), ("stop", "</s>"), ("temperature", "0.5")),
    ]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% set x = 'x' * 2000000000 %}{{ x }}",
    ],
)
def test_a_template_that_never_ends_or_eats_memory_is_stopped(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_rendering, "TIME_LIMIT_S", 1.0)
    started = time.monotonic()
    result = modelfile("m.gguf", template, ChatTokens(), {})
    assert time.monotonic() - started < 5
    assert result.template is None
    assert "not translated" in result.notes[0]


def test_without_a_chat_template_the_words_are_sent_as_they_are() -> None:
    result = modelfile("base.gguf", None, ChatTokens("<s>", "</s>", adds_bos=True), {})
    assert result.template == "{{ .Prompt }}"
    assert ours(result, [user("Once upon a time")]) == "Once upon a time"
    assert "no chat template" in result.notes[0]


def test_parameters_come_from_the_generation_config() -> None:
    config = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0,
        "typical_p": None,
        "repetition_penalty": 1.05,
        "max_length": 99,
        "stop_strings": ["\nUser:", "Observation:", "</s>"],
    }
    tokens = ChatTokens("<s>", "</s>", ends=("<|eot|>", "</s>"))
    result = modelfile("m.gguf", None, tokens, config, context_length=131072)
    commands = parse_modelfile(result.text)[2:]
    assert commands == [
        *(("stop", "</s>"), ("stop", "<|eot|>"), ("stop", "Observation:"), ("temperature", "0.7")),
        *(("top_p", "0.8"), ("top_k", "20"), ("min_p", "0"), ("repeat_penalty", "1.05")),
        ("num_ctx", str(LONGEST_CONTEXT)),
    ]
    assert any("131072" in note for note in result.notes)
    assert any("'\\nUser:'" in note for note in result.notes)
    short = modelfile("m.gguf", None, tokens, {"do_sample": False, "temperature": 0.7}, context_length=2048)
    assert parse_modelfile(short.text)[-2:] == [("temperature", "0"), ("num_ctx", "2048")]


@pytest.mark.parametrize("value", ["hot", True, float("nan"), -1, [0.7]])
def test_a_senseless_parameter_is_left_out_and_told(value: object) -> None:
    result = modelfile("m.gguf", None, ChatTokens(), {"temperature": value})
    assert "PARAMETER" not in result.text
    assert any("temperature" in note for note in result.notes)


def test_files_adapter_and_licence() -> None:
    tokens = ChatTokens()
    text = 'MIT "License"\n\n# not a comment\n\tAS IS,\xa0"""'
    result = modelfile("my model q4.gguf", None, tokens, {}, adapter="lo ra.gguf ", license_text=text)
    assert ("from", "./my model q4.gguf") in parse_modelfile(result.text)
    assert ("adapter", "./lo ra.gguf ") in parse_modelfile(result.text)
    assert "LICENSE" not in result.text
    assert any("three quotation marks" in note for note in result.notes)
    kept = modelfile("m.gguf", None, tokens, {}, license_text=text.replace('"""', '"')).text
    assert values(kept)["license"] == 'MIT "License"\n\n# not a comment\n\tAS IS, "'
    shards = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    found = parse_modelfile(modelfile(shards, None, tokens, {}).text)
    assert [value for name, value in found if name == "from"] == [f"./{shard}" for shard in shards]
    for name in ("", "../m.gguf", "/etc/m.gguf", "m\n.gguf", "m\u200b.gguf", 'm""".gguf'):
        with pytest.raises(SpecError, match="cannot name the file"):
            modelfile(name, None, tokens, {})


def test_marks_that_a_template_or_a_modelfile_would_misread_are_escaped() -> None:
    """Braces, three quotes, a no-break space and an invisible one, all round the contents."""
    odd = ['{"""\n', '{{x}}"', "\xa0\u200b{", '""', '\n"""', "{"]
    start, end, begin, finish, before, after = odd
    quoted = {name: repr(text) for name, text in zip("abcdef", odd, strict=True)}
    template = (
        "{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ {a} + m.content + {b} }}}}"
        "{{% elif m.role == 'system' %}}{{{{ {e} + m.content + {f} }}}}"
        "{{% else %}}{{{{ {c} + m.content + {d} }}}}{{% endif %}}{{% endfor %}}"
        "{{% if add_generation_prompt %}}{{{{ {c} }}}}{{% endif %}}"
    ).format(**quoted)
    result = modelfile("m.gguf", template, ChatTokens(), {})
    question, answer, again = (turn["content"] for turn in TURNS)
    assert ours(result, [SYSTEM, *TURNS]) == (
        f"{before}{SYSTEM['content']}{after}{start}{question}{end}{begin}{answer}{finish}{start}{again}{end}{begin}"
    )


def test_the_interpreter_is_right_about_ollamas_own_templates() -> None:
    """Two of Ollama's templates with the outputs that its own tests expect (template/testdata)."""
    messages = [system("Be brief."), user("Hello?"), assistant("Yes."), user("Go on.")]
    gemma = (
        "{{- range $i, $_ := .Messages }}\n{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
        '{{- if eq .Role "user" }}<start_of_turn>user\n{{- if and (eq $i 1) $.System }}\n{{ $.System }}\n'
        '{{ end }}\n{{ .Content }}<end_of_turn>\n{{ else if eq .Role "assistant" }}<start_of_turn>model\n'
        "{{ .Content }}<end_of_turn>\n{{ end }}\n{{- if $last }}<start_of_turn>model\n{{ end }}\n{{- end }}\n"
    )
    assert ollama_text(gemma, messages) == (
        "<start_of_turn>user\nBe brief.\n\nHello?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
        "<start_of_turn>user\nGo on.<end_of_turn>\n<start_of_turn>model\n\n"
    )
    chatml = (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
    )
    assert ollama_text(chatml, messages[1:2]) == (
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    )
    for wrong in ("{{ if .A }}", "{{ end }}", "{{ nosuch 1 }}", "{{ .A", "{{{ .A }}"):
        with pytest.raises(GoTemplateError):
            ollama_text(wrong, messages)


def test_the_grammar_refuses_what_ollama_refuses() -> None:
    for wrong in ("", "# only", "FORM ./x", 'FROM ./x\nSYSTEM """open', "PARAMETER temperature 1", "FROM"):
        with pytest.raises(ModelfileError):
            parse_modelfile(wrong)
    assert parse_modelfile('from x\nsystem """a\n"b"\n"""\n') == [("from", "x"), ("system", 'a\n"b"\n')]
