"""Command-line options made from the fields of the specs, so that help and checks cannot drift apart."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qexport.errors import SpecError
from qexport.sizes import format_size
from qexport.specs import parse_bits

Function = TypeVar("Function", bound=Callable[..., Any])
SpecType = TypeVar("SpecType", bound=BaseModel)


def spec_options(*specs: type[BaseModel], leave: Sequence[str] = ()) -> Callable[[Function], Function]:
    """One option a field of `specs` that is described, in order, each once. What the user leaves out stays
    None."""
    fields: dict[str, tuple[FieldInfo, list[str]]] = {}
    for spec in specs:
        for name, field in spec.model_fields.items():
            if name not in leave and field.description:
                fields.setdefault(name, (field, []))[1].append(_label(spec))

    def decorate(function: Function) -> Function:
        for name, (field, owners) in reversed(fields.items()):
            only = f" ({', '.join(owners)} only)" if len(owners) < len(specs) else ""
            told = f"{field.description}{_default(name, field)}{only}"
            if bool in _kinds(field.annotation):
                both = "" if field.default is False else f"/--no-{_flag(name)[2:]}"
                option = click.option(_flag(name) + both, name, is_flag=True, default=None, help=told)
            else:
                kind = _click_type(field, specs if name == "bits" else ())
                several = typing.get_origin(field.annotation) is tuple
                told += "; repeatable" if several else ""
                option = click.option(_flag(name), name, type=kind, default=None, multiple=several, help=told)
            function = option(function)
        return function

    return decorate


class Names(click.ParamType[tuple[str, ...]]):
    """One or several of some names, with commas between them; each once."""

    name = "names"

    def __init__(self, known: Iterable[str]) -> None:
        self._known = tuple(known)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self._known)}],..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(name.strip() for name in str(value).split(",")))
        for name in names:
            try:
                self.check(name)
            except ValueError as error:
                self.fail(str(error), param, ctx)
        return names

    def check(self, name: str) -> None:
        """Raises ValueError for what is no such name."""
        if name not in self._known:
            raise ValueError(f"{name!r} is not one of {', '.join(map(repr, self._known))}.")


class _Widths(Names):
    """Widths, or averages of them, as the user wrote them."""

    name = "bits"

    def __init__(self, widths: Iterable[int]) -> None:
        super().__init__([*map(str, sorted(widths)), "3.5"])

    def check(self, name: str) -> None:
        parse_bits(name)


def _label(spec: type[BaseModel]) -> str:
    """What help calls the owner of an option: the solver, where the spec is one's."""
    solver = spec.model_fields.get("solver")
    return str(solver.default) if solver else spec.__name__.removesuffix("Spec").lower()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(name: str, field: FieldInfo) -> str:
    if (
        field.default is None
        or field.default is False
        or field.default == ()
        or "default:" in (field.description or "")
    ):
        return ""
    if field.default is True:
        return "; default: yes"
    shown = (
        format_size(field.default).replace(" ", "")
        if name.endswith("size") and field.default > 10**6
        else field.default
    )
    return f"; default: {shown}"


def _click_type(field: FieldInfo, specs: Sequence[type[BaseModel]]) -> Any:
    """Numbers are parsed here; sizes and shares are text that the spec itself parses."""
    if specs:
        return _Widths({w for s in specs for w in typing.get_args(s.model_fields["bits"].annotation)})
    kinds = [kind for kind in _kinds(field.annotation) if kind is not type(None)]
    if typing.get_origin(kinds[0]) is typing.Literal:
        return click.Choice(typing.get_args(kinds[0]))
    parsed_by_spec = any("Validator" in type(extra).__name__ for extra in field.metadata)
    if parsed_by_spec or kinds == [str]:
        return click.STRING
    return {int: click.INT, float: click.FLOAT}.get(kinds[0], click.STRING)


def _kinds(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return [str]
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def make_spec(spec: type[SpecType], given: dict[str, Any], what: str = "") -> SpecType:
    """The spec from the options that the user gave; SpecError in the options' own words.

    None, and for a repeatable one nothing at all, is what the user left out.
    """
    values = {name: value for name, value in given.items() if value is not None and value != ()}
    foreign = [name for name in values if name not in spec.model_fields]
    if foreign:
        own = [
            _flag(name)
            for name, field in spec.model_fields.items()
            if field.description or name == "solver"  # the others are no options
        ]
        near = difflib.get_close_matches(_flag(foreign[0]), own, n=1)
        raise SpecError(
            f"{_flag(foreign[0])} is no option of {what}",
            expected=f"it takes {', '.join(own)}",
            remedy=f"did you mean {near[0]}?" if near else "",
        )
    try:
        return spec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        if name == "bits":
            message = f"{what} has {_widths(spec)} bits, not {values['bits']}"
            raise SpecError(message) from error
        raise SpecError(f"{_flag(name)} {values.get(name)}: {message}") from error


def _widths(spec: type[BaseModel]) -> str:
    return ", ".join(str(width) for width in typing.get_args(spec.model_fields["bits"].annotation))
