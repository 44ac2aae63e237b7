"""Generated tokens a second of a finished file, in a runtime that reads it, on this machine's CPU.

Batch 1, greedy, with the runtime's key-value cache; reading the prompt is not counted (what llama-bench
calls `tg`). A model is loaded as the runtime's users load it, in the dtype of its files. Such a number
belongs to one machine, with nothing else to do: where other programs take one of two cores, threads wait for
each other, and transformers generates at a fifth of its speed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import SpecError
from qexport.events import Finished, Noted, OnEvent, Started, ignore
from qexport.formats.opening import open_checkpoint
from qexport.verification.runtimes import process
from qexport.verification.runtimes.check import READERS, method_of
from qexport.verification.runtimes.drivers.speed_driver import ENGINES, SpeedJob, SpeedOutcome
from qexport.verification.runtimes.support import why_unread

_DRIVER = Path(process.__file__).parent / "drivers" / "speed_driver.py"
_PROMPT = 16  # tokens
_RUNS = 3
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Speed:
    """Generated tokens a second, the median of several runs, and what they were measured with.

    `generated` are the token ids that followed those of `prompt`; `dtype` is the runtime's for the weights
    that are no codes ("gguf": as the file has it).
    """

    runtime: str
    tokens_per_second: float
    threads: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    dtype: str
    device: str
    versions: Mapping[str, str]

    @property
    def tokens(self) -> int:
        """How many tokens each run generated; `tokens_per_second` says where it is fewer than asked for."""
        return len(self.generated)


def speed_runtime(model: str | Path) -> str | None:
    """The runtime in which the speed of this file can be measured; None where there is none.

    llama.cpp for GGUF, transformers for what it reads, else the format's own. Raises as `open_checkpoint`.
    """
    return next(iter(_timed_readers(open_checkpoint(model))), None)


def tokens_per_second(
    model: str | Path,
    runtime: str | None = None,
    *,
    tokens: int = 64,
    threads: int | None = None,
    python: Path | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Speed | None:
    """How fast `runtime` (by default `speed_runtime`) generates with this file; the median of three runs.

    `tokens`, at least 2, are generated a run; fewer where the model's context is short, and where all runs
    would take more than a minute. `threads` is by default one a physical core, `python` the interpreter of
    another environment. None, with a Noted event that says why, where the runtime is not installed or fails:
    no speed is no defect of the file. Raises SpecError for a runtime that does not read this format or a
    `python` that is none, and as `open_checkpoint`.
    """
    python = process.require_python(python)
    checkpoint = open_checkpoint(model)
    readers = _timed_readers(checkpoint)
    if runtime is None:
        if not readers:
            method = method_of(checkpoint)
            why = why_unread(method) or "no runtime that is timed here reads it"
            on_event(Noted(f"no speed is measured of {model} ({method}): {why}"))
            return None
        runtime = readers[0]
    elif runtime not in readers:
        raise SpecError(
            f"the speed of {model} is not measured in {runtime!r}",
            expected=f"one of {', '.join(readers)}" if readers else "no runtime for this format",
        )
    threads = threads or physical_cores()
    job: SpeedJob = {
        "model": str(checkpoint.path.absolute()),
        "prompt": _PROMPT,
        "tokens": tokens,
        "runs": _RUNS,
        "threads": threads,
        "trust_remote_code": trust_remote_code,
    }
    on_event(Started(f"speed in {runtime}", 1, "models"))
    outcome = _run(runtime, job, python)
    on_event(Finished())
    if "error" in outcome:
        absent = outcome["error_kind"] == process.ABSENT
        told = "is not installed" if absent else f"does not run {model}"
        on_event(Noted(f"no speed is measured: {runtime} {told} ({outcome['error']})"))
        return None
    return Speed(
        runtime,
        1 / statistics.median(outcome["seconds_per_token"]),
        threads,
        tuple(outcome["prompt"]),
        tuple(outcome["generated"]),
        outcome["dtype"],
        outcome["device"],
        outcome["versions"],
    )


def physical_cores() -> int:
    """The physical cores that this process may run on; hyperthreads slow generation down.

    By Linux's table of siblings; elsewhere what Python counts.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    try:
        cores = {(_CPUS / f"cpu{n}/topology/thread_siblings_list").read_text() for n in allowed}
    except OSError:
        return len(allowed)
    return len(cores)


def _timed_readers(checkpoint: Checkpoint) -> tuple[str, ...]:
    return tuple(name for name in READERS.get(method_of(checkpoint), ()) if name in ENGINES)


def _run(runtime: str, job: SpeedJob, python: Path) -> SpeedOutcome:
    """The driver's report; a process that dies is an error in it. It does not outlive an interruption."""
    with tempfile.TemporaryDirectory(prefix="qexport-speed-") as name:
        work = Path(name)
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), str(_DRIVER), runtime, str(work / "job.json"), str(work / "report.json")]
        environment = {**process.environment(python), "OMP_NUM_THREADS": str(job["threads"])}
        try:
            ran = subprocess.run(  # noqa: S603 - the user's interpreter, our script
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise SpecError(
                f"{python} does not start: {error.strerror}", expected="a Python interpreter"
            ) from error
        if os.environ.get("QEXPORT_DEBUG"):
            sys.stderr.write(ran.stdout)
        try:
            outcome: SpeedOutcome = json.loads((work / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"error": f"it ended with exit code {ran.returncode}", "error_kind": process.CRASHED}
    return outcome
