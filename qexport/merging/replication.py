"""`layer_replication`: a deeper model whose added layers are copies of the base's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qexport.checkpoint.checkpoint import Checkpoint, PlainDecoder
from qexport.errors import AdapterError
from qexport.merging.adapter import Adapter

_LAYER = re.compile(r"(?P<stem>(?:.*\.)?(?:layers|h))\.(?P<number>\d+)\.(?P<rest>.+)")


def replicated(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """The base as the adapters saw it: itself, or with the layers that they were trained on.

    Raises AdapterError when the adapters differ in it, for ranges that are none, and for a quantized base.
    """
    wanted = [adapter.config.get("layer_replication") for adapter in adapters]
    if not any(wanted):
        return checkpoint
    adapter = adapters[next(n for n, ranges in enumerate(wanted) if ranges)]
    if any(ranges != wanted[0] for ranges in wanted):
        raise AdapterError(
            f"{adapter.path} was trained on replicated layers, another adapter was not, or on others",
            expected="adapters of one layer_replication",
        )
    if not isinstance(checkpoint.decoder, PlainDecoder):
        kind = "a GGUF file" if checkpoint.quantization is None else "quantized"
        raise AdapterError(
            f"{adapter.path} was trained on replicated layers, and the base is {kind}",
            expected="a full-precision base in safetensors",
        )
    matches = {name: _LAYER.fullmatch(name) for name in checkpoint.stored}
    depth = max((int(m["number"]) + 1 for m in matches.values() if m), default=0)
    sources = _sources(adapter, depth)
    copies: dict[int, list[int]] = {}
    for copy, source in enumerate(sources):
        copies.setdefault(source, []).append(copy)
    stored = {}
    for name, tensor in checkpoint.stored.items():
        match = matches[name]
        for number in copies.get(int(match["number"]), []) if match else ():
            assert match is not None  # noqa: S101 - there are no numbers otherwise
            copied = f"{match['stem']}.{number}.{match['rest']}"
            stored[copied] = replace(tensor, name=copied)
        if match is None:
            stored[name] = tensor
    config = {**checkpoint.config, **_deeper(checkpoint.config, sources)}
    return replace(checkpoint, config=config, stored=stored, decoder=PlainDecoder(stored))


def _sources(adapter: Adapter, depth: int) -> list[int]:
    """The base's layer that each layer of the deeper model is a copy of."""
    ranges: Any = adapter.config["layer_replication"]
    sources: list[int] = []
    for pair in ranges if isinstance(ranges, list) else [None]:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(type(n) is int for n in pair)
            or not 0 <= pair[0] < pair[1] <= depth
        ):
            raise AdapterError(
                f"{adapter.path}: layer_replication is {str(ranges)[:80]}",
                expected=f"ranges of the base's {depth} layers, such as [[0, {depth}]]",
            )
        sources += range(pair[0], pair[1])
    return sources


def _deeper(config: Mapping[str, Any], sources: Sequence[int]) -> dict[str, Any]:
    """The keys of the config that tell the depth, or have an entry for every layer."""
    changed: dict[str, Any] = {}
    for key in ("num_hidden_layers", "n_layer"):
        if key in config:
            changed[key] = len(sources)
    types = config.get("layer_types")
    if isinstance(types, list) and max(sources) < len(types):
        changed["layer_types"] = [types[source] for source in sources]
    return changed
