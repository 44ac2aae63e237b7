"""A chat template's markup as the Go template that Ollama wants (its docs/template.mdx; Go's text/template).

Only `.Messages` is used, as every Ollama since 0.3 has it: a template with it is executed once, on all
messages, with `.System` the system messages joined by empty lines. Consecutive messages of one role have
been made one. An answer that comes last is being continued: its turn is left open.
"""

from __future__ import annotations

from collections.abc import Sequence

from qexport.ollama.chat_reading import Reading
from qexport.ollama.chat_rendering import DATE

_LAST = "$last := eq (len (slice $.Messages $i)) 1"
_OF_LAST_USER = "le (len (slice $.Messages $i)) 2"  # the last message, or the one before an open answer
_MARKS = ("{{", '"""')  # the beginning of an action, the end of a Modelfile's value
_SHORTEST_STOP = 3  # characters; less would stop the model in the middle of its words


class _Writer:
    """Go template text: literal pieces exactly, and actions with line breaks where these change nothing."""

    def __init__(self) -> None:
        self.written = ""

    def literal(self, text: str) -> None:
        """`text` as it is, today's date in the place of the probes'."""
        for number, part in enumerate(text.split(DATE)):
            if number:
                self._add("{{ currentDate }}")
            self._add("".join(_escaped(piece) for piece in _pieces(part)))

    def action(self, code: str) -> None:
        """`{{ code }}`, on a line of its own where no literal space comes before it to be trimmed."""
        broken = self.written and not self.written[-1].isspace()
        self._add("\n{{- " if broken and code.split()[0] in ("if", "else", "end", "range") else "{{ ")
        self.written += f"{code} }}}}"

    def _add(self, text: str) -> None:
        self.written += text


def go_template(reading: Reading) -> str:
    """The template of Ollama's that writes what `reading` does, and leaves an answer at the end open.

    A default system message is in the Modelfile's SYSTEM (`system_line`), so that users can replace it.
    """
    out = _Writer()
    out.literal(reading.lead)
    _system_first(out, reading)
    special = reading.first_user_start != reading.user_start or reading.system_place == "first user"
    if special:
        out.action("$first := true")
    out.action("range $i, $_ := .Messages")
    out.action(_LAST)
    out.action('if eq .Role "user"')
    _user_start(out, reading, special=special)
    out.action(".Content")
    out.literal(reading.user_end)
    out.action('else if eq .Role "assistant"')
    _answer(out, reading)
    if reading.system_place == "anywhere":
        out.action('else if eq .Role "system"')
        _block(out, reading, ".Content")
    out.action("end")
    _generation_prompt(out, reading)
    out.action("end")
    return out.written


def system_line(reading: Reading) -> str | None:
    """The default system message for the Modelfile's SYSTEM, which takes text only.

    None where there is none, and where it has today's date or characters that a Modelfile does not keep:
    then the template has it.
    """
    default = reading.default_system
    return None if default is None or DATE in default or not storable(default) else default


def has_date(reading: Reading) -> bool:
    """Whether the template writes today's date."""
    parts = (reading.lead, reading.before_system, reading.after_system, reading.without_system)
    return any(DATE in part for part in (*parts, reading.first_user_start))


def stop_texts(reading: Reading, tokens: Sequence[str]) -> list[str]:
    """What ends the model's turn: the mark after its answer, and that before the next turn of the user's.

    `tokens` (BOS and EOS) are not part of a mark, though they may be one.
    """
    marks: list[str] = []
    for text in (reading.assistant_end, reading.user_start):
        mark = "".join(text.strip().splitlines()[:1]).strip()
        for token in tokens:
            mark = mark.removeprefix(token).strip() if mark != token else mark
        if len(mark) >= _SHORTEST_STOP and not mark.isalnum() and mark not in marks:
            marks.append(mark)
    return marks


def _system_first(out: _Writer, reading: Reading) -> None:
    without = "" if system_line(reading) is not None else reading.without_system
    if reading.system_place == "anywhere":
        if without:
            out.action("if not .System")
            out.literal(without)
            out.action("end")
    elif reading.system_place == "start":
        if without and without == reading.before_system + reading.after_system:  # the block is always there
            _block(out, reading, ".System")
            return
        out.action("if .System")
        _block(out, reading, ".System")
        if without:
            out.action("else")
            out.literal(without)
        out.action("end")


