"""Tied embeddings: one matrix that serves as input embedding and as output head.

Which of the two names a checkpoint stores differs (transformers drops the head, some writers drop the
embedding). Here the embedding's name is the one that counts, for that is what every runtime looks up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

# the last part of the modules' names, under whatever prefix
_HEADS = frozenset({"lm_head", "embed_out"})
_EMBEDDINGS = frozenset(
    {"wte", "embed_tokens", "word_embeddings", "embed_in", "tokens_embed", "tok_embeddings"}
)
_ALSO_EMBEDDINGS = frozenset({"backbone.embeddings.weight"})  # Mamba: too common a word to go by
_NOT_OF_TEXT = ("vision", "visual", "audio", "encoder")
# where the embedding of a checkpoint belongs that stores the head alone
_USUAL = (
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
    embedding, head = embedding_name(stored), head_name(stored)
    if not tied or (embedding and head) or not (embedding or head):
        return None
    # a text model inside a multimodal one, as transformers stores it, has its head there too
    nested = "language_model." if (embedding or "").startswith("language_model.") else ""
    return Tie(embedding or _embedding_beside(stored), head or f"{nested}lm_head.weight")


def embedding_name(stored: Collection[str]) -> str | None:
    """The input embedding among the names of tensors."""
    return _outermost(stored, _EMBEDDINGS) or next((n for n in _ALSO_EMBEDDINGS if n in stored), None)


def head_name(stored: Collection[str]) -> str | None:
    """The output head among the names of tensors."""
    return _outermost(stored, _HEADS)


def _outermost(stored: Collection[str], modules: Collection[str]) -> str | None:
    """The weight of such a module that is nested least: a model of text may sit in one of images."""
    found = [
        name
        for name in stored
        if name.endswith(".weight")
        and name.removesuffix(".weight").rpartition(".")[2] in modules
        and not any(part in name for part in _NOT_OF_TEXT)
    ]
    return min(found, key=lambda name: (name.count("."), name), default=None)


def vocabulary_names(stored: Collection[str], tie: Tie | None) -> tuple[str, ...]:
    """The tensors with a row for every token: input embedding, output head and its bias."""
    if tie:
        return tie.embedding, tie.head
    head = head_name(stored)
    bias = f"{head.removesuffix('.weight')}.bias" if head else ""
    sides = (embedding_name(stored), head, bias if bias in stored else None)
    return tuple(name for name in sides if name)


def _embedding_beside(stored: Collection[str]) -> str:
    """The name that the embedding of a checkpoint would have that stores the head alone."""
    for embedding in _USUAL:
        body = embedding.rsplit(".", 2)[0] + "."
        if any(name.startswith(body) for name in stored):
            return embedding
    return _USUAL[-1]
