"""A README.md that is partly ours: what the user wrote in it stays byte for byte.

Our part of the body stands between two comments. The first of them also tells the keys of the YAML on top
that are ours, each with a hash of the value that we wrote: a value that has another one is the user's by now.

The YAML block is found as the Hub finds it (huggingface_hub, `REGEX_YAML_BLOCK`), and read as YAML 1.2 is:
`no` is a language, not false, and a date is a text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qexport.checkpoint.disk import read_errors
from qexport.errors import CorruptFileError

CARD_FILE = "README.md"
_BLOCK = re.compile(
    r"\A(\ufeff?\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n|(?<=[\r\n]))---[ \t]*(?:\r\n|\n|\Z))"
)
_OPEN = re.compile(r"\A\ufeff?\s*---[ \t]*[\r\n]")
_BEGIN = re.compile(r"^<!-- qexport:begin(?P<keys>(?: [\w-]+=[0-9a-f]+)*) -->(?=[ \t]*\r?$)", re.MULTILINE)
_END = re.compile(r"^<!-- qexport:end -->(?=[ \t]*\r?$)", re.MULTILINE)
_HEADING = re.compile(r"^# +\S", re.MULTILINE)
_FENCED = re.compile(r"^(?P<mark>```+|~~~+)[\S\s]*?^(?P=mark)", re.MULTILINE)
_MAX_BYTES = 1 << 20
_HASH_DIGITS = 12
# A key says nothing without the one before it: where that one is the user's, so are these.
_FOLLOWERS = {
    "license_name": "license",
    "license_link": "license",
    "base_model_relation": "base_model",
}


@dataclass(frozen=True)
class Card:
    """A card's text and its parts.

    `front` is the text of the YAML, None where there is none, `metadata` what it says; `section` is where our
    part of the body lies in `body`, comments included; `ours` are the hashes of the values that we wrote.
    """

    text: str
    front: str | None
    body: str
    metadata: Mapping[str, Any]
    section: tuple[int, int] | None
    ours: Mapping[str, str]

    @property
    def titled(self) -> bool:
        """Whether the user's part of the body has a title."""
        begin, end = self.section or (len(self.body), len(self.body))
        return bool(_HEADING.search(_FENCED.sub("", self.body[:begin] + self.body[end:])))

    @property
    def line_break(self) -> str:
        """What lines end with: of a file that has both, a plain line feed."""
        return "\r\n" if "\n" in self.text and self.text.count("\n") == self.text.count("\r\n") else "\n"


EMPTY = Card("", None, "", {}, None, {})


def read_card(path: Path) -> Card:
    """The card in a file. Raises CorruptFileError for one that cannot be told apart into its parts."""
    with read_errors(path):
        raw = path.read_bytes()
    if len(raw) > _MAX_BYTES:
        raise _broken(path, f"it has {len(raw)} bytes")
    try:
        return parse_card(raw.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise _broken(path, "it is not UTF-8") from error


def read_metadata(path: Path) -> Mapping[str, Any]:
    """What the YAML of another's card says; nothing where there is none, or a broken one."""
    try:
        return read_card(path).metadata
    except Exception:  # a source's card is for people, too: whatever it holds, the output stands without
        return {}


def parse_card(text: str, path: Path) -> Card:
    """The parts of a card's text; `path` is for errors. Raises CorruptFileError."""
    block = _BLOCK.match(text)
    if block is None and _OPEN.match(text):
        raise _broken(path, "its YAML begins with '---' and does not end with it")
    body = text[block.end() :] if block else text
    begins, ends = list(_BEGIN.finditer(body)), list(_END.finditer(body))
    if len(begins) > 1 or len(begins) != len(ends) or (begins and ends[0].start() < begins[0].end()):
        raise _broken(path, "its comments '<!-- qexport:begin -->' and '<!-- qexport:end -->' are no pair")
    section = (begins[0].start(), ends[0].end()) if begins else None
    told = begins[0]["keys"].split() if begins else []
    ours = dict(one.split("=") for one in told)
    return Card(
        text, block[2] if block else None, body, _load(block[2] if block else "", path), section, ours
    )


def _broken(path: Path, found: str) -> CorruptFileError:
    return CorruptFileError(
        f"{path} cannot be merged with a card: {found}",
        expected="a model card: YAML between two lines '---', then Markdown",
        remedy="mend it or move it away; it was left as it is",
    )


def _load(front: str, path: Path) -> dict[str, Any]:
    try:
        node = yaml.compose(front, _loader())
        found = yaml.load(front, _loader())  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 2}" if where else ""
        what = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise _broken(path, f"its YAML is broken{line} ({' '.join(what.split())})") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise _broken(path, "its YAML is no mapping of names")
    names = [key.value for key, _ in node.value] if node else []
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _broken(path, f"its YAML has {twice} twice")
    return found


