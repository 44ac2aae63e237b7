"""A PEFT adapter directory: which module it changes, by which tensors, at which scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.safetensors_file import StoredTensor, read_header
from qexport.errors import AdapterError, CheckpointNotFoundError, UnsafeFileError
from qexport.merging.lora import lora_scale

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT saves the base's own matrix along when an embedding or the output head is adapted
_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.weight")


@dataclass(frozen=True)
class LoraPair:
    """A [r, in] and B [out, r] of one module, and the scale of their product."""

    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the matrix that the pair fits."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: module name (without `.weight`) -> its pair.

    `copies` are shapes of the base's own matrices that PEFT saved along, by module name.
    """

    path: Path
    base_name: str | None
    pairs: Mapping[str, LoraPair]
    copies: Mapping[str, tuple[int, ...]]


def open_adapter(source: str | Path) -> Adapter:
    """Reads an adapter's config and header; its matrices stay on disk.

    Raises CheckpointNotFoundError, AdapterError (a kind that cannot be merged here, half a pair, ranks
    that differ), CorruptFileError, UnsafeFileError.
    """
    path = resolve(source)
    if not path.is_dir():
        raise CheckpointNotFoundError(
            f"adapter {path} " + ("is a file" if path.exists() else "does not exist"),
            expected=f"a directory with {CONFIG_FILE} and {WEIGHTS_FILE}",
        )
    if not (path / CONFIG_FILE).is_file():
        raise AdapterError(f"{path} has no {CONFIG_FILE}", expected="a PEFT adapter has one")
    config = read_json(path / CONFIG_FILE)
    _require_supported(path, config)
    if not (path / WEIGHTS_FILE).is_file():
        if (path / "adapter_model.bin").is_file():
            raise UnsafeFileError(
                f"{path} holds its weights in adapter_model.bin, a pickle that can run code",
                expected=f"qexport reads {WEIGHTS_FILE} only",
                remedy="load it once with PEFT where you trust it and save_pretrained() it",
            )
        raise AdapterError(f"{path} has no {WEIGHTS_FILE}", expected="a PEFT adapter has one")
    tensors, _ = read_header(path / WEIGHTS_FILE)
    copies = {m["module"]: t.shape for name, t in tensors.items() if (m := _COPY.fullmatch(name))}
    matrices = {name: tensor for name, tensor in tensors.items() if not _COPY.fullmatch(name)}
    return Adapter(path, config.get("base_model_name_or_path"), _pairs(path, config, matrices), copies)


def _require_supported(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path} is a {kind} adapter", expected="LoRA and rsLoRA can be merged so far")
    for option, what in {
        "use_dora": "DoRA",
        "fan_in_fan_out": "fan_in_fan_out (GPT-2's Conv1D)",
        "lora_bias": "lora_bias",
        "use_qalora": "QALoRA",
        "modules_to_save": "modules_to_save",
        "layer_replication": "layer_replication",
        "trainable_token_indices": "trainable_token_indices",
        "target_parameters": "target_parameters",
        "alora_invocation_tokens": "activated LoRA",
    }.items():
        if config.get(option):
            raise AdapterError(f"{path} uses {what}", expected="plain LoRA and rsLoRA can be merged so far")
    if (init := config.get("init_lora_weights", True)) not in _HARMLESS_INITS:
        raise AdapterError(
            f"{path} was initialised by {init}, which changed the base's own weights",
            expected="adapters that leave their base as it was can be merged so far",
            remedy="save it converted: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{path} was trained with bias={config['bias']!r}",
            expected="adapters without trained biases can be merged so far",
        )


def _pairs(path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, LoraPair]:
    sides: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point:
            unknown.append(name)
        else:
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    if unknown:
        raise AdapterError(
            f"{path} holds {len(unknown)} tensors that are no LoRA matrices: " + ", ".join(unknown[:3]),
            expected="lora_A and lora_B pairs",
        )
    if not sides:
        raise AdapterError(f"{path} holds no tensors", expected="lora_A and lora_B pairs")
    pairs = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{path} has only lora_{next(iter(pair))} of {module}")
        a, b = pair["A"], pair["B"]
        if a.shape[0] != b.shape[1] or not a.shape[0]:
            raise AdapterError(
                f"{path}: the ranks of {module} differ: lora_A has {a.shape[0]}, lora_B {b.shape[1]}"
            )
        pairs[module] = LoraPair(a, b, _scale(path, config, module, a.shape[0]))
    return pairs


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{path}: alpha_pattern is no object of names and numbers")
    alpha = config.get("lora_alpha")
    for pattern, value in patterns.items():
        # PEFT's rule: the pattern, a regular expression, matches a whole name or its end after a dot
        # (tuners_utils, get_pattern_key). One out of a downloaded file is not run: names only.
        if not re.fullmatch(r"[\w.]+", pattern):
            raise AdapterError(
                f"{path}: alpha_pattern has the regular expression {pattern!r}",
                expected="names of modules, or their ends, can be merged so far",
            )
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"{path}: lora_alpha is {alpha!r}", expected="a number")
    return lora_scale(alpha, rank, rank_stabilized=bool(config.get("use_rslora")))
