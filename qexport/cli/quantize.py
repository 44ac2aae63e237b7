"""`qexport quantize`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.sizes import format_size
from qexport.specs import METHODS


@click.command(short_help="Quantize a model.")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="directory to make")
@click.option("--method", required=True, type=click.Choice(list(METHODS)), help="how to quantize")
@spec_options(*METHODS.values(), leave=["method"])
@click.option("--overwrite", is_flag=True, help="replace a model that is there")
@click.option("--trust-remote-code", is_flag=True, help="run the code that the model brings")
@output_options
def quantize(
    model: str,
    output: Path,
    method: str,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Quantize MODEL, a directory or Hub id.

    bnb: bitsandbytes' NF4 with double quantization (4 bits) or LLM.int8 (8). gptq: GPTQ on a symmetric
    integer grid (2, 3, 4, 8), calibrated block by block. rtn: the same grid and layout, rounded to
    nearest, without data.
    """
    if given["bits"] is not None:
        given["bits"] = int(given["bits"])
    spec = make_spec(METHODS[method], given, method)
    out = Output(as_json, quiet)
    from qexport.quantization import quantize as run

    with out.listening() as on_event:
        result = run(
            model,
            output,
            spec,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            on_event=on_event,
        )
    out.result(
        {**asdict(result), "path": str(result.path)},
        f"{output}: {result.method} {result.bits} bits, {result.quantized_layers} layers quantized "
        f"({result.layer_bits_per_weight:.2f} bits a weight), {format_size(result.size_bytes)} in all "
        f"({result.bits_per_weight:.2f}), {result.seconds:.1f} s, "
        f"peak memory {format_size(result.peak_bytes)}",
    )
