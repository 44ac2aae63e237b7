"""A recipe file: what `qexport export` makes of one fine-tune, as YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from qexport.checkpoint.disk import exists, read_errors
from qexport.errors import RecipeError
from qexport.specs import (
    METHODS,
    MergeSpec,
    QuantizeSpec,
    ShardSpec,
    Spec,
    VerifySpec,
)


class ExportRecipe(Spec):
    """The keys of a recipe. Paths are relative to where qexport is called."""

    base: str = Field(min_length=1, description="directory or Hub id of the base model")
    adapters: tuple[str, ...] = Field((), description="adapters to merge, one after the other")
    output: str = Field(min_length=1, description="directory that all outputs go into")
    title: str = Field("qexport report", description="heading of the report")
    merge: MergeSpec = Field(MergeSpec(), description="how to merge")
    shard: ShardSpec | None = Field(None, description="write the merged model again in such files")
    quantize: tuple[QuantizeSpec, ...] = Field(
        (), description="methods, each with its options; bits may be a list"
    )
    verify: VerifySpec = Field(VerifySpec(), description="how to measure; max_loss is the gate")

    @field_validator("adapters", mode="before")
    @classmethod
    def _one_adapter(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("quantize", mode="before")
    @classmethod
    def _each_width(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        spread: list[Any] = []
        for entry in value:
            if isinstance(entry, Mapping) and isinstance(entry.get("bits"), list):
                spread += [{**entry, "bits": bits} for bits in entry["bits"]]
            else:
                spread.append(entry)
        return spread


def read_recipe(path: Path) -> ExportRecipe:
    """The recipe in a YAML file. Raises RecipeError with the key that is wrong and the nearest right one."""
    if not exists(path):
        raise RecipeError(f"the recipe {path} does not exist")
    try:
        with read_errors(path):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"the recipe {path} is not UTF-8 text") from None
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str) -> ExportRecipe:
    """The recipe in `text`; `name` is what errors call it."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{name} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{name} holds no keys", expected="base, output and what to make")
    try:
        return ExportRecipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{name}: " + "; ".join(map(_line, error.errors()))) from error


_SPECS: dict[str, type[BaseModel]] = {
    "merge": MergeSpec,
    "shard": ShardSpec,
    "verify": VerifySpec,
    **METHODS,
}


def _line(error: Any) -> str:
    """One of pydantic's errors in one line, with the nearest known key for an unknown one."""
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    kind = error["type"]
    if kind == "extra_forbidden":
        owner = next((_SPECS[p] for p in reversed(place[:-1]) if p in _SPECS), ExportRecipe)
        known = list(owner.model_fields)
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        found = error["input"].get("method") if isinstance(error["input"], Mapping) else None
        near = difflib.get_close_matches(str(found), list(METHODS), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(METHODS)}"
        return f"{key}: unknown method {found!r}; {hint}"
    message = error["msg"].replace("valid tuple", "list").removeprefix("Value error, ")
    if kind == "model_type":
        message = "input should have keys of its own"
    return f"{key}: {message[:1].lower()}{message[1:]}, found {error['input']!r}"
