"""Quality of quantized models, qexport's and its peers': equal bits, equal groups, equal calibration windows.

    python -m benchmarks.quality [--models ...] [--methods ...] [--bits ...] [--seeds ...] [--again]
    python -m benchmarks.quality --markdown benchmarks/results/quality.md [--no-run]

Each tool quantizes the same model on the same windows of tokens, in an environment of its own that is made on
first use (benchmarks/environments.py), with two threads. One scorer reads what it wrote, in fp32, on held-out
text: perplexity, KL divergence to full precision, and BLEU of answers where the model has pairs; so that no
runtime's own kernels enter. Models and texts: benchmarks/quality_models.py; methods: quality_methods.py.

Rows are kept in a JSON file (--json) as they are finished, and a second call does what is missing, or failed;
--again does the chosen ones anew. A tool that fails is a row with its reason; what it printed lies in --work.
Needs pip install -e '.[dev,bnb]', and ../shared (or $QEXPORT_SHARED) for all models but the embedded one.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import qexport
from benchmarks.peers import THREADS, Job, run
from benchmarks.quality_methods import ALL_BITS, METHODS, Method
from benchmarks.quality_models import LENGTH, MODELS, SAMPLES, Prepared, calibration, prepare
from benchmarks.quality_table import Row, markdown
from qexport.errors import QexportError
from qexport.results import Evaluation, plain
from qexport.verification.evaluate import Reference
from qexport.verification.perplexity import relative_difference
from qexport.version import __version__

RESULTS = Path(__file__).with_name("results") / "quality.json"
_WORK = Path.home() / ".cache" / "qexport" / "bench-quality"


@dataclass(frozen=True)
class Case:
    """A row to be measured."""

    model: str
    method: str
    bits: int
    seed: int

    def is_of(self, row: Row) -> bool:
        """Whether `row` is this one's."""
        return all(row.get(name) == value for name, value in vars(self).items())


def cases(
    models: Iterable[str], methods: Iterable[str], bits: Iterable[int], seeds: Sequence[int]
) -> list[Case]:
    """What there is to measure; methods without calibration have the first seed alone."""
    return [
        Case(model, method, width, seed)
        for model in models
        for method in methods
        for width in bits
        if width in METHODS[method].bits
        for seed in (seeds if METHODS[method].calibrated else seeds[:1])
    ]


class Bench:
    """One model: prepared once, its full-precision logits kept."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work = name, work / name
        self.prepared: Prepared = prepare(name, self.work)
        logits = self.work / "logits"
        scores = qexport.evaluate(self.prepared.path, self.prepared.spec, keep_logits=logits)
        self.reference = Reference(scores, logits, self.prepared.path)

    def full(self) -> Row:
        """The row of full precision."""
        return {"model": self.name, "method": "full", **_scores(self.reference.scores)}

    def measure(self, case: Case, rows: Sequence[Row]) -> Row:
        """Quantizes and scores; a row with `error` where either failed. `rows` are those that are there."""
        method = METHODS[case.method]
        group = method.group_size or self.prepared.group_size
        file, ids = calibration(self.name, self.prepared.path, case.seed, self.work)
        out = self.work / f"{case.method}-{case.bits}-{case.seed}"
        shutil.rmtree(out, ignore_errors=True)
        job: Job = {
            "model": str(self.prepared.path),
            "out": str(out),
            "bits": case.bits,
            "group_size": group,
            "options": {**method.options, **self._layout(method), **_budget(case, rows)},
            "ids": ids,
            "calibration": str(file),
            "seed": case.seed,
        }
        row: Row = {**vars(case), "label": method.label, "ours": method.ours, "group_size": group}
        row |= dict(run(method.peer, job, self.work / f"{out.name}.log"))
        if "error" not in row:
            row |= self._scored(out, method)
        shutil.rmtree(out, ignore_errors=True)
        return row

    def _layout(self, method: Method) -> dict[str, str]:
        asymmetric = method.ours and method.options.get("symmetric") is False
        return {"format": self.prepared.layout} if asymmetric else {}

    def _scored(self, out: Path, method: Method) -> Row:
        try:
            found = qexport.evaluate(out, self.prepared.spec, reference=self.reference)
        except QexportError as error:
            return {"error": f"what {method.label} wrote cannot be scored: {error}"[:300]}
        rise = relative_difference(self.reference.scores.perplexity, found.perplexity)
        row = {**_scores(found), "rise": rise.loss, "rise_error": rise.standard_error}
        if found.divergence:
            row |= {"kl": found.divergence.mean, "kl_error": found.divergence.standard_error}
            row["same_top"] = found.divergence.same_top
        return row


def _budget(case: Case, rows: Sequence[Row]) -> dict[str, Any]:
    """The size that is not to be passed, where a method's own is another's."""
    uniform = METHODS[case.method].size_of
    if uniform is None:
        return {}
    of = replace(case, method=uniform)
    sizes = [row["size_bytes"] for row in rows if of.is_of(row) and "size_bytes" in row]
    if not sizes:
        raise SystemExit(f"{case.method} is to be as large as {uniform}: run that first")
    return {"target_size": sizes[0]}


def _scores(found: Evaluation) -> Row:
    row: Row = {
        "perplexity": found.perplexity.value,
        "perplexity_error": found.perplexity.standard_error,
        "tokens": found.perplexity.tokens,
        "size_bytes": found.size_bytes,
    }
    if found.answers and found.answers.references:
        bleu = found.answers.references.bleu
        row |= {"bleu": bleu.value, "bleu_interval": [bleu.low, bleu.high]}
    return row


@contextmanager
def _held(file: Path) -> Iterator[list[Row]]:
    """The rows in `file`, written back at the end; no other process changes them meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        rows: list[Row] = read_rows(file)
        yield rows
        content = {"protocol": _protocol(), "machine": _machine(), "rows": plain(rows)}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(file)
    finally:
        os.close(held)


