"""The YAML on top of a model card, in the Hub's words.

Keys and values: https://huggingface.co/docs/hub/model-cards and huggingface_hub's `repocard_data.py`, which
also writes the model index.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qexport.report.card_facts import LORA, CardFacts
from qexport.report.card_origins import Origin, hub_ids
from qexport.report.content import Measure, Report, Row
from qexport.verification.runtimes.support import GGUF

_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_FORM_TAGS = {
    "gptq_v2": ("gptq",),
    "hqq-safetensors": ("hqq",),
    GGUF: ("gguf",),
    LORA: ("gguf", "lora"),
    "16-bit": (),
}
_LIBRARIES = {"mlx": "mlx", GGUF: "gguf", LORA: "gguf", "hqq": "hqq", "hqq-safetensors": "hqq"}
# What a source's tags say of its own files, which are not these.
_OF_ITS_FILES = re.compile(
    r"(base_model|license|region|dataset|language|library|deploy):.*|.*\d-?bit|q\d\w*|iq\d\w*|gguf|ggml|imatrix|gptq"
    r"|awq|hqq|eetq|mlx|exl\d|bitsandbytes|bnb|compressed-tensors|quantized|quantization|safetensors|pytorch|tf"
    r"|jax|onnx|transformers|peft|lora|dora|adapter|qexport|conversational|text-generation(-inference)?"
    r"|endpoints_compatible|autotrain_compatible|custom_code|has_space|eval-results|merge|mergekit",
    re.IGNORECASE,
)
# score -> the Hub's name of the metric, and ours
_TEXT_METRICS = {
    "bleu": ("bleu", "BLEU"),
    "chrf": ("chrf", "chrF"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "exact_match": ("exact_match", "Exact match"),
}
_DIGITS = 6  # of a number that was measured; what follows is noise
_NAMES_OF_DATA = ("dataset", "name", "text", "file", "path")
_NOT_OF_DATA = {*_NAMES_OF_DATA, "config", "split", "revision", "versions"}


def card_metadata(facts: CardFacts, title: str, report: Report | None, own: Sequence[Row]) -> dict[str, Any]:
    """All keys that can be told; `own` are the report's rows of these files, under `title` in the index."""
    found: dict[str, Any] = {}
    if languages := _union(facts, "language"):
        found["language"] = languages
    found |= _licence(facts)
    bases, relation = base_models(facts)
    if bases:
        found["base_model"] = bases if len(bases) > 1 else bases[0]
        if relation:
            found["base_model_relation"] = relation
    if adapters := [origin.hub_id for origin in facts.adapters if origin.hub_id]:
        found["adapters"] = adapters
    found["library_name"] = _LIBRARIES.get(facts.form, "transformers")
    if facts.task:
        found["pipeline_tag"] = facts.task
    found["tags"] = _tags(facts)
    if datasets := _union(facts, "datasets"):
        found["datasets"] = datasets
    if index := _model_index(facts, title, report, own):
        found["model-index"] = index
    return found


def roots(facts: CardFacts) -> tuple[Origin, ...]:
    """The models at the beginning of all."""
    return tuple(origin for origin in facts.models if not origin.origins)


def base_models(facts: CardFacts) -> tuple[list[str], str | None]:
    """Ids of the Hub's models that these weights come from, and the relation; none where it is not known.

    A quantized fine-tune that is not on the Hub itself is a fine-tune of its base: among the base's own
    quantizations nobody would look for it, nor expect it.
    """
    direct = [origin.hub_id for origin in roots(facts) if origin.hub_id]
    local = [origin for origin in roots(facts) if not origin.hub_id]
    told = [one for origin in local for one in hub_ids(origin.card.get("base_model"), facts.directory)]
    named = [origin.base_model for origin in facts.adapters if origin.base_model]
    ids = list(dict.fromkeys([*direct, *told] or named))
    if facts.form == LORA:
        return ids, "adapter"
    if facts.adapters:
        return ids, "merge" if len(facts.adapters) > 1 else "finetune"
    if told:
        relation = next((origin.card.get("base_model_relation") for origin in local), None)
        return ids, relation if relation in _RELATIONS else "finetune"
    return ids, "quantized" if facts.quantization or facts.form == GGUF else None


def _cards(facts: CardFacts) -> Iterator[Origin]:
    yield from facts.models
    yield from facts.adapters


def _texts(value: object) -> Iterator[str]:
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str) and one.strip():
            yield one.strip()


def _union(facts: CardFacts, key: str) -> list[str]:
    """A key of all the sources' cards, each entry once."""
    return list(dict.fromkeys(text for origin in _cards(facts) for text in _texts(origin.card.get(key))))


def _licence(facts: CardFacts) -> dict[str, Any]:
    """The licence of the model that all comes from: by its card, its text, or the text that came along."""
    for origin in _cards(facts):
        if names := list(_texts(origin.card.get("license"))):
            found: dict[str, Any] = {"license": names[0] if len(names) == 1 else names}
            if name := next(_texts(origin.card.get("license_name")), ""):
                found["license_name"] = name
            if link := _licence_link(next(_texts(origin.card.get("license_link")), ""), origin, facts):
                found["license_link"] = link
            return found
    known = next((origin.licence for origin in facts.models if origin.licence), None)
    known = known or facts.licence or facts.header.get("general.license")
    if known:
        return {"license": str(known)}
    return {"license": "other", "license_link": facts.licence_file} if facts.licence_file else {}


