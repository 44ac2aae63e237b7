"""How long does a merge take, against copying the files and against PEFT? And do the results agree?

    python -m benchmarks.merge [--shape 1.5b|7b|both] [--runs N] [--work DIR] [--device cpu|cuda] [--json]

Makes random bf16 checkpoints in the shapes of Qwen2.5-1.5B (tied, 3.1 GB) and Qwen2.5-7B (untied, 15.2 GB)
with a rank-16 LoRA on all linear layers, then runs in turn, N times, each in a process of its own that writes
a fresh directory: `cp -r` of the base, the command `qexport merge`, and PEFT (from_pretrained in bf16,
merge_and_unload, save_pretrained in files of the same size). Prints a Markdown table and what the figures
rest on; progress goes to stderr. A shape that disk has no room for is left out, and so is PEFT where memory
is short; a line says so.

Before each measured run what earlier ones wrote is flushed to the disk, and the inputs are read once, or
dropped from the page cache when memory would not hold them twice: every tool finds the same. qexport flushes
its files and records their hashes, which cp and PEFT do not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.shapes import ALPHA, RANK, SHAPES, Shape, make_adapter, make_checkpoint
from qexport.sizes import format_size

Result = TypeVar("Result")

COPY, QEXPORT, PEFT = "cp -r", "qexport merge", "PEFT"
DISK_FACTOR = 3.5  # base, output, and room to spare for the file system
PEFT_MEMORY_FACTOR = 2.5  # the model, what reading and merging it take besides, and the page cache
POLL_SECONDS = 0.005

# argv: base, adapter, output, size of a file, device
PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, size, device = sys.argv[1:]
placed = {} if device == "cpu" else {"device_map": device}
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **placed)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size=size)
"""
STARTS = {
    QEXPORT: "import qexport.cli.main, qexport.merging.merge",
    PEFT: "import torch, peft, transformers; transformers.AutoModelForCausalLM; peft.PeftModel",
}


@dataclass(frozen=True)
class Row:
    """One tool on one shape; times in seconds and sizes in bytes, one of each a round."""

    shape: str
    weights_bytes: int
    tool: str
    seconds: list[float] = field(default_factory=list)
    copy_ratios: list[float] = field(default_factory=list)  # to cp in the same round
    max_rss_bytes: list[int] = field(default_factory=list)  # wait4's ru_maxrss
    peak_bytes: list[int] = field(default_factory=list)  # VmHWM, on Linux
    start_seconds: float | None = None  # of its imports alone


@dataclass(frozen=True)
class Agreement:
    """Sampled matrices against W + s B A in fp64.

    Errors are in units of the last bf16 digit of the value before or after merging, the larger one.
    """

    shape: str
    tensors: list[str]
    worst_error: dict[str, float]  # by tool; rounding once makes at most 0.5
    worst_difference: float | None  # qexport to PEFT; None without PEFT
    differing: float | None  # share of values


@dataclass(frozen=True)
class Results:
    """All that was measured, and the lines that say what it rests on."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def table(results: Results) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| shape | tool | seconds, best | median | start-up | times cp | peak memory | GB/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results.rows:
        median = statistics.median(row.seconds)
        start = "" if row.start_seconds is None else f"{row.start_seconds:.1f}"
        cells = (
            f"{row.shape} ({format_size(row.weights_bytes)})",
            row.tool,
            f"{min(row.seconds):.1f}",
            f"{median:.1f}",
            start,
            f"{statistics.median(row.copy_ratios):.2f}",
            format_size(max(row.peak_bytes or row.max_rss_bytes)),
            f"{row.weights_bytes / 1e9 / median:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def remarks(results: Results) -> str:
    """What the table rests on and whether the weights agree, a Markdown list."""
    lines = [", ".join(f"{key} {value}" for key, value in results.machine.items()), *results.notes]
    for found in results.agreements:
        worst = ", ".join(f"{tool} {error:.3f}" for tool, error in found.worst_error.items())
        line = (
            f"{found.shape}: largest error of {len(found.tensors)} merged matrices against fp64, in units of "
            f"bf16's last digit (0.5 is rounding once): {worst}"
        )
        if found.differing is not None:
            line += (
                f"; qexport and PEFT differ in {100 * found.differing:.2g} % of the values, "
                f"by {found.worst_difference:.3g} units at most"
            )
        lines.append(line)
    return "\n".join(f"- {line}" for line in lines)


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function`, in a process of its own.

    A child's ru_maxrss is at least what its parent held when it was started (Linux keeps the maximum over
    exec), so this process must never load torch.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_of(pid: int) -> int:
    """The largest resident set so far of a running process, in bytes; 0 where it cannot be told."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(peaks[0]) * 1024 if peaks else 0


