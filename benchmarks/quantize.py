"""Seconds a block: GPTQ and AWQ beside GPTQModel and AutoAWQ, and the calls of hqq and bitsandbytes.

    python -m benchmarks.quantize [blocks] [tensors] [--layers N] [--samples N] [--length N] [--limit S]

`blocks`: models of Qwen2.5-1.5B's shape (random bf16 weights, norms of uneven size, as outliers are), with
one block and with `--layers`, quantized to 4 bits in groups of 128 by each tool with its own defaults, on the
same samples, one process after the other on `--threads` cores. A block's time is the difference of the two
models' over the difference of their blocks: what is done once a model drops out. Peers' times are those of
their `quantize` alone, without reading or saving the model; ours hold both. CPU seconds are those of all
threads: they stand still while other work has the machine.
`tensors`: the matrices of such a block by hqq's `Quantizer.quantize` and bitsandbytes' `quantize_4bit` and
`int8_vectorwise_quant`, each in turn with our own call for the same format; the best of several turns.

AutoAWQ takes many minutes a block: it gets the model of one block alone, whose time is taken for the block's,
and each run of any tool ends after `--limit` seconds: then "over" that many is all that the table tells.

Each prints a Markdown table; both go to benchmarks/results/quantize.md, the figures to quantize.json there.
GPTQModel and AutoAWQ get environments of their own (benchmarks/environments.py).
Needs pip install -e '.[dev]'.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environments import python_of
from benchmarks.shapes import SHAPES, Shape, make_checkpoint
from qexport.cli.main import ENVIRONMENT

Record = dict[str, Any]
Timed = tuple[float, float, bool]  # seconds, CPU seconds of all threads, and whether it came to its end
_RESULTS = Path(__file__).with_name("results")
_ONE_BLOCK = ("AutoAWQ",)
_BITS, _GROUP = 4, 128
_SAMPLES = "samples.json"  # token ids
_TURNS = 3
_ROOT = Path(__file__).resolve().parents[1]
_TEXT = _ROOT / "calibration" / "calibration.jsonl"
# tool -> (what it does, the peer whose environment it runs in)
TOOLS = {
    "qexport gptq fast": ("GPTQ", "qexport"),
    "qexport gptq balanced": ("GPTQ", "qexport"),
    "GPTQModel": ("GPTQ", "gptqmodel"),
    "qexport awq": ("AWQ", "qexport"),
    "AutoAWQ": ("AWQ", "autoawq"),
}


def make_model(shape: Shape, directory: Path, *, samples: int, length: int) -> None:
    """The checkpoint, a tokenizer of byte pairs, and the windows of the package's text for calibration.

    The norms' weights are log-normal: inputs differ in size by some ten times.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from qexport.modeling.calibration import calibration_data
    from qexport.modeling.skeleton import build_skeleton
    from qexport.specs import GptqSpec

    make_checkpoint(shape, directory)
    generator = torch.Generator().manual_seed(2)
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensors[name] = torch.randn(len(tensor), generator=generator).mul(0.7).exp().to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    texts = [json.loads(line)["text"] for line in _TEXT.read_text().splitlines()]
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    pairs.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=8192,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    pairs.save(str(directory / "tokenizer.json"))
    end = "<|endoftext|>"
    names = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": end, "eos_token": end}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    spec = GptqSpec(calibration=(str(_TEXT),), samples=samples, sequence_length=length)
    data = calibration_data(directory, spec, build_skeleton(directory))
    (directory / _SAMPLES).write_text(json.dumps(data.windows.tolist()))


