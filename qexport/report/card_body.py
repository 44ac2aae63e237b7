"""The body of a model card: what the model is, how to run it, what was lost, how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from qexport.report.card_facts import LORA, PLOT_FILE, CardFacts
from qexport.report.card_loss import legend, loss_table, warnings
from qexport.report.card_metadata import names, roots
from qexport.report.card_origins import Origin
from qexport.report.content import Report, Row
from qexport.report.markdown import code, code_block, plain
from qexport.report.runtime_commands import commands
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
_SHOWN_DIGITS = 16  # of a hash; qexport.json has it whole
# options that change nothing in what the weights say
_NOT_TOLD = ("max_shard_size", "device", "split", "legacy_format", "tokenizer", "weights")


def called(facts: CardFacts) -> str:
    """What the model is called by what it was made of; empty where that is not known."""
    made_of = (*names(roots(facts)), *names(facts.adapters))
    return " + ".join(name.rpartition("/")[2] for name in made_of)


def form_of(facts: CardFacts) -> str:
    """The format's name, for people."""
    return "full precision" if facts.form == PLAIN else _FORMS.get(facts.form, facts.form)


def title_of(facts: CardFacts) -> str:
    """What the model is called: by what it was made of, and in what form it is."""
    name = called(facts) or facts.directory.resolve().name
    if facts.form == LORA:
        return f"{facts.header.get('general.name') or name}, LoRA as GGUF"
    if facts.form == PLAIN:
        return name
    types = [file.type.upper() for file in facts.files if file.type]
    form = " ".join((form_of(facts), *types))
    return f"{name}, {form}" if types or not facts.bits else f"{name}, {form} {facts.bits:g}-bit"


def rendered(template: str, **values: Any) -> str:
    """A template of ours with `values`, texts that are fit for Markdown."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=False,  # noqa: S701 - this is Markdown: markdown.py makes texts safe for it
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source = files("qexport.report").joinpath(f"templates/{template}").read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)


def card_body(facts: CardFacts, report: Report | None, own: Sequence[Row], title: str) -> str:
    """Our part of an output's card; `own` are the report's rows of these files."""
    return rendered(
        "card.md.jinja",
        title=title,
        summary=_summary(facts),
        warnings=list(warnings(own)),
        commands=shown_commands(facts),
        unread=_unread(facts),
        table=loss_table(report, own) if report else "",
        legend=legend(report) if report else "",
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


def shown_commands(facts: CardFacts) -> list[dict[str, str]]:
    """What runs these files, as a template takes it."""
    return [
        {
            "runtime": command.runtime,
            "install": code_block(command.install, "sh") if command.install else "",
            "code": code_block(command.code, command.language),
            "note": command.note,
        }
        for command in commands(facts)
    ]


def link(origin: Origin) -> str:
    """A model's name, with a link where it is on the Hub."""
    if origin.hub_id is None:
        return code(origin.name)
    return f"[{plain(origin.name)}](https://huggingface.co/{origin.hub_id})"


def listed(texts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def _bases(facts: CardFacts) -> str:
    return listed(list(dict.fromkeys(map(link, roots(facts)))))


def subject_of(facts: CardFacts, directory: Path) -> str:
    """What the weights are of, with links; where that is not known, what `directory` is called."""
    adapters = list(dict.fromkeys(map(link, facts.adapters)))
    merged = f" with the adapter{'s' if len(adapters) > 1 else ''} {listed(adapters)} merged in"
    bases = _bases(facts) or code(directory.resolve().name)
    return bases + merged if adapters else bases


def _summary(facts: CardFacts) -> str:
    """One sentence: what this is, of what."""
    if facts.form == LORA:
        bases = _bases(facts)
        of = f" for {bases}" if bases else ""
        return f"A LoRA adapter{of}, as a GGUF file that llama.cpp adds to its base."
    subject = subject_of(facts, facts.directory)
    if facts.form == PLAIN:
        dtype = facts.config.get("dtype") or facts.config.get("torch_dtype")
        form = f" ({plain(dtype)})" if dtype else ""
        if facts.figures.get("decoded_tensors"):
            return f"{subject}, decoded from codes{form}: what their quantization lost stays lost."
        return f"{subject}, not quantized{form}."
    form = plain(form_of(facts))
    options = facts.recipe.get("options") or {}
    solver = _SOLVERS.get(str(options.get("solver"))) if facts.recipe.get("task") == "quantize" else None
    types = [plain(file.type.upper()) for file in facts.files if file.type]
    bits = f" to {facts.bits:g} bits" if facts.bits else f" to {listed(types)}" if types else ""
    return f"{subject}, quantized{bits}{f' by {solver}' if solver else ''}, in {form}'s format."


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
        yield label, link(origin) + (f" ({told})" if told else "")
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
    return f"{listed(texts)}; {size}" if texts else size


def _errors(figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The errors of all matrices, of a GGUF's files all together."""
    found = list(figures.get("tensor_errors") or ())
    inner = figures.get("files")
    for file in inner.values() if isinstance(inner, dict) else ():
        found += file.get("tensor_errors") or ()
    return [one for one in found if isinstance(one.get("relative"), float)]
