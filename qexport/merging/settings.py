"""What a LoRA adapter's config says about each module: its rank, its scale, which variant it is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qexport.errors import AdapterError
from qexport.merging.adapter import Adapter
from qexport.merging.lora import lora_scale

_PLAIN_NAME = re.compile(r"[\w.]+")
_PATTERN_SECONDS = 0.1
# initialisations that leave the base as it was
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# variants whose arithmetic is PEFT's to do
_VARIANTS = ("kasa_config", "monteclora_config", "velora_config", "use_bdlora")
_BY_TOKEN = {
    "alora_invocation_tokens": "activated LoRA: its change begins where the invocation tokens stand",
    "arrow_config": "routed by Arrow: each token chooses its experts when the model runs",
}


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA config's part in the arithmetic."""

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    rank_stabilized: bool
    dora: bool
    transposed: bool

    def rank_of(self, module: str) -> int:
        """The rank of a module: `rank_pattern`, or `r`."""
        return _whole(self.where, "rank_pattern", _by_pattern(self.where, self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of B A: `alpha_pattern`, or `lora_alpha`, over the rank."""
        alpha = _number(self.where, "alpha_pattern", _by_pattern(self.where, self.alphas, module, self.alpha))
        return lora_scale(alpha, self.rank_of(module), rank_stabilized=self.rank_stabilized)


def lora_settings(adapter: Adapter) -> LoraSettings:
    """Reads the config. Raises AdapterError for values that are none, and for what no weight can hold."""
    config, where = adapter.config, str(adapter.path)
    for option, what in _BY_TOKEN.items():
        if config.get(option):
            raise AdapterError(
                f"{where} cannot be merged: {what}", remedy="serve it with PEFT, or train a plain LoRA"
            )
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise AdapterError(f"{where}: {name} is no object of names and numbers")
    return LoraSettings(
        where,
        _whole(where, "r", config.get("r")),
        _number(where, "lora_alpha", config.get("lora_alpha")),
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        rank_stabilized=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        transposed=bool(config.get("fan_in_fan_out")),
    )


def is_plain_lora(adapter: Adapter) -> bool:
    """Whether our own arithmetic does: LoRA and DoRA on a base that their initialisation left alone."""
    config = adapter.config
    return (
        adapter.kind == "LORA"
        and config.get("init_lora_weights", True) in _HARMLESS_INITS
        and not any(config.get(variant) for variant in _VARIANTS)
    )


def _whole(where: str, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{where}: {key} is {value!r}", expected="a rank of 1 or more")
    return value


def _number(where: str, key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise AdapterError(f"{where}: {key} is {value!r}", expected="a number")
    return float(value)


def _by_pattern(where: str, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern that matches the whole name, or its end after a dot (PEFT, get_pattern_key)."""
    for pattern, value in patterns.items():
        if _matches(where, pattern, module):
            return value
    return default


def _matches(where: str, pattern: str, module: str) -> bool:
    if _PLAIN_NAME.fullmatch(pattern):
        # as a regular expression each dot stands for any character; in real names it stands for itself
        return module == pattern or module.endswith(f".{pattern}")
    import regex  # its matches can be timed out: the expression comes out of a downloaded file

    try:
        return bool(regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS))
    except (regex.error, TimeoutError) as error:
        raise AdapterError(
            f"{where}: the pattern {pattern!r} "
            + (
                "takes too long" if isinstance(error, TimeoutError) else f"is no regular expression ({error})"
            ),
            expected="names of modules, or expressions that match them",
        ) from error
