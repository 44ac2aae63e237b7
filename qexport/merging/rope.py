"""Rotary scaling, written into a config in transformers 5's form (`rope_parameters`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qexport.errors import SpecError
from qexport.specs import MergeSpec

_DEFAULT_THETA = 10_000.0
# Llama 3.1's own values (its config.json); the factor is the user's
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def with_rope_scaling(config: Mapping[str, Any], spec: MergeSpec) -> dict[str, Any]:
    """The config with the scaling that `spec` asks for.

    `max_position_embeddings` grows by the factor, and yarn and llama3 keep the length the model was made
    for beside it; dynamic scaling sets in beyond `max_position_embeddings`, which stays.

    Raises SpecError for half an instruction, for a model without rotary embeddings and for one that is
    scaled already.
    """
    if spec.rope_scaling is None and spec.rope_factor is None:
        return dict(config)
    if spec.rope_scaling is None or spec.rope_factor is None:
        raise SpecError(
            "--rope-scaling and --rope-factor belong together", expected="--rope-scaling yarn --rope-factor 4"
        )
    if not math.isfinite(spec.rope_factor):
        raise SpecError(f"--rope-factor {spec.rope_factor}", expected="a finite number")
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": with_rope_scaling(config["text_config"], spec)}
    length = config.get("max_position_embeddings")
    parameters = config.get("rope_parameters")
    theta = config.get("rope_theta")
    if isinstance(parameters, dict):
        theta = parameters.get("rope_theta", theta)
    if not isinstance(length, int) or not (isinstance(parameters, dict) or theta is not None):
        raise SpecError(
            f"--rope-scaling: a {config.get('model_type')} model's config names no rotary embedding",
            expected="rope_parameters or rope_theta, and max_position_embeddings",
        )
    if isinstance(parameters, dict) and any(isinstance(value, dict) for value in parameters.values()):
        raise SpecError(
            f"--rope-scaling: a {config.get('model_type')} model has several rotary embeddings",
            expected="one for all layers",
        )
    present = config.get("rope_scaling") or parameters or {}
    kind = present.get("rope_type", present.get("type", "default")) if isinstance(present, dict) else present
    if kind != "default":
        raise SpecError(f"--rope-scaling: the base is scaled already ({kind})", expected="an unscaled base")
    scaled: dict[str, Any] = {
        **(parameters if isinstance(parameters, dict) else {}),
        "rope_theta": theta or _DEFAULT_THETA,
        "rope_type": spec.rope_scaling,
        "factor": spec.rope_factor,
    }
    if spec.rope_scaling in ("yarn", "llama3"):
        scaled["original_max_position_embeddings"] = length
    if spec.rope_scaling == "llama3":
        scaled.update(_LLAMA3)
    kept = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    grown = length if spec.rope_scaling == "dynamic" else round(length * spec.rope_factor)
    return {**kept, "rope_parameters": scaled, "max_position_embeddings": grown}
