"""The whole model in memory: only generation needs it."""

from __future__ import annotations

from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.modeling.skeleton import Skeleton, set_parameters


def load_whole(skeleton: Skeleton, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The skeleton's model with every weight of `checkpoint`, decoded, in `dtype`. It stays loaded."""
    model, expected = skeleton.model, skeleton.expected_shapes()
    for name in checkpoint.names():
        if name in expected:
            value = checkpoint.read(name)
            set_parameters(model, {name: value.to(dtype) if value.is_floating_point() else value})
    if checkpoint.tie:
        set_parameters(model, {checkpoint.tie.head: model.get_parameter(checkpoint.tie.embedding).data})
    return model
