"""`qexport merge`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.sizes import format_size
from qexport.specs import MergeSpec


@click.command(short_help="Merge adapters into their base.")
@click.argument("base")
@click.option(
    "-a", "--adapter", "adapters", multiple=True, required=True, help="adapter, or ADAPTER:WEIGHT; repeatable"
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="directory to make")
@spec_options(MergeSpec)
@click.option("--dry-run", is_flag=True, help="print what would be written, and write nothing")
@click.option("--overwrite", is_flag=True, help="replace a model that is there")
@click.option("--trust-remote-code", is_flag=True, help="run the code that the model brings")
@output_options
def merge(
    base: str,
    adapters: tuple[str, ...],
    output: Path | None,
    dry_run: bool,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Merge PEFT adapters into BASE, a directory or Hub id, one after the other.

    LoRA, rsLoRA, DoRA and everything else that PEFT can merge. With a WEIGHT an adapter's change is
    multiplied by it; with --combine several LoRAs become one first.
    """
    spec = make_spec(MergeSpec, given, "merge")
    out = Output(as_json, quiet)
    if dry_run:
        _show_plan(base, adapters, spec, out, trust_remote_code)
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'")
    from qexport.merging.merge import merge as run

    with out.listening() as on_event:
        made = run(
            base,
            adapters,
            output,
            spec,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            on_event=on_event,
        )
    out.card(made.path)
    data = {**asdict(made), "path": str(made.path), "base": str(made.base)}
    out.result(
        {"output": data.pop("path"), "tensors_changed": len(made.changes), **data},
        f"{output}: {format_size(made.size_bytes)}, {len(made.changes)} of {made.tensors} tensors changed",
    )


def _show_plan(
    base: str, adapters: tuple[str, ...], spec: MergeSpec, out: Output, trust_remote_code: bool
) -> None:
    """Prints the tensors that would be touched, the files and the memory that it takes."""
    from qexport.merging.merge import planned_merge

    with out.listening() as on_event:
        planned = planned_merge(base, adapters, spec, trust_remote_code=trust_remote_code, on_event=on_event)
    rows = [(n, "x".join(map(str, shape)), ", ".join(map(str, by))) for n, shape, by in planned.touched]
    data = {
        "tensors": planned.tensors,
        "touched": [{"tensor": n, "shape": list(s), "adapters": by} for n, s, by in planned.touched],
        "files": [{"file": file, "size_bytes": size} for file, size in planned.files],
        "size_bytes": planned.size_bytes,
        "peak_bytes": planned.peak_bytes,
    }
    out.table("dry run", ("tensor", "shape", "adapters"), rows, data)
    if not out.json:
        out.note(
            f"{len(rows)} of {planned.tensors} tensors touched; {format_size(planned.size_bytes)} in "
            f"{len(planned.files)} file{'s' if len(planned.files) > 1 else ''}; "
            f"about {format_size(planned.peak_bytes)} of memory"
        )
