"""The process that quantizes: python -m benchmarks.peers.driver PEER JOB REPORT (see `benchmarks.peers`)."""

from __future__ import annotations

import importlib
import json
import random
import sys
import traceback
from pathlib import Path

import torch

from benchmarks.peers import THREADS, Job, Outcome


def main() -> None:
    """See the module's text."""
    peer, asked, report = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    job: Job = json.loads(asked.read_text(encoding="utf-8"))
    torch.set_num_threads(THREADS)
    random.seed(job["seed"])
    torch.manual_seed(job["seed"])
    outcome: Outcome
    try:
        outcome = importlib.import_module(f"benchmarks.peers.{peer}").quantize(job)
    except Exception as error:
        traceback.print_exc()
        words = [line.strip() for line in str(error).splitlines() if line.strip()]
        outcome = {"error": f"{type(error).__name__}: {words[0] if words else ''}"[:300]}
    report.write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main()
