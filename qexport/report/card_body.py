"""The body of a model card: what the model is, how to run it, what was lost, how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from qexport.report.card_facts import LORA, PLOT_FILE, CardFacts
from qexport.report.card_metadata import names, roots
from qexport.report.card_origins import Origin
from qexport.report.content import Report, Row
from qexport.report.markdown import code, code_block, plain
from qexport.report.runtime_commands import commands
from qexport.report.tables import format_loss, table
from qexport.report.verdict import BROKEN
from qexport.sizes import format_size
from qexport.verification.runtimes.support import GGUF, PLAIN, why_unread

_FORMS = {
    "gptq": "GPTQ",
    "gptq_v2": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "hqq-safetensors": "HQQ",
    "mlx": "MLX",
    "eetq": "EETQ",
    GGUF: "GGUF",
    LORA: "GGUF LoRA",
}
_SOLVERS = {
    "rtn": "rounding to nearest",
    "search": "scale search",
    "hqq": "HQQ",
    "importance": "a scale search that weighs inputs by their importance",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "awq+gptq": "AWQ's scales, then GPTQ",
}
_LARGE_LOSS = 0.1  # a rise of perplexity from which on a card warns
_SHOWN_DIGITS = 16  # of a hash; qexport.json has it whole
# columns of a report's table that say nothing to who only uses the files
_NOT_SHOWN = ("method", "bits", "time", "peak memory", "tokens/s", "gate")
# options that change nothing in what the weights say
_NOT_TOLD = ("max_shard_size", "device", "split", "legacy_format", "tokenizer", "weights")


def title_of(facts: CardFacts) -> str:
    """What the model is called: by what it was made of, and in what form it is."""
    models = [name.rpartition("/")[2] for name in names(roots(facts))]
    parts = models + [name.rpartition("/")[2] for name in names(facts.adapters)]
    called = " + ".join(parts) or facts.directory.resolve().name
    if facts.form == LORA:
        return f"{facts.header.get('general.name') or called}, LoRA as GGUF"
    if facts.form == PLAIN:
        return called
    types = [file.type.upper() for file in facts.files if file.type]
    form = " ".join((_FORMS.get(facts.form, facts.form), *types))
    return f"{called}, {form}" if types or not facts.bits else f"{called}, {form} {facts.bits}-bit"


def card_body(facts: CardFacts, report: Report | None, own: Sequence[Row], title: str) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=False,  # noqa: S701 - this is Markdown: markdown.py makes texts safe for it
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = files("qexport.report").joinpath("templates/card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title,
        summary=_summary(facts),
        warnings=list(_warnings(own)),
        commands=[
            {
                "runtime": command.runtime,
                "install": code_block(command.install, "sh") if command.install else "",
                "code": code_block(command.code, command.language),
                "note": command.note,
            }
            for command in commands(facts)
        ],
        unread=_unread(facts),
        table=_loss_table(report, own) if report else "",
        legend=_legend(report) if report else "",
        verdict=plain(report.verdict) if report else "",
        measured=list(_measured(facts)) if report is None else [],
        scored="Scores" if facts.form == PLAIN else "What was lost",
        unmeasured=""
        if facts.form in (PLAIN, LORA)
        else "Nothing was measured against the full-precision model.",
        plot=PLOT_FILE if facts.plot else "",
        plot_text="Loss against bits a weight",
        recipe_lines=[plain(line) for line in report.recipe_lines] if report else [],
        made=list(_made(facts)),
        typed=any(file.type for file in facts.files),
        files=[
            {
                "name": code(file.name, cell=True),
                "type": plain((file.type or "").upper()),
                "bits": f"{file.bits_per_weight:.2f}" if file.bits_per_weight else "",
                "size": format_size(file.size),
                "hash": f"`{file.blake3[:_SHOWN_DIGITS]}…`" if file.blake3 else "",
            }
            for file in facts.files
        ],
        manifest=_manifest_line(facts),
    )


def _link(origin: Origin) -> str:
    """A model's name, with a link where it is on the Hub."""
    if origin.hub_id is None:
        return code(origin.name)
    return f"[{plain(origin.name)}](https://huggingface.co/{origin.hub_id})"