def measured(command: Sequence[str | Path]) -> tuple[float, int, int]:
    """Runs `command`: seconds, ru_maxrss and VmHWM in bytes. A failure ends the benchmark."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as talk:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=talk, env=offline)
        peak = 0
        try:
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                peak = max(peak, peak_of(process.pid))
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(ended[1])  # else Popen would wait for it again
        if process.returncode:
            talk.seek(0)
            sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{talk.read()[-3000:]}")
    return seconds, ended[2].ru_maxrss * (1 if sys.platform == "darwin" else 1024), peak


def set_page_cache(directories: Sequence[Path], *, cached: bool) -> None:
    """Flushes what was written, then reads all files, or asks the system to forget them (Linux)."""
    os.sync()
    buffer = bytearray(1 << 24)
    for path in (file for directory in directories for file in directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            if cached:
                while file.readinto(buffer):
                    pass
            elif sys.platform == "linux":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sampled_modules(shape: Shape) -> list[str]:
    """Matrices of the first, a middle and the last block."""
    kinds = ("self_attn.q_proj", "mlp.down_proj", "mlp.gate_proj")
    blocks = (0, shape.layers // 2, shape.layers - 1)
    return [f"model.layers.{block}.{kind}" for block, kind in zip(blocks, kinds, strict=True)]


def keep_samples(directory: Path, modules: Sequence[str], kept: Path) -> None:
    """Copies the modules' weights out of a checkpoint, read by the safetensors library."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            present = set(file.keys())
            tensors |= {m: file.get_tensor(f"{m}.weight") for m in modules if f"{m}.weight" in present}
    save_file(tensors, kept)


