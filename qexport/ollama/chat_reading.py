"""The words that a chat template puts around turns, read off what it writes on probe conversations.

No template is parsed and none is known by heart: each is asked to write conversations whose contents are
words of our own, and what stands between those words is its markup. A reading counts only when it writes
further conversations, which it was not read from, exactly as the template does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qexport.ollama.chat_rendering import Message, Render, render_all

Place = Literal["start", "anywhere", "first user", "last user", "ignored"]

# Contents for probes: words that no template writes or looks for.
_SYSTEM, _LATER_SYSTEM, _THOUGHT = "Qsystemq", "Qlaterq", "Qthoughtq"
_USERS, _ANSWERS = ("Quseroneq", "Qusertwoq", "Quserthreeq"), ("Qansweroneq", "Qanswertwoq")
_THINKING_SWITCHES = ("enable_thinking", "thinking")  # Qwen3, SmolLM3, GLM-4.5; Granite 3.2, DeepSeek V3.1
_REASONING = ("reasoning_content", "reasoning", "thinking")  # as transformers names them to templates


@dataclass(frozen=True)
class Reading:
    """The text sent for a conversation is, in this order:

    `lead`; the system block `before_system` + system + `after_system`, or `without_system`; every turn with
    its start and end; and after a last turn of the user's, `generate`. The block stands, by `system_place`,
    before the first turn ("start"), wherever a system message stands ("anywhere"), or in place of the first
    user turn's start (`first_user_start`) or of the last's ("last user"); "ignored": it is left out.
    """

    lead: str
    system_place: Place
    before_system: str
    after_system: str
    without_system: str
    first_user_start: str
    user_start: str
    user_end: str
    assistant_start: str
    assistant_end: str
    generate: str
    default_system: str | None = None  # what the template says when there is no system message
    folded: bool = False  # the template refuses a system message: it is put in the user's first words
    trims: bool = False  # the template trims contents, which Ollama's cannot
    thought: tuple[str, str] | None = None  # around the reasoning of an answer that is being continued
    thought_in_history: bool = False
    generate_thinking: str | None = None  # instead of `generate`, when thinking is asked for
    generate_unthinking: str | None = None  # ... and when it is asked not to
    switches_elsewhere: bool = False  # the thinking switch changes more than the prompt's end
    writes_bos: bool = False  # before all; not in `lead` where the runtime adds it

    def write(self, messages: Sequence[Message]) -> str:
        """The conversation as the template writes it with its generation prompt.

        The system message, if any, comes first; user and assistant alternate; the user's turn is last.
        """
        said = messages[0]["content"] if messages[0]["role"] == "system" else self.default_system
        block = None if said is None else f"{self.before_system}{said}{self.after_system}"
        turns = [message for message in messages if message["role"] != "system"]
        parts = [self.lead]
        if self.system_place in ("start", "anywhere"):
            parts.append(self.without_system if block is None else block)
        place = {"first user": 0, "last user": len(turns) - 1}.get(self.system_place)
        for number, turn in enumerate(turns):
            if turn["role"] == "user":
                start = self.first_user_start if number == 0 else self.user_start
                start = block if number == place and block is not None else start
                parts += [start, turn["content"], self.user_end]
            else:
                parts += [self.assistant_start, turn["content"], self.assistant_end]
        return "".join([*parts, self.generate])


class UnreadableTemplateError(Exception):
    """The template's markup is not of the shape that a Reading has; says in which way."""


def read_template(template: str, tokens: Mapping[str, Any], *, adds_bos: bool) -> Reading:
    """The markup of `template`. `tokens` are its variables (bos_token, eos_token, ...).

    With `adds_bos` the runtime puts the BOS before the text, and the reading has none. Raises
    UnreadableTemplateError for a template that fails, or whose markup has another shape.
    """
    probes = {**_probes(), **_checks()}
    outcomes = dict(zip(probes, render_all(template, list(probes.values()), tokens), strict=True))
    texts = {name: outcome.text for name, outcome in outcomes.items() if outcome.text is not None}
    if "users" not in texts:
        raise UnreadableTemplateError(f"it fails on a plain conversation ({outcomes['users'].error})")
    bos = tokens.get("bos_token")
    writes_bos = isinstance(bos, str) and bos != "" and texts["users"].startswith(bos)
    if adds_bos and writes_bos:
        texts = {name: text.removeprefix(str(bos)) for name, text in texts.items()}
    reading = _thinking(replace(_strings(texts, tokens.get("eos_token")), writes_bos=writes_bos), texts)
    for name, messages in _conversations().items():
        if reading.write(messages) != texts.get(f"folded {name}" if reading.folded else name):
            roles = ", ".join(message["role"] for message in messages)
            raise UnreadableTemplateError(f"its markup follows no rule that we know for {roles}")
    return replace(reading, trims=_trims(texts))


