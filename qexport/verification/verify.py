"""`qexport verify`: opens the written bytes again and measures what they lost."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qexport.errors import GateError
from qexport.events import OnEvent, ignore
from qexport.modeling.activations import scratch_directory
from qexport.results import Evaluation, VerifyResult
from qexport.specs import VerifySpec
from qexport.verification.evaluate import Reference, evaluate, prepare, require_same_tokens, score
from qexport.verification.gate import failures
from qexport.verification.perplexity import relative_difference


def verify(
    reference: str | Path | Evaluation,
    candidate: str | Path,
    spec: VerifySpec | None = None,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> VerifyResult:
    """Measures `candidate` against `reference` (a model, or scores that were taken before).

    Scores that were taken before bring no logits: there is no divergence then. Whether the loss is within
    the spec's gates is for `require_within` to say. Raises as `evaluate`.
    """
    spec = spec or VerifySpec()
    ready = prepare(candidate, spec, trust_remote_code, on_event)
    if isinstance(reference, Evaluation):
        require_same_tokens(ready, reference)
        scores = score(ready, None, None, on_event)
        return VerifyResult(reference, scores, relative_difference(reference.perplexity, scores.perplexity))
    with tempfile.TemporaryDirectory(prefix="qexport-", dir=scratch_directory()) as directory:
        kept = Path(directory) / "logits"
        full = evaluate(
            reference, spec, keep_logits=kept, trust_remote_code=trust_remote_code, on_event=on_event
        )
        scores = score(ready, Reference(full, kept, reference, trust_remote_code), None, on_event)
    return VerifyResult(full, scores, relative_difference(full.perplexity, scores.perplexity))


def require_within(result: VerifyResult, spec: VerifySpec) -> None:
    """The gate: GateError where the candidate lost more than the spec allows."""
    if found := failures(result.candidate, result.loss.loss, spec):
        raise GateError(f"{result.candidate.model} {', '.join(found)}")
