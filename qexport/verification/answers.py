"""A model's greedy answers to prompts, in batches, with its key-value cache.

Greedy means the most likely token at each step and nothing else: penalties, temperatures and forbidden words
of a generation_config.json, which transformers' `generate` would heed, are left out, so that a variant's
answers differ from full precision's by its weights alone.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qexport.calibrate.chat import rendered
from qexport.errors import CalibrationError, NonFiniteError
from qexport.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from qexport.verification.prompts import Prompt


@dataclass(frozen=True)
class Answered:
    """Answers in the prompts' order, and what they took.

    `tokens` are those generated for each, the one that ended it among them; `seconds` is the time of the
    generation, without the prompts' encoding.
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second over all prompts and batches."""
        return sum(self.tokens) / self.seconds


def prompt_tokens(tokenizer: Any, prompts: Sequence[Prompt], context: int | None = None) -> list[list[int]]:
    """Token ids of every prompt, as the model's chat template writes it, up to where the answer begins.

    A template that refuses a system prompt gets it as the beginning of the first user turn. Without a
    template a prompt is its messages' contents, a line each, after the tokens with which the tokenizer opens
    a text; the answer begins where the last content ends. No prompt is cut: a question without its beginning
    is another question. Raises CalibrationError when the template fails, when a prompt has no tokens, and
    when some leave no room for an answer in the `context` (tokens).
    """
    encoded = [_encoded(tokenizer, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise CalibrationError(f"{prompt.where} has no tokens", expected="a prompt with words")
    long = [n for n, ids in enumerate(encoded) if context is not None and len(ids) >= context]
    if long:
        raise CalibrationError(
            f"{len(long)} of {len(prompts)} prompts leave no room for an answer in the model's context of "
            f"{context} tokens: {prompts[long[0]].where} has {len(encoded[long[0]])}",
            expected="shorter prompts",
            remedy="take the long ones out",
        )
    return encoded


def _encoded(tokenizer: Any, prompt: Prompt) -> list[int]:
    if tokenizer.chat_template:  # it writes BOS itself
        text = rendered(prompt.conversation, tokenizer, asking=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    ids = list(tokenizer(prompt.text).input_ids)
    closed = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    # some tokenizers close every text with EOS; after it no answer would come
    return ids[:-1] if closed and not prompt.text.endswith(tokenizer.eos_token) else ids


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    one_line: bool = False,
    ends: Sequence[int] = (),
    on_event: OnEvent = ignore,
) -> Answered:
    """The model's most likely answer to every prompt, token by token.

    An answer ends before one of `ends` (token ids; by default the tokenizer's EOS), with `one_line` at the
    first line break after its first word, after `max_new_tokens`, and where the model's context is full,
    which is told by a Noted event. Space around it is taken off. Prompts of like length share a batch, and
    neither `batch_size` nor its other prompts change an answer, except where two tokens are equally likely
    to within the rounding of `model`'s dtype. Raises as `prompt_tokens`, before anything is generated;
    CalibrationError for ids that the model does not know; NonFiniteError for NaN in its logits.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    encoded = prompt_tokens(tokenizer, prompts, context)
    _require_known(encoded, config.vocab_size)
    if not ends and tokenizer.eos_token_id is not None:
        ends = (tokenizer.eos_token_id,)
    limits = [min(max_new_tokens, (context or len(ids) + max_new_tokens) - len(ids)) for ids in encoded]
    line = _LineBreaks(tokenizer)

    def ended(n: int, answer: Sequence[int]) -> bool:
        return answer[-1] in ends or len(answer) >= limits[n] or (one_line and line.is_over(answer))

    answers: dict[int, list[int]] = {}
    switch = _rope_switch(config)
    on_event(Started("answers", len(prompts), "prompts"))
    begun = time.perf_counter()
    for batch in _batches(encoded, max_new_tokens, batch_size, switch):
        generated = _generate(model, [encoded[n] for n in batch], batch, ended, switch, on_event)
        answers.update(zip(batch, generated, strict=True))
    seconds = time.perf_counter() - begun
    on_event(Finished())
    full = sum(len(answers[n]) == limit < max_new_tokens for n, limit in enumerate(limits))
    if full:
        on_event(Noted(f"{full} answers were cut where the model's context of {context} tokens was full"))

    texts = []
    for n in range(len(prompts)):
        ids = answers[n][:-1] if answers[n][-1] in ends else answers[n]
        text = tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        texts.append((text.split("\n", 1)[0] if one_line else text).strip())
    return Answered(tuple(texts), tuple(len(answers[n]) for n in range(len(prompts))), seconds)


def _require_known(encoded: Sequence[Sequence[int]], vocabulary: int) -> None:
    largest = max((max(ids) for ids in encoded), default=0)
    if largest >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives id {largest}, the model knows {vocabulary} ids",
            expected="the model's own tokenizer beside it",
        )