def _listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def _summary(facts: CardFacts) -> str:
    """One sentence: what this is, of what."""
    bases = _listed(list(dict.fromkeys(map(_link, roots(facts)))))
    adapters = list(dict.fromkeys(map(_link, facts.adapters)))
    if facts.form == LORA:
        of = f" for {bases}" if bases else ""
        return f"A LoRA adapter{of}, as a GGUF file that llama.cpp adds to its base."
    subject = bases or code(facts.directory.resolve().name)
    if adapters:
        subject += f" with the adapter{'s' if len(adapters) > 1 else ''} {_listed(adapters)} merged in"
    if facts.form == PLAIN:
        dtype = facts.config.get("dtype") or facts.config.get("torch_dtype")
        return f"{subject}, not quantized{f' ({plain(dtype)})' if dtype else ''}."
    form = _FORMS.get(facts.form, plain(facts.form))
    options = facts.recipe.get("options") or {}
    solver = _SOLVERS.get(str(options.get("solver"))) if facts.recipe.get("task") == "quantize" else None
    types = [plain(file.type.upper()) for file in facts.files if file.type]
    bits = f" to {facts.bits} bits" if facts.bits else f" to {_listed(types)}" if types else ""
    return f"{subject}, quantized{bits}{f' by {solver}' if solver else ''}, in {form}'s format."


def _warnings(own: Sequence[Row]) -> Iterator[str]:
    """What a user should know before the download: a gate that failed, a large loss."""
    for row in own:
        of = f"{plain(row.variant)}: it" if len(own) > 1 else "It"
        for failure in row.failures:
            yield f"{of} {plain(failure)}."
        if row.loss and not row.loss.value < _LARGE_LOSS:
            what = "not usable for most purposes" if not row.loss.value < BROKEN else "noticeably worse"
            rise = format_loss(row.loss.value, None).removeprefix("+")
            yield f"{of}s perplexity is {rise} above full precision's: the answers are {what}."


def _loss_table(report: Report, own: Sequence[Row]) -> str:
    """The report's rows as Markdown, those of these files in bold."""
    titles, lines = table(report.rows, short=True)
    shown = [number for number, title in enumerate(titles) if title not in _NOT_SHOWN]
    made = [
        "| " + " | ".join(plain(titles[number]) for number in shown) + " |",
        "| --- |" + " ---: |" * (len(shown) - 1),
    ]
    for row, line in zip(report.rows, lines, strict=True):
        mark = "**" if row in own else ""
        cells = [f"{mark}{plain(line[number])}{mark}" if line[number] else "" for number in shown]
        made.append(f"| {' | '.join(cells)} |")
    return "\n".join(made)


def _legend(report: Report) -> str:
    """What the columns mean."""
    told = "Loss is the rise of perplexity over full precision, ± the standard error, paired on the same text"
    if any(row.kl for row in report.rows):
        told += "; KL is the divergence from full precision, nats a token"
    if any(row.text for row in report.rows):
        told += "; BLEU comes with half its 95 % bootstrap interval"
    return f"{told}."


def _unread(facts: CardFacts) -> str:
    why = why_unread(facts.form)
    return f"No runtime is known to read these files{f': {why}' if why else ''}."


def _measured(facts: CardFacts) -> Iterator[str]:
    """The numbers in qexport.json, for a card without a report."""
    figures = facts.figures
    for key, name in (("perplexity", "Perplexity"), ("bleu", "BLEU")):
        value, recipe = figures.get(key), figures.get(f"{key}_recipe")
        if isinstance(value, (int, float)) and isinstance(recipe, dict):
            error = figures.get(f"{key}_se")
            spread = f" ±{error:.3f}" if isinstance(error, float) else ""
            told = _pairs({k: v for k, v in recipe.items() if k not in ("data", "versions")})
            yield f"{name} {value:.4g}{spread} on data of BLAKE3 `{str(recipe.get('data'))[:12]}` ({told})"


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{plain(key)} {plain(value)}" for key, value in options.items())


