"""GGUF beside llama.cpp: how fast the encoders are and what they lose, and what the types cost a model.

    python -m benchmarks.gguf encoders
    python -m benchmarks.gguf ladder --model DIR --calibration FILE --text FILE
    python -m benchmarks.gguf export

`encoders`: every type's encoder beside `ggml_quantize_chunk` (xllamacpp's wheel), one core, the same matrix
of heavy-tailed noise (Student's t, 4 degrees of freedom) in the same run, with and without importance.
Speeds are CPU time, the best of several turns; errors are squared, ours over theirs: below 1 is less.
`ladder`: a model in types from Q8_0 down, quantized by ggml's encoders and by ours, with and without an
importance matrix, and by GPTQ; llama.cpp computes the logits of all, on held-out text. KL divergence is that
of the file's predictions from those of the F32 file.
`export`: a model of Qwen2.5-1.5B's shape, random weights, to Q4_K_M: qexport straight from safetensors,
beside a 16-bit GGUF first and llama.cpp's own `llama-quantize` (cyllama's `model_quantize`) then, on all
cores. The 16-bit file is written by qexport too, faster than by llama.cpp's converter.

Each prints a Markdown table, `--json FILE` keeps the figures. Needs pip install -e '.[dev]'.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import qexport
from benchmarks import ggml
from benchmarks.shapes import SHAPES, make_checkpoint
from qexport.grids.ggml.types import TYPES, BlockType
from qexport.specs import spec_of

Record = dict[str, Any]
_ENCODED = [
    *("q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"),
    *("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"),
    *("tq1_0", "tq2_0", "mxfp4"),
]
_SIDE, _TURNS = 1024, 5
_LADDER = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "iq3_m", "q2_k")
_WINDOW, _WINDOWS = 128, 48


def encoders() -> list[Record]:
    """Speed and error of every type."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(5, _SIDE, _SIDE, generator=generator)
    weight = normal[0] / (normal[1:].square().mean(dim=0)).sqrt() * 0.02
    importance = torch.rand(_SIDE, generator=generator).square() + 0.01
    return [_compared(TYPES[name], weight, importance) for name in _ENCODED]


def _compared(kind: BlockType, weight: torch.Tensor, importance: torch.Tensor) -> Record:
    record: Record = {"type": kind.name}
    for label, h in (("plain", None), ("weighted", importance)):
        if h is None and kind.needs_importance:
            continue
        ours_s, ours = _timed(lambda h=h: kind.encode(weight, h))  # type: ignore[misc]
        theirs_s, theirs = _timed(lambda h=h: ggml.encode(kind, weight, h))  # type: ignore[misc]
        h = torch.ones(weight.shape[1]) if h is None else h
        errors = [((kind.decode(blocks) - weight).square() @ h).sum() for blocks in (ours, theirs)]
        record[label] = {
            "ggml_mweights_s": weight.numel() / theirs_s / 1e6,
            "qexport_mweights_s": weight.numel() / ours_s / 1e6,
            "error": float(errors[0] / (weight.square() @ h).sum()),
            "error_ratio": float(errors[0] / errors[1]),
        }
    return record


def _timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """The least CPU time of several turns, the first, which compiles, left aside."""
    made = work()
    least = math.inf
    for _ in range(_TURNS):
        begin = time.process_time()
        made = work()
        least = min(least, time.process_time() - begin)
    return least, made


def encoders_table(records: Sequence[Record]) -> str:
    """As Markdown."""
    lines = [
        "| type | ggml, Mweights/s | qexport | times | error | of ggml's | with importance: ggml | qexport "
        "| times | error of ggml's |",
        "| --- |" + " ---: |" * 9,
    ]
    for record in records:
        cells = [record["type"]]
        for label in ("plain", "weighted"):
            found = record.get(label)
            if found is None:
                cells += ["–"] * 5
                continue
            ours, theirs = found["qexport_mweights_s"], found["ggml_mweights_s"]
            cells += [f"{theirs:.1f}", f"{ours:.1f}", f"{ours / theirs:.1f}"]
            cells += [f"{found['error']:.2e}"] if label == "plain" else []
            cells += [f"{found['error_ratio']:.3f}"]
        lines.append(f"| {' | '.join(cells[:10])} |")
    return "\n".join(lines)