def read_rows(file: Path) -> list[Row]:
    """The finished rows, none where there is no file."""
    return list(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.is_file() else []


def keep(file: Path, row: Row) -> None:
    """Puts a row in the place of the one that it repeats."""
    key = ("model", "method", "bits", "seed")
    with _held(file) as rows:
        rows[:] = [old for old in rows if any(old.get(name) != row.get(name) for name in key)]
        rows.append(row)


def _protocol() -> dict[str, Any]:
    return {
        "calibration": f"{SAMPLES} windows of {LENGTH} tokens, the same for every tool",
        "held_out": f"windows of {LENGTH} tokens from BOS",
        "scorer": f"qexport {__version__}, fp32",
        "threads": THREADS,
    }


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2] for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def measure(wanted: Sequence[Case], file: Path, work: Path, *, again: bool) -> None:
    """Measures what is wanted and not there, telling of each row on stderr."""
    for model in dict.fromkeys(case.model for case in wanted):
        done = [row for row in read_rows(file) if "error" not in row]
        todo = [case for case in wanted if case.model == model]
        todo = [case for case in todo if again or not any(case.is_of(row) for row in done)]
        if not todo:
            continue
        bench = Bench(model, work)
        keep(file, bench.full())
        for number, case in enumerate(todo, start=1):
            row = bench.measure(case, read_rows(file))
            keep(file, row)
            told = (
                row.get("error") or f"KL {row['kl']:.5f}, {row['rise']:+.2%}, {row['cpu_seconds']:.1f} CPU s"
            )
            print(f"{number}/{len(todo)} {model} {case.method} {case.bits} bits: {told}", file=sys.stderr)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="Quality of quantized models, qexport's and its peers'.")
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=", ".join(METHODS),
    )
    add("--bits", nargs="+", type=int, choices=ALL_BITS, default=list(ALL_BITS))
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--again", action="store_true", help="measure rows that are there anew")
    add("--no-run", action="store_true", help="write the table of what is there")
    add(
        "--json", type=Path, default=RESULTS, metavar="FILE", help="where rows are kept; default: %(default)s"
    )
    add("--markdown", type=Path, metavar="FILE", help="write the table there; default: print it")
    add("--work", type=Path, default=_WORK, metavar="DIR", help="logs and models; default: %(default)s")
    args = parser.parse_args()
    if not args.no_run:
        wanted = cases(args.models, args.methods, args.bits, args.seeds)
        measure(wanted, args.json, args.work, again=args.again)
    rows = [row for row in read_rows(args.json) if row["model"] in args.models]
    table = markdown(rows, [*METHODS])
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")
    else:
        print(table, end="")


if __name__ == "__main__":
    main()