def user(content: str) -> Message:
    """A turn of the user's."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A turn of the model's."""
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    """A system message."""
    return {"role": "system", "content": content}


def fold(messages: Sequence[Message]) -> list[Message]:
    """`messages` with a leading system message put before the first user's words."""
    if messages[0]["role"] != "system":
        return list(messages)
    return [user(f"{messages[0]['content']}\n\n{messages[1]['content']}"), *messages[2:]]


def _probes() -> dict[str, Render]:
    """What a reading is taken from."""
    first, second, third = (user(word) for word in _USERS)
    one, two = (assistant(word) for word in _ANSWERS)
    thoughtful: Message = {**one, **dict.fromkeys(_REASONING, _THOUGHT)}
    return {
        "users": Render([first, one, second, two, third]),
        "system": Render([system(_SYSTEM), first, one, second, two, third]),
        "system alone": Render([system(_SYSTEM), first]),
        "question": Render([first], generation_prompt=False),
        "answer": Render([first, one], generation_prompt=False),
        "later system": Render([system(_SYSTEM), first, one, system(_LATER_SYSTEM), second]),
        "spaces": Render([user(f" {_USERS[0]} "), assistant(f" {_ANSWERS[0]} "), second]),
        "thought": Render([first, thoughtful], generation_prompt=False),
        "old thought": Render([first, thoughtful, second]),
        "thinking": Render([first], variables=dict.fromkeys(_THINKING_SWITCHES, True)),
        "unthinking": Render([first], variables=dict.fromkeys(_THINKING_SWITCHES, False)),
    }


def _conversations() -> dict[str, list[Message]]:
    """What a reading must write as the template does, though it was not taken from it."""
    said = system("You answer in verse.\n\n1. Be {{brief}}")
    first, second, third = user("Who are you?\nAnd why?"), user("2 + 2 = {x}"), user("Danke!")
    turns = [first, assistant("I am no one."), second, assistant('"4", <b>four</b>'), third]
    cut = {f"{count} turns": turns[:count] for count in (1, 3, 5)}
    return {**cut, **{f"system and {name}": [said, *some] for name, some in cut.items()}}


def _checks() -> dict[str, Render]:
    plain = {name: Render(messages) for name, messages in _conversations().items()}
    return {**plain, **{f"folded {name}": Render(fold(m)) for name, m in _conversations().items()}}


def _between(text: str, *words: str) -> list[str]:
    """The texts before, between and after `words`, each of which stands in `text` once, in this order."""
    if any(text.count(word) != 1 for word in words):
        raise UnreadableTemplateError("it leaves turns out or repeats them")
    found = []
    for word in words:
        before, _, text = text.partition(word)
        found.append(before)
    if any(word in part for word in words for part in found):
        raise UnreadableTemplateError("it writes turns in another order")
    return [*found, text]


def _strings(texts: Mapping[str, str], eos: object) -> Reading:
    turns = [_USERS[0], _ANSWERS[0], _USERS[1], _ANSWERS[1], _USERS[2]]
    opening, to_answer, to_user, again_to_answer, again_to_user, generate = _between(texts["users"], *turns)
    if (to_answer, to_user) != (again_to_answer, again_to_user):
        raise UnreadableTemplateError("what it writes between turns differs from turn to turn")
    user_end = _end([to_answer, generate], _last(texts.get("question"), _USERS[0]), eos)
    if user_end is None:
        user_end = to_answer[: _shared(to_answer, generate)]
    assistant_end = _end([to_user], _last(texts.get("answer"), _ANSWERS[0]), eos)
    if assistant_end is None:
        assistant_end = to_user[: len(to_user) - _shared(to_user[::-1], opening[::-1])]
    plain = Reading(
        lead="",
        system_place="ignored",
        before_system="",
        after_system="",
        without_system="",
        first_user_start=opening,
        user_start=to_user.removeprefix(assistant_end),
        user_end=user_end,
        assistant_start=to_answer.removeprefix(user_end),
        assistant_end=assistant_end,
        generate=generate.removeprefix(user_end),
    )
    return _with_system(plain, texts, turns)


def _last(text: str | None, word: str) -> str | None:
    return None if text is None or word not in text else text.rpartition(word)[2]


