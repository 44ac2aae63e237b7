"""Does peak memory grow with the number of layers? One process a step, on models of 4 and of 24 blocks.

    python -m benchmarks.memory

Makes Llama-shaped checkpoints of random bf16 weights on the spot (hidden 1024, MLP 2816, 32 000 tokens) with
an adapter on all linear layers, and prints a Markdown table: the peak resident memory of each step's process,
for both depths (its seconds go to stderr). Python, torch and transformers are in it; the first row shows what
they take without any work. Takes about 2.2 GB of disk and a few minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import qexport
from qexport.checkpoint.manifest import Recipe
from qexport.checkpoint.sidecars import sidecars_of
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.writer import CheckpointWriter
from qexport.packaged import embedded_base
from qexport.sizes import format_size

DEPTHS = (4, 24)
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
STEPS = {
    "(imports only)": ("", "import qexport.graph.run, transformers, bitsandbytes"),
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


def make_model(directory: Path, depth: int) -> None:
    """Random weights, written tensor by tensor, with the embedded model's tokenizer."""
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


def main() -> None:
    """See the module's text."""
    torch.manual_seed(0)
    results: dict[str, list[tuple[float, int]]] = {step: [] for step in STEPS}
    sizes = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for depth in DEPTHS:
            base, adapter = work / f"base{depth}", work / f"adapter{depth}"
            make_model(base, depth)
            make_adapter(adapter, depth)
            sizes.append(format_size(qexport.open_checkpoint(base).weights_size))
            for step, (out, code) in STEPS.items():
                script = RUN.replace("STEP", code)
                paths = (base, adapter, work / f"{out}{depth}")
                command = [sys.executable, "-c", script, *map(str, paths)]
                ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                seconds, peak = json.loads(ran.stdout.splitlines()[-1])
                results[step].append((seconds, peak))
                print(f"{depth} blocks, {step}: {seconds:.1f} s, {format_size(peak)}", file=sys.stderr)
    heads = " | ".join(f"{depth} blocks ({size})" for depth, size in zip(DEPTHS, sizes, strict=True))
    print(f"| step | {heads} |\n| --- | --- | --- |")
    for step, cells in results.items():
        print(f"| {step} | " + " | ".join(format_size(peak) for _, peak in cells) + " |")


if __name__ == "__main__":
    main()
