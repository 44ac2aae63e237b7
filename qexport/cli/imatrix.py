"""`qexport imatrix`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.specs import CalibrationSpec


@click.command(short_help="Gather a GGUF importance matrix.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="file to make: .gguf, or .dat for llama.cpp before August 2025",
)
@spec_options(CalibrationSpec)
@click.option("--overwrite", is_flag=True, help="replace a file that is there")
@click.option("--trust-remote-code", is_flag=True, help="run the code that the model brings")
@output_options
def imatrix(
    model: str,
    output: Path,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Gather what each input of MODEL's layers weighs on a calibration text, in llama.cpp's form.

    `qexport quantize --method gguf --imatrix FILE` takes it, and so does llama-quantize.
    """
    spec = make_spec(CalibrationSpec, given, "imatrix")
    out = Output(as_json, quiet)
    from qexport.quantization.imatrix import make_imatrix

    with out.listening() as on_event:
        matrix = make_imatrix(
            model, output, spec, overwrite=overwrite, trust_remote_code=trust_remote_code, on_event=on_event
        )
    tokens = matrix.chunk_count * matrix.chunk_size
    out.result(
        {"output": str(output), "tensors": len(matrix.entries), "tokens": tokens},
        f"{output}: {len(matrix.entries)} tensors, {matrix.chunk_count} chunks of {matrix.chunk_size} tokens",
    )
