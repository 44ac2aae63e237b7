"""Runs the driver in a runtime's own Python, and brings back what it reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qexport.errors import SpecError
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.verification.runtimes.drivers.driver import RUNTIMES, Job, Outcome

# Kinds of Outcome["error_kind"] beside the names of exceptions.
ABSENT, CRASHED, KILLED = "absent", "crashed", "killed"
_DRIVER = Path(__file__).with_name("drivers") / "driver.py"
_LOOK_AGAIN_S = 0.2
_SETTINGS = {
    # kernels run as written: compiling one takes longer than its work, and fails without a fit compiler
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "GPTQMODEL_CPU_WORKERS": "2",  # with its own default it does not start on two cores
    "PYTHONUNBUFFERED": "1",
}
_OUR_PYTHON = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "__PYVENV_LAUNCHER__")


def run_jobs(
    runtime: str, jobs: Sequence[Job], *, python: Path | None = None, on_event: OnEvent = ignore
) -> list[Outcome]:
    """One outcome for each of `jobs`, all run by one process of `python` (this Python by default).

    When the process dies, the job at hand and those after it have that as their error. Raises SpecError
    for a `python` that is none. The process does not outlive an interruption.
    """
    python = require_python(python)
    with tempfile.TemporaryDirectory(prefix="qexport-runtime-") as name:
        work = Path(name)
        report, talk = work / "report.jsonl", work / "stderr"
        (work / "jobs.json").write_text(json.dumps(list(jobs)), encoding="utf-8")
        report.touch()
        command = [str(python), str(_DRIVER), runtime, str(work / "jobs.json"), str(report)]
        on_event(Started(f"load in {runtime}", len(jobs), "models"))
        with talk.open("wb") as stderr:
            code = _run(command, stderr.fileno(), report, on_event)
        on_event(Finished())
        told = talk.read_text(encoding="utf-8", errors="replace")
        if os.environ.get("QEXPORT_DEBUG"):
            sys.stderr.write(told)
        lines = report.read_text(encoding="utf-8").split("\n")[:-1]  # a line that was cut short is not one
    outcomes: list[Outcome] = [json.loads(line) for line in lines]
    lost = len(jobs) - len(outcomes)
    return [*outcomes, *(_death(code, told, python) for _ in range(lost))]


def require_python(python: Path | None) -> Path:
    """`python` where it can be run, this process's own for None; SpecError otherwise."""
    if python is None:
        return Path(sys.executable)
    if not python.is_file():
        found = "is a directory" if python.is_dir() else "does not exist"
        raise SpecError(
            f"--runtime-python {python} {found}",
            expected="the interpreter of an environment, such as ENV/bin/python",
        )
    if not os.access(python, os.X_OK):
        raise SpecError(f"--runtime-python {python} may not be executed", expected="a Python interpreter")
    return python


def _run(command: Sequence[str], stderr: int, report: Path, on_event: OnEvent) -> int:
    try:
        process = subprocess.Popen(  # noqa: S603 - the user's interpreter, our script
            command,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=environment(Path(command[0])),
        )
    except OSError as error:
        raise SpecError(
            f"{command[0]} does not start: {error.strerror}", expected="a Python interpreter"
        ) from error
    try:
        done = 0
        while True:
            try:
                return process.wait(timeout=_LOOK_AGAIN_S)
            except subprocess.TimeoutExpired:
                now = report.read_bytes().count(b"\n")
                if now > done:
                    on_event(Advanced(now - done))
                    done = now
    finally:  # Ctrl-C, or a signal that the command line turned into an exception
        if process.poll() is None:
            process.kill()
            process.wait()


def environment(python: Path) -> dict[str, str]:
    """Ours without what is meant for our own Python; the tools beside `python` (ninja) come first."""
    kept = {name: value for name, value in os.environ.items() if name not in _OUR_PYTHON}
    path = os.pathsep.join([str(python.absolute().parent), kept.get("PATH", os.defpath)])
    return {**kept, **_SETTINGS, "PATH": path}


def _death(code: int, told: str, python: Path) -> Outcome:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        if -code == signal.SIGKILL:
            return {"error": f"it was killed ({name}), most likely for want of memory", "error_kind": KILLED}
        return {"error": f"it crashed ({name})", "error_kind": CRASHED}
    last = next((line.strip() for line in reversed(told.splitlines()) if line.strip()), "it said nothing")
    return {"error": f"{python} ended with exit code {code}: {last[:300]}", "error_kind": CRASHED}


def runtimes() -> tuple[str, ...]:
    """The runtimes that there is a driver for."""
    return tuple(RUNTIMES)
