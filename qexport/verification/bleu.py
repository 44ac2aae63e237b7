"""BLEU of a model's greedy answers to prompts, against references, by sacrebleu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.results import Bleu


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    one_line: bool,
    ends: Sequence[int] = (),
    on_event: OnEvent = ignore,
) -> list[str]:
    """The model's most likely continuation of every prompt, up to its end token.

    An answer ends at one of `ends`, by default at the tokenizer's EOS, and with `one_line` at its first
    line break. Prompts go through the chat template where
    the tokenizer has one. Batches are padded on the left, longest prompts first.
    """
    encoded = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    if not ends and tokenizer.eos_token_id is not None:
        ends = (tokenizer.eos_token_id,)
    order = sorted(range(len(encoded)), key=lambda n: -len(encoded[n]))
    answers = [""] * len(encoded)
    stop = {"stop_strings": ["\n"], "tokenizer": tokenizer} if one_line else {}
    on_event(Started("answers", len(encoded), "prompts"))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = max(len(encoded[n]) for n in chosen)
        tokens = torch.full((len(chosen), width), pad)
        mask = torch.zeros_like(tokens)
        for row, n in enumerate(chosen):
            tokens[row, width - len(encoded[n]) :] = torch.tensor(encoded[n])
            mask[row, width - len(encoded[n]) :] = 1
        out = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=list(ends) or None,
            **stop,
        )
        for row, n in enumerate(chosen):
            text = tokenizer.decode(out[row, width:], skip_special_tokens=True).lstrip()
            answers[n] = (text.split("\n", 1)[0] if one_line else text).strip()
        on_event(Advanced(len(chosen)))
    on_event(Finished())
    return answers


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer(prompt).input_ids)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def bleu(answers: Sequence[str], references: Sequence[str], recipe: Mapping[str, Any]) -> Bleu:
    """Corpus BLEU (Papineni et al. 2002) with sacrebleu's defaults and signature."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(answers), [list(references)])
    return Bleu(float(score.score), str(metric.get_signature()), tuple(answers), recipe)