def _end(continued: Sequence[str], alone: str | None, eos: object) -> str | None:
    """How a turn ends: what follows it when nothing does (`alone`), where `continued` begin with it.

    Some templates write EOS after the last turn of all, which is no part of it. None where they disagree.
    """
    candidates = [] if alone is None else [alone]
    if candidates and isinstance(eos, str) and eos:
        candidates.append(candidates[0].removesuffix(eos))
    return next((end for end in candidates if all(text.startswith(end) for text in continued)), None)


def _shared(one: str, other: str) -> int:
    """How many characters `one` and `other` begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def _with_system(plain: Reading, texts: Mapping[str, str], turns: Sequence[str]) -> Reading:
    """`plain` with the place and the surroundings of the system message."""
    start, opening = plain.user_start, plain.first_user_start
    if "system alone" not in texts or "system" not in texts:  # it refuses one
        plain = _with_lead(plain)
        before = plain.first_user_start
        return replace(
            plain, system_place="first user", before_system=before, after_system="\n\n", folded=True
        )
    text = texts["system"]
    if _SYSTEM not in text:
        return _with_lead(plain)
    if text.index(_SYSTEM) > text.index(_USERS[0]):
        return _in_last_user(plain, text, turns)
    before, after, *_ = _between(text, _SYSTEM, *turns)
    if not (opening.endswith(start) and after.endswith(start)):
        default = _inside(opening, before, after)
        return replace(
            plain, system_place="first user", before_system=before, after_system=after, default_system=default
        )
    without, after = opening.removesuffix(start), after.removesuffix(start)
    lead = without if before.startswith(without) else ""
    before, without = before.removeprefix(lead), without.removeprefix(lead)
    later = f"{_ANSWERS[0]}{plain.assistant_end}{before}{_LATER_SYSTEM}{after}{start}{_USERS[1]}"
    return replace(
        plain,
        lead=lead,
        system_place="anywhere" if later in texts.get("later system", "") else "start",
        before_system=before,
        after_system=after,
        without_system=without,
        first_user_start=start,
        default_system=_inside(without, before, after),
    )


def _with_lead(reading: Reading) -> Reading:
    """`reading` with what stands before the first user turn's start as its lead, where that can be told."""
    opening, start = reading.first_user_start, reading.user_start
    if not opening.endswith(start):
        return reading
    return replace(reading, lead=opening.removesuffix(start), first_user_start=start)


def _in_last_user(plain: Reading, text: str, turns: Sequence[str]) -> Reading:
    """The system message in the last turn of the user's, as Mistral's v3 has it."""
    *_, before, after, _ = _between(text, *turns[:-1], _SYSTEM, turns[-1])
    plain = _with_lead(plain)
    if plain.first_user_start != plain.user_start or not before.startswith(plain.assistant_end):
        raise UnreadableTemplateError("it puts the system message in the last turn in a way of its own")
    before = before.removeprefix(plain.assistant_end)
    return replace(plain, system_place="last user", before_system=before, after_system=after)


def _inside(whole: str, before: str, after: str) -> str | None:
    """What stands in `whole` between `before` and `after`; None where they are not there, or nothing is."""
    if len(whole) <= len(before) + len(after) or not (whole.startswith(before) and whole.endswith(after)):
        return None
    return whole[len(before) : len(whole) - len(after)]


def _thinking(reading: Reading, texts: Mapping[str, str]) -> Reading:
    """`reading` with the switch of thinking and what surrounds reasoning, where the template has them."""
    question = reading.write([user(_USERS[0])])
    stem = question.removesuffix(reading.generate)
    ends: dict[str, str | None] = {"thinking": None, "unthinking": None}
    for name in ends:
        text = texts.get(name, question)
        if text != question and text.startswith(stem):
            ends[name] = text.removeprefix(stem)
        elif text != question:
            reading = replace(reading, switches_elsewhere=True)
    reading = replace(reading, generate_thinking=ends["thinking"], generate_unthinking=ends["unthinking"])
    text, head = texts.get("thought", ""), stem + reading.assistant_start
    if not text.startswith(head) or text.count(_THOUGHT) != 1 or text.count(_ANSWERS[0]) != 1:
        return reading
    before, after, *rest = _between(text.removeprefix(head), *sorted((_THOUGHT, _ANSWERS[0]), key=text.index))
    if not rest or text.index(_THOUGHT) > text.index(_ANSWERS[0]):
        return reading
    in_history = _THOUGHT in texts.get("old thought", "")
    return replace(reading, thought=(before, after), thought_in_history=in_history)


def _trims(texts: Mapping[str, str]) -> bool:
    text = texts.get("spaces", "")
    return bool(text) and not (f" {_USERS[0]} " in text and f" {_ANSWERS[0]} " in text)
