"""A recipe file: what `qexport export` makes of one fine-tune, as YAML; other tools' files will do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, field_validator

from qexport.checkpoint.disk import exists, read_errors
from qexport.errors import RecipeError
from qexport.graph.foreign import Dialect, ModelRecipe, read_foreign
from qexport.graph.keys import validated
from qexport.graph.llamafactory import LLAMA_FACTORY
from qexport.graph.swift import SWIFT
from qexport.publishing.spec import PushRecipe
from qexport.specs import (
    METHODS,
    SOLVERS,
    MergeSpec,
    QuantizeSpec,
    ShardSpec,
    Spec,
    VerifySpec,
    split_list,
    with_preset,
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
    candidates: tuple[str, ...] = Field(
        (), description="finished models to measure too: directories, GGUF files or Hub ids"
    )
    push: PushRecipe | None = Field(
        None, description="push the quantized variants to the Hub, when they pass the gate"
    )
    verify: VerifySpec = Field(
        VerifySpec(), description="how to measure; max_loss, max_kl and min_bleu are the gate"
    )

    @field_validator("adapters", "candidates", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("quantize", mode="before")
    @classmethod
    def _each_width(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        spread: list[Any] = []
        for entry in value:
            if _has_names(entry):
                entry = with_preset(entry)
            spread += _alone(entry)
        return spread


def _alone(entry: Any) -> list[Any]:
    """One entry for each of its bits, or of GGUF's types: each is a variant with scores of its own."""
    if not isinstance(entry, Mapping):
        return [entry]
    types = split_list(entry.get("type"))
    if isinstance(types, tuple) and len(types) > 1:
        return [{**entry, "type": kind} for kind in types]
    if isinstance(entry.get("bits"), list):
        return [{**entry, "bits": bits} for bits in entry["bits"]]
    return [entry]


def _has_names(entry: Any) -> bool:
    """Whether an entry names a method, and no solver that is none; others are told by validation."""
    return (
        isinstance(entry, Mapping)
        and entry.get("method") in METHODS
        and entry.get("solver") in (None, *SOLVERS)
    )


AnyRecipe = ExportRecipe | ModelRecipe

_PARTS: dict[str, type[BaseModel]] = {
    "merge": MergeSpec,
    "shard": ShardSpec,
    "push": PushRecipe,
    "verify": VerifySpec,
    **SOLVERS,
}
_DIALECTS = (LLAMA_FACTORY, SWIFT)


def read_recipe(path: Path) -> AnyRecipe:
    """The recipe in a YAML file. Raises RecipeError with the key that is wrong and the nearest right one."""
    if not exists(path):
        raise RecipeError(f"the recipe {path} does not exist")
    try:
        with read_errors(path):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"the recipe {path} is not UTF-8 text") from None
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str) -> AnyRecipe:
    """The recipe in `text`; `name` is what errors call it.

    Its keys tell whose it is: qexport's own, LLaMA-Factory's or SWIFT's.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{name} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{name} holds no keys", expected="base, output and what to make")
    dialect = _dialect(content, name)
    if dialect is None:
        return validated(ExportRecipe, content, name, _PARTS)
    return read_foreign(dialect, content, name)


def _dialect(content: Mapping[Any, Any], name: str) -> Dialect | None:
    """Whose file it is, by the keys that only one tool knows; None when it is our own.

    Raises RecipeError when two tools have such keys in it.
    """
    owners: dict[str, list[str]] = {}
    counts: dict[str, int] = {"qexport": 0}
    for key in map(str, content):
        knowing = ["qexport"] if key in ExportRecipe.model_fields else []
        knowing += [dialect.tool for dialect in _DIALECTS if dialect.knows(key)]
        for tool in knowing:
            counts[tool] = counts.get(tool, 0) + 1
        if len(knowing) == 1:
            owners.setdefault(knowing[0], []).append(key)
    if len(owners) > 1:
        found = " and ".join(f"{tool}'s ({', '.join(keys[:3])})" for tool, keys in owners.items())
        raise RecipeError(
            f"{name} mixes keys of several tools: {found}",
            expected="one tool's keys only",
            remedy="take the others out, or write them in that tool's words",
        )
    tool = next(iter(owners), None) or max(counts, key=counts.__getitem__)
    return next((dialect for dialect in _DIALECTS if dialect.tool == tool), None)
