"""A PEFT adapter directory: its config, and its tensors by name, on disk until they are wanted."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import exists, is_file
from qexport.checkpoint.finiteness import is_finite, non_finite_error
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.safetensors_file import StoredTensor, read_header, read_rows, read_tensor
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.weighted import split_weighted
from qexport.errors import AdapterError, CheckpointNotFoundError, UnsafeFileError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
_PIECE_VALUES = 1 << 22
# options that this package goes by, for any kind; the rest is checked where it is used, or by PEFT
_SWITCHES = ("use_dora", "use_rslora", "fan_in_fan_out", "ensure_weight_tying")
_NAME_LISTS = ("modules_to_save", "target_parameters")
_NAMES_OR_PATTERNS = ("target_modules", "exclude_modules")
_PREFIX = re.compile(r"^base_model\.(model\.)?")

_INPUT = "it changes the input of the model, not its weights"
# what cannot become part of a weight, whatever library merges
UNMERGEABLE = {
    "PROMPT_TUNING": _INPUT,
    "MULTITASK_PROMPT_TUNING": _INPUT,
    "P_TUNING": _INPUT,
    "CPT": _INPUT,
    "PREFIX_TUNING": "it adds keys and values to every attention layer, which no weight can hold",
    "CARTRIDGE": "it adds keys and values to every attention layer, which no weight can hold",
    "ADAPTION_PROMPT": "it adds attention over learned prompts, which no weight can hold",
    "POLY": "it routes by task when the model runs",
    "LILY": "it mixes its experts by a router that looks at each input",
    "SHADOW": "it runs a second network beside the model",
    "XLORA": "it weighs its experts anew for every token when the model runs",
}


@dataclass(frozen=True)
class AdapterTensor(TensorInfo):
    """A tensor of an adapter, in `file` or, out of a pickle, in memory."""

    file: Path
    stored: StoredTensor | None = None
    held: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def read(self) -> torch.Tensor:
        """All of it, as it is stored."""
        if self.held is not None:
            return self.held
        assert self.stored is not None  # noqa: S101 - one of the two is always there
        return read_tensor(self.stored)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows along the first side, as they are stored."""
        if self.held is not None:
            return self.held[begin:end]
        assert self.stored is not None  # noqa: S101
        return read_rows(self.stored, begin, end)

    def pieces(self) -> Iterator[torch.Tensor]:
        """All of it, some megabytes at a time, in order."""
        if not self.shape:
            yield self.read()
            return
        step = max(_PIECE_VALUES * self.shape[0] // max(self.numel, 1), 1)
        for begin in range(0, self.shape[0], step):
            yield self.rows(begin, min(begin + step, self.shape[0]))

    def same_values(self, other: AdapterTensor) -> bool:
        """Whether both hold the same numbers."""
        return self.shape == other.shape and all(
            torch.equal(one.float(), two.float())
            for one, two in zip(self.pieces(), other.pieces(), strict=True)
        )


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. `tensors` are named as in the model that was trained: PEFT's prefix is gone.

    `weight` is what the user multiplies its change with; None when nothing was said, which is 1.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, AdapterTensor]
    weight: float | None = None

    @property
    def kind(self) -> str:
        """PEFT's `peft_type`."""
        return str(self.config["peft_type"])

    @property
    def base_name(self) -> str | None:
        """What the adapter calls its base."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def trained_on(self) -> str:
        """Words about the base, for errors."""
        return f" (it names {self.base_name!r} as its base)" if self.base_name else ""


def require_finite_adapter(adapter: Adapter) -> None:
    """Reads the adapter's tensors once, in pieces; NonFiniteError names those that are not finite."""
    broken = [
        tensor.name
        for tensor in adapter.tensors.values()
        if not all(is_finite(piece) for piece in tensor.pieces())
    ]
    if broken:
        raise non_finite_error(str(adapter.path), broken)


def split_weight(source: str) -> tuple[str, float | None]:
    """`A:0.7` as A and 0.7. Raises AdapterError for a weight that is no finite number."""
    return split_weighted(source, AdapterError)


