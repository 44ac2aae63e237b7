"""Where each tensor of a model lies in its checkpoint: under which name, and as which rows of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.devices import CPU
from qexport.modeling.experts import Experts
from qexport.modeling.names import StoredNames


@dataclass(frozen=True)
class Place:
    """A tensor on disk, or rows `begin` to `end` of one expert in a 3-D tensor [experts, rows, columns]."""

    name: str
    expert: int | None = None
    begin: int = 0
    end: int = 0


def unbound_places(model: Any) -> dict[str, Place]:
    """Places of a model of which no checkpoint is known: everything is called as it is in memory."""
    return {key: Place(key) for key in model.state_dict()}


def places_in(checkpoint: Checkpoint, model: Any, head: str, *, tied: bool) -> dict[str, Place]:
    """The place of every tensor of `model`, by its key in the model's state_dict.

    What the checkpoint lacks is placed under its name in memory. `head` is the output head's key; where
    `tied` and the checkpoint holds one matrix for both, it lies where the embedding does.
    """
    shapes = {name: checkpoint.info(name).shape for name in checkpoint.names()}
    names = StoredNames(shapes)
    keys = list(model.state_dict())
    places = {key: Place(key) for key in keys if key in shapes}
    places |= _experts(model, names, places)
    taken = {place.name for place in places.values()}
    for key in keys:
        if key not in places and (found := names.find(key, taken)):
            places[key] = Place(found)
    taken = {place.name for place in places.values()}
    left, strangers = [key for key in keys if key not in places], [n for n in shapes if n not in taken]
    if head in left and tied and checkpoint.tie:
        left.remove(head)
        embedding = _embedding_key(model)
        if embedding not in places and checkpoint.tie.embedding in strangers:
            places[embedding] = Place(checkpoint.tie.embedding)
            left.remove(embedding)
        places[head] = places[embedding] if embedding in places else Place(head)
    if left and strangers:
        places |= _renamed_by_transformers(model, left, strangers)
    return {key: places.get(key) or Place(key) for key in keys}


def _embedding_key(model: Any) -> str:
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def _experts(model: Any, names: StoredNames, known: Mapping[str, Place]) -> dict[str, Place]:
    """Places of the experts that are not called on disk as they are in memory."""
    places: dict[str, Place] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Experts) or f"{path}.0.gate_proj.weight" in known:
            continue
        for parameter, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            parts = names.experts(path, parameter)
            fused = None if parts else names.fused(path, parameter)
            for expert in range(module.count):
                row = 0
                for number, leaf in enumerate(leaves):
                    key = f"{path}.{expert}.{leaf}.weight"
                    at = expert * len(leaves) + number
                    rows = module.get_parameter(f"{expert}.{leaf}.weight").shape[0]
                    if at < len(parts):
                        places[key] = Place(parts[at].name)
                    elif fused:
                        places[key] = Place(fused, expert, row, row + rows)
                    row += rows
    return places


def _renamed_by_transformers(model: Any, keys: list[str], strangers: list[str]) -> dict[str, Place]:
    """Places by transformers' own renamings, for the architectures whose names are not in our table."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # other releases have them elsewhere: then the names are told as missing
        return {}
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    known = dict.fromkeys(model.state_dict(), True)
    places = {}
    for name in strangers:
        key, _ = rename_source_key(name, renamings, [], model.base_model_prefix, known)
        if key in keys:
            places[key] = Place(name)
    return places


def read_places(
    checkpoint: Checkpoint, places: Mapping[str, Place], dtype: torch.dtype, device: torch.device = CPU
) -> Iterator[tuple[str, torch.Tensor]]:
    """Keys of `places` and their tensors on `device`, floats in `dtype`; a tensor that has several is read
    once.

    Keys of one place share their memory, as tied matrices do.
    """
    keys: dict[str, list[str]] = defaultdict(list)
    for key, place in places.items():
        keys[place.name].append(key)
    for name, sharing in keys.items():
        value = checkpoint.read(name).to(device)
        if value.is_floating_point():
            value = value.to(dtype)
        for key in sharing:
            place = places[key]
            yield key, value if place.expert is None else value[place.expert, place.begin : place.end]
