"""The command line as a whole: exit codes, streams, and one line for every wrong call."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qexport.cli.main import COMMANDS
from qexport.version import __version__
from tests.conftest import RunCli

README = Path(__file__).resolve().parents[1] / "README.md"


def test_version_and_help(cli: RunCli) -> None:
    assert cli("--version") == (0, f"qexport, version {__version__}\n", "")
    code, out, _ = cli("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


def test_no_command_shows_the_help(cli: RunCli) -> None:
    code, out, err = cli()
    assert (code, out) == (2, "")
    assert "Commands:\n" in err


def test_a_full_stdout_is_told(llama: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = f"{sys.executable} -m qexport --help > /dev/full"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (2, "error: cannot write the result: No space left on device\n")


def test_summaries_of_the_commands_are_their_own(cli: RunCli) -> None:
    from importlib import import_module

    for place, summary in COMMANDS.values():
        module, _, name = place.partition(":")
        assert getattr(import_module(module), name).short_help == summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "no command 'quantise'; did you mean 'quantize'?"),
        (["bake"], "no command 'bake'; known are compare, convert"),
        (["merge", "x"], "Missing option '-a' / '--adapter'"),
        (["merge", "x", "-a", "y"], "Missing option '-o' / '--output'"),
        (["quantize", "x", "-o", "y"], "Missing option '--method'"),
        (["quantize", "x", "-o", "y", "--method", "bnb", "--bits", "four"], "'four' is not one of"),
        (
            ["quantize", "x", "-o", "y", "--method", "gptq", "--samples", "0"],
            "--samples 0: it should be greater",
        ),
        (["shard", "x", "-o", "y", "--max-shard-size", "big"], "'big' is not a size"),
        (["shard", "x", "-o", "y", "--max-shard-size", "0GB"], "a size must be positive"),
        (["shard", "x", "-o", "y", "--max-shard"], "did you mean '--max-shard-size'"),
        (["shard", "", "-o", "y"], "the model's name is empty"),
        (["verify", "x"], "nothing to verify against"),
        (["demo", "extra"], "unexpected extra argument (extra)"),
    ],
)
def test_wrong_calls(cli: RunCli, arguments: list[str], message: str, tmp_path: Path) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message.lower() in err.lower()
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_python_m_qexport_and_the_entry_point_are_the_same() -> None:
    entry = Path(sys.executable).with_name("qexport")
    for command in ([sys.executable, "-m", "qexport"], [str(entry)]):
        ran = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert ran.stdout == f"qexport, version {__version__}\n"


def test_quiet_is_quiet(cli: RunCli, llama: Path, tmp_path: Path) -> None:
    assert cli("shard", llama, "-o", tmp_path / "out", "--quiet", "--max-shard-size", "10KB") == (0, "", "")


def test_a_closed_pipe_is_no_traceback(llama: Path, text: Path) -> None:
    command = f"{sys.executable} -m qexport verify {llama} --reference {llama} --text {text} | head -c 1"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_readme_shows_the_help_as_it_is(command: str, cli: RunCli) -> None:
    text = README.read_text(encoding="utf-8")
    block = re.search(rf"```text\n\$ qexport {command} --help\n(.*?)```", text, re.DOTALL)
    assert block, f"README.md has no block for qexport {command} --help"
    assert block.group(1) == cli(command, "--help")[1]
