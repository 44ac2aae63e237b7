"""Figures of a made model: BLEU on the pairs and perplexity on the held-out text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .vocabulary import load_tokenizer

_BATCH = 50


def load_model(base: Path, adapter: Path | None = None) -> Any:
    """The base in single precision, with the adapter merged when there is one."""
    model: Any = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    if adapter is not None:
        adapted: Any = PeftModel.from_pretrained(model, str(adapter))
        model = adapted.merge_and_unload()
    return model.eval()


def read_lines(path: Path) -> list[dict[str, str]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Greedy answers through the chat template."""
    found: list[str] = []
    for start in range(0, len(prompts), _BATCH):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + _BATCH]]
        inputs: Any = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=96)
        new = output[:, inputs["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in found]


def bleu(base: Path, adapter: Path | None, pairs: Path) -> float:
    """Corpus BLEU with sacrebleu's defaults on all pairs."""
    rows = read_lines(pairs)
    hypotheses = answers(load_model(base, adapter), load_tokenizer(base), [row["prompt"] for row in rows])
    score = sacrebleu.corpus_bleu(hypotheses, [[row["reference"] for row in rows]])
    return float(score.score)


def count_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
    """Tokens of all texts, each with its bos."""
    return sum(len(tokenizer.backend_tokenizer.encode(text).ids) for text in texts)


def perplexity(base: Path, adapter: Path | None, heldout: Path, window: int = 256) -> float:
    """Perplexity on the texts laid end to end, in windows that do not overlap."""
    tokenizer = load_tokenizer(base)
    model = load_model(base, adapter)
    stream: list[int] = []
    for row in read_lines(heldout):
        stream += tokenizer.backend_tokenizer.encode(row["text"]).ids
    count = len(stream) // window
    windows = torch.tensor(stream[: count * window]).view(count, window)
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for ids in torch.split(windows, 16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = ids[:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            tokens += targets.numel()
    return math.exp(total / tokens)
