"""`qexport verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.errors import SpecError
from qexport.sizes import format_size
from qexport.specs import VerifySpec
from qexport.verification.runtimes.drivers.driver import RUNTIMES

if TYPE_CHECKING:
    from qexport.results import RuntimeCheck, VerifyResult


@click.command(short_help="Measure what a model lost against its reference.")
@click.argument("candidate")
@click.option("--reference", help="the full-precision model, a directory or Hub id")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(list(RUNTIMES)),
    help="also load the candidate in this runtime, and compare its logits with our decoded weights'; "
    "without --reference only that; repeatable",
)
@click.option(
    "--runtime-python",
    type=click.Path(path_type=Path),
    help="interpreter of the environment that has the runtime; default: this one",
)
@spec_options(VerifySpec)
@click.option("--trust-remote-code", is_flag=True, help="run the code that the models bring")
@output_options
def verify(
    candidate: str,
    reference: str | None,
    runtimes: tuple[str, ...],
    runtime_python: Path | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Open CANDIDATE's written bytes again, check every tensor, and measure perplexity and BLEU.

    Exits with 1 when a tensor is missing, unexpected, misshapen or not finite, when the loss is more than
    --max-loss, --max-kl or --min-bleu allow, or when a runtime reads the files otherwise than they were
    meant.
    """
    spec = make_spec(VerifySpec, given, "verify")
    _require_a_task(reference, runtimes, runtime_python, given)
    out = Output(as_json, quiet)
    from qexport.verification.runtimes.check import check_runtime, require_agreement
    from qexport.verification.verify import require_within
    from qexport.verification.verify import verify as run

    with out.listening() as on_event:
        checks = [
            check_runtime(
                candidate,
                runtime,
                python=runtime_python,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
            for runtime in dict.fromkeys(runtimes)
        ]
        result = (
            run(reference, candidate, spec, trust_remote_code=trust_remote_code, on_event=on_event)
            if reference
            else None
        )
    data = {
        **(asdict(result) if result else {}),
        **({"runtimes": list(map(asdict, checks))} if checks else {}),
    }
    if as_json:
        out.result(data, "")
    else:
        if result:
            _show_loss(out, result)
        if checks:
            _show_runtimes(out, checks)
    for check in checks:
        require_agreement(check)
    if result:
        require_within(result, spec)


def _require_a_task(
    reference: str | None, runtimes: tuple[str, ...], python: Path | None, given: dict[str, Any]
) -> None:
    if reference:
        pass
    elif not runtimes:
        raise SpecError(
            "nothing to verify against", expected="--reference MODEL, --runtime RUNTIME, or both of them"
        )
    elif named := [name for name, value in given.items() if value is not None and value != ()]:
        raise SpecError(f"--{named[0].replace('_', '-')} measures a loss", expected="--reference beside it")
    if python and not runtimes:
        raise SpecError("--runtime-python without --runtime")


def _show_loss(out: Output, result: VerifyResult) -> None:
    from qexport.report.recipes import recipe_lines
    from qexport.report.tables import format_interval, format_kl, format_loss, format_perplexity

    rows = [
        (
            role,
            scores.model,
            format_perplexity(scores.perplexity),
            format_interval(scores.answers.references.bleu)
            if scores.answers and scores.answers.references
            else "",
            format_size(scores.size_bytes),
            f"{scores.bits_per_weight:.2f}",
        )
        for role, scores in (("reference", result.reference), ("candidate", result.candidate))
    ]
    columns = ("", "model", "perplexity", "BLEU", "size", "bits a weight")
    out.table("qexport verify", columns, rows, {})
    loss = format_loss(result.loss.loss, result.loss.standard_error)
    out.result({}, f"loss\t{loss}")
    if kl := result.candidate.divergence:
        out.result({}, f"KL\t{format_kl(kl.mean, kl.standard_error)}")
        out.result({}, f"same top token\t{100 * kl.same_top:.2f}%")
    for runtime, speed in result.candidate.speeds.items():
        out.result({}, f"tokens/s in {runtime}\t{speed:.1f}")
    for task, score in result.candidate.tasks.items():
        out.result({}, f"{task}\t{score.value:.4f} ±{score.standard_error:.4f}")
    for line in recipe_lines(result.reference, result.candidate):
        out.note(line)


def _show_runtimes(out: Output, checks: list[RuntimeCheck]) -> None:
    rows = [
        (
            check.runtime,
            check.model,
            _layers(check),
            str(len(check.missing)),
            str(len(check.unexpected)),
            "" if check.difference is None else f"{check.difference:.1e} (may be {check.tolerance:g})",
            "" if check.same_top is None else f"{100 * check.same_top:.1f} %",
        )
        for check in checks
    ]
    columns = ("runtime", "model", "quantized layers", "missing", "unread", "difference", "same top token")
    out.table("qexport verify --runtime", columns, rows, {})
    for check in checks:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(check.layers.items())) or "plain layers"
        versions = ", ".join(f"{name} {version}" for name, version in check.versions.items())
        out.note(f"{check.runtime}: {kinds} in {check.dtype}, {check.tokens} tokens; {versions}")


def _layers(check: RuntimeCheck) -> str:
    """How many layers hold codes in the runtime; it may have decoded some, or all, while it loaded."""
    count = sum(check.layers.values())
    decoded = check.stored_layers - count if check.decodes_at_load else 0
    return f"{count}, {decoded} decoded at load" if decoded else str(count)
