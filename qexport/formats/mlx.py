"""MLX's layout, mode "affine", for Apple's machines: what `mlx_lm.convert --quantize` writes.

A linear layer or an embedding [out, in] of b bits in groups of g becomes
    weight uint32 [out, in * b / 32]  codes, packed along `in`, low bits first, straddling words
    scales float  [out, in / g]
    biases float  [out, in / g]
and w = scale * q + bias, scales and biases in the model's dtype. The symmetric grid is stored with a bias of
-2^(b-1) scales, which is exact. Tied embeddings are packed once and serve as head too.
config.json has `quantization` {group_size, bits, mode}, with an entry for each layer that is otherwise, and
the same once more as `quantization_config`, without a quant_method.
Source: mlx 0.32.4, `mx.quantize`; mlx_lm 0.32.2, `utils.py` (`load_model`, `save_config`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from qexport.checkpoint.checkpoint import CONFIG_FILE, read_json
from qexport.checkpoint.disk import write_errors
from qexport.checkpoint.rewriting import Made, rewrite
from qexport.checkpoint.safetensors_file import StoredTensor, read_header, read_tensor
from qexport.checkpoint.tensors import TensorInfo
from qexport.errors import CorruptFileError, SpecError, UnsupportedModelError
from qexport.formats.format import Facts, Wish
from qexport.formats.mlx_names import UNKNOWN, Found, Place, hugging_face_names, place_of, plain_name, renames
from qexport.formats.packing import pack_rows, unpack_rows
from qexport.formats.parts import FLOATS, misfit, require_part
from qexport.grids.integer import IntegerCodes, IntegerGrid

NAME = "mlx"
METHOD = "mlx"  # no quant_method says so: see `is_mlx`
HOLDS_HEAD = True
HOLDS_EMBEDDINGS = True
HOLDS_CONV1D = True  # for MLX they are linear layers
HOLDS_GROUP_ORDER = False
EXPERTS = "codes"  # stacked
BITS = (2, 3, 4, 5, 6, 8)  # 0.32.4 has 1 as well, older ones not
GROUP_SIZES = (32, 64, 128)
_DEFAULT_GROUP = 64
_PARTS = ("weight", "scales", "biases")


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config`, or a `quantization`, is MLX's."""
    return "quant_method" not in config and "group_size" in config and "bits" in config


def grid_for(wish: Wish) -> IntegerGrid:
    """The integer grid of the wish: groups of 64 and asymmetric unless it says otherwise."""
    if wish.bits not in BITS:
        raise SpecError(f"{wish.bits} bits in MLX", expected=f"one of {', '.join(map(str, BITS))}")
    group = _DEFAULT_GROUP if wish.group_size is None else wish.group_size
    if group not in GROUP_SIZES:
        raise SpecError(
            f"a group size of {group} in MLX", expected=f"one of {', '.join(map(str, GROUP_SIZES))}"
        )
    return IntegerGrid(wish.bits, group, "middle" if wish.symmetric else "bias", wish.dtype)


def obstacle(shape: Sequence[int], grid: IntegerGrid) -> str | None:
    """Why a matrix [out, in] cannot be stored in this layout, in a few words."""
    if shape[1] % grid.group_size:
        return f"rows that are no whole number of groups of {grid.group_size}"
    return None


