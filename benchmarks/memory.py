"""Does peak memory grow with the layers? One process a step, on two models that differ in depth only.

    python -m benchmarks.memory [verbs] [calibrated] [--rows TEXT] [--depths 8 28] [--threads N] [--json FILE]

Checkpoints of random bf16 weights are made on the spot, and removed again. `verbs`: a Llama of 4 and of 24
blocks (hidden 1024, MLP 2816, 32 000 tokens) with an adapter on all linear layers. `calibrated`: the shape of
Qwen2.5-1.5B with 8 and with 28 blocks (hidden 1536, MLP 8960, 151 936 tokens, tied), GPTQ at each effort, and
AWQ, on 4 x 512 tokens; one row with room for 64 kB of hidden states, so that they are spilled. `--rows` takes
the rows whose name holds one of the texts.

Prints a Markdown table a part: the peak resident memory of each step's process for both depths (its seconds
go to stderr). Python, torch and transformers are in it; the first row shows what they take without any work.
`--json` keeps the figures for `python -m benchmarks.readme --memory FILE`. `verbs` take 2.2 GB of disk and a
few minutes, `calibrated` 5 GB in $TMPDIR and hours: what a block costs depends little on the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import qexport
from benchmarks.shapes import SHAPES, make_checkpoint
from qexport.checkpoint.manifest import Recipe
from qexport.checkpoint.sidecars import sidecars_of
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.writer import CheckpointWriter
from qexport.packaged import embedded_base
from qexport.sizes import format_size

Record = dict[str, Any]

HIDDEN, MLP, VOCABULARY, HEADS = 1024, 2816, 32_000, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
IMPORTS = {"(imports only)": ("", "import qexport.graph.run, transformers, bitsandbytes")}
VERBS = IMPORTS | {
    "merge": ("merged", "qexport.merge(base, [adapter], out)"),
    "shard, 200MB": ("sharded", "qexport.shard(base, out, ShardSpec(max_shard_size='200MB'))"),
    "quantize, bnb 4 bits": ("bnb", "qexport.quantize(base, out, spec_of('bnb'))"),
    "quantize, rtn 4 bits": ("rtn", "qexport.quantize(base, out, RtnSpec())"),
    "quantize, gptq 4 bits, 8 x 256 tokens": (
        "gptq",
        "qexport.quantize(base, out, GptqSpec(samples=8, sequence_length=256))",
    ),
    "evaluate, 20 documents": (
        "",
        "qexport.evaluate(base, VerifySpec(text=str(heldout_text()), max_documents=20))",
    ),
    "compare the rtn model with the base, 20 documents": (
        "rtn",
        "compared(base, out, VerifySpec(text=str(heldout_text()), max_documents=20))",
    ),
}
_FEW = "samples=4, sequence_length=512"
CALIBRATED = IMPORTS | {
    "gptq 4 bits, effort fast": ("out", f"qexport.quantize(base, out, GptqSpec({_FEW}, effort='fast'))"),
    "gptq 4 bits, effort fast, 64 kB of hidden states in memory": (
        "out",
        f"qexport.quantize(base, out, GptqSpec({_FEW}, effort='fast', memory='64KB'))",
    ),
    "gptq 4 bits, effort balanced": ("out", f"qexport.quantize(base, out, GptqSpec({_FEW}))"),
    "gptq 4 bits, effort best": ("out", f"qexport.quantize(base, out, GptqSpec({_FEW}, effort='best'))"),
    "awq 4 bits": ("out", f"qexport.quantize(base, out, AwqSpec({_FEW}))"),
}
RUN = """
import json, sys
from pathlib import Path
import qexport
from qexport.specs import *
from qexport.measure import Measured
from qexport.packaged import heldout_text
from qexport.verification.evaluate import Reference
base, adapter, out = map(Path, sys.argv[1:4])
def compared(base, variant, spec):
    kept = Path(f"{variant}.logits")
    full = qexport.evaluate(base, spec, keep_logits=kept)
    qexport.evaluate(variant, spec, reference=Reference(full, kept, base))
with Measured() as cost:
    STEP
