"""`qexport convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.errors import SpecError
from qexport.events import OnEvent
from qexport.sizes import format_size
from qexport.specs import ConvertSpec

_FORMS = ("safetensors", "gguf-lora")


@click.command(short_help="Write a model, or an adapter, in another form.")
@click.argument("source")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="directory, or .gguf file, to make"
)
@click.option(
    "--to",
    "form",
    type=click.Choice(_FORMS),
    default="safetensors",
    help="what to write; default: safetensors",
)
@click.option("--base", help="gguf-lora: the model that the adapter is for; default: the one that it names")
@spec_options(ConvertSpec)
@click.option("--overwrite", is_flag=True, help="replace what is there")
@click.option("--trust-remote-code", is_flag=True, help="run the code that the model brings")
@output_options
def convert(
    source: str,
    output: Path,
    form: str,
    base: str | None,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write SOURCE in another form.

    \b
    safetensors  a model in any form that can be read (.gguf, GPTQ, AWQ, ...), decoded to full precision
    gguf-lora    a LoRA adapter as the .gguf file that llama.cpp puts on a model (--lora)

    For a model as GGUF: qexport quantize --method gguf --type f16, or any other type.
    """
    spec = make_spec(ConvertSpec, given, "convert")
    out = Output(as_json, quiet)
    with out.listening() as on_event:
        if form == "gguf-lora":
            result, told = _adapter(source, base, output, spec, overwrite, trust_remote_code, on_event)
        elif base is not None:
            raise SpecError("--base is for --to gguf-lora", remedy="leave it out")
        else:
            result, told = _model(source, output, spec, overwrite, on_event)
            out.card(output)
    out.result(result, told)


def _model(
    source: str, output: Path, spec: ConvertSpec, overwrite: bool, on_event: OnEvent
) -> tuple[dict[str, Any], str]:
    from qexport.conversion import convert as run

    if output.suffix == ".gguf":
        raise SpecError(
            f"-o {output} with --to safetensors",
            expected="a directory to make",
            remedy="a model becomes GGUF by qexport quantize --method gguf --type f16, or any other type",
        )
    made = run(source, output, spec, overwrite=overwrite, on_event=on_event)
    size = made.weights_size
    told = f"{output}: {len(made.stored)} tensors, {format_size(size)}"
    return {"output": str(output), "tensors": len(made.stored), "size_bytes": size}, told


def _adapter(
    source: str,
    base: str | None,
    output: Path,
    spec: ConvertSpec,
    overwrite: bool,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> tuple[dict[str, Any], str]:
    import torch

    from qexport.merging.gguf_adapter import convert_adapter

    made = convert_adapter(
        source,
        base,
        output,
        dtype=getattr(torch, spec.dtype or "float32"),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        on_event=on_event,
    )
    told = (
        f"{output}: LoRA pairs of {made.pairs} tensors, alpha {made.alpha:g}, {format_size(made.size_bytes)}"
    )
    return {**asdict(made), "path": str(output)}, told