def open_adapter(source: str | Path) -> Adapter:
    """Reads an adapter's config and header; its matrices stay on disk. `PATH:WEIGHT` gives it a weight.

    Raises CheckpointNotFoundError, AdapterError (no adapter, or of a kind that no merge can hold),
    CorruptFileError, UnsafeFileError (a pickle that holds more than tensors).
    """
    name, weight = split_weight(str(source))
    path = resolve(Path(name) if isinstance(source, Path) else name)
    if not exists(path) or not path.is_dir():
        raise CheckpointNotFoundError(
            f"adapter {path} " + ("is a file" if exists(path) else "does not exist"),
            expected=f"a directory with {CONFIG_FILE} and {WEIGHTS_FILE}",
        )
    if not is_file(path / CONFIG_FILE):
        raise AdapterError(f"{path} has no {CONFIG_FILE}", expected="a PEFT adapter has one")
    config = read_json(path / CONFIG_FILE)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterError(
            f"{path}/{CONFIG_FILE} names no peft_type", expected="LORA, or another of PEFT's kinds"
        )
    if kind in UNMERGEABLE:
        raise AdapterError(
            f"{path} is a {kind} adapter and cannot be merged: {UNMERGEABLE[kind]}",
            remedy="serve it with PEFT, or train a LoRA instead",
        )
    _require_types(path, config)
    return Adapter(path, config, _tensors(path), weight)


def _require_types(path: Path, config: Mapping[str, Any]) -> None:
    """Raises AdapterError for an option of the wrong type: "false" would count as true, "ab" as two names."""
    for option in _SWITCHES:
        if not (config.get(option) is None or isinstance(config[option], bool)):
            raise AdapterError(
                f"{path}: {option} is {reprlib.repr(config[option])}", expected="true or false"
            )
    for option in (*_NAME_LISTS, *_NAMES_OR_PATTERNS):
        names = config.get(option)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            continue
        if not (names is None or (isinstance(names, str) and option in _NAMES_OR_PATTERNS)):
            raise AdapterError(f"{path}: {option} is {reprlib.repr(names)}", expected="a list of names")


def _tensors(path: Path) -> dict[str, AdapterTensor]:
    if is_file(path / WEIGHTS_FILE):
        stored, _ = read_header(path / WEIGHTS_FILE)
        found = {name: AdapterTensor(name, t.dtype, t.shape, t.file, t) for name, t in stored.items()}
    elif is_file(path / PICKLE_FILE):
        found = {
            name: AdapterTensor(name, held.dtype, tuple(held.shape), path / PICKLE_FILE, held=held)
            for name, held in _unpickled(path / PICKLE_FILE).items()
        }
    else:
        raise AdapterError(
            f"{path} has no {WEIGHTS_FILE} and no {PICKLE_FILE}", expected="a PEFT adapter has one"
        )
    if not found:
        raise AdapterError(f"{path} holds no tensors", expected="what PEFT saved")
    tensors: dict[str, AdapterTensor] = {}
    for name, tensor in found.items():
        short = _PREFIX.sub("", name)
        if short in tensors:
            raise AdapterError(f"{path}: {short} stands twice in it, with PEFT's prefix and without")
        tensors[short] = tensor
    return tensors


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a pickle, by torch's loader that makes tensors only and runs no code."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or broken file leads it to
        raise UnsafeFileError(
            f"{file} is a pickle that torch's weights-only loader refuses",
            expected=f"{WEIGHTS_FILE}, or a {PICKLE_FILE} that holds tensors only",
            remedy="load it once with PEFT where you trust it and save_pretrained() it",
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise UnsafeFileError(f"{file} does not hold named tensors", expected="what PEFT saved")
    size = file.stat().st_size
    for name, tensor in content.items():
        # sparse or on the meta device, it has no values; expanded, it may claim more than memory holds
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.nbytes > size:
            raise UnsafeFileError(
                f"{file} holds {name} as {list(tensor.shape)}, {tensor.layout}, on {tensor.device}",
                expected=f"plain tensors within its {size} bytes",
            )
    return {name: tensor.detach().contiguous() for name, tensor in content.items()}
