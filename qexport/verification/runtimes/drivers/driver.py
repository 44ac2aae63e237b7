"""Loads checkpoints in a runtime and writes the logits that it computes.

    python driver.py RUNTIME JOBS REPORT

Runs inside the runtime's own Python, so neither this script nor the loaders beside it import qexport.
JOBS is a JSON list of jobs. REPORT gets one JSON line at once when a job is done, so that what was done
before a crash is known; a job that fails is told in its line, and the next one begins.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import re
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable

# runtime -> (its loader beside this file, what it cannot do without, what its arithmetic depends on)
RUNTIMES = {
    "transformers": (
        "transformers_loader",
        ("torch", "transformers", "accelerate"),
        ("torch", "transformers", "accelerate", "bitsandbytes", "compressed-tensors"),
    ),
    "gptqmodel": (
        "gptqmodel_loader",
        ("torch", "transformers", "accelerate", "optimum", "gptqmodel"),
        ("torch", "transformers", "accelerate", "optimum", "gptqmodel"),
    ),
    "hqq": ("hqq_loader", ("torch", "transformers", "accelerate", "hqq"), ("torch", "transformers", "hqq")),
    "mlx": ("mlx_loader", ("mlx", "mlx_lm"), ("mlx", "mlx-lm")),
    "llamacpp": ("llamacpp_loader", ("cyllama", "numpy"), ("cyllama",)),
}


class Job(TypedDict):
    """A checkpoint to load, rows of token ids to run it on, and the .npy file for its logits."""

    model: str
    ids: list[list[int]]
    logits: str
    trust_remote_code: bool


class Loaded(TypedDict):
    """What a loader found.

    `layers` counts the matrices that the runtime keeps as codes, by the class that holds them (a stack of
    experts counts as many as it holds). `forward` is None where what is missing makes it pointless.
    """

    forward: Callable[[list[list[int]]], Any] | None
    dtype: str
    layers: dict[str, int]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    problems: list[str]


class Outcome(TypedDict, total=False):
    """A line of the report."""

    versions: dict[str, str]
    dtype: str
    layers: dict[str, int]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    problems: list[str]
    error: str
    error_kind: str


def main(arguments: list[str]) -> None:
    """See the module's text."""
    runtime, jobs_file, report_file = arguments
    name, needs, told = RUNTIMES[runtime]
    sys.stdout = sys.stderr  # libraries print
    with Path(report_file).open("w", encoding="utf-8") as report:

        def tell(outcome: Outcome) -> None:
            report.write(json.dumps(outcome) + "\n")
            report.flush()

        jobs: list[Job] = json.loads(Path(jobs_file).read_text(encoding="utf-8"))
        absent = [package for package in needs if importlib.util.find_spec(package) is None]
        if absent:
            for _ in jobs:
                tell({"error": f"No module named {absent[0]}", "error_kind": "absent"})
            return
        versions = installed(told)
        for job in jobs:
            try:
                outcome = run(importlib.import_module(name).load, job)
            except (Exception, SystemExit) as error:  # whatever a runtime raises on a broken checkpoint
                traceback.print_exc()
                outcome = {"error": one_line(error), "error_kind": type(error).__name__}
            outcome["versions"] = versions
            tell(outcome)
            if job is jobs[0]:  # loaders collect garbage at every model: what they imported is none
                gc.collect()
                gc.freeze()


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of `packages` that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def run(load: Callable[[Job], Loaded], job: Job) -> Outcome:
    """Loads a job's checkpoint, and runs it when it was found whole enough."""
    import numpy as np

    loaded = load(job)
    outcome: Outcome = {
        "dtype": loaded["dtype"],
        "layers": loaded["layers"],
        "missing": sorted(loaded["missing"]),
        "unexpected": sorted(loaded["unexpected"]),
        "mismatched": sorted(loaded["mismatched"]),
        "problems": loaded["problems"],
    }
    forward = loaded["forward"]
    if forward is not None:
        try:
            logits = np.asarray(forward(job["ids"]), dtype=np.float32)
        except Exception as error:  # what was found while loading may say why
            traceback.print_exc()
            outcome["problems"] = [*outcome["problems"], one_line(error)]
        else:
            np.save(job["logits"], logits, allow_pickle=False)
    return outcome


def one_line(error: BaseException) -> str:
    """The error's first lines, as one."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1:])
