"""A LoRA or DoRA adapter, key by key, as edits of the checkpoint's tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from qexport.errors import AdapterError, first_of
from qexport.merging.adapter import Adapter, AdapterTensor
from qexport.merging.book import EditBook
from qexport.merging.edits import (
    BiasEdit,
    DoraEdit,
    Edit,
    ExpertEdit,
    FusedExpertsEdit,
    LoraEdit,
)
from qexport.merging.settings import ALL_LINEAR, LoraSettings, lora_settings, matches_whole
from qexport.merging.trained import add_trained

# PEFT leaves the adapter's name out of what it saves; some trainers leave it in
_KEY = re.compile(
    r"(?P<module>.+?)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!weight$|bias$|_)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
# model types whose linear layers are stored [in, out] (transformers' Conv1D)
_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
# and those whose experts are stored [experts, in, out] (`is_transposed`)
_EXPERTS_IN_OUT = frozenset({"gpt_oss", "openai_privacy_filter", "aria_text"})


@dataclass
class _Parts:
    """What an adapter holds for one module."""

    a: AdapterTensor | None = None
    b: AdapterTensor | None = None
    bias: AdapterTensor | None = None
    magnitude: AdapterTensor | None = None
    embedding: bool = False
    names: list[str] = field(default_factory=list)


def add_lora(book: EditBook) -> None:
    """Enters every edit of a LoRA adapter into its book.

    Raises AdapterError: half a pair, ranks that differ, a config that fits no pair.
    """
    adapter = book.adapter
    settings = lora_settings(adapter)
    modules: dict[str, _Parts] = defaultdict(_Parts)
    for name, tensor in adapter.tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            add_trained(book, name, tensor)
        elif not tensor.dtype.is_floating_point:
            raise AdapterError(f"{adapter.path}: {name} holds {tensor.dtype}", expected="floats")
        else:
            part = "bias" if match["leaf"] == "bias" else match["part"]
            _collect(adapter, modules[match["module"]], part, tensor)
    _drop_tied_head(book, modules)
    for module, parts in modules.items():
        _add_module(book, settings, module, parts)
    if missing := _without_pair(book):
        book.notes.append(
            f"{adapter.path} has no pair for {len(missing)} of the modules that its config names: "
            f"{first_of(missing)}; they stay as they are"
        )


def _without_pair(book: EditBook) -> list[str]:
    """Modules that the config targets and the file does not adapt, as far as names tell.

    A file that lost some, or an adapter of a shallower base, would else go unseen.
    """
    config, where = book.adapter.config, str(book.adapter.path)
    targets, excluded, layers = (
        config.get(option) for option in ("target_modules", "exclude_modules", "layers_to_transform")
    )
    if not isinstance(targets, (str, list)) or targets == ALL_LINEAR:
        return []
    chosen = layers if isinstance(layers, list) else None if layers is None else [layers]

    def named(module: str, by: Any) -> bool:
        if isinstance(by, str):
            return matches_whole(where, by, module)
        names = by if isinstance(by, list) else ()
        return any(module == name or module.endswith(f".{name}") for name in names)

    missing = []
    for name in sorted(book.names.known - set(book.edits)):
        module, _, leaf = name.rpartition(".")
        number = _LAYER_NUMBER.search(module)
        if leaf != "weight" or ".experts." in name or len(book.names.shape(name)) != 2:
            continue  # experts are parameters of one module once they are loaded
        if chosen is not None and (number is None or int(number[1]) not in chosen):
            continue
        if named(module, targets) and not named(module, excluded):
            missing.append(module)
    return missing


def _drop_tied_head(book: EditBook, modules: dict[str, _Parts]) -> None:
    """With `ensure_weight_tying` PEFT saves the one pair under both names, transposed for the head."""
    sides = [module for module in modules if book.keeps_tie(module)]
    embedding = next((module for module in sides if modules[module].embedding), None)
    for module in sides:
        if embedding is None or module == embedding:
            continue
        head, pair = modules.pop(module), modules[embedding]
        if (
            None in (head.a, head.b, pair.a, pair.b)
            or not torch.equal(_read(head.a), _read(pair.b).T)
            or not torch.equal(_read(head.b), _read(pair.a).T)
        ):
            raise AdapterError(
                f"conflicting tied edits: {book.adapter.path} was trained to keep {embedding} and {module} "
                "tied, and its pairs for them differ",
                expected="one pair, transposed for the head",
            )


def _read(tensor: AdapterTensor | None) -> torch.Tensor:
    assert tensor is not None  # noqa: S101 - the caller looked
    return tensor.read().float()


_SLOTS = {
    "A": "a",
    "B": "b",
    "embedding_A": "a",
    "embedding_B": "b",
    "magnitude_vector": "magnitude",
    "bias": "bias",
}


def _collect(adapter: Adapter, parts: _Parts, part: str, tensor: AdapterTensor) -> None:
    slot = _SLOTS[part]
    held: AdapterTensor | None = getattr(parts, slot)
    if held is not None:
        raise AdapterError(
            f"{adapter.path} holds both {held.name} and {tensor.name}",
            expected="one adapter a directory",
            remedy="save each by itself",
        )
    setattr(parts, slot, tensor)
    parts.names.append(tensor.name)
    parts.embedding |= part.startswith("embedding")


def _add_module(book: EditBook, settings: LoraSettings, module: str, parts: _Parts) -> None:
    adapter, a, b = book.adapter, parts.a, parts.b
    if a is None or b is None:
        side = "lora_A" if b is None else "lora_B"
        raise AdapterError(
            f"{adapter.path} has only {side} of {module}"
            if (a or b)
            else f"{adapter.path} has neither lora_A nor lora_B of {module}, only {parts.names[0]}",
            expected="both matrices of every pair",
        )
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(
            f"{adapter.path}: {module} has {list(a.shape)} and {list(b.shape)}",
            expected="matrices of two sides",
            remedy="an adapter saved from a partitioned run (ZeRO-3, FSDP) must be gathered first",
        )
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{adapter.path}: the ranks of {module} differ: lora_A has {a.shape[0]}, lora_B {b.shape[1]}"
        )
    name = book.names.find(module)
    if name is None and adapter.config.get("target_parameters"):
        _add_parameter(book, settings, module, parts)
        return
    if name is None:
        book.stranger(module)
        return
    if a.shape[0] != settings.rank_of(module):
        raise AdapterError(
            f"{adapter.path}: lora_A of {module} has rank {a.shape[0]}, its config says "
            f"{settings.rank_of(module)}"
        )
    transposed = parts.embedding or _is_conv1d(book, name)
    pooled = adapter.config.get("use_qalora") and a.shape[1] not in book.names.shape(name)
    if pooled:
        raise AdapterError(
            f"{adapter.path} is a QALoRA on quantized layers and cannot be merged: it adds to the zero "
            f"points of {module}, a number a group of inputs",
            remedy="serve it with PEFT",
        )
    wanted = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
    if not book.fits(name, wanted):
        return
    for vector in (parts.magnitude, parts.bias):
        if vector is not None and vector.numel != b.shape[0]:
            raise AdapterError(
                f"{adapter.path}: {vector.name} is {list(vector.shape)}",
                expected=f"a number for each of the {b.shape[0]} outputs",
            )
    edit = LoraEdit(a, b, settings.scale_of(module), transposed)
    both = book.keeps_tie(module)
    if parts.magnitude is not None and not settings.dora:
        raise AdapterError(
            f"{adapter.path} holds lora_magnitude_vector of {module}, and its config says no use_dora",
            expected="the config that the adapter was saved with",
        )
    if settings.dora:
        if parts.magnitude is None:
            raise AdapterError(f"{adapter.path} is a DoRA without lora_magnitude_vector of {module}")
        book.add(name, DoraEdit(edit, parts.magnitude), both=both)
    else:
        book.add(name, edit, both=both)
    if parts.bias is not None:
        bias = book.names.find(module, "bias")
        if bias is None:
            raise AdapterError(
                f"{adapter.path} adds a bias to {module}, which has none in the base",
                expected="lora_bias on layers that have one",
            )
        book.add(bias, BiasEdit(parts.bias, edit.scale))


def _is_conv1d(book: EditBook, name: str) -> bool:
    # The module decides, as in PEFT, whatever fan_in_fan_out says. GPT-2's head and embeddings are ordinary.
    return book.model_type in _CONV1D and not book.names.is_vocabulary(name)


def _add_parameter(book: EditBook, settings: LoraSettings, module: str, parts: _Parts) -> None:
    """A pair on a parameter that is no layer's weight: PEFT nests one wrapper a parameter of a module.

    The key tells the module and the depth only; which parameter it is, the shapes tell.
    """
    owner, adapter = module.replace(".base_layer", ""), book.adapter
    if parts.magnitude is not None or parts.bias is not None:
        raise AdapterError(f"{adapter.path} holds more than lora_A and lora_B for a parameter of {owner}")
    leaves = sorted({str(target).rpartition(".")[2] for target in adapter.config["target_parameters"]})
    fitting = {
        leaf: found for leaf in leaves if (found := _parameter_edits(book, settings, owner, leaf, parts))
    }
    if len(fitting) > 1:
        raise AdapterError(
            f"{adapter.path}: the pair of {module} fits {' and '.join(fitting)} alike",
            expected="parameters that their shapes tell apart",
            remedy="train one of them in an adapter of its own",
        )
    if not fitting:
        book.stranger(module)
    for name, edit in next(iter(fitting.values()), []):
        book.add(name, edit)


def _parameter_edits(
    book: EditBook, settings: LoraSettings, owner: str, leaf: str, parts: _Parts
) -> list[tuple[str, Edit]]:
    """The edits of the tensors that hold a parameter, if the pair is of its shape; else none."""
    a, b = parts.a, parts.b
    assert a is not None  # noqa: S101 - the caller looked
    assert b is not None  # noqa: S101
    scale = settings.scale_of(f"{owner}.{leaf}")
    experts, rest = divmod(a.shape[0], settings.rank_of(f"{owner}.{leaf}"))
    if rest:
        return []
    name = book.names.find(owner, leaf)
    if name is not None:
        shape = book.names.shape(name)
        if experts == 1 and shape == (b.shape[0], a.shape[1]):
            return [(name, LoraEdit(a, b, scale))]
        transposed = book.model_type in _EXPERTS_IN_OUT
        sides = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if shape == (experts, *sides):
            return [(name, FusedExpertsEdit(a, b, scale, experts, transposed))]
    places = book.names.experts(owner, leaf)
    fused = FusedExpertsEdit(a, b, scale, experts)
    if (
        places
        and places[-1].expert + 1 == experts
        and places[-1].end == b.shape[0]
        and all(book.names.shape(place.name)[1] == a.shape[1] for place in places)
    ):
        return [(p.name, ExpertEdit(fused, p.expert, p.begin, p.end)) for p in places]
    return []
