"""A process of its own in which a model's chat template is rendered: run as a script, JSON in, JSON out.

A chat template comes with the model and is a program: it may never end, or ask for all memory. Here it has
jinja's sandbox (with the settings and helpers that transformers gives it), limits on time and memory, and
nothing but the conversations. The parent (chat_rendering.py) ends this process when it takes too long.
Imports only the standard library and jinja2, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 1 << 30
CPU_S = 20
LONGEST = 1_000_000  # characters of one rendering; a probe's is some hundred


def main() -> None:
    """Reads {"path", "template", "date", "renders": [variables...]}, writes [{"text"} or {"error"}...]."""
    job = json.load(sys.stdin)
    _limit()
    sys.path[:] = job["path"]
    print(json.dumps(_outcomes(job["template"], job["date"], job["renders"])))  # noqa: T201 - the answer


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, CPU_S)):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # a lower limit holds already, or the system knows none
            continue


def _outcomes(template: str, date: str, renders: list[dict[str, Any]]) -> list[dict[str, str]]:
    try:
        compiled = environment(date).from_string(template)
    except Exception as error:  # whatever the template provokes is its own
        return [{"error": _reason(error)}] * len(renders)
    outcomes = []
    for variables in renders:
        try:
            text = compiled.render(**variables)
            outcomes.append({"text": text} if len(text) <= LONGEST else {"error": "it writes too much"})
        except Exception as error:
            outcomes.append({"error": _reason(error)})
    return outcomes


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def environment(date: str) -> Any:
    """Jinja's sandbox with what transformers' `apply_chat_template` gives a template; today is `date`."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training: its body is written as it is."""

        tags = {"generation"}  # noqa: RUF012 - as the base class declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """jinja's, without the names by which Python's inner things are reached."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace has no place for {name!r}")
            super().__setitem__(name, value)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals.update(raise_exception=_raiser(jinja2.exceptions.TemplateError), namespace=Namespace)
    sandbox.globals["strftime_now"] = lambda form: date
    return sandbox


def _to_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def _raiser(kind: type[Exception]) -> Callable[[str], None]:
    def raise_exception(message: str) -> None:
        raise kind(message)

    return raise_exception


if __name__ == "__main__":
    main()
