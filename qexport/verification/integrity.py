"""Every tensor is there, has the model's shape, and is finite: what loaders today let pass in silence."""

from __future__ import annotations

import re

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.finiteness import is_finite
from qexport.errors import VerificationError
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.modeling.skeleton import Skeleton


def check_integrity(checkpoint: Checkpoint, skeleton: Skeleton, on_event: OnEvent = ignore) -> int:
    """Decodes every tensor of `checkpoint` and holds it against the model; returns how many there are.

    Raises VerificationError that names what is missing, unexpected, misshapen or not finite.
    """
    expected = skeleton.expected_shapes()
    found = set(checkpoint.names())
    aliases = {checkpoint.tie.head} if checkpoint.tie else set()
    ignored = [re.compile(pattern) for pattern in skeleton.ignored_patterns()]
    strangers = found - set(expected)
    problems = {
        "missing": sorted(set(expected) - found - aliases),
        "unexpected": sorted(n for n in strangers if not any(p.search(n) for p in ignored)),
        "of the wrong shape": [
            f"{name} {list(checkpoint.info(name).shape)}, expected {list(expected[name])}"
            for name in sorted(found & set(expected))
            if checkpoint.info(name).shape != expected[name]
        ],
    }
    on_event(Started("check tensors", len(found), "tensors"))
    if not any(problems.values()):
        broken = problems.setdefault("not finite", [])
        for name in checkpoint.names():
            if not is_finite(checkpoint.read(name)):
                broken.append(name)
            on_event(Advanced(1, name))
    on_event(Finished())
    told = [
        f"{len(names)} tensors {kind} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if told:
        raise VerificationError(
            f"{checkpoint.path} is not whole: " + ", ".join(told),
            remedy="do not use these files; export again",
        )
    return len(found)
