"""`qexport compare`: what each bit costs, as an export whose outcome is the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qexport.errors import SpecError
from qexport.events import OnEvent, ignore
from qexport.graph.recipe import ExportRecipe
from qexport.graph.run import OnTask, export
from qexport.report.content import Report
from qexport.specs import AnyQuantizeSpec, VerifySpec

TITLE = "what each bit costs"


def comparison(
    model: str | Path,
    out: Path,
    specs: Sequence[AnyQuantizeSpec] = (),
    *,
    adapters: Sequence[str | Path] = (),
    candidates: Sequence[str | Path] = (),
    verify: VerifySpec | None = None,
    title: str = TITLE,
) -> ExportRecipe:
    """The recipe of a comparison. SpecError where there is nothing to compare with the model."""
    if not specs and not candidates:
        raise SpecError(
            "nothing to compare with the model",
            expected="--method METHODS, or finished models after MODEL",
            remedy="qexport compare MODEL -o DIR --method gptq,gguf --bits 8,4,3",
        )
    return ExportRecipe(
        base=str(model),
        adapters=tuple(map(str, adapters)),
        candidates=tuple(map(str, candidates)),
        output=str(out),
        title=title,
        quantize=tuple(specs),
        verify=verify or VerifySpec(),
    )


def compare(
    model: str | Path,
    out: Path,
    specs: Sequence[AnyQuantizeSpec] = (),
    *,
    adapters: Sequence[str | Path] = (),
    candidates: Sequence[str | Path] = (),
    verify: VerifySpec | None = None,
    title: str = TITLE,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
    on_task: OnTask = lambda task, runs, number, total: None,
) -> Report:
    """Quantizes `model`, with `adapters` merged, as each of `specs` says, measures these and the finished
    `candidates` against it, and writes the report into `out`.

    What is there and whole is not made again, what was measured not measured again. The gates' failures
    stand in the rows. Raises whatever `merge`, `quantize` and `evaluate` do.
    """
    recipe = comparison(
        model, out, specs, adapters=adapters, candidates=candidates, verify=verify, title=title
    )
    result = export(recipe, trust_remote_code=trust_remote_code, on_event=on_event, on_task=on_task)
    assert result.report is not None  # noqa: S101 - an ExportRecipe has one
    return result.report
