"""`qexport demo`."""

from __future__ import annotations

from pathlib import Path

import click

from qexport.cli.export import run_recipe, show_plan
from qexport.cli.output import Output, output_options


@click.command(short_help="Run the whole way on the embedded model, in minutes.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("qexport-demo"),
    show_default=True,
    help="directory that all outputs go into",
)
@click.option("--dry-run", is_flag=True, help="print what would run, and how large it gets")
@output_options
def demo(output: Path, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Merge, shard, quantize and verify the embedded model and its adapter, and print one table."""
    from qexport.graph.recipe import parse_recipe
    from qexport.packaged import demo_recipe

    path = demo_recipe()
    text = path.read_text(encoding="utf-8").replace("${embedded}", str(path.parent))
    recipe = parse_recipe(text, str(path)).model_copy(update={"output": str(output)})
    out = Output(as_json, quiet)
    if dry_run:
        show_plan(recipe, out)
    else:
        run_recipe(recipe, out)
