"""The text model inside a multimodal one, as a checkpoint of its own: a view, nothing is written or copied.

llama.cpp keeps the two apart: the text model is the GGUF file, what makes tokens of images is a second one
(mmproj). Source: llama.cpp's `conversion/base.py` and `gemma.py`. Another multimodal model is a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint, Decoder, PlainDecoder
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.ties import TIED_BY_DEFAULT, Tie
from qexport.errors import CorruptFileError, NotACheckpointError
from qexport.events import Noted, OnEvent, ignore
from qexport.modeling.skeleton import Skeleton, build_skeleton
from qexport.sizes import format_size


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model. `text_type` is the model type of the text model in it, where the config says none.

    `renamed`: (how tensors of the text model begin on disk, how they do in a text model alone), the first
    that fits counts. `others`: how those begin that have no part in text. A tensor that is neither keeps its
    name, for others to refuse.
    """

    model_type: str
    text_type: str
    renamed: tuple[tuple[str, str], ...]
    others: tuple[str, ...]

    def text_name(self, name: str) -> str | None:
        """A tensor's name in the text model alone; None when it is none of its own."""
        for disk, alone in self.renamed:
            if name.startswith(disk):
                return alone + name.removeprefix(disk)
        return None if name.startswith(self.others) else name


WRAPPERS = (
    Wrapper(
        "gemma3",
        "gemma3_text",
        (
            # as published, and as transformers writes it; then as it is in transformers' memory
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."),
        ),
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
)
_BY_TYPE = {wrapper.model_type: wrapper for wrapper in WRAPPERS}
# what the whole model's config says of the text model too
_QUANTIZATION = ("quantization_config", "quantization")


@dataclass(frozen=True)
class RenamedDecoder:
    """Some of a decoder's tensors under other names; `names` are its own by the new ones."""

    inner: Decoder
    names: Mapping[str, str]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        found = self.inner.infos()
        return {name: replace(found[own], name=name) for name, own in self.names.items()}

    def read(self, name: str) -> torch.Tensor:
        """One full-precision tensor."""
        return self.inner.read(self.names[name])

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor lies in the file as codes."""
        return self.inner.is_quantized(self.names[name])


def is_multimodal(checkpoint: Checkpoint) -> bool:
    """Whether there is a text model in it to be taken out."""
    return checkpoint.config.get("model_type") in _BY_TYPE


def text_model(checkpoint: Checkpoint, on_event: OnEvent = ignore) -> Checkpoint:
    """The text model of a multimodal checkpoint, under the names and with the config of a text model alone; a
    checkpoint that is none of `WRAPPERS` is given back as it is.

    A note tells what is left out. The path stays the whole model's, where the tokenizer lies; its config.json
    is not the view's. What the text model's config leaves out is left to transformers' defaults.

    Raises NotACheckpointError for a config without a text model, CorruptFileError for a tensor that is there
    under two names.
    """
    if not is_multimodal(checkpoint):
        return checkpoint
    wrapper = _BY_TYPE[checkpoint.config["model_type"]]
    config = _text_config(wrapper, checkpoint)
    names = _renamed(wrapper, checkpoint.decoder.infos(), checkpoint)
    left = checkpoint.decoder.infos().keys() - set(names.values())
    size = sum(checkpoint.info(name).size for name in left)
    on_event(
        Noted(
            f"{checkpoint.path} is a multimodal model ({wrapper.model_type}): its text model alone is taken; "
            f"{len(left)} tensors for images ({format_size(size)}) are left out, and no mmproj file is made"
        )
    )
    stored = _renamed(wrapper, checkpoint.stored, checkpoint)
    plain = {name: checkpoint.stored[own] for name, own in stored.items()}
    inner = checkpoint.decoder
    decoder = PlainDecoder(plain) if isinstance(inner, PlainDecoder) else RenamedDecoder(inner, names)
    return Checkpoint(checkpoint.path, config, plain, _tie(wrapper, checkpoint.tie), decoder=decoder)


def text_and_skeleton(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False, on_event: OnEvent = ignore
) -> tuple[Checkpoint, Skeleton]:
    """What of a checkpoint becomes a GGUF file (`text_model`), and its skeleton, bound to it.

    Raises as `text_model` and `build_skeleton` do.
    """
    text = text_model(checkpoint, on_event)
    config = None if text is checkpoint else text.config  # a directory's own code stands in its config.json
    return text, build_skeleton(text, config=config, trust_remote_code=trust_remote_code)


def _renamed(wrapper: Wrapper, own: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, str]:
    """The text model's names of tensors -> those on disk, in the files' order."""
    found: dict[str, str] = {}
    for name in own:
        alone = wrapper.text_name(name)
        if alone is None:
            continue
        if alone in found:
            raise CorruptFileError(
                f"{checkpoint.path} holds {alone} of its text model twice: {found[alone]}, {name}"
            )
        found[alone] = name
    return found


def _tie(wrapper: Wrapper, tie: Tie | None) -> Tie | None:
    if tie is None:
        return None
    embedding, head = wrapper.text_name(tie.embedding), wrapper.text_name(tie.head)
    return Tie(embedding, head) if embedding and head else None


def _text_config(wrapper: Wrapper, checkpoint: Checkpoint) -> dict[str, Any]:
    whole = checkpoint.config
    inner = whole.get("text_config", {})
    if not isinstance(inner, Mapping):
        raise NotACheckpointError(
            f"{checkpoint.path}/config.json has a text_config that is {type(inner).__name__}",
            expected="an object, as every multimodal model has one",
        )
    # the whole model's word counts for the head, in transformers too
    tied = whole.get("tie_word_embeddings", wrapper.model_type in TIED_BY_DEFAULT)
    config = {"model_type": wrapper.text_type, **inner, "tie_word_embeddings": tied}
    return config | {key: whole[key] for key in _QUANTIZATION if key in whole}
