"""`qexport quantize`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.results import QuantizeResult
from qexport.sizes import format_size
from qexport.specs import METHODS, SOLVERS, with_preset


@click.command(short_help="Quantize a model.")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="directory to make")
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    help="adapter to merge into MODEL as it is read, PATH or PATH:WEIGHT; repeatable",
)
@click.option("--method", required=True, type=click.Choice(list(METHODS)), help="how to quantize")
@click.option(
    "--solver", type=click.Choice(list(SOLVERS)), help="how codes are chosen; default: the method's"
)
@spec_options(*SOLVERS.values(), leave=["method", "solver"])
@click.option("--overwrite", is_flag=True, help="replace a model that is there")
@click.option("--trust-remote-code", is_flag=True, help="run the code that the model brings")
@output_options
def quantize(
    model: str,
    output: Path,
    adapters: tuple[str, ...],
    method: str,
    solver: str | None,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Quantize MODEL, a directory, GGUF file or Hub id.

    A method is a preset of solver, bits and format; --solver, --bits and --format override each.

    \b
    without data: bnb   NF4 (4 bits) or LLM.int8 (8), bitsandbytes
                  eetq  int8 a row, EETQ
                  rtn   round to nearest, GPTQ's format
                  hqq   half-quadratic zeros, HQQ's format
                  mlx   searched scales, MLX
                  gguf  llama.cpp's types; by importance with --calibration
    calibrated:   gptq  error feedback, GPTQ's format
                  awq   activation-aware scales, AWQ's format
    """
    values = with_preset({"method": method, "solver": solver, **_given(given)})
    spec = make_spec(SOLVERS[values["solver"]], values, f"solver {values['solver']}")
    out = Output(as_json, quiet)
    from qexport.quantization.quantize import quantize as run

    with out.listening() as on_event:
        result = run(
            model,
            output,
            spec,
            adapters=adapters,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            on_event=on_event,
        )
    out.card(result.path)
    told = _gguf_summary(result) if result.files else _summary(result)
    out.result({**asdict(result), "path": str(result.path)}, told)
    if result.tensors and not as_json and not quiet:
        title = "largest errors" + (" of the smallest file" if len(result.files) > 1 else "")
        out.table(title, ("tensor", "bits", "relative error", "of outputs"), _worst(result), {})


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave, in the spec's types."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "bits" in given:
        given["bits"] = int(given["bits"])
    return given


def _summary(result: QuantizeResult) -> str:
    method = result.method if result.method == result.solver else f"{result.method} ({result.solver})"
    bits = " and ".join(map(str, sorted({error.bits for error in result.tensors})))
    twice = ", written twice" if result.copies > 1 else ""
    return (
        f"{result.path}: {method} {bits} bits, {result.format}, {result.quantized_layers} layers "
        f"quantized ({result.layer_bits_per_weight:.2f} bits a weight), {format_size(result.size_bytes)} in "
        f"all ({result.bits_per_weight:.2f}){twice}, {result.seconds:.1f} s, "
        f"peak memory {format_size(result.peak_bytes)}"
    )


def _gguf_summary(result: QuantizeResult) -> str:
    """A line for each file, and one of what it took."""
    usual = result.solver in ("search", result.method)
    method = result.method if usual else f"{result.method} ({result.solver})"
    lines = [
        f"{result.path / file.file}: {method} {file.type}, {format_size(file.size_bytes)} "
        f"({file.bits_per_weight:.2f} bits a weight): "
        + ", ".join(f"{count} {kind}" for kind, count in file.types.items())
        for file in result.files
    ]
    lines.append(f"{result.seconds:.1f} s, peak memory {format_size(result.peak_bytes)}")
    return "\n".join(lines)


def _worst(result: QuantizeResult) -> list[tuple[str, str, str, str]]:
    return [
        (
            error.tensor,
            str(error.bits),
            f"{error.relative:.2%}",
            "" if error.weighted is None else f"{error.weighted:.2%}",
        )
        for error in result.worst()
    ]
