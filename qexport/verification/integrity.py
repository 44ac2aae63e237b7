"""Every tensor is there, has the model's shape, and is finite: what loaders today let pass in silence."""

from __future__ import annotations

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.finiteness import is_finite
from qexport.checkpoint.manifest import changed_files
from qexport.errors import VerificationError
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.modeling.skeleton import Skeleton
from qexport.modeling.structure import structure_problems, told


def check_integrity(checkpoint: Checkpoint, skeleton: Skeleton, on_event: OnEvent = ignore) -> int:
    """Decodes every tensor of `checkpoint` and holds it against the model; returns how many there are.

    The bytes of what qexport made are held against the hashes in its manifest first.
    Raises VerificationError that names what changed, is missing, unexpected, misshapen or not finite.
    """
    problems = structure_problems(checkpoint, skeleton)
    if changed := changed_files(checkpoint.path):
        problems.append(f"{', '.join(changed[:3])} changed since qexport wrote it")
    names = list(checkpoint.names())
    on_event(Started("check tensors", len(names), "tensors"))
    if not problems:
        broken = []
        for name in names:
            if not is_finite(checkpoint.read(name)):
                broken.append(name)
            on_event(Advanced(1, name))
        if broken:
            problems.append(told("not finite", broken))
    on_event(Finished())
    if problems:
        raise VerificationError(
            f"{checkpoint.path} is not whole: " + ", ".join(problems),
            remedy="do not use these files; export again",
        )
    return len(names)
