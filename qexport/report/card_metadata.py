"""The YAML on top of a model card, in the Hub's words.

Keys and values: https://huggingface.co/docs/hub/model-cards and huggingface_hub's `repocard_data.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qexport.report.card_facts import LORA, CardFacts
from qexport.report.card_index import model_index, numbers
from qexport.report.card_origins import Origin, hub_ids
from qexport.report.content import Report, Row
from qexport.verification.runtimes.support import GGUF

_LICENCE = ("license", "license_name", "license_link")
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
    if index := model_index(facts.task, title, numbers(facts.figures, report, own)):
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
    told = {_type_bits(file.type) for file in facts.files if file.type}
    bits: set[float | None] = {facts.bits} if facts.bits else {*told}
    if len(bits) == 1 and (known := next(iter(bits))):
        ours.append(f"{known:g}-bit")
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


def names(origins: Iterable[Origin]) -> list[str]:
    """Their names, each once."""
    return list(dict.fromkeys(origin.name for origin in origins))


def metadata_of_several(
    cards: Sequence[Mapping[str, Any]], index: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """One card's keys from those of several outputs, of one origin as a rule, and a `model-index` of all.

    Lists become one; of what can be told once only, the licence is the first one's and the relation that of
    the most; library and task stay away where the outputs differ in them.
    """
    found: dict[str, Any] = {}
    if languages := _all_of(cards, "language"):
        found["language"] = languages
    found |= next(
        ({key: card[key] for key in _LICENCE if key in card} for card in cards if "license" in card), {}
    )
    if bases := _all_of(cards, "base_model"):
        found["base_model"] = bases if len(bases) > 1 else bases[0]
        relations = Counter(card["base_model_relation"] for card in cards if "base_model_relation" in card)
        if relations:
            found["base_model_relation"] = relations.most_common(1)[0][0]
    if adapters := _all_of(cards, "adapters"):
        found["adapters"] = adapters
    for key in ("library_name", "pipeline_tag"):
        if len({card.get(key) for card in cards}) == 1 and key in cards[0]:
            found[key] = cards[0][key]
    found["tags"] = _all_of(cards, "tags")
    if datasets := _all_of(cards, "datasets"):
        found["datasets"] = datasets
    return {**found, "model-index": index} if index else found


def _all_of(cards: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(text for card in cards for text in _texts(card.get(key))))
