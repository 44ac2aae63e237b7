"""Training of the base model and of the LoRA adapter on the processor, reproducible by seed."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .progress import Report
from .texts import EOS, PAD, SPECIAL_TOKENS, base_documents, training_writer
from .vocabulary import CONTEXT

BASE_NAME = "qexport/embedded-base"
WINDOW = 256
ADAPTER_WINDOW = 128
BATCH = 16
_THREADS = 2
_REPLAY = 0.15
_NO_LOSS = -100
_LINEAR_LAYERS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]


@dataclass(frozen=True)
class Schedule:
    """Steps and peak learning rate; warm-up, then a cosine down to a hundredth."""

    steps: int
    peak: float
    warm_up: int = 60

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warm_up:
            return self.peak * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.peak * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


BASE_SCHEDULE = Schedule(steps=2000, peak=2.5e-3)
ADAPTER_SCHEDULE = Schedule(steps=1500, peak=1.5e-3, warm_up=30)

Batch = tuple[torch.Tensor, torch.Tensor]


def make_deterministic(seed: int) -> None:
    """Fix threads, seeds and algorithms: two runs give the same weights."""
    torch.set_num_threads(_THREADS)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture of the embedded model."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens with bos in front and one eos behind."""
    ids: list[int] = tokenizer.backend_tokenizer.encode(text).ids
    end = SPECIAL_TOKENS.index(EOS)
    return ids if ids[-1] == end else [*ids, end]


def base_batches(tokenizer: PreTrainedTokenizerFast, seed: int, heldout: frozenset[str]) -> Iterator[Batch]:
    """Documents laid end to end and cut into windows."""
    stream: list[int] = []
    for text in base_documents(seed, heldout):
        stream += _encode(tokenizer, text)
        if len(stream) >= WINDOW * BATCH:
            ids = torch.tensor(stream[: WINDOW * BATCH]).view(BATCH, WINDOW)
            stream = stream[WINDOW * BATCH :]
            yield ids, ids


def adapter_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, heldout: frozenset[str]
) -> Iterator[Batch]:
    """Windows of whole dialogues and of replayed stories.

    The prompts count as well: perplexity is measured on complete dialogues.
    """
    writer = training_writer(seed, "adapter", heldout)
    source = random.Random(f"{seed}/replay")
    pad = SPECIAL_TOKENS.index(PAD)
    position = 0
    while True:
        rows, labels = [], []
        for _ in range(BATCH):
            is_replay = source.random() < _REPLAY
            row: list[int] = []
            while True:
                position += 1
                text = writer.monolingual() if is_replay else writer.adapter_document(position)
                ids = _encode(tokenizer, text)
                if len(row) + len(ids) > ADAPTER_WINDOW:
                    break
                row += ids
            missing = ADAPTER_WINDOW - len(row)
            rows.append(row + [pad] * missing)
            labels.append(row + [_NO_LOSS] * missing)
        yield torch.tensor(rows), torch.tensor(labels)


def fit(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    schedule: Schedule,
    report: Report,
    *,
    weight_decay: float,
) -> float:
    """Train with AdamW under bfloat16 autocast; returns the mean loss of the last 50 steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.95), fused=True)
    model.train()
    losses: list[float] = []
    start = time.monotonic()
    for step, (ids, labels) in enumerate(islice(batches, schedule.steps)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        recent = losses[-50:]
        report.step(step + 1, schedule.steps, sum(recent) / len(recent), time.monotonic() - start)
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def train_base(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    heldout: frozenset[str],
    folder: Path,
    report: Report,
    schedule: Schedule = BASE_SCHEDULE,
) -> float:
    """Train the base model and save it in half precision; returns the last loss."""
    make_deterministic(seed)
    model: Any = LlamaForCausalLM(base_config(tokenizer))
    loss = fit(model, base_batches(tokenizer, seed, heldout), schedule, report, weight_decay=0.1)
    model = model.to(dtype=torch.float16)
    check_health(model)
    settings: Any = GenerationConfig
    model.generation_config = settings(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
        max_new_tokens=96,
    )
    model.save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)
    return loss


def train_adapter(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    heldout: frozenset[str],
    base: Path,
    folder: Path,
    report: Report,
    schedule: Schedule = ADAPTER_SCHEDULE,
) -> float:
    """Train the adapter on the saved base and save it with peft; returns the last loss."""
    make_deterministic(seed)
    model = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    model.name_or_path = BASE_NAME
    config = LoraConfig(
        base_model_name_or_path=BASE_NAME,
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=_LINEAR_LAYERS,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    if not isinstance(adapted, PeftModel):
        raise TypeError("peft returned a model without an adapter")
    batches = adapter_batches(tokenizer, seed, heldout)
    loss = fit(adapted, batches, schedule, report, weight_decay=0.0)
    check_health(adapted)
    adapted.save_pretrained(str(folder))
    _tidy_adapter(folder)
    return loss


def _tidy_adapter(folder: Path) -> None:
    """Sort what peft writes in the order of a set, and drop its empty model card."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)


def check_health(model: torch.nn.Module) -> None:
    """Refuse weights that are not finite, or large enough to overflow in half precision."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all() or parameter.abs().max() > 1000:
            raise ValueError(f"{name} is not healthy")
