"""Methods times bits: the variants that a comparison asks for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from qexport.errors import SpecError
from qexport.methods import method_of
from qexport.specs import METHODS, SOLVERS, AnyQuantizeSpec, Bits, CalibrationSpec, parse_bits, spec_of

_GGUF = "gguf"
_HEEDED = ("imatrix", *CalibrationSpec.TEXT)


def variant_specs(
    methods: Sequence[str],
    bits: Sequence[str],
    types: Sequence[str],
    solvers: Sequence[str],
    options: Mapping[str, Any],
    note: Callable[[str], None],
) -> tuple[AnyQuantizeSpec, ...]:
    """A spec for each method with each solver at each width, or of GGUF at each type.

    An option goes to those that have it. A width that a method's format has not is left out, and a note says
    so. Raises SpecError for a name or a width that is none, an option that no method takes, and a method
    that is left with no width.
    """
    for name in ("target_size", "max_loss", "plan"):
        if bits and options.get(name) is not None:
            raise SpecError(
                f"--bits {','.join(bits)} beside --{name.replace('_', '-')}", expected="one of them"
            )
    for name in methods:
        _known("method", name, METHODS)
    for name in solvers:
        _known("solver", name, SOLVERS)
    widths: list[float | None] = [_width(text) for text in bits]
    if types and _GGUF not in methods:
        raise SpecError("--type is for gguf alone", expected="gguf in --method")
    found: list[AnyQuantizeSpec] = []
    taken: set[str] = set()
    for method in dict.fromkeys(methods):
        made = [
            spec
            for solver in dict.fromkeys(solvers or (None,))
            for asked in _asked(method, widths or [None], types)
            if (spec := _spec(method, solver, asked, options, taken, note))
        ]
        if not made:
            raise SpecError(
                f"--method {method} has none of --bits {','.join(bits)}"
                if not solvers
                else f"--method {method} with --solver {','.join(solvers)} cannot be",
                remedy="leave it out, or give other --bits",
            )
        found += [spec for spec in made if spec not in found]
    unused = [name for name in options if name not in taken]
    if unused and methods:
        raise SpecError(f"--{unused[0].replace('_', '-')} is no option of {', '.join(methods)}")
    if unused or ((bits or solvers) and not methods):
        name = unused[0].replace("_", "-") if unused else "bits" if bits else "solver"
        raise SpecError(f"--{name} without --method")
    return tuple(found)


def _known(what: str, name: str, known: Mapping[Any, Any]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise SpecError(
            f"there is no {what} {name!r}",
            expected=", ".join(known),
            remedy=f"did you mean {near[0]}?" if near else "",
        )


def _width(text: str) -> int | float:
    try:
        return parse_bits(text)
    except ValueError as error:
        known = ",".join(str(width) for width in Bits.__args__)  # type: ignore[attr-defined]
        raise SpecError(f"--bits {text}", expected=f"some of {known}, or an average such as 3.5") from error


def _asked(method: str, widths: Sequence[float | None], types: Sequence[str]) -> list[dict[str, Any]]:
    if method == _GGUF and types:
        return [{"type": kind} for kind in types]
    return [{} if width is None else {"bits": width} for width in widths]


def _spec(
    method: str,
    solver: str | None,
    asked: Mapping[str, Any],
    options: Mapping[str, Any],
    taken: set[str],
    note: Callable[[str], None],
) -> AnyQuantizeSpec | None:
    """The spec, with those of the options that it has; None for what the method has not."""
    called = " ".join([method, *(f"{value}" for value in (solver,) if value)])
    try:
        # for GGUF, who gives a text or a matrix wants it heeded, as `qexport quantize` does
        heeded = {name: options[name] for name in options if method == _GGUF and name in _HEEDED}
        bare = spec_of(method, solver=solver, **asked, **({} if solver else heeded))
        own = {name: value for name, value in options.items() if name in type(bare).model_fields}
        format_of = options.get("format", bare.format)
        if "device" in own and format_of != _GGUF and not isinstance(bare, CalibrationSpec):
            del own["device"]  # no model runs, and none but GGUF's blocks are encoded there
        if method == _GGUF:
            own = {name: value for name, value in own.items() if name not in ("group_size", "symmetric")}
        spec = spec_of(method, solver=solver or bare.solver, **asked, **own)
        if method == _GGUF and spec.budget:
            raise SpecError("average of bits in GGUF, whose types have theirs")
        if method != _GGUF and not spec.budget:
            method_of(spec, {})
    except SpecError as error:
        if asked.get("bits") is None:
            raise
        note(f"note: {called} is not made with {asked['bits']} bits: no {error.found}")
        return None
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        raise SpecError(f"--{name.replace('_', '-')} {options.get(name, '')}: {message}") from error
    taken.update(own)
    return spec