def layout(module: str, shape: Sequence[int], grid: IntegerGrid) -> list[TensorInfo]:
    """The tensors that a linear layer [out, in] becomes."""
    out, inputs = shape
    groups = inputs // grid.group_size
    return [
        TensorInfo(f"{module}.weight", torch.uint32, (out, inputs * grid.bits // 32)),
        TensorInfo(f"{module}.scales", grid.dtype, (out, groups)),
        TensorInfo(f"{module}.biases", grid.dtype, (out, groups)),
    ]


def encode(module: str, codes: IntegerCodes, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    """The layer's tensors, named and shaped as `layout` says."""
    if codes.group_of is not None:
        raise ValueError(f"{module} has groups that are no neighbours, which MLX cannot tell")
    biases = codes.scales * -grid.middle if codes.zeros is None else codes.zeros
    return {
        f"{module}.weight": pack_rows(codes.codes, grid.bits).view(torch.uint32),
        f"{module}.scales": codes.scales,
        f"{module}.biases": biases,
    }


def config_entries(facts: Facts) -> dict[str, Any]:
    """config.json's `quantization`, and the same as `quantization_config`.

    Raises SpecError for a model that mlx_lm does not know, and for experts of a layer that differ.
    """
    if facts.model_type in UNKNOWN:
        raise SpecError(f"mlx-lm has no {facts.model_type} models", remedy="choose another format")
    common = cast(IntegerGrid, facts.common)
    grids: dict[str, IntegerGrid | None] = dict.fromkeys(facts.left)
    grids |= cast(Mapping[str, IntegerGrid], facts.grids)
    usual = {"group_size": common.group_size, "bits": common.bits}
    stacks: dict[str, set[tuple[int, int] | None]] = {}
    entries: dict[str, Any] = {**usual, "mode": "affine"}
    for name, grid in grids.items():
        place = place_of(name, facts.model_type)
        if place.expert is not None:
            stacks.setdefault(place.path, set()).add((grid.bits, grid.group_size) if grid else None)
        if grid and (own := {"group_size": grid.group_size, "bits": grid.bits}) != usual:
            entries[place.path] = own
    if mixed := [path for path, kinds in stacks.items() if len(kinds) > 1]:
        raise SpecError(
            f"MLX stacks the experts of a layer, and those of {mixed[0]} differ in bits or groups",
            remedy="treat all experts of a layer alike",
        )
    return {"quantization": entries, "quantization_config": entries}


def extra_files(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """None: config.json says it all."""
    return {}


def finish(directory: Path) -> None:
    """Gives the tensors MLX's names and stacks experts, for the models where MLX has others.

    And gives config.json the names of settings that mlx_lm looks for, where transformers 5 has others.
    """
    config = read_json(directory / CONFIG_FILE)
    if more := {key: value for key, value in older_settings(config).items() if key not in config}:
        text = json.dumps({**config, **more}, indent=2, ensure_ascii=False) + "\n"
        with write_errors(directory):
            (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    model_type = str(config.get("model_type"))
    if not renames(model_type):
        return
    files = sorted(directory.glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in read_header(file)[0].items()}
    made: list[Made] = []
    stacks: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        place = place_of(module, model_type)
        if place.expert is not None:
            stacks.setdefault(f"{place.path}.{leaf}", {})[place.expert] = tensor
        elif new_name := _name_in_file(name, place, stored, model_type):
            made.append(Made(replace(_info(tensor), name=new_name), (tensor,)))
    for new_name, members in stacks.items():
        first = members[0]
        if any(members.get(number) is None for number in range(len(members))):
            raise ValueError(f"{new_name} lacks experts: {sorted(members)}")
        if any(_info(replace(other, name=first.name)) != _info(first) for other in members.values()):
            raise ValueError(f"the experts of {new_name} differ in shape or dtype")
        info = TensorInfo(new_name, first.dtype, (len(members), *first.shape))
        made.append(Made(info, tuple(members[number] for number in range(len(members)))))
    rewrite(directory, made)


def older_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names that they had before transformers 5, as far as config.json tells them.

    Most models of mlx_lm 0.32 know no other names, and take a default without a word: a Llama 3 whose
    config was saved by transformers 5 would run with a rope_theta of 10000.
    """
    found: dict[str, Any] = {}
    if config.get("model_type") == "gpt2" and "n_positions" in config:
        found["n_ctx"] = config["n_positions"]
    if "num_local_experts" in config:  # Qwen's and OLMoE's name was another
        found["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return found
    if isinstance(local := rope.get("sliding_attention"), dict) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    if isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        found["rope_theta"] = found["rotary_emb_base"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = found["rotary_pct"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        others = ("rope_theta", "partial_rotary_factor")
        found["rope_scaling"] = {key: value for key, value in rope.items() if key not in others}
    if config.get("model_type") != "gpt_neox":  # these are its own names
        found.pop("rotary_emb_base", None)
        found.pop("rotary_pct", None)
    return found


def _name_in_file(name: str, place: Place, stored: Mapping[str, StoredTensor], model_type: str) -> str | None:
    module, _, leaf = name.rpartition(".")
    if leaf in _PARTS and f"{module}.scales" in stored:
        return f"{place.path}.{leaf}"
    return plain_name(name, model_type)


def _info(tensor: TensorInfo) -> TensorInfo:
    return TensorInfo(tensor.name, tensor.dtype, tensor.shape)


@dataclass(frozen=True)
class _Layer:
    """A packed layer's tensors, seen to fit together, and its grid."""

    parts: tuple[StoredTensor, ...]
    shape: tuple[int, int]
    grid: IntegerGrid


@dataclass(frozen=True)
class MlxDecoder:
    """Reads the mode "affine", each layer by the config's entry for it, under Hugging Face's names."""

    stored: Mapping[str, StoredTensor]
    config: Mapping[str, Any]

    def infos(self) -> dict[str, TensorInfo]:
        """Names, dtypes and shapes of the full-precision tensors, in file order.

        A quantized layer's `weight` has its scales' dtype. Raises CorruptFileError for a layer whose
        tensors do not fit together, or not what the config says of it.
        """
        return self._infos

    def is_quantized(self, name: str) -> bool:
        """Whether `name` is the weight of a packed layer."""
        return name.endswith(".weight") and name.removesuffix("weight") + "scales" in self._found

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, or a layer's weight [out, in] in fp32, unrounded."""
        if not self.is_quantized(name):
            found = self._found[name]
            tensor = read_tensor(found.tensor)
            return tensor.t().contiguous() if found.turned else tensor
        layer = self._layer(name.removesuffix(".weight"))
        words, scales, biases = (read_tensor(part) for part in layer.parts)
        codes = IntegerCodes(unpack_rows(words.view(torch.int32), layer.grid.bits), scales, biases)
        return layer.grid.decode(codes)

    @cached_property
    def _found(self) -> dict[str, Found]:
        return hugging_face_names(self.stored)

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        return {name: found.tensor for name, found in self._found.items()}

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for name, found in self._found.items():
            module, _, part = name.rpartition(".")
            tensor = found.tensor
            if part in ("scales", "biases") and f"{module}.scales" in self._found:
                if f"{module}.weight" not in self._found:
                    raise CorruptFileError(f"{module} has {part}, but no weight", expected=", ".join(_PARTS))
            elif part == "weight" and f"{module}.scales" in self._found:
                layer = self._layer(module)
                infos[name] = TensorInfo(name, layer.grid.dtype, layer.shape)
            elif part == "weight" and tensor.dtype == torch.uint32:
                raise CorruptFileError(f"{name} is packed and has no scales", expected=", ".join(_PARTS))
            elif found.turned:
                infos[name] = TensorInfo(name, tensor.dtype, tuple(reversed(tensor.shape)))
            else:
                infos[name] = tensor
        return infos

    def _layer(self, module: str) -> _Layer:
        parts = tuple(
            require_part(
                self._tensors,
                module,
                part,
                dtypes=(torch.uint32,) if part == "weight" else FLOATS,
                sides=(2,),
                parts=_PARTS,
            )
            for part in _PARTS
        )
        weight, scales, biases = parts
        path = self._found[f"{module}.weight"].path
        own = self.config.get(path)
        bits, group_size = _affine(own if isinstance(own, dict) else self.config, path)
        out, groups = scales.shape
        inputs = groups * group_size
        if (
            weight.shape[0] != out
            or weight.shape[1] * 32 != inputs * bits
            or (biases.dtype, biases.shape) != (scales.dtype, scales.shape)
        ):
            raise misfit(
                module,
                parts,
                f"weight [out, in * {bits} / 32], scales and biases [out, in / {group_size}], by config.json",
            )
        return _Layer(parts, (out, inputs), IntegerGrid(bits, group_size, "bias", scales.dtype))


def _affine(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Bits and group size of an entry of the config; UnsupportedModelError for what MLX has not."""
    bits, group_size, mode = entry.get("bits"), entry.get("group_size"), entry.get("mode", "affine")
    if mode != "affine":
        raise UnsupportedModelError(f"an MLX checkpoint in the mode {mode!r} ({where})", expected="affine")
    if type(bits) is not int or type(group_size) is not int:
        raise UnsupportedModelError(
            f"an MLX checkpoint of {bits!r} bits in groups of {group_size!r} ({where})"
        )
    if bits not in (1, *BITS) or group_size not in GROUP_SIZES:
        raise UnsupportedModelError(
            f"an MLX checkpoint of {bits} bits in groups of {group_size} ({where})",
            expected=f"bits of 1, {', '.join(map(str, BITS))}, groups of {', '.join(map(str, GROUP_SIZES))}",
        )
    return bits, group_size


def decoder(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], float_dtype: torch.dtype
) -> MlxDecoder:
    """The reader of a checkpoint with this `quantization`; scales tell the dtype by themselves.

    Raises UnsupportedModelError for other modes, such as mxfp4.
    """
    _affine(config, "the model")
    return MlxDecoder(stored, config)