def ladder(model: Path, calibration: Path, text: Path) -> list[Record]:
    """Perplexity and KL divergence, by llama.cpp, of each type made in each way."""
    data = {"calibration": (str(calibration),), "samples": 128, "sequence_length": 256}
    ids = _windows(model, text)
    records: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="qexport-ladder-") as made:
        work = Path(made)
        qexport.quantize(model, work / "full", spec_of("gguf", type="f32"))
        full = _log_probabilities(next((work / "full").glob("*.gguf")), ids, work)
        perplexity = _perplexity(full, ids)
        records.append({"type": "f32", "bits": 32.0, "perplexity": perplexity})
        matrix = work / "imatrix.gguf"
        from qexport.quantization.imatrix import make_imatrix
        from qexport.specs import CalibrationSpec

        make_imatrix(model, matrix, CalibrationSpec(**data))
        known = {"imatrix": str(matrix)}
        ways: tuple[tuple[str, bool, dict[str, Any]], ...] = (
            ("ggml", True, {}),
            ("qexport", False, {}),
            ("ggml, imatrix", True, known),
            ("qexport, imatrix", False, known),
            ("qexport, gptq", False, {"solver": "gptq", **data}),
        )
        for way, by_ggml, options in ways:
            out = work / way.replace(", ", "-")
            spec = spec_of("gguf", type=_LADDER, **options)
            if by_ggml:
                with ggml.in_our_place():
                    result = qexport.quantize(model, out, spec)
            else:
                result = qexport.quantize(model, out, spec)
            for file in result.files:
                found = _log_probabilities(out / file.file, ids, work)
                records.append(
                    {
                        "type": file.type,
                        "way": way,
                        "bits": file.bits_per_weight,
                        "perplexity": _perplexity(found, ids),
                        "divergence": float((full.exp() * (full - found)).sum(-1).mean()),
                    }
                )
                print(f"{file.type} {way}: {records[-1]}", file=sys.stderr)
    return records


def _windows(model: Path, text: Path) -> torch.Tensor:
    """Token ids [windows, tokens] of held-out text, each window opened as the tokenizer opens a text."""
    from qexport.calibrate.texts import read_documents
    from qexport.modeling.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    ids: list[int] = []
    for document in read_documents(text):
        ids += tokenizer(document)["input_ids"]
        if len(ids) >= _WINDOW * _WINDOWS:
            break
    count = min(_WINDOWS, len(ids) // _WINDOW)
    return torch.tensor(ids[: count * _WINDOW]).reshape(count, _WINDOW)


def _log_probabilities(file: Path, ids: torch.Tensor, work: Path) -> torch.Tensor:
    from qexport.verification.runtimes.process import run_jobs

    logits = work / "logits.npy"
    job = {"model": str(file), "ids": ids.tolist(), "logits": str(logits), "trust_remote_code": False}
    outcome = run_jobs("llamacpp", [job])[0]  # type: ignore[list-item]
    if "error" in outcome or not logits.is_file():
        sys.exit(f"llama.cpp does not run {file}: {outcome}")
    import numpy as np

    found = torch.from_numpy(np.load(logits)).log_softmax(-1)
    logits.unlink()
    return found


def _perplexity(log_probabilities: torch.Tensor, ids: torch.Tensor) -> float:
    told = log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])
    return float((-told.double().mean()).exp())