def _block(out: _Writer, reading: Reading, system: str) -> None:
    out.literal(reading.before_system)
    out.action(system)
    out.literal(reading.after_system)


def _user_start(out: _Writer, reading: Reading, *, special: bool) -> None:
    """The start of a user's turn, and the system message where it stands in such a turn."""
    if reading.system_place == "last user":
        out.action(f"if and $.System ({_OF_LAST_USER})")
        _block(out, reading, "$.System")
        out.action("else")
        out.literal(reading.user_start)
        out.action("end")
    elif not special:
        out.literal(reading.user_start)
    else:
        branches: list[tuple[str, str | None]] = []
        if reading.system_place == "first user":
            branches.append(("and $first $.System", None))
        if reading.first_user_start != reading.user_start:
            branches.append(("$first", reading.first_user_start))
        for number, (condition, text) in enumerate(branches):
            out.action(f"{'else if' if number else 'if'} {condition}")
            _block(out, reading, "$.System") if text is None else out.literal(text)
        out.action("else")
        out.literal(reading.user_start)
        out.action("end")
        out.action("$first = false")


def _answer(out: _Writer, reading: Reading) -> None:
    out.literal(reading.assistant_start)
    if reading.thought is not None:
        before, after = reading.thought
        # Ollama finds the tags of reasoning by the texts at this block's two ends (its thinking/template.go)
        out.action("if .Thinking" if reading.thought_in_history else "if and $last .Thinking")
        out.literal(before)
        out.action(".Thinking")
        out.literal(after)
        out.action("end")
    out.action(".Content")
    if reading.assistant_end:
        out.action("if not $last")
        out.literal(reading.assistant_end)
        out.action("end")


def _generation_prompt(out: _Writer, reading: Reading) -> None:
    on, off = reading.generate_thinking, reading.generate_unthinking
    if not (reading.generate or on or off):
        return
    out.action('if and $last (ne .Role "assistant")')
    # `think` may be left unset, on or off; the template's own default holds where it is unset
    cases = [("and $.IsThinkSet (not $.Think)", off)] if off is not None else []
    cases += [("$.Think", on)] if on is not None else []
    for number, (condition, text) in enumerate(cases):
        out.action(f"{'else if' if number else 'if'} {condition}")
        out.literal(text or "")
    if cases:
        out.action("else")
    out.literal(reading.generate)
    if cases:
        out.action("end")
    out.action("end")


def storable(text: str) -> bool:
    """Whether a value in a Modelfile's quotes keeps `text`: three quotes end it, and nothing escapes them;
    and what Go calls not printable, a no-break space too, is dropped (Ollama's parser/parser.go)."""
    return '"""' not in text and all(_kept(char) for char in text)


def _kept(char: str) -> bool:
    return char in "\n\t" or char.isprintable()  # Go's IsPrint is the same but for newer characters


def _pieces(text: str) -> list[str]:
    """`text` cut so that what needs escaping stands alone."""
    pieces, plain, position = [], "", 0
    while position < len(text):
        special = next((mark for mark in _MARKS if text.startswith(mark, position)), "")
        last = position == len(text) - 1  # where an action's braces may follow
        if not special and (not _kept(text[position]) or (last and text[position] == "{")):
            special = text[position]
        if special:
            pieces += [plain, special]
            plain, position = "", position + len(special)
        else:
            plain, position = plain + text[position], position + 1
    return [piece for piece in (*pieces, plain) if piece]


def _escaped(piece: str) -> str:
    """A piece of `_pieces`, as a string in an action where it would not survive as text."""
    if piece in (*_MARKS, "{") or not storable(piece):
        return '{{ "' + "".join(_in_string(char) for char in piece) + '" }}'
    return piece


def _in_string(char: str) -> str:
    """A character in a string of Go's."""
    if char in '"\\':
        return "\\" + char
    return char if _kept(char) and char not in "\n\t" else f"\\U{ord(char):08x}"
