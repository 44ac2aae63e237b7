"""`qexport merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.sizes import format_size
from qexport.specs import MergeSpec


@click.command(short_help="Merge adapters into their base.")
@click.argument("base")
@click.option("-a", "--adapter", "adapters", multiple=True, required=True, help="adapter; repeatable")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="directory to make")
@spec_options(MergeSpec)
@click.option("--overwrite", is_flag=True, help="replace a model that is there")
@output_options
def merge(
    base: str,
    adapters: tuple[str, ...],
    output: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Merge LoRA and rsLoRA adapters into BASE, a directory or Hub id, one after the other."""
    spec = make_spec(MergeSpec, given, "merge")
    out = Output(as_json, quiet)
    from qexport.checkpoint.manifest import read_figures
    from qexport.merging.merge import merge as run

    with out.listening() as on_event:
        made = run(base, adapters, output, spec, overwrite=overwrite, on_event=on_event)
    figures = read_figures(output)
    out.result(
        {"output": str(output), "size_bytes": made.weights_size, **figures},
        f"{output}: {format_size(made.weights_size)}, {figures['tensors_changed']} of "
        f"{figures['tensors']} tensors changed",
    )
