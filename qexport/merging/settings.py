"""What a LoRA adapter's config says about each module: its rank, its scale, which variant it is."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qexport.errors import AdapterError
from qexport.merging.adapter import Adapter
from qexport.merging.lora import lora_scale

PLAIN_NAME = re.compile(r"[\w.]+")
ALL_LINEAR = "all-linear"  # PEFT's word in target_modules, no expression
_PATTERN_SECONDS = 0.1
_SHOWN = 80
_NO_RANK = 1 << 31
_NO_NUMBER = 1e38
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

    def rank_of(self, module: str) -> int:
        """The rank of a module: `rank_pattern`, or `r`."""
        return _whole(self.where, "rank_pattern", by_pattern(self.where, self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of B A: `alpha_pattern`, or `lora_alpha`, over the rank."""
        alpha = _number(self.where, "alpha_pattern", by_pattern(self.where, self.alphas, module, self.alpha))
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
            raise AdapterError(
                f"{where}: {name} is {reprlib.repr(pattern)}", expected="an object of names and numbers"
            )
    return LoraSettings(
        where,
        _whole(where, "r", config.get("r")),
        _number(where, "lora_alpha", config.get("lora_alpha")),
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        rank_stabilized=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )


def is_plain_lora(adapter: Adapter) -> bool:
    """Whether our own arithmetic does: LoRA and DoRA on a base that their initialisation left alone."""
    config = adapter.config
    return (
        adapter.kind == "LORA"
        and config.get("init_lora_weights", True) in _HARMLESS_INITS
        and not any(config.get(variant) for variant in _VARIANTS)
    )


def not_converted(found: str) -> AdapterError:
    """The error about an adapter whose initialisation changed the base, in a way that is not to be redone."""
    return AdapterError(
        found,
        expected="an adapter that was saved converted to plain LoRA",
        remedy="save it converted: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
    )


def _whole(where: str, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < _NO_RANK:
        raise AdapterError(f"{where}: {key} is {reprlib.repr(value)}", expected="a rank of 1 or more")
    return value


def _number(where: str, key: str, value: Any) -> float:
    # fp32, in which the products are made, holds no larger one
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < _NO_NUMBER:
        raise AdapterError(f"{where}: {key} is {reprlib.repr(value)}", expected="a number")
    return float(value)


def by_pattern(where: str, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern that matches the whole name, or its end after a dot (PEFT, get_pattern_key)."""
    for pattern, value in patterns.items():
        if _matches(where, pattern, module):
            return value
    return default


def _matches(where: str, pattern: str, module: str) -> bool:
    if PLAIN_NAME.fullmatch(pattern):
        # as a regular expression each dot stands for any character; in real names it stands for itself
        return module == pattern or module.endswith(f".{pattern}")
    return matches_whole(where, pattern, module, before=r"(.*\.)?")


def matches_whole(where: str, pattern: str, text: str, *, before: str = "") -> bool:
    """Whether an expression out of an adapter's config, or `before` and it, matches all of `text`.

    Raises AdapterError when it is none, or takes too long.
    """
    import regex  # its matches can be timed out: the expression comes out of a downloaded file

    try:
        return bool(regex.fullmatch(f"{before}({pattern})", text, timeout=_PATTERN_SECONDS))
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        shown = f"{where}: the pattern {pattern[:_SHOWN]!r}"
        raise AdapterError(
            f"{shown} takes too long"
            if isinstance(error, TimeoutError)
            else f"{shown} is no regular expression ({error})",
            expected="names of modules, or expressions that match them",
        ) from error