def ladder_table(records: Sequence[Record]) -> str:
    """As Markdown: a row a type, a column a way, the rise of perplexity in per cent / KL divergence."""
    full = records[0]["perplexity"]
    ways = list(dict.fromkeys(record["way"] for record in records[1:]))
    lines = [
        f"| type (F32: perplexity {full:.3f}) | bits a weight | " + " | ".join(ways) + " |",
        "| --- |" + " ---: |" * (len(ways) + 1),
    ]
    for kind in _LADDER:
        own = {record["way"]: record for record in records[1:] if record["type"] == kind}
        cells = [
            f"{100 * (own[way]['perplexity'] / full - 1):+.2f} / {own[way]['divergence']:.4f}" for way in ways
        ]
        lines.append(f"| {kind} | {own[ways[0]]['bits']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


_STEPS = {
    "qexport": "import qexport; from qexport.specs import spec_of\n"
    "qexport.quantize({base!r}, {out!r}, spec_of('gguf', type='q4_k_m'))",
    "f16": "import qexport; from qexport.specs import spec_of\n"
    "qexport.quantize({base!r}, {out!r}, spec_of('gguf', type='f16'))",
    "llama-quantize": "from cyllama.llama import llama_cpp as l\n"
    "p = l.LlamaModelQuantizeParams(); p.ftype = 15; p.nthread = {cores}\n"
    "l.set_log_callback(lambda *a: None)\n"
    "l.model_quantize({base!r}, {out!r}, p)",
}


def export(shape_name: str) -> list[Record]:
    """Seconds and peak memory of each way, a process a step."""
    from qexport.packaged import embedded_base

    shape = SHAPES[shape_name]
    records = []
    with tempfile.TemporaryDirectory(prefix="qexport-gguf-") as made:
        work = Path(made)
        base = work / shape.name
        make_checkpoint(shape, base)
        _give_tokenizer(embedded_base(), base)
        for name in _STEPS:
            out = work / name if name != "llama-quantize" else work / "theirs.gguf"
            source = base if name != "llama-quantize" else next((work / "f16").glob("*.gguf"))
            seconds, peak = _run(_STEPS[name].format(base=str(source), out=str(out), cores=os.cpu_count()))
            files = [out] if out.is_file() else list(out.glob("*.gguf"))
            size = sum(file.stat().st_size for file in files)
            records.append({"step": name, "seconds": seconds, "peak_bytes": peak, "size_bytes": size})
            print(records[-1], file=sys.stderr)
    return records


def _give_tokenizer(source: Path, directory: Path) -> None:
    """A vocabulary is needed, but not weighed: the embedded model's, the rest of the rows unused."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            (directory / name).write_bytes((source / name).read_bytes())


def _run(code: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a Python process."""
    begin = time.perf_counter()
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return time.perf_counter() - begin, int(told.split()[-1]) * 1024


def export_table(records: Sequence[Record]) -> str:
    """As Markdown."""
    names = {
        "qexport": "qexport, safetensors to Q4_K_M",
        "f16": "safetensors to F16 (by qexport)",
        "llama-quantize": "llama-quantize, F16 to Q4_K_M",
    }
    lines = ["| step | seconds | peak memory | size |", "| --- | ---: | ---: | ---: |"]
    for record in records:
        memory, size = record["peak_bytes"] / 1e9, record["size_bytes"] / 1e9
        lines.append(
            f"| {names[record['step']]} | {record['seconds']:.1f} | {memory:.2f} GB | {size:.2f} GB |"
        )
    return "\n".join(lines)


TABLES = {"encoders": encoders_table, "ladder": ladder_table, "export": export_table}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=["encoders", "ladder", "export"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--calibration", type=Path, metavar="FILE")
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--shape", choices=list(SHAPES), default="1.5b")
    options = parser.parse_args()
    if options.part == "encoders":
        records = encoders()
    elif options.part == "export":
        records = export(options.shape)
    elif options.model and options.calibration and options.text:
        records = ladder(options.model, options.calibration, options.text)
    else:
        parser.error("ladder needs --model, --calibration and --text")
    if options.json:
        options.json.write_text(json.dumps({"part": options.part, "records": records}, indent=1))
    print(TABLES[options.part](records))


if __name__ == "__main__":
    main()