def agreement(shape: Shape, base: Path, adapter: Path, merged: dict[str, Path]) -> Agreement:
    """Compares kept samples, tool -> file, with fp64 arithmetic and with each other."""
    import torch
    from safetensors.torch import load_file

    pairs = load_file(adapter / "adapter_model.safetensors")
    kept = {tool: load_file(path) for tool, path in merged.items()}
    worst = dict.fromkeys(kept, 0.0)
    difference, differing, values = 0.0, 0, 0
    modules = sampled_modules(shape)
    for module, weight in load_file(base).items():
        a, b = (pairs[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        exact = torch.addmm(weight.double(), b, a, alpha=ALPHA / RANK)
        # of the larger value, before or after: where the two summands cancel, fp32's own digits end too.
        # bf16 has 8 significant bits, and frexp's mantissa begins at 1/2
        larger = torch.maximum(exact.abs(), weight.double().abs())
        unit = torch.exp2((torch.frexp(larger).exponent - 8).double())
        for tool, tensors in kept.items():
            error = float(((tensors[module].double() - exact) / unit).abs().max())
            worst[tool] = max(worst[tool], error)
        if PEFT in kept:
            ours, theirs = kept[QEXPORT][module], kept[PEFT][module]
            difference = max(difference, float(((ours.double() - theirs.double()) / unit).abs().max()))
            differing += int((ours != theirs).sum())
            values += ours.numel()
    both = (difference, differing / values) if values else (None, None)
    return Agreement(shape.name, modules, worst, *both)


def measure_shape(shape: Shape, work: Path, runs: int, device: str, results: Results) -> None:
    """Makes the shape's checkpoint in `work`, measures, and adds to `results`."""
    free = shutil.disk_usage(work).free
    if free < DISK_FACTOR * shape.size:
        results.notes.append(
            f"{shape.name} was left out: {format_size(free)} of disk are free, "
            f"{DISK_FACTOR} x {format_size(shape.size)} are needed"
        )
        return
    base, adapter, out = work / "base", work / "adapter", work / "out"
    print(f"{shape.name}: making {format_size(shape.size)} of weights", file=sys.stderr)
    apart(make_checkpoint, shape, base)
    apart(make_adapter, shape, base, adapter)

    python, size = sys.executable, shape.max_shard_size
    commands: dict[str, list[str | Path]] = {
        COPY: ["cp", "-r", base, out],
        QEXPORT: [python, "-m", "qexport", "merge", base, "-a", adapter, "-o", out, "--quiet"],
        PEFT: [python, "-c", PEFT_MERGE, base, adapter, out, size, device],
    }
    commands[QEXPORT] += ["--max-shard-size", size, "--device", device]
    if memory_bytes() < PEFT_MEMORY_FACTOR * shape.size:
        del commands[PEFT]
        results.notes.append(
            f"{shape.name}: PEFT was left out: it holds the whole model, and {format_size(memory_bytes())} "
            f"of memory are less than {PEFT_MEMORY_FACTOR} x {format_size(shape.size)}"
        )
    cached = memory_bytes() >= 2 * shape.size
    results.notes.append(
        f"{shape.name}: inputs {'in' if cached else 'not in'} the page cache, files of at most {size}, "
        f"{runs} runs in turn"
    )

    # pages that a virtual machine has not used yet are slow: the first copy pays for all
    measured(commands[COPY])
    shutil.rmtree(out)
    starts = {
        tool: min(measured([python, "-c", STARTS[tool]])[0] for _ in range(2))
        for tool in commands
        if tool in STARTS
    }
    rows = {tool: Row(shape.name, shape.size, tool, start_seconds=starts.get(tool)) for tool in commands}
    samples: dict[str, Path] = {}
    for number in range(runs):
        for tool, command in commands.items():
            set_page_cache([base, adapter], cached=cached)
            seconds, max_rss, peak = measured(command)
            row = rows[tool]
            row.seconds.append(seconds)
            row.copy_ratios.append(seconds / rows[COPY].seconds[-1])
            row.max_rss_bytes.append(max_rss)
            row.peak_bytes.extend([peak] if peak else [])
            print(f"{shape.name}, {tool}: {seconds:.1f} s, {format_size(max_rss)}", file=sys.stderr)
            if number == 0 and tool != COPY:
                samples[tool] = work / f"{tool}.safetensors"
                apart(keep_samples, out, sampled_modules(shape), samples[tool])
            shutil.rmtree(out)
    results.rows.extend(rows.values())
    before = work / "before.safetensors"
    apart(keep_samples, base, sampled_modules(shape), before)
    results.agreements.append(apart(agreement, shape, before, adapter, samples))


def machine() -> dict[str, Any]:
    """What ran it."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return {
        "CPU cores": os.cpu_count(),
        "OMP threads": threads,
        "memory": format_size(memory_bytes()),
        "Python": platform.python_version(),
        **packages,
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="1.5b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where to make the files; removed afterwards"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)

    # a plain SIGTERM would leave the running child and gigabytes behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = Results(machine() | {"device": options.device})
    for name in SHAPES if options.shape == "both" else [options.shape]:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            measure_shape(SHAPES[name], Path(work), options.runs, options.device, results)
    if options.json:
        print(json.dumps(asdict(results), indent=2))
    else:
        print(f"{table(results)}\n\n{remarks(results)}")


if __name__ == "__main__":
    main()
