"""A file's keys against a spec: every wrong one in one line, with the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qexport.errors import RecipeError
from qexport.specs import METHODS, SOLVERS

SpecType = TypeVar("SpecType", bound=BaseModel)


def validated(
    spec: type[SpecType], content: Any, name: str, parts: Mapping[str, type[BaseModel]] | None = None
) -> SpecType:
    """`content` as `spec`; RecipeError that calls the file `name`. `parts` are the specs within the spec."""
    try:
        return spec.model_validate(content)
    except ValidationError as error:
        lines = [_line(one, spec, parts or {}) for one in error.errors()]
        raise RecipeError(f"{name}: " + "; ".join(lines)) from error


def unknown_key(key: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """What to say of a key that is not known: the nearest that is, `others` included, or the known ones."""
    near = difflib.get_close_matches(key.rpartition(".")[2], [*known, *others], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _line(error: Any, spec: type[BaseModel], parts: Mapping[str, type[BaseModel]]) -> str:
    """One of pydantic's errors in one line."""
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    kind = error["type"]
    if kind == "extra_forbidden":
        owner = next((parts[part] for part in reversed(place[:-1]) if part in parts), spec)
        return unknown_key(key, owner.model_fields)
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        entry = error["input"] if isinstance(error["input"], Mapping) else {}
        what, known = (
            ("solver", list(SOLVERS)) if entry.get("method") in METHODS else ("method", list(METHODS))
        )
        found = entry.get(what)
        near = difflib.get_close_matches(str(found), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"{key}: unknown {what} {found!r}; {hint}"
    message = error["msg"].replace("valid tuple", "list").removeprefix("Value error, ")
    if kind == "model_type":
        message = "input should have keys of its own"
    return f"{key}: {message[:1].lower()}{message[1:]}, found {error['input']!r}"