def _licence_link(link: str, origin: Origin, facts: CardFacts) -> str:
    if not link or link.startswith("https://") or (facts.directory / Path(link).name).is_file():
        return link if link.startswith("https://") else Path(link).name if link else ""
    return f"https://huggingface.co/{origin.hub_id}/blob/main/{link.lstrip('./')}" if origin.hub_id else ""


def _tags(facts: CardFacts) -> list[str]:
    ours = [*_FORM_TAGS.get(facts.form, (facts.form,))]
    bits = {facts.bits} if facts.bits else {_type_bits(file.type) for file in facts.files if file.type}
    if len(bits) == 1 and (known := next(iter(bits))):
        ours.append(f"{known}-bit")
    if facts.recipe.get("options", {}).get("solver") == "importance":
        ours.append("imatrix")
    if facts.chat:
        ours.append("conversational")
    carried = [tag for tag in _union(facts, "tags") if not _OF_ITS_FILES.fullmatch(tag)]
    return list(dict.fromkeys([*ours, "qexport", *carried]))


def _type_bits(kind: str) -> int | None:
    """Bits of a GGUF type that has codes, by its name: 4 of q4_k_m."""
    found = re.match(r"(?:i?q|tq|mxfp)(\d)", kind.lower())
    return int(found[1]) if found else None


def _model_index(
    facts: CardFacts, title: str, report: Report | None, own: Sequence[Row]
) -> list[dict[str, Any]] | None:
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    task = facts.task or "text-generation"
    groups: dict[str, list[EvalResult]] = {}  # by data: custom ones of several names would become one
    for metric, name, value, error, recipe in _measured(facts, report, own):
        if not math.isfinite(value):
            continue
        result = EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=_data_type(recipe),
            dataset_name=_data_name(recipe),
            dataset_config=_text_of(recipe, "config"),
            dataset_split=_text_of(recipe, "split"),
            dataset_revision=_text_of(recipe, "revision"),
            dataset_args=_settings(recipe),
            metric_type=metric,
            metric_name=name,
            metric_value=_rounded(value),
            metric_args={key: _rounded(bound) for key, bound in error.items()} or None,
        )
        groups.setdefault(repr((result.dataset_name, result.dataset_args)), []).append(result)
    indices = [eval_results_to_model_index(title, results)[0] for results in groups.values()]
    results = [one for index in indices for one in index["results"]]
    return [{"name": title, "results": results}] if results else None


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


_Measured = tuple[str, str, float, dict[str, float], Mapping[str, Any]]


def _measured(facts: CardFacts, report: Report | None, own: Sequence[Row]) -> Iterator[_Measured]:
    """Each number: the metric's id and name, its value, its error, and its recipe."""
    if report is None or not own:
        yield from _from_figures(facts.figures)
        return
    for row in own:
        of = f", {row.variant}" if len(own) > 1 else ""
        text = _recipe(report, "perplexity")
        yield "perplexity", f"Perplexity{of}", row.perplexity.value, _error(row.perplexity), text
        if row.loss:
            name = f"Rise of perplexity over full precision{of}"
            yield "perplexity_increase", name, row.loss.value, _error(row.loss), text
        for metric, name, measure in (
            ("kl_divergence", "KL divergence to full precision, nats a token", row.kl),
            ("top1_agreement", "Same most likely token as full precision", row.same_top),
        ):
            if measure:
                yield metric, name + of, measure.value, _error(measure), _recipe(report, "kl")
        for field, (metric, name) in _TEXT_METRICS.items() if row.text else ():
            score = getattr(row.text, field)
            bounds = {"low": score.low, "high": score.high}
            yield metric, name + of, score.value, bounds, _recipe(report, "answers")
        for task, measure in row.tasks.items():
            yield task.rpartition("/")[2], f"{task}{of}", measure.value, _error(measure), {"dataset": task}


def _from_figures(figures: Mapping[str, Any]) -> Iterator[_Measured]:
    for key, name in (("perplexity", "Perplexity"), ("bleu", "BLEU")):
        value, recipe = figures.get(key), figures.get(f"{key}_recipe")
        if isinstance(value, (int, float)) and isinstance(recipe, dict):
            error = figures.get(f"{key}_se")
            yield key, name, float(value), {"standard_error": error} if error else {}, recipe


def _recipe(report: Report, measure: str) -> Mapping[str, Any]:
    return report.recipes.get(measure, {})


def _error(measure: Measure) -> dict[str, float]:
    error = measure.standard_error
    return {} if error is None or not math.isfinite(error) else {"standard_error": error}


def _text_of(recipe: Mapping[str, Any], key: str) -> str | None:
    value = recipe.get(key)
    return value if isinstance(value, str) and value else None


def _data_name(recipe: Mapping[str, Any]) -> str:
    """What the data is called: a data set's name, or that of a file without its directories."""
    found = next(filter(None, (_text_of(recipe, key) for key in _NAMES_OF_DATA)), None)
    if found is None:
        return "held-out text" if "pairs" not in recipe else "held-out prompts and references"
    return found if _data_type(recipe) != "custom" else Path(found).name


def _data_type(recipe: Mapping[str, Any]) -> str:
    """The data set's id, or that it is somebody's own."""
    return _text_of(recipe, "dataset") or "custom"


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """What else the recipe tells: numbers, texts and switches."""
    plain = (str, int, float, bool)
    found = {
        key: value for key, value in recipe.items() if key not in _NOT_OF_DATA and isinstance(value, plain)
    }
    return found or None


def names(origins: Iterable[Origin]) -> list[str]:
    """Their names, each once."""
    return list(dict.fromkeys(origin.name for origin in origins))
