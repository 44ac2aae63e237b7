"""The importance matrix that a user brings to a GGUF export, held against the tensors that need one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from qexport.errors import SpecError, first_of
from qexport.events import Noted, OnEvent
from qexport.formats.gguf.imatrix import ImportanceMatrix, read_imatrix
from qexport.quantization.gguf.checks import hungry
from qexport.quantization.gguf.plan import GgufPlan, is_coded
from qexport.quantization.importance import layer_inputs


def known_matrix(plan: GgufPlan, on_event: OnEvent) -> ImportanceMatrix | None:
    """The importance matrix that the user has; None where there is none yet.

    Raises SpecError when it is not one of this model, or when a tensor whose type needs importance gets none.
    """
    given = getattr(plan.spec, "imatrix", None)
    if given is None:
        _require_known(plan, layer_inputs(plan.tensors), "no inputs are seen of it")
        return None
    matrix = read_imatrix(Path(given))
    coded = [t for t in plan.tensors if any(is_coded(variant.types[t.name]) for variant in plan.variants)]
    try:
        known = {t.name for t in coded if matrix.importance(t.name, t.shape[-1], t.experts) is not None}
    except SpecError as error:
        raise SpecError(f"{given}: {error.found}", expected=error.expected, remedy=error.remedy) from error
    if not known:
        raise SpecError(
            f"{given} knows none of the tensors that become codes: {first_of([t.name for t in coded], 2)}",
            expected="an importance matrix that was gathered with this very model",
        )
    _require_known(plan, known, f"{given} does not know it")
    if missing := [t.name for t in coded if t.name.startswith("blk.") and t.name not in known]:
        on_event(
            Noted(
                f"{given} does not know {len(missing)} tensors, whose inputs all count alike: "
                f"{first_of(missing, 2)}"
            )
        )
    return matrix


def _require_known(plan: GgufPlan, known: Collection[str], why: str) -> None:
    """SpecError for a tensor whose type needs importance, and which is not among `known`."""
    for variant in plan.variants if plan.spec.solver != "search" else ():
        for name, kind in variant.types.items():
            if name not in known and hungry(variant.mix, name, kind):
                raise SpecError(
                    f"{name} becomes {kind.name}, which needs importance, and {why}",
                    expected=f"another type for it, such as --override '{name}=q4_k'",
                )
