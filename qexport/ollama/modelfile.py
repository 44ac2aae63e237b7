"""The Modelfile beside a GGUF, as `ollama create NAME -f Modelfile` takes it (Ollama's docs/modelfile.mdx).

Its grammar: an instruction and its value a line; a value in quotes, or in three for several lines, is kept
as it is, and there are no escapes; a line with `#` first is a comment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qexport.errors import SpecError
from qexport.ollama.chat_families import family_name
from qexport.ollama.chat_reading import Reading, UnreadableTemplateError, read_template
from qexport.ollama.chat_translation import go_template, has_date, stop_texts, storable, system_line

# Ollama takes the memory for the whole window when it loads a model: a window of 131072 costs an 8B model
# 16 GiB in 16 bits. Its own default is 4096 on small machines, too short for a long conversation.
LONGEST_CONTEXT = 8192

# generation_config.json's name -> Ollama's, whole number or not, and the least and the most that make sense.
_PARAMETERS: tuple[tuple[str, str, type, float, float], ...] = (
    ("temperature", "temperature", float, 0.0, 100.0),
    ("top_p", "top_p", float, 0.0, 1.0),
    ("top_k", "top_k", int, 0, 2**31 - 1),
    ("min_p", "min_p", float, 0.0, 1.0),
    ("typical_p", "typical_p", float, 0.0, 1.0),
    ("repetition_penalty", "repeat_penalty", float, 0.0, 100.0),
)


@dataclass(frozen=True)
class ChatTokens:
    """A tokenizer's special tokens as texts; an empty text is none.

    `ends` are the tokens beside `eos` that end a turn (generation_config's other EOS, EOT, EOM). `adds_bos`
    is what the GGUF's `tokenizer.ggml.add_bos_token` says. `others` are further variables for the chat
    template, such as pad_token.
    """

    bos: str = ""
    eos: str = ""
    ends: tuple[str, ...] = ()
    adds_bos: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)

    def variables(self) -> dict[str, Any]:
        """What a chat template may ask for, under transformers' names."""
        return {**self.others, "bos_token": self.bos, "eos_token": self.eos}


@dataclass(frozen=True)
class ModelfileResult:
    """The Modelfile's text; its TEMPLATE, None where none is given; the family of the chat template, None
    where it has no name; and what a user should know, a sentence each."""

    text: str
    template: str | None
    family: str | None
    notes: tuple[str, ...]


def modelfile(
    gguf_files: str | Sequence[str],
    chat_template: str | None,
    tokens: ChatTokens,
    generation_config: Mapping[str, Any],
    *,
    context_length: int | None = None,
    adapter: str | None = None,
    license_text: str | None = None,
    name: str = "Modelfile",
) -> ModelfileResult:
    """The Modelfile for a GGUF (its file's name, or its shards' in order) that lies in the same directory.

    `chat_template` is the tokenizer's (jinja), translated where its markup can be read off what it writes;
    where not, no TEMPLATE is made up, and the notes say so. `generation_config` is generation_config.json;
    `context_length` what the model was made for; `adapter` a LoRA's GGUF in the same directory; `name` is the
    file's own. Raises
    SpecError for a file name that a Modelfile cannot hold.
    """
    files = [gguf_files] if isinstance(gguf_files, str) else list(gguf_files)
    notes: list[str] = []
    template, reading = _template(chat_template, tokens, notes)
    lines = [f"FROM {_file(name)}" for name in files]
    if len(files) > 1:
        notes.append(
            "the GGUF is split, which only recent versions of Ollama take: write it whole for others"
        )
    if adapter is not None:
        lines.append(f"ADAPTER {_file(adapter)}")
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    if reading is not None and (default := system_line(reading)) is not None:
        lines.append(f'SYSTEM """{default}"""')
    lines += [f'PARAMETER stop "{text}"' for text in _stops(reading, tokens, generation_config, notes)]
    lines += _parameters(generation_config, notes)
    lines += _context(context_length, notes)
    if license_text is not None and license_text.strip():
        lines += _license(license_text, notes)
    comments = [f"# {' '.join(note.split())}" for note in notes]
    head = [f"# For Ollama: `ollama create NAME -f {name}`, in this directory.", *comments, ""]
    family = None if reading is None else family_name(reading)
    return ModelfileResult("\n".join([*head, *lines, ""]), template, family, tuple(notes))


def _template(
    chat_template: str | None, tokens: ChatTokens, notes: list[str]
) -> tuple[str | None, Reading | None]:
    """The TEMPLATE and the reading that it was made from; adds what there is to say to `notes`."""
    if not chat_template or not chat_template.strip():
        notes.append(
            "the model has no chat template: what is written is sent as it is, and the model completes it"
        )
        return "{{ .Prompt }}", None
    try:
        reading = read_template(chat_template, tokens.variables(), adds_bos=tokens.adds_bos)
    except UnreadableTemplateError as error:
        notes.append(
            f"the chat template is not translated: {error}; recent versions of Ollama use the GGUF's own,"
            " for older ones write a TEMPLATE as https://docs.ollama.com/template has it"
        )
        return None, None
    notes += _differences(reading, chat_template, tokens)
    return go_template(reading), reading


def _differences(reading: Reading, chat_template: str, tokens: ChatTokens) -> list[str]:
    """Where Ollama cannot, or does not, write what the chat template does."""
    told = {
        "the chat template refuses a system message: it is put before the first user's words": reading.folded,
        "the chat template leaves a system message out, and so does TEMPLATE": (
            reading.system_place == "ignored"
        ),
        "the chat template strips spaces off contents, which Ollama cannot": reading.trims,
        "today's date is written in the form 2024-07-26, the only one that Ollama has (0.11 or later)": (
            has_date(reading)
        ),
        "the chat template's switch for thinking is left at its default": reading.switches_elsewhere,
        "tool calls are not in TEMPLATE: recent versions of Ollama use the GGUF's own template for them": (
            "tools" in chat_template
        ),
        f"the runtime puts {tokens.bos} before the text, which the chat template does not": (
            tokens.adds_bos and bool(tokens.bos) and not reading.writes_bos
        ),
    }
    return [sentence for sentence, holds in told.items() if holds]


def _file(name: str) -> str:
    """A file beside the Modelfile, as a value."""
    if not name or "/" in name or "\\" in name or "\n" in name or "\t" in name or not storable(name):
        raise SpecError(
            f"a Modelfile cannot name the file {name!r}",
            expected="the name of a file in its directory, of printable characters",
            remedy="rename the file",
        )
    return f'"./{name}"' if name != name.strip() else f"./{name}"


def _stops(
    reading: Reading | None, tokens: ChatTokens, config: Mapping[str, Any], notes: list[str]
) -> list[str]:
    """The texts that end an answer, each once; those that no Modelfile can hold are told."""
    given = config.get("stop_strings") or []
    given = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    marks = [] if reading is None else stop_texts(reading, [t for t in (tokens.bos, tokens.eos) if t])
    texts = dict.fromkeys(
        [tokens.eos, *tokens.ends, *marks, *(text for text in given if isinstance(text, str))]
    )
    kept = [text for text in texts if text.strip() and "\n" not in text and storable(text)]
    if lost := [text for text in texts if text.strip() and text not in kept]:
        notes.append(f"a Modelfile cannot hold these stop texts: {', '.join(map(repr, lost))}")
    return kept


def _parameters(config: Mapping[str, Any], notes: list[str]) -> list[str]:
    if config.get("do_sample") is False:
        return ["PARAMETER temperature 0"]  # greedy; what shapes a distribution has no part in it
    lines = []
    for name, theirs, kind, least, most in _PARAMETERS:
        value = config.get(name)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if number and least <= value <= most and (kind is float or value == int(value)):
            lines.append(f"PARAMETER {theirs} {int(value) if value == int(value) else value}")
        else:
            notes.append(f"generation_config's {name} is {value!r}, which is left out")
    return lines


def _context(context_length: int | None, notes: list[str]) -> list[str]:
    if context_length is None or context_length < 1:
        return []
    if context_length > LONGEST_CONTEXT:
        notes.append(
            f"num_ctx is {LONGEST_CONTEXT} of the {context_length} tokens that the model can read, "
            "for Ollama takes the memory for all of them when it loads; raise it where there is room"
        )
    return [f"PARAMETER num_ctx {min(context_length, LONGEST_CONTEXT)}"]


def _license(text: str, notes: list[str]) -> list[str]:
    """LICENSE; form feeds and no-break spaces, which a Modelfile would drop, as plain spaces."""
    plain = "".join(char if storable(char) else " " for char in text.replace("\r\n", "\n"))
    if not storable(plain):
        notes.append("the licence has three quotation marks in a row, which no Modelfile can hold")
        return []
    return [f'LICENSE """{plain}"""']
