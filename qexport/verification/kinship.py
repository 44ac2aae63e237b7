"""Is a candidate a variant of the reference, or another model altogether?"""

from __future__ import annotations

from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import CalibrationError
from qexport.modeling.skeleton import Skeleton

# what no quantization changes; a GGUF file of a Mistral is one of a Llama
_SHAPE = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
_ROWS = 256  # of the embeddings, where another model's are elsewhere altogether
_UNRELATED = 0.9  # of |W' - W| / |W|: two random matrices have 1.4, embeddings of 2 bits about 0.6


def require_same_shape(candidate: Skeleton, reference: Skeleton, names: tuple[str, str]) -> None:
    """Raises CalibrationError, with the first setting that differs, for models of different shapes.

    `names` are what candidate and reference are called.
    """
    for key in _SHAPE:
        ours, theirs = (getattr(skeleton.config, key, None) for skeleton in (candidate, reference))
        if ours != theirs:
            raise _of_another(names, f"{key} is {ours}, there {theirs}")


def require_same_embeddings(
    candidate: tuple[Checkpoint, Skeleton], reference: tuple[Checkpoint, Skeleton], names: tuple[str, str]
) -> None:
    """Raises CalibrationError where the two have nothing of their embeddings in common."""
    ours, theirs = (_embeddings(*model) for model in (candidate, reference))
    if ours.shape != theirs.shape:
        raise _of_another(names, f"embeddings of {list(ours.shape)}, there {list(theirs.shape)}")
    size = float(theirs.norm())
    distance = float((ours - theirs).norm()) / size if size else 0.0
    if distance > _UNRELATED:
        raise _of_another(
            names, f"their embeddings have nothing in common (|W' - W| / |W| is {distance:.2f})"
        )


def _embeddings(checkpoint: Checkpoint, skeleton: Skeleton) -> torch.Tensor:
    name = skeleton.bound(checkpoint).embedding_weight
    rows = min(_ROWS, checkpoint.info(name).shape[0])
    return checkpoint.read_rows(name, 0, rows).float()


def _of_another(names: tuple[str, str], found: Any) -> CalibrationError:
    return CalibrationError(
        f"{names[0]} is no variant of {names[1]}: {found}",
        expected="a model that was made from the reference",
        remedy="name the full-precision model that it was made from",
    )
