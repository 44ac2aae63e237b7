"""Does a checkpoint hold the tensors of the model that its config describes? From headers alone."""

from __future__ import annotations

import re

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.modeling.skeleton import Skeleton


def structure_problems(checkpoint: Checkpoint, skeleton: Skeleton) -> list[str]:
    """What is missing, unexpected or of another shape, a line each with the first three names."""
    skeleton = skeleton.bound(checkpoint)
    expected = skeleton.expected_shapes()
    found = set(checkpoint.names())
    ignored = [re.compile(pattern) for pattern in skeleton.ignored_patterns()]
    problems = {
        "missing": sorted(set(expected) - found),
        "unexpected": sorted(
            name for name in found - set(expected) if not any(pattern.search(name) for pattern in ignored)
        ),
        "of the wrong shape": [
            f"{name} {list(checkpoint.info(name).shape)}, expected {list(expected[name])}"
            for name in sorted(found & set(expected))
            if checkpoint.info(name).shape != expected[name]
        ],
    }
    return [told(kind, names) for kind, names in problems.items() if names]


def told(kind: str, names: list[str]) -> str:
    """How many tensors have a problem, and the first three of them."""
    more = "; ..." if len(names) > 3 else ""
    return f"{len(names)} tensors {kind} ({'; '.join(names[:3])}{more})"
