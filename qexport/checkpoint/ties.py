"""Tied embeddings: one matrix that serves as input embedding and as output head.

Which of the two names a checkpoint stores differs (transformers drops the head, some writers drop the
embedding). Here the embedding's name is the one that counts, for that is what every runtime looks up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
EMBEDDING_NAMES = (
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "model.embed_tokens.weight",
)
# model types whose config class ties when config.json does not say (transformers 5.23)
TIED_BY_DEFAULT = frozenset(
    {"bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2"}
    | {"gpt_bigcode", "gpt_neo", "mpt", "opt", "smollm3", "starcoder2"}
)


@dataclass(frozen=True)
class Tie:
    """The two names of one tied matrix."""

    embedding: str
    head: str


def tie_of(config: Mapping[str, Any], stored: Collection[str]) -> Tie | None:
    """The tied pair of a checkpoint whose tensors are named `stored`, or None when it has none.

    A checkpoint that stores both matrices is left as it is, whatever its config says: the two may
    differ, and transformers then does not tie them either.
    """
    # configs leave out what is their class's default
    tied = config.get("tie_word_embeddings", config.get("model_type") in TIED_BY_DEFAULT)
    embedding = next((name for name in EMBEDDING_NAMES if name in stored), None)
    head = next((name for name in HEAD_NAMES if name in stored), None)
    if not tied or (embedding and head) or not (embedding or head):
        return None
    return Tie(embedding or _embedding_beside(stored), head or HEAD_NAMES[0])


def vocabulary_names(stored: Collection[str], tie: Tie | None) -> tuple[str, ...]:
    """The tensors with a row for every token: input embedding, output head and its bias."""
    if tie:
        return tie.embedding, tie.head
    sides = (*EMBEDDING_NAMES, "model.language_model.embed_tokens.weight", *HEAD_NAMES)
    return tuple(name for name in (*sides, "lm_head.bias") if name in stored)


def _embedding_beside(stored: Collection[str]) -> str:
    """The name that the embedding of a checkpoint would have that stores the head alone."""
    for embedding in EMBEDDING_NAMES:
        body = embedding.rsplit(".", 2)[0] + "."
        if any(name.startswith(body) for name in stored):
            return embedding
    return EMBEDDING_NAMES[-1]
