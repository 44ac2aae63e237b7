"""`qexport verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.sizes import format_size
from qexport.specs import VerifySpec


@click.command(short_help="Measure what a model lost against its reference.")
@click.argument("candidate")
@click.option("--reference", required=True, help="the full-precision model, a directory or Hub id")
@spec_options(VerifySpec)
@click.option("--trust-remote-code", is_flag=True, help="run the code that the models bring")
@output_options
def verify(
    candidate: str,
    reference: str,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Open CANDIDATE's written bytes again, check every tensor, and measure perplexity and BLEU.

    Exits with 1 when a tensor is missing, unexpected, misshapen or not finite, or when the loss is more
    than --max-loss.
    """
    spec = make_spec(VerifySpec, given, "verify")
    out = Output(as_json, quiet)
    from qexport.report.rows import format_loss, format_perplexity, recipe_lines
    from qexport.verification.verify import require_within
    from qexport.verification.verify import verify as run

    with out.listening() as on_event:
        result = run(reference, candidate, spec, trust_remote_code=trust_remote_code, on_event=on_event)
    rows = [
        (
            role,
            scores.model,
            format_perplexity(scores.perplexity),
            "" if scores.bleu is None else f"{scores.bleu.value:.1f}",
            format_size(scores.size_bytes),
            f"{scores.bits_per_weight:.2f}",
        )
        for role, scores in (("reference", result.reference), ("candidate", result.candidate))
    ]
    columns = ("", "model", "perplexity", "BLEU", "size", "bits a weight")
    out.table("qexport verify", columns, rows, asdict(result))
    if not as_json:
        loss = format_loss(result.loss.loss, result.loss.standard_error)
        out.result({}, f"loss\t{loss}")
        for line in recipe_lines(result.reference):
            out.note(line)
    require_within(result, spec.max_loss)
