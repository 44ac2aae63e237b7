"""Quantization by each peer, and by qexport, as a process in the peer's own environment.

`run` is what the benchmarks call; it needs nothing but the standard library. The process runs
`python -m benchmarks.peers.driver PEER JOB REPORT`, which calls `quantize(job)` of the module of that name.
GPTQModel, AutoAWQ and bitsandbytes write checkpoints that qexport reads back. hqq's pickle and AutoRound's
asymmetric files are not read by qexport: their modules write the weights that they themselves decode, as
plain safetensors in fp32.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, TypedDict, cast

from benchmarks.environments import python_of

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2  # of every peer and of qexport
_TIMEOUT_S = 3600.0


class Job(TypedDict):
    """What a peer is asked for."""

    model: str  # directory of the full-precision model
    out: str  # directory to write, which is not there yet
    bits: int
    group_size: int  # -1: whole rows
    options: dict[str, Any]  # the method's own
    ids: list[list[int]]  # calibration windows; none of them is padded
    calibration: str  # the same text as a file for qexport
    seed: int


class Outcome(TypedDict, total=False):
    """What came of it: seconds of quantizing, without imports and loading, or what went wrong."""

    seconds: float
    cpu_seconds: float  # of all threads; steadier than seconds on a shared machine
    versions: dict[str, str]
    error: str


def run(peer: str, job: Job, log: Path) -> Outcome:
    """Has `peer` do the job; all that it prints is kept in `log`.

    Raises RuntimeError where the peer's environment cannot be made.
    """
    python = python_of(peer)
    report = log.with_suffix(".report.json")
    asked = log.with_suffix(".job.json")
    asked.write_text(json.dumps(job), encoding="utf-8")
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "benchmarks.peers.driver", peer, str(asked), str(report)]
    try:
        with log.open("w", encoding="utf-8") as talk:
            ran = subprocess.run(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=talk,
                stderr=talk,
                env=environment(python),
                timeout=_TIMEOUT_S,
            )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {_TIMEOUT_S:.0f} s"}
    finally:
        asked.unlink()
    if not report.is_file():
        return {"error": f"it ended with exit code {ran.returncode} and no report"}
    outcome = cast(Outcome, json.loads(report.read_text(encoding="utf-8")))
    report.unlink()
    return outcome


def environment(python: Path) -> dict[str, str]:
    """The variables of the process: our own, without what is meant for our Python, with as many threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    beside = os.pathsep.join([str(python.parent), kept.get("PATH", os.defpath)])
    return {
        **kept,
        "PATH": beside,
        "OMP_NUM_THREADS": str(THREADS),
        "MKL_NUM_THREADS": str(THREADS),
        "NUMBA_NUM_THREADS": str(THREADS),
        "GPTQMODEL_CPU_WORKERS": "2",  # with its own default it does not start on two cores
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(python.parents[1] / "kernels"),
        "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(python.parents[1] / "kernels"),
    }
