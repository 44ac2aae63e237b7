"""The tokenizer: byte-level BPE trained on the generated text, with the chat template."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .texts import ASSISTANT, BOS, EOS, PAD, SPECIAL_TOKENS, base_documents

VOCABULARY_SIZE = 1024
CONTEXT = 512
_TRAINING_DOCUMENTS = 12_000

# The template renders bos itself; apply_chat_template tokenizes without special tokens, so bos
# comes once. A plain call of the tokenizer adds it through the post-processor.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '" + ASSISTANT + "' }}{%- endif %}"
)


def train_tokenizer(seed: int, heldout: frozenset[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer on documents of the base model's mixture."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = islice(base_documents(seed, heldout), _TRAINING_DOCUMENTS)
    cleaned = (_without_markup(text) for text in documents)
    tokenizer.train_from_iterator(cleaned, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))],
            ),
        ]
    )
    make: type[Any] = PreTrainedTokenizerFast
    fast = make(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return cast(PreTrainedTokenizerFast, fast)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a saved base folder."""
    loaded = PreTrainedTokenizerFast.from_pretrained(str(folder))
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise TypeError(f"{folder} holds no fast tokenizer")
    return loaded


def _without_markup(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, " ")
    return text