def _made(facts: CardFacts) -> Iterator[tuple[str, str]]:
    """How it was made: label and text."""
    manifest, recipe = facts.manifest, facts.recipe
    for origin in (*facts.models, *facts.adapters):
        details = [origin.kind, f"weight {origin.weight:g}" if origin.weight is not None else ""]
        details += [f"revision {origin.revision[:12]}"] if origin.revision else []
        told = ", ".join(plain(detail) for detail in details if detail)
        label = "Adapter" if origin.adapter else "Base" if not origin.origins else "Model"
        yield label, _link(origin) + (f" ({told})" if told else "")
    if manifest:
        told = ", ".join(code(f"{key}={_value(value)}") for key, value in _options(facts).items())
        step = code(f"qexport {recipe.get('task')}")
        yield "Step", f"{step} with {told}" if told else step
    if isinstance(changed := facts.figures.get("tensors_changed"), int):
        yield "Tensors that the adapters changed", f"{changed} of {plain(facts.figures.get('tensors'))}"
    if isinstance(calibration := facts.figures.get("calibration"), dict):
        yield "Calibration", _calibration(calibration)
    if errors := _errors(facts.figures):
        worst = max(errors, key=lambda one: float(one["relative"]))
        mean = sum(float(one["relative"]) for one in errors) / len(errors)
        most = f"{worst['relative']:.2%} in {code(worst['tensor'])}, the worst of {len(errors)}"
        yield "Error of the matrices, |W' − W| / |W|", f"{mean:.2%} on average, {most}"
    if manifest:
        inputs = recipe.get("inputs") or {}
        told = ", ".join(f"{plain(name)} `{str(value)[:_SHOWN_DIGITS]}…`" for name, value in inputs.items())
        yield "Hashes of what went in", told or "none"
        versions = manifest.get("versions") or {}
        counted = {key: versions[key] for key in ("python", *recipe.get("packages", ())) if key in versions}
        yield "Versions", _pairs({"qexport": manifest.get("qexport"), **counted})


def _options(facts: CardFacts) -> dict[str, Any]:
    """The recipe's options that say something about the weights."""
    options = facts.recipe.get("options") or {}
    left_out = set(_NOT_TOLD)
    if facts.form == GGUF:
        left_out.add("bits")  # its types say it
    if facts.recipe.get("task") == "merge" and not options.get("combine"):
        left_out |= {"majority_sign", "seed"}
    return {
        key: value
        for key, value in options.items()
        if value not in (None, False, "", [], {}) and key not in left_out
    }


def _manifest_line(facts: CardFacts) -> str:
    if not facts.manifest:
        return ""
    more = ", with the error of each matrix" if _errors(facts.figures) else ""
    return f"`qexport.json` has all of this for programs{more}."


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _calibration(told: Mapping[str, Any]) -> str:
    texts = [
        f"{plain(Path(str(one.get('source'))).name)} (BLAKE3 `{str(one.get('blake3'))[:12]}…`)"
        for one in told.get("sources") or ()
    ]
    size = f"{told.get('samples')} samples of {told.get('length')} tokens, seed {told.get('seed')}"
    return f"{_listed(texts)}; {size}" if texts else size


def _errors(figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The errors of all matrices, of a GGUF's files all together."""
    found = list(figures.get("tensor_errors") or ())
    inner = figures.get("files")
    for file in inner.values() if isinstance(inner, dict) else ():
        found += file.get("tensor_errors") or ()
    return [one for one in found if isinstance(one.get("relative"), float)]
