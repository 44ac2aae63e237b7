"""Calibration without data: windows that the full-precision model says itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qexport.calibrate.windows import Packed, opening_token
from qexport.checkpoint.checkpoint import Checkpoint, open_directory
from qexport.errors import CalibrationError, NonFiniteError
from qexport.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from qexport.modeling.generation import end_tokens
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.whole import load_whole
from qexport.sizes import format_size

# Temperatures of a document's first tokens; 0 takes the most likely one, after them it is 1.
HEATED = tuple(1.5 - 0.0625 * step for step in range(8))  # begun by BOS
GREEDY = (0.0, 0.0, 0.0, 0.0)  # begun by a random token
_LIKELIEST = 100  # heated tokens are drawn of so many: heat is not to reach the tail
_FP32_BYTES = 8_000_000_000
_CACHE_BYTES = 2_000_000_000  # of keys and values, all rows of a batch together
_MAX_ROWS = 64


def sampled_windows(
    path: Path,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Packed:
    """Windows int64 [samples, length] drawn from the model in `path`, the same for the same seed.

    Each window is one stream of documents, as packed text is: it begins with BOS, and when the model
    ends a document the next one begins. Tokens are drawn from the model's whole distribution at
    temperature 1, for that is the distribution whose activations are wanted; only a document's first
    tokens are not, since they decide what it is about:

    - with a BOS to begin from, the temperature falls in a line to 1: the schedule of Williams,
      Chrysostomou and Aletras, Self-calibration for Language Model Quantization and Pruning, section 3.2
      (NAACL 2025, arXiv 2410.17170); from 1.5, over 8 tokens, of the 100 likeliest, is our choice;
    - without one, a document begins with a random token, goes on with the likeliest ones and is then
      drawn: LLM-QAT, section 3.1 (Liu et al. 2023, arXiv 2305.17888), which takes 3 to 5, here 4.

    Within these first tokens no document ends. BOS and ids that the tokenizer does not know are never drawn.

    The model is loaded whole, in fp32 when that takes no more than 8 GB, else in 16 bits (bf16 for fp16,
    whose range a CPU's sums may leave), and dropped at the end. Nothing is written. Raises NonFiniteError
    when the model gives no numbers, and what opening it raises.
    """
    checkpoint = open_directory(path)
    dtype = _dtype(checkpoint)
    size = sum(checkpoint.info(name).numel for name in checkpoint.names()) * dtype.itemsize
    on_event(Noted(f"calibrating on the model's own words: it is loaded whole for that, {format_size(size)}"))
    # a skeleton of its own: the caller's stays empty
    skeleton = build_skeleton(path, trust_remote_code=trust_remote_code)
    model = load_whole(skeleton, checkpoint, dtype)
    opening = opening_token(tokenizer)
    if opening is None and tokenizer.bos_token_id == tokenizer.eos_token_id:
        opening = tokenizer.bos_token_id  # GPT-2's way: one token ends a text and begins the next
    usable = _usable(tokenizer, skeleton.config.vocab_size)
    ends = end_tokens(path, checkpoint.config, tokenizer)
    if opening is not None and opening not in ends:
        usable[opening] = False  # it stands at beginnings only
    generator = torch.Generator().manual_seed(seed)
    on_event(Started("sampling", samples * length, "tokens"))
    rows = _rows(skeleton.config, length, dtype)
    windows = [
        _batch(model, min(rows, samples - begin), length, opening, usable, ends, generator, on_event)
        for begin in range(0, samples, rows)
    ]
    on_event(Finished())
    return Packed(torch.cat([one.windows for one in windows]), sum(one.documents for one in windows))


@torch.no_grad()
def _batch(
    model: Any,
    rows: int,
    length: int,
    opening: int | None,
    usable: torch.Tensor,
    ends: Sequence[int],
    generator: torch.Generator,
    on_event: OnEvent,
) -> Packed:
    """Windows int64 [rows, length], side by side; keys and values are cached."""
    schedule = torch.tensor((*(GREEDY if opening is None else HEATED), 1.0))
    ending = torch.isin(torch.arange(len(usable)), torch.tensor(ends, dtype=torch.int64))
    beginnings = (usable & ~ending).float()
    windows = torch.empty(rows, length, dtype=torch.int64)
    begins = torch.ones(rows, dtype=torch.bool)  # whether a row's next token begins a document
    said = torch.zeros(rows, dtype=torch.int64)  # tokens that its document has after that one
    cache, logits, documents = None, torch.zeros(rows, len(usable)), 0
    for position in range(length):
        temperature = schedule[said.clamp(max=len(schedule) - 1)]
        fresh = said < len(schedule) - 1
        barred = ~usable | (fresh[:, None] & ending)
        drawn = _draw(logits.masked_fill(barred, -torch.inf), temperature, fresh, generator)
        if opening is None:
            first = torch.multinomial(beginnings, rows, replacement=True, generator=generator)
        else:
            first = torch.full_like(drawn, opening)
        token = torch.where(begins, first, drawn)
        windows[:, position] = token
        documents += int(begins.sum())
        said = torch.where(begins, 0, said + 1)
        begins = ~begins & ending[token]
        said = torch.where(begins, 0, said)
        if position + 1 < length:
            out = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            if not bool(logits[:, usable].isfinite().all()):
                raise NonFiniteError(
                    "the model's logits are NaN or infinite while it is sampled for calibration",
                    remedy="check that the model works at all, or calibrate on a text",
                )
        on_event(Advanced(rows))
    return Packed(windows, documents)


def _draw(
    logits: torch.Tensor, temperature: torch.Tensor, fresh: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """A token id a row [rows] of logits [rows, vocabulary], at the row's temperature; at 0 the likeliest."""
    likeliest = logits.topk(min(_LIKELIEST, logits.shape[1])).values
    logits = logits.masked_fill(fresh[:, None] & (logits < likeliest[:, -1:]), -torch.inf)
    warm = temperature.clamp(min=1e-6)[:, None]
    drawn = torch.multinomial((logits / warm).softmax(-1), 1, generator=generator)[:, 0]
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


def _usable(tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """Which ids the tokenizer knows, bool [vocabulary]: the rest are rows that nobody trained."""
    known = torch.zeros(vocabulary, dtype=torch.bool)
    ids = [number for number in tokenizer.get_vocab().values() if 0 <= number < vocabulary]
    if not ids:
        raise CalibrationError("the tokenizer knows no token of the model")
    known[torch.tensor(ids)] = True
    return known


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """fp32 where the model is small, else what most of its weights are stored in."""
    sizes: Counter[torch.dtype] = Counter()
    for name in checkpoint.names():
        info = checkpoint.info(name)
        if info.dtype.is_floating_point:
            sizes[info.dtype] += info.numel
    stored = sizes.most_common(1)[0][0] if sizes else torch.float32
    if 4 * sizes.total() <= _FP32_BYTES or stored == torch.float32:
        return torch.float32
    return torch.bfloat16 if stored == torch.float16 else stored


def _rows(config: Any, length: int, dtype: torch.dtype) -> int:
    """Rows of a batch whose keys and values fit into the room for them; at least one."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = int(2 * config.num_hidden_layers * heads * width * length * dtype.itemsize)
    return max(min(_CACHE_BYTES // row, _MAX_ROWS), 1)
