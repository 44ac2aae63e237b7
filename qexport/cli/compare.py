"""`qexport compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qexport.cli.export import run_recipe, show_plan
from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.cli.report_table import check_junit
from qexport.specs import METHODS, SOLVERS, CalibrationSpec, VerifySpec, split_list

# what the variants' own fields are left with: each is asked for by --method, --bits and --type
_OWN = ("method", "solver", "bits", "type", "format", *VerifySpec.model_fields)


@click.command(short_help="Measure what each bit costs: the loss-vs-bits report.")
@click.argument("model")
@click.argument("candidates", nargs=-1)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="directory of the report"
)
@click.option("-a", "--adapter", "adapters", multiple=True, help="adapter to merge first; repeatable")
@click.option("--method", "methods", multiple=True, help=f"methods to try, a,b,c of {', '.join(METHODS)}")
@click.option("--bits", multiple=True, help="bits to try each with, e.g. 8,4,3,2; default: the method's own")
@click.option(
    "--type",
    "types",
    multiple=True,
    help="gguf: types and mixes to try, e.g. q8_0,q4_k_m, in place of --bits",
)
@click.option(
    "--solver", "solvers", multiple=True, help="solvers to try each with; default: the method's own"
)
@click.option("--title", default="what each bit costs", show_default=True, help="heading of the report")
@spec_options(*SOLVERS.values(), leave=_OWN)
@spec_options(VerifySpec)
@click.option("--junit", type=click.Path(path_type=Path), help="write the gates to this file as JUnit XML")
@click.option("--dry-run", is_flag=True, help="print what would run, and how large it gets")
@click.option("--trust-remote-code", is_flag=True, help="run the code that the model brings")
@output_options
def compare(
    model: str,
    candidates: tuple[str, ...],
    output: Path,
    adapters: tuple[str, ...],
    methods: tuple[str, ...],
    bits: tuple[str, ...],
    types: tuple[str, ...],
    solvers: tuple[str, ...],
    title: str,
    junit: Path | None,
    dry_run: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Quantize MODEL in every way that is asked for, measure each against full precision, and report.

    CANDIDATES are finished models to measure too, directories or GGUF files. What is there and whole is not
    made again, what was measured not measured again.

    \b
    DIR/report.html  the page: plots, table, layers, answers
    DIR/report.md    the table
    DIR/report.json  all of it (qexport report --schema)

    Exits with 1 when a variant does not pass --max-loss, --max-kl or --min-bleu.
    """
    out = Output(as_json, quiet)
    check_junit(junit)
    verify = make_spec(
        VerifySpec, {k: v for k, v in given.items() if k in VerifySpec.model_fields}, "compare"
    )
    options = {
        name: value
        for name, value in given.items()
        if name not in VerifySpec.model_fields and value not in (None, ())
    }
    from qexport.graph.compare import comparison
    from qexport.graph.variants import variant_specs

    specs = variant_specs(
        split_list(methods), split_list(bits), split_list(types), split_list(solvers), options, out.note
    )
    specs = tuple(
        spec.model_copy(update={"memory": verify.memory}) if isinstance(spec, CalibrationSpec) else spec
        for spec in specs
    )
    recipe = comparison(
        model, output, specs, adapters=adapters, candidates=candidates, verify=verify, title=title
    )
    if dry_run:
        show_plan(recipe, out, trust_remote_code=trust_remote_code)
    else:
        run_recipe(recipe, out, trust_remote_code=trust_remote_code, junit=junit)
