"""Synthetic checkpoints in the shapes of Qwen2.5, random weights and all, with a LoRA on every linear layer.

Merging costs what the shapes and the bytes cost; whether the weights know anything makes no difference. Torch
is imported only where tensors are made: who measures other processes must stay small (see merge.py).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model's sides, as its config.json on the Hub has them."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    max_shard_size: str

    def linears(self) -> dict[str, tuple[int, int]]:
        """Each linear layer of a block: name -> [out, in]."""
        keys = self.hidden // self.heads * self.key_value_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint: name -> shape."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for block in range(self.layers):
            prefix = f"model.layers.{block}"
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden,)
            for name, shape in self.linears().items():
                shapes[f"{prefix}.{name}.weight"] = shape
                if name.endswith(("q_proj", "k_proj", "v_proj")):  # Qwen2 has biases on these three
                    shapes[f"{prefix}.{name}.bias"] = shape[:1]
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    @property
    def size(self) -> int:
        """Bytes of all weights in bf16."""
        return sum(2 * math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
        }


SHAPES = {
    "1.5b": Shape("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151_936, tied=True, max_shard_size="1GB"),
    "7b": Shape("Qwen2.5-7B", 3584, 18_944, 28, 28, 4, 152_064, tied=False, max_shard_size="4GB"),
}


def make_checkpoint(shape: Shape, directory: Path, seed: int = 0) -> None:
    """Random bf16 weights in files of at most the shape's size, written piece by piece."""
    import torch

    from qexport.checkpoint.safetensors_file import header_bytes
    from qexport.checkpoint.sharding import INDEX_FILE, plan_shards
    from qexport.checkpoint.tensors import TensorInfo
    from qexport.sizes import parse_size

    piece = 1 << 24  # values
    generator = torch.Generator().manual_seed(seed)
    infos = [TensorInfo(name, torch.bfloat16, sides) for name, sides in shape.tensors().items()]
    plan = plan_shards(infos, parse_size(shape.max_shard_size))
    directory.mkdir()
    for shard in plan.shards:
        with (directory / shard.file).open("wb") as file:
            file.write(header_bytes(shard.tensors))
            for info in shard.tensors:
                mean = 1.0 if info.name.endswith("norm.weight") else 0.0
                for begin in range(0, info.numel, piece):
                    values = torch.randn(min(piece, info.numel - begin), generator=generator)
                    raw: Any = values.mul_(0.02).add_(mean).to(torch.bfloat16).view(torch.uint8).numpy()
                    file.write(raw)
    if len(plan.shards) > 1:
        (directory / INDEX_FILE).write_text(json.dumps(plan.index()))
    (directory / "config.json").write_text(json.dumps(shape.config()))


def make_adapter(shape: Shape, base: Path, directory: Path, seed: int = 1) -> None:
    """A LoRA with random A and B in fp32 on all linear layers, in PEFT's files."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in range(shape.layers):
        for name, (out, inputs) in shape.linears().items():
            module = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [name.partition(".")[2] for name in shape.linears()],
    }
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