@cache
def _loader() -> Any:
    class Loader(yaml.SafeLoader):
        """As YAML 1.2, which the Hub reads."""

    kept = {
        first: [(tag, words) for tag, words in resolvers if not tag.endswith((":bool", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.yaml_implicit_resolvers = kept
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$", re.I), list("tTfF"))
    return Loader


def _dump(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=100)


def _hash(value: Any) -> str:
    told = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:_HASH_DIGITS]


def merged(card: Card, metadata: Mapping[str, Any], section: str) -> str:
    """The card's text with our keys and our part of the body put in, or put in anew.

    A key that the user has, or has changed since, stays as it is. One of ours that is no longer wanted
    goes. The same arguments on the result give the same text.
    """
    theirs = {key for key, value in card.metadata.items() if card.ours.get(key) != _hash(value)}
    # dumped and loaded, a value is what will be read the next time
    given = {key: yaml.load(_dump(key, value), _loader())[key] for key, value in metadata.items()}  # noqa: S506
    ours = {
        key: value
        for key, value in given.items()
        if key not in theirs and _FOLLOWERS.get(key, key) not in theirs
    }
    told = "".join(f" {key}={_hash(value)}" for key, value in ours.items())
    part = f"<!-- qexport:begin{told} -->\n\n{section.strip()}\n\n<!-- qexport:end -->"
    line_break = card.line_break
    return _front(card, ours, theirs) + _body(card, part.replace("\n", line_break), line_break)


def _front(card: Card, ours: Mapping[str, Any], theirs: set[str]) -> str:
    line_break = card.line_break
    pieces = _pieces(card.front or "") if theirs or _has_comments(card.front) else []
    written: list[str] = []
    left = dict(ours)
    for key, text in pieces:
        if key is None or key in theirs:
            written.append(text if text.endswith(("\n", "\r")) or not text else text + line_break)
        elif key in left:
            written.append(_dump(key, left.pop(key)).replace("\n", line_break) + _comments_after(text))
        else:
            written.append(_comments_after(text))
    written += [_dump(key, value).replace("\n", line_break) for key, value in left.items()]
    mark = "\ufeff" if card.text.startswith("\ufeff") else ""
    return f"{mark}---{line_break}{''.join(written)}---{line_break}" if written else mark


def _has_comments(front: str | None) -> bool:
    return bool(front and re.search(r"^\s*#", front, re.MULTILINE))


def _comments_after(text: str) -> str:
    """The comments and empty lines that end a piece: they belong to what follows, or to nobody."""
    lines = text.splitlines(keepends=True)
    count = 0
    while count < len(lines) - 1 and re.match(r"\s*(#|$)", lines[-1 - count]):
        count += 1
    kept = "".join(lines[len(lines) - count :])
    return kept if not kept or kept.endswith(("\n", "\r")) else kept + "\n"


def _pieces(front: str) -> list[tuple[str | None, str]]:
    """The text of each key of the YAML, with what follows it; under None, what stands before the first.

    A mapping in braces has no lines of its own: it is written anew.
    """
    node: Any = yaml.compose(front, _loader())
    if node is None:
        return [(None, front)] if front.strip() else []
    if node.flow_style:
        found: dict[str, Any] = yaml.load(front, _loader())  # noqa: S506
        return [(key, _dump(key, value)) for key, value in found.items()]
    begins = [key.start_mark.index for key, _ in node.value]
    ends = [*begins[1:], len(front)]
    parts: list[tuple[str | None, str]] = [
        (key.value, front[begin:end]) for (key, _), begin, end in zip(node.value, begins, ends, strict=True)
    ]
    return [(None, front[: begins[0]]), *parts]


def _body(card: Card, part: str, line_break: str) -> str:
    body = card.body.removeprefix("\ufeff") if card.front is None else card.body
    shift = len(card.body) - len(body)
    if card.section:
        begin, end = (place - shift for place in card.section)
        return body[:begin] + part + body[end:]
    if not body.strip():
        return f"{body or line_break}{part}{line_break}"
    gap = "" if body.endswith(("\n", "\r")) else line_break
    return f"{body}{gap}{line_break}{part}{line_break}"
