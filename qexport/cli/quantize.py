"""`qexport quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qexport.cli.options import Names, make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.errors import SpecError
from qexport.results import PlanRow, QuantizeResult
from qexport.sizes import format_size
from qexport.specs import METHODS, SOLVERS, AnyQuantizeSpec, parse_bits, split_list, with_preset

_PLAN_COLUMNS = ("bits", "group", "layers", "weights", "predicted KL")


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
@click.option(
    "--method",
    "methods",
    required=True,
    type=Names(METHODS),
    help="how to quantize, one or several: gptq,awq",
)
@click.option(
    "--solver",
    "solvers",
    type=Names(SOLVERS),
    help="how codes are chosen, one or several; default: the method's",
)
@spec_options(*SOLVERS.values(), leave=["method", "solver"])
@click.option(
    "--plan-only", is_flag=True, help="write the plan of bits to the file OUTPUT, and quantize nothing"
)
@click.option("--overwrite", is_flag=True, help="replace a model that is there")
@click.option("--trust-remote-code", is_flag=True, help="run the code that the model brings")
@output_options
def quantize(
    model: str,
    output: Path,
    adapters: tuple[str, ...],
    methods: tuple[str, ...],
    solvers: tuple[str, ...] | None,
    plan_only: bool,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Quantize MODEL, a directory, GGUF file or Hub id.

    A method is a preset of solver, bits and format; --solver, --bits and --format override each. With several
    of these OUTPUT gets a directory for each, and those that need a calibration share it.

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
    out = Output(as_json, quiet)
    options = {"overwrite": overwrite, "trust_remote_code": trust_remote_code}
    bits: tuple[str, ...] = given.pop("bits") or ()
    if len(methods) > 1 or len(solvers or ()) > 1 or len(bits) > 1:
        if plan_only:
            raise SpecError("--plan-only with several outputs", expected="one method with one --bits")
        _several(model, output, methods, bits, solvers or (), given, out, adapters=adapters, **options)
        return
    solver = solvers[0] if solvers else None
    width = {"bits": parse_bits(bits[0])} if bits else {}
    values = with_preset({"method": methods[0], "solver": solver, **_given(given), **width})
    spec = make_spec(SOLVERS[values["solver"]], values, f"solver {values['solver']}")
    if plan_only:
        _plan_alone(model, output, spec, out, adapters=adapters, **options)
        return
    from qexport.quantization.quantize import quantize as run

    with out.listening() as on_event:
        result = run(model, output, spec, adapters=adapters, on_event=on_event, **options)
    out.card(result.path)
    told = _gguf_summary(result) if result.files else _summary(result)
    out.result({**asdict(result), "path": str(result.path)}, told)
    if result.plan and not as_json:
        out.table("plan", _PLAN_COLUMNS, plan_rows(result.plan), {})
    if result.tensors and not as_json and not quiet:
        title = "largest errors" + (" of the smallest file" if len(result.files) > 1 else "")
        out.table(title, ("tensor", "bits", "relative error", "of outputs"), _worst(result), {})


def _several(
    model: str,
    output: Path,
    methods: Sequence[str],
    bits: Sequence[str],
    solvers: Sequence[str],
    given: dict[str, Any],
    out: Output,
    **options: Any,
) -> None:
    """Every method with every solver and width, in a directory each."""
    from qexport.graph.build import named
    from qexport.graph.variants import variant_specs
    from qexport.quantization.quantize import quantize_several

    types = split_list(given.get("type") or ())
    others = {name: value for name, value in _given(given).items() if name != "type"}
    specs = variant_specs(methods, bits, types, solvers, others, out.note)
    outs = {output / name: spec for name, spec in named(specs)}
    with out.listening() as on_event:
        results = quantize_several(model, outs, on_event=on_event, **options)
    for result in results:
        out.card(result.path)
    told = [_gguf_summary(result) if result.files else _summary(result) for result in results]
    entries = [{**asdict(result), "path": str(result.path)} for result in results]
    out.result({"outputs": entries}, "\n".join(told))


def _plan_alone(
    model: str,
    output: Path,
    spec: AnyQuantizeSpec,
    out: Output,
    **options: Any,
) -> None:
    from qexport.quantization.allotment.make import write_plan

    with out.listening() as on_event:
        plan = write_plan(model, output, spec, on_event=on_event, **options)
    size = format_size(plan.size_bytes)
    told = f"{output}: {plan.bits:.2f} bits on average, {size} in all; for --plan"
    out.result(plan.content(), told)
    if not out.json:
        out.table("plan", _PLAN_COLUMNS, plan_rows(plan.rows()), {})


def plan_rows(rows: Sequence[PlanRow]) -> list[tuple[str, ...]]:
    """Cells of a table, a row for each kind of layers."""
    return [
        (
            str(row.bits),
            {None: "", -1: "row"}.get(row.group_size, str(row.group_size)),
            str(row.layers),
            f"{row.weights / 1e6:.3g} M",
            "" if row.loss is None else f"{row.loss:.4f}",
        )
        for row in rows
    ]


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value not in (None, ())}


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