print(json.dumps([cost.seconds, cost.peak_bytes]))
"""


def make_llama(directory: Path, depth: int) -> None:
    """Random weights, written tensor by tensor, with the embedded model's tokenizer; an adapter beside it."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 4,
        "num_hidden_layers": depth,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for block in range(depth):
        prefix = f"model.layers.{block}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes |= {f"{prefix}.{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    infos = [TensorInfo(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    with CheckpointWriter(
        directory,
        infos,
        config=config,
        recipe=lambda: Recipe("synthetic", {"depth": depth}, {}),
        max_shard_size=500_000_000,
        sidecars=sidecars_of(embedded_base()),
        sources=[],
    ) as writer:
        for info in infos:
            scale = 1.0 if len(info.shape) == 1 else 0.02
            writer.write(info.name, (torch.randn(info.shape) * scale).to(torch.bfloat16))
    make_adapter(_adapter_of(directory), depth)


def make_adapter(directory: Path, depth: int) -> None:
    """A rank-16 LoRA on all linear layers."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": list(LINEARS)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for block in range(depth):
        for name, (out, inputs) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(16, inputs) * 0.01
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, 16) * 0.01
    save_file(tensors, directory / "adapter_model.safetensors")


def make_qwen(directory: Path, depth: int) -> None:
    """Qwen2.5-1.5B's sides, with the embedded model's tokenizer, whose ids are all in its vocabulary."""
    make_checkpoint(replace(SHAPES["1.5b"], layers=depth), directory)
    for name, file in sidecars_of(embedded_base()).items():
        shutil.copy(file, directory / name)


@dataclass(frozen=True)
class Part:
    """A model, its depths, and the steps that are measured on it."""

    make: Callable[[Path, int], None]
    depths: tuple[int, ...]
    steps: dict[str, tuple[str, str]]  # name -> (directory of the output, code)


PARTS = {
    "verbs": Part(make_llama, (4, 24), VERBS),
    "calibrated": Part(make_qwen, (8, 28), CALIBRATED),
}


def _adapter_of(base: Path) -> Path:
    return base.with_name(f"{base.name}-adapter")


def measured(part: Part, steps: Sequence[str], threads: int) -> Record:
    """Each step's seconds and peak bytes, by depth."""
    torch.manual_seed(0)
    records: list[Record] = [{"step": step, "seconds": [], "peak_bytes": []} for step in steps]
    sizes = []
    for depth in part.depths:
        with tempfile.TemporaryDirectory(prefix="qexport-bench-") as name:
            base = Path(name, "base")
            part.make(base, depth)
            sizes.append(qexport.open_checkpoint(base).weights_size)
            for record in records:
                out, code = part.steps[record["step"]]
                shutil.rmtree(Path(name, "out"), ignore_errors=True)
                seconds, peak = _one(code, base, Path(name, out or "none"), threads)
                record["seconds"].append(seconds)
                record["peak_bytes"].append(peak)
                told = f"{depth} blocks, {record['step']}: {seconds:.1f} s, {format_size(peak)}"
                print(told, file=sys.stderr, flush=True)
    return {"depths": list(part.depths), "sizes": sizes, "records": records}


def _one(code: str, base: Path, out: Path, threads: int) -> tuple[float, int]:
    """Seconds and peak bytes of one step in a process of its own."""
    script = RUN.replace("STEP", code)
    command = [sys.executable, "-c", script, *map(str, (base, _adapter_of(base), out))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    seconds, peak = json.loads(ran.stdout.splitlines()[-1])
    return seconds, peak


def table(found: Record) -> str:
    """Markdown: a row a step, its peak at each depth and what the deeper model takes more."""
    heads = [
        f"{depth} blocks ({format_size(size)})"
        for depth, size in zip(found["depths"], found["sizes"], strict=True)
    ]
    lines = [f"| step | {' | '.join(heads)} | more |", "| --- |" + " --- |" * (len(heads) + 1)]
    for record in found["records"]:
        peaks = record["peak_bytes"]
        cells = [record["step"], *map(format_size, peaks), f"{peaks[-1] / peaks[0] - 1:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(found: Record) -> str:
    """Markdown of all parts that --json kept."""
    return "\n\n".join(table(part) for part in found.values())


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="Does peak memory grow with the number of layers?")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: both")
    parser.add_argument("--rows", nargs="*", metavar="TEXT", default=[""], help="default: all")
    parser.add_argument("--depths", nargs=2, type=int, metavar="N", help="default: the part's own")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: Record = {}
    for name in arguments.parts or PARTS:
        if name not in PARTS:
            parser.error(f"no part {name!r}: one of {', '.join(PARTS)}")
        part = PARTS[name]
        if arguments.depths:
            part = replace(part, depths=tuple(arguments.depths))
        steps = [step for step in part.steps if any(text in step for text in arguments.rows)]
        found[name] = measured(part, steps, arguments.threads)
        print(table(found[name]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