def quantized(tool: str, model: Path, out: Path, *, samples: int, length: int, limit: int) -> Timed:
    """The time that `tool` takes for the whole model, in this process; no more than `limit` seconds."""
    ids = json.loads((model / _SAMPLES).read_text())
    if tool.startswith("qexport"):
        import qexport
        from qexport.specs import spec_of

        options: Record = {"bits": _BITS, "group_size": _GROUP, "samples": samples, "sequence_length": length}
        _, method, *effort = tool.split()
        if effort:
            options["effort"] = effort[0]
        spec = spec_of(method, calibration=(str(_TEXT),), **options)
        return _seconds(lambda: qexport.quantize(model, out, spec), limit)
    if tool == "GPTQModel":
        from gptqmodel import GPTQModel, QuantizeConfig

        config = QuantizeConfig(bits=_BITS, group_size=_GROUP, offload_to_disk=False)
        loaded = GPTQModel.load(str(model), config)
        return _seconds(lambda: loaded.quantize(ids, batch_size=8), limit)
    from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(model)
    awq = AutoAWQForCausalLM.from_pretrained(str(model))
    config = {"w_bit": _BITS, "q_group_size": _GROUP, "zero_point": True, "version": "GEMM"}
    limits = {"max_calib_samples": samples, "max_calib_seq_len": length}
    return _seconds(lambda: awq.quantize(words, quant_config=config, calib_data=ids, **limits), limit)


def blocks(arguments: argparse.Namespace) -> list[Record]:
    """Every tool on the short and on the long model, and the seconds a block that this comes to."""
    counts = (1, arguments.layers)
    with tempfile.TemporaryDirectory(prefix="qexport-bench-", dir=arguments.scratch) as scratch:
        for layers in counts:
            shape = replace(SHAPES["1.5b"], layers=layers)
            make_model(
                shape, Path(scratch, f"model-{layers}"), samples=arguments.samples, length=arguments.length
            )
        records = []
        for tool in arguments.tools or TOOLS:
            wall, cpu, whole = _in_its_environment(tool, Path(scratch), counts[0], arguments)
            if tool not in _ONE_BLOCK and whole:
                long_wall, long_cpu, whole = _in_its_environment(tool, Path(scratch), counts[1], arguments)
                between = counts[1] - counts[0]
                wall, cpu = (long_wall - wall) / between, (long_cpu - cpu) / between
            figures = {"block_s": wall, "block_cpu_s": cpu, "ended": whole}
            records.append({"tool": tool, "method": TOOLS[tool][0], **figures})
    return records


def _in_its_environment(tool: str, scratch: Path, layers: int, arguments: argparse.Namespace) -> Timed:
    command = [str(python_of(TOOLS[tool][1])), "-m", "benchmarks.quantize", "--only", tool]
    command += ["--model", str(scratch / f"model-{layers}"), "--out", str(scratch / f"{tool}-{layers}")]
    command += ["--samples", str(arguments.samples), "--length", str(arguments.length)]
    command += ["--limit", str(arguments.limit)]
    threads = str(arguments.threads)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    environment |= {"OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": threads}
    if tool.startswith("qexport"):
        environment |= ENVIRONMENT
    ran = subprocess.run(
        # GPTQModel leaves its logs where it runs
        command,
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * arguments.limit + 300,
    )
    if ran.returncode:
        raise RuntimeError(f"{tool} failed:\n{ran.stderr[-3000:]}")
    wall, cpu, ended = json.loads(ran.stdout.splitlines()[-1])
    cut = "" if ended else ", cut off"
    print(f"{tool}, blocks {layers}: {wall:.1f} s, {cpu:.1f} s of CPU{cut}", file=sys.stderr)
    return wall, cpu, ended


def tensors(arguments: argparse.Namespace) -> list[Record]:
    """Seconds for all matrices of a block by hqq's and bitsandbytes' calls and by ours."""
    import bitsandbytes.functional as bnb
    import torch
    from hqq.core.quantize import Quantizer

    from qexport.grids.bnb4 import Bnb4Grid
    from qexport.grids.grid import encode
    from qexport.grids.int8_rows import Int8RowGrid
    from qexport.grids.integer import IntegerGrid
    from qexport.solvers.hqq import half_quadratic

    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    block = [
        torch.randn(shape, generator=generator).mul_(0.02) for shape in SHAPES["1.5b"].linears().values()
    ]
    halves = [weight.half() for weight in block]  # what bitsandbytes' int8 takes
    int8, hqq = Int8RowGrid(), IntegerGrid(4, 64, "float")

    def by_hqq(weight: torch.Tensor) -> Any:
        return Quantizer.quantize(
            weight, nbits=4, group_size=64, axis=1, optimize=True, compute_dtype=torch.float16, device="cpu"
        )

    def by_bnb(kind: str, nested: bool) -> Callable[[torch.Tensor], Any]:
        return lambda weight: bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)

    cases: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]] = {
        "hqq 4 bits": (by_hqq, lambda weight: half_quadratic(weight, hqq), block),
        "bnb nf4": (by_bnb("nf4", False), Bnb4Grid("nf4", False).quantize, block),
        "bnb nf4 nested": (by_bnb("nf4", True), Bnb4Grid("nf4", True).quantize, block),
        "bnb fp4": (by_bnb("fp4", False), Bnb4Grid("fp4", False).quantize, block),
        "bnb int8": (bnb.int8_vectorwise_quant, lambda w: encode(int8, w, int8.fit(w)), halves),
    }
    records = []
    for name, (theirs, ours, weights) in cases.items():
        turns = [
            [_seconds(partial(_each, call, weights))[0] for call in (theirs, ours)] for _ in range(_TURNS + 1)
        ][1:]  # the first one warms up
        records.append(
            {"call": name, "peer_s": min(turn[0] for turn in turns), "qexport_s": min(t[1] for t in turns)}
        )
    return records


