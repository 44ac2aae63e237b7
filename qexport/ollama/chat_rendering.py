"""Conversations as a model's chat template writes them, in a process of its own that ends when it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = Mapping[str, str]

DATE = "2024-07-26"  # what `strftime_now` answers, whatever form it is asked for
TIME_LIMIT_S = 15.0  # a probe takes milliseconds; the rest is the start of a process on a busy machine
_LONGEST_TEMPLATE = 1_000_000
_SCRIPT = Path(__file__).with_name("chat_sandbox.py")
_START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"  # sys.path comes with the job
# What a process needs to start; tokens and keys of the user's are none of a template's business.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_ALL", "TMPDIR", "TEMP")


@dataclass(frozen=True)
class Render:
    """One rendering to make: the messages and the variables beside them."""

    messages: Sequence[Message]
    generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """What came of it: the text, or why there is none."""

    text: str | None
    error: str = ""


def render_all(template: str, renders: Sequence[Render], tokens: Mapping[str, Any]) -> list[Rendered]:
    """Each of `renders` by `template`, with `tokens` (bos_token, eos_token, ...) as its variables.

    The environment is that of transformers' `apply_chat_template`. Never raises for a template's sake: a
    template that fails, hangs (it is ended after TIME_LIMIT_S) or crashes is an error in each result.
    """
    if len(template) > _LONGEST_TEMPLATE:
        return [Rendered(None, f"it has {len(template)} characters")] * len(renders)
    job = {
        "path": [entry for entry in sys.path if entry],
        "template": template,
        "date": DATE,
        "renders": [_variables(render, tokens) for render in renders],
    }
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and script
            [sys.executable, "-I", "-S", "-c", _START, str(_SCRIPT)],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=TIME_LIMIT_S,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [Rendered(None, f"it does not end within {TIME_LIMIT_S:g} s")] * len(renders)
    except OSError as error:
        return [Rendered(None, f"no process to render it in: {error.strerror}")] * len(renders)
    return _read(done.returncode, done.stdout, len(renders))


def _variables(render: Render, tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **tokens,
        "tools": None,
        "documents": None,
        "messages": [dict(message) for message in render.messages],
        "add_generation_prompt": render.generation_prompt,
        **render.variables,
    }


def _read(code: int, answer: bytes, count: int) -> list[Rendered]:
    try:
        outcomes = json.loads(answer) if code == 0 else None
    except ValueError:
        outcomes = None
    if not isinstance(outcomes, list) or len(outcomes) != count:
        return [Rendered(None, "it takes too much time or memory, or crashes the renderer")] * count
    return [Rendered(outcome.get("text"), outcome.get("error", "")) for outcome in outcomes]
