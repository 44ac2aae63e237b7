"""The whole model in memory: only generation needs it."""

from __future__ import annotations

from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.modeling.places import read_places
from qexport.modeling.skeleton import Skeleton, set_parameters


def load_whole(skeleton: Skeleton, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The skeleton's model with every weight of `checkpoint`, decoded, in `dtype`. It stays loaded."""
    model = skeleton.model
    places = {
        key: place for key, place in skeleton.bound(checkpoint).places.items() if place.name in checkpoint
    }
    for key, value in read_places(checkpoint, places, dtype):
        set_parameters(model, {key: value})
    return model