class _LineBreaks:
    """Whether an answer's first line is over; decodes an answer only when its last token breaks a line."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._breaks: dict[int, bool] = {}

    def is_over(self, answer: Sequence[int]) -> bool:
        last = answer[-1]
        if last not in self._breaks:
            self._breaks[last] = "\n" in self._tokenizer.decode([last])
        if not self._breaks[last]:
            return False
        return "\n" in self._tokenizer.decode(list(answer), skip_special_tokens=True).lstrip()


def _rope_switch(config: Any) -> int | None:
    """The length in tokens past which LongRoPE (Ding et al. 2024) uses its long factors, for all positions.

    None for other models.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    found = rope.get("original_max_position_embeddings")
    return found if isinstance(found, int) else None


def _batches(
    encoded: Sequence[Sequence[int]], new: int, size: int, switch: int | None
) -> Iterable[list[int]]:
    """Numbers of the prompts, those of like length together, the longest first: they need the most memory.

    A prompt that may pass the `switch` is alone: transformers switches a whole batch.
    """
    batch: list[int] = []
    for n in sorted(range(len(encoded)), key=lambda n: -len(encoded[n])):
        if switch is not None and len(encoded[n]) + new > switch:
            yield [n]
            continue
        batch.append(n)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    ended: Callable[[int, Sequence[int]], bool],
    switch: int | None,
    on_event: OnEvent,
) -> list[list[int]]:
    """The ids generated for each prompt of one batch, up to the one after which it has `ended`.

    Rows are filled up on the left, so that a cached key is as far away as its position says, which sliding
    windows go by; the filling is masked, and positions count from the first real token. A row that has ended
    leaves the batch and the cache.
    """
    parameters = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    width = max(len(ids) for ids in prompts)
    tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    cache = None
    while live:
        new = tokens.shape[1] if cache is None else 1
        inputs: dict[str, Any] = {"input_ids": tokens[:, -new:], "attention_mask": mask}
        if "position_ids" in parameters:  # models with ALiBi count by the mask
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new:]
        if "logits_to_keep" in parameters:  # those of a whole prompt would be gigabytes
            inputs["logits_to_keep"] = 1
        out = model(**inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[:, -1]
        if bool(logits.isnan().any()):
            raise NonFiniteError("the model's logits are NaN on a prompt")
        chosen = logits.argmax(dim=-1)
        for n, token in zip(live, chosen.tolist(), strict=True):
            answers[n].append(token)
        kept = [row for row, n in enumerate(live) if not ended(numbers[n], answers[n])]
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if len(kept) < len(live):
            on_event(Advanced(len(live) - len(kept)))
            live = [live[row] for row in kept]
            rows = torch.tensor(kept, dtype=torch.long, device=device)
            tokens, mask = tokens[rows], mask[rows]
            if live and cache is not None:
                cache.batch_select_indices(rows)
        if switch is not None and tokens.shape[1] == switch + 1:
            cache = None  # its keys were turned by the short factors
    return answers
