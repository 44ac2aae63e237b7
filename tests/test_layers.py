"""The house's plan: imports only point down, and help stays fast because heavy packages wait."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qexport"

# Top floor first. A module may import from its own room and from the floors below it.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"graph"},
    {"publishing"},
    {"report"},
    {"verification"},
    {"quantization", "conversion"},
    {"merging"},
    {"methods"},
    {"formats", "ollama"},
    {"solvers"},
    {"modeling"},
    {"calibrate"},
    {"grids"},
    {"checkpoint"},
    {"specs", "results", "packaged", "measure", "events", "devices", "heap"},
    {"errors", "sizes", "version"},
)
ARITHMETIC = {"grids", "solvers"}  # tensors in, tensors out: no files, no models


def rooms() -> dict[str, set[str]]:
    """Room -> the rooms that its modules import, at any depth of indentation."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts in (("__init__",),):
            continue
        imported = found.setdefault(parts[0], set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: a relative import hides its floor"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            imported |= {name.split(".")[1] for name in names if name.startswith("qexport.")}
    return found


def floor(room: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if room in names)


def test_every_room_has_a_floor() -> None:
    placed = set().union(*FLOORS)
    assert set(rooms()) - {"embedded", "calibration"} <= placed
    assert placed <= set(rooms())


@pytest.mark.parametrize("room", sorted(rooms()))
def test_imports_point_down(room: str) -> None:
    if room == "embedded":
        assert not rooms()[room]
        return
    above = {name for name in rooms()[room] if name != room and floor(name) <= floor(room)}
    assert not above, f"{room} imports {above}, which lie on its own floor or above"


def test_arithmetic_touches_no_files_and_no_models() -> None:
    for room in ARITHMETIC:
        assert rooms()[room] <= {"grids", "solvers", "errors"}, room
        for file in (PACKAGE / room).glob("*.py"):
            assert "open(" not in file.read_text(), file


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in ran.stderr.splitlines()}


HEAVY = {"torch", "transformers", "numpy", "pydantic", "rich", "yaml", "huggingface_hub", "bitsandbytes"}


def test_help_imports_nothing_heavy() -> None:
    run = "from qexport.cli.main import run\nassert run(['--help']) == 0"
    assert not modules_after(run) & HEAVY
    assert not modules_after("import qexport") & HEAVY


COMMANDS = (
    "compare",
    "convert",
    "demo",
    "export",
    "imatrix",
    "merge",
    "push",
    "quantize",
    "report",
    "shard",
    "verify",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_does_not_wait_for_torch(command: str) -> None:
    run = f"from qexport.cli.main import run\nassert run(['{command}', '--help']) == 0"
    assert not modules_after(run) & (HEAVY - {"pydantic"})
