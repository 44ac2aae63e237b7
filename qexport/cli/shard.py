"""`qexport shard`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.sizes import format_size
from qexport.specs import ShardSpec


@click.command(short_help="Write a model again in files of another size.")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="directory to make")
@spec_options(ShardSpec)
@click.option("--overwrite", is_flag=True, help="replace a model that is there")
@output_options
def shard(model: str, output: Path, overwrite: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write MODEL, a directory or Hub id, again in files of another size."""
    spec = make_spec(ShardSpec, given, "shard")
    out = Output(as_json, quiet)
    from qexport.checkpoint.resharding import shard as run

    with out.listening() as on_event:
        made = run(model, output, spec, overwrite=overwrite, on_event=on_event)
    out.card(output)
    files = len({tensor.file for tensor in made.stored.values()})
    out.result(
        {"output": str(output), "files": files, "size_bytes": made.weights_size},
        f"{output}: {files} files, {format_size(made.weights_size)}",
    )
