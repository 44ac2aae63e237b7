"""How much a variant may lose."""

from __future__ import annotations

import math

from qexport.results import Evaluation
from qexport.specs import VerifySpec
from qexport.verification.divergence import is_bound


def failures(scores: Evaluation, loss: float, spec: VerifySpec) -> list[str]:
    """What of the gates of `spec` is not met, in words; `loss` is the relative rise of perplexity.

    What was not measured does not pass.
    """
    found = []
    if spec.max_loss is not None and not loss <= spec.max_loss:
        found.append(f"loses {100 * loss:.2f} % of perplexity, at most {100 * spec.max_loss:g} % may be")
    if spec.max_kl is not None:
        kl = scores.divergence.mean if scores.divergence else math.nan
        recipe = scores.divergence.recipe if scores.divergence else {}
        bound = is_bound(recipe)
        if bound or not kl <= spec.max_kl:
            least = "at least " if bound else ""
            found.append(f"has a KL divergence of {least}{kl:.4g}, at most {spec.max_kl:g} may be")
    if spec.min_bleu is not None:
        against = scores.answers.references if scores.answers else None
        bleu = against.bleu.value if against else math.nan
        if not bleu >= spec.min_bleu:
            found.append(f"has a BLEU of {bleu:.1f}, at least {spec.min_bleu:g} must be")
    return found