def _each(call: Callable[[Any], Any], weights: Sequence[Any]) -> None:
    for weight in weights:
        call(weight)


class _Over(BaseException):
    """The time is over; no tool may take it for an error of its own."""


def _seconds(work: Callable[[], Any], limit: int = 0) -> Timed:
    """The time of `work` in this process; it is ended after `limit` seconds, if that is not 0."""

    def over(*_: object) -> None:
        raise _Over

    signal.signal(signal.SIGALRM, over)
    begun, begun_cpu, ended = time.perf_counter(), time.process_time(), True
    signal.alarm(limit)
    try:
        work()
    except _Over:
        ended = False
    finally:
        signal.alarm(0)
    return time.perf_counter() - begun, time.process_time() - begun_cpu, ended


def blocks_table(records: Sequence[Record]) -> str:
    """Markdown: seconds a block, and how many times those of our own of the same method: our first one."""
    ours = {r["method"]: r for r in reversed(records) if r["tool"].startswith("qexport")}
    lines = [
        "| method | tool | s a block | times ours | CPU s a block | times ours |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        cells = [record["method"], record["tool"]]
        for key in ("block_s", "block_cpu_s"):
            own = ours.get(record["method"], {}).get(key)
            over = "" if record["ended"] else "over "
            cells += [f"{over}{record[key]:.1f}", f"{over}{record[key] / own:.2f}" if own else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tensors_table(records: Sequence[Record]) -> str:
    """Markdown: seconds for the matrices of a block."""
    lines = ["| call | peer, s | qexport, s | times ours |", "|---|---|---|---|"]
    for r in records:
        times = r["peer_s"] / r["qexport_s"]
        lines.append(f"| {r['call']} | {r['peer_s']:.3f} | {r['qexport_s']:.3f} | {times:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="Seconds a block, beside the peers.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="of blocks, tensors; default: both")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the longer model")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tools", nargs="*", choices=list(TOOLS), help="default: all")
    parser.add_argument("--scratch", help="where models may lie for the while, 2 GB")
    parser.add_argument("--limit", type=int, default=300, help="seconds that a run may take")
    parser.add_argument("--only", choices=list(TOOLS), help=argparse.SUPPRESS)  # in the tool's environment
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        with redirect_stdout(sys.stderr):
            seconds = quantized(
                arguments.only,
                arguments.model,
                arguments.out,
                samples=arguments.samples,
                length=arguments.length,
                limit=arguments.limit,
            )
        print(json.dumps(seconds))
        return
    parts = {"blocks": (blocks, blocks_table), "tensors": (tensors, tensors_table)}
    kept = _RESULTS / "quantize.json"
    found: Record = json.loads(kept.read_text()) if kept.exists() else {}
    for part in arguments.parts or parts:
        if part not in parts:
            parser.error(f"no part {part!r}: one of {', '.join(parts)}")
        measure, table = parts[part]
        found[part] = measure(arguments)
        print(table(found[part]), flush=True)
    settings = vars(arguments)
    found["recipe"] = {name: settings[name] for name in ("layers", "samples", "length", "threads", "limit")}
    _RESULTS.mkdir(exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    tables = [table(found[part]) for part, (_, table) in parts.items() if part in found]
    kept.with_suffix(".md").write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
