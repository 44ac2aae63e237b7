"""The model that a config describes, without its weights: names, shapes, modules, on the meta device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import NotACheckpointError, UnsupportedModelError
from qexport.modeling.experts import unfuse
from qexport.modeling.places import Place, places_in, unbound_places

# the layers that choose a token's experts: they are small, and a wrong choice is dear
_ROUTER = "router"
_GATES = ("gate", "shared_expert_gate")


@dataclass(frozen=True)
class Skeleton:
    """A transformers model whose parameters are on the meta device and whose buffers are real.

    Experts are modules of their own in it. `places` tells where the checkpoint that it is bound to holds
    each tensor, by the key in the model's state_dict. `linears`, `transposed`, `routers`, `fused` and
    `expected_shapes` speak of names on disk; a skeleton without a checkpoint takes those in memory for them.
    """

    model: Any
    config: Any
    places: Mapping[str, Place]

    def bound(self, checkpoint: Checkpoint) -> Skeleton:
        """This skeleton, the model shared, with the names of `checkpoint`."""
        head = f"{self.head_name}.weight"
        return replace(self, places=places_in(checkpoint, self.model, head, tied=self.tied))

    @property
    def model_type(self) -> str:
        """The config's `model_type`."""
        return str(self.config.model_type)

    @property
    def max_length(self) -> int | None:
        """The longest input the model was made for, in tokens; None when the config tells none."""
        found = getattr(self.config, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def tied(self) -> bool:
        """Whether the model ties its output head to its input embedding."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint should hold; a tied pair that is stored once stands once."""
        shapes: dict[str, tuple[int, ...]] = {}
        experts: dict[str, tuple[int, int]] = {}
        for key, tensor in self.model.state_dict().items():
            place = self.places[key]
            shapes[place.name] = tuple(tensor.shape)
            if place.expert is not None:
                count, rows = experts.get(place.name, (0, 0))
                experts[place.name] = (max(count, place.expert + 1), max(rows, place.end))
                shapes[place.name] = (*experts[place.name], tensor.shape[-1])
        return shapes

    def ignored_patterns(self) -> set[str]:
        """Regular expressions of names that old checkpoints hold and the model does without."""
        own = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        # rotary tables were stored once; transformers computes them and passes over stored ones too
        return {*own, r"rotary_emb\.inv_freq$"}

    def length(self, wanted: int) -> int:
        """`wanted` tokens, or as many as the model can take."""
        return min(wanted, self.max_length or wanted)

    @property
    def head_name(self) -> str:
        """Full name in memory of the output head; empty when the model has none."""
        head = self.model.get_output_embeddings()
        return next((name for name, module in self.model.named_modules() if module is head), "")

    @property
    def embedding_weight(self) -> str:
        """Name on disk of the input embeddings' table."""
        embedding = self.model.get_input_embeddings()
        names = (name for name, module in self.model.named_modules() if module is embedding)
        return self.places[f"{next(names)}.weight"].name

    @property
    def head_weight(self) -> str:
        """Name on disk of the output head's matrix, its own even where tied; empty when there is none."""
        if not self.head_name:
            return ""
        key = f"{self.head_name}.weight"
        name = self.places[key].name
        return key if name == self.embedding_weight else name

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name on disk and shape [out, in] of every linear layer, in order.

        Without the output head, routers, and experts that lie fused on disk. Conv1D layers are among them,
        though they are stored as [in, out].
        """
        found = {}
        for name, module in self._linear_modules():
            place = self.places[f"{name}.weight"]
            if place.expert is None:
                shape = tuple(reversed(module.weight.shape)) if is_conv1d(module) else module.weight.shape
                found[place.name.removesuffix(".weight")] = (int(shape[0]), int(shape[1]))
        return found

    def _linear_modules(self) -> Iterator[tuple[str, Any]]:
        head = self.head_name
        for name, module in self.model.named_modules():
            linear = isinstance(module, nn.Linear) or is_conv1d(module)
            if linear and name != head and not self._is_router(name):
                yield name, module

    @property
    def transposed(self) -> frozenset[str]:
        """Those of `linears` that are stored as [in, out]."""
        return frozenset(
            self.places[f"{name}.weight"].name.removesuffix(".weight")
            for name, module in self._linear_modules()
            if is_conv1d(module)
        )

    @property
    def routers(self) -> tuple[str, ...]:
        """Names on disk of the modules that choose experts: quantization leaves them as they are."""
        return tuple(
            self.places[f"{name}.weight"].name.removesuffix(".weight")
            for name, module in self.model.named_modules()
            if "weight" in module._parameters and module.weight.dim() == 2 and self._is_router(name)
        )

    def _is_router(self, name: str) -> bool:
        parent, _, leaf = name.rpartition(".")
        if _ROUTER in name.split("."):
            return True
        return leaf in _GATES and hasattr(self.model.get_submodule(parent), "experts")

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Name on disk and shape of the 3-D tensors that hold the matrices of all experts of a block."""
        shapes = self.expected_shapes()
        inside = {place.name for place in self.places.values() if place.expert is not None}
        whole = {
            self.places[name].name
            for name, value in self.model.named_parameters()
            if value.dim() == 3 and not isinstance(self._owner(name), nn.Conv1d)
        }
        return {name: shape for name, shape in shapes.items() if name in inside | whole}

    def _owner(self, parameter: str) -> nn.Module:
        owner: nn.Module = self.model.get_submodule(parameter.rpartition(".")[0])
        return owner


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight lies as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def quiet_transformers() -> None:
    """transformers tells by logs and bars what qexport tells itself, or raises."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def build_skeleton(
    source: Path | Checkpoint, *, config: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> Skeleton:
    """The skeleton of the model in a directory, from its config.json alone, or of a checkpoint's model.

    That of a checkpoint is bound to its names. `config` as in `build_model`. Raises as `build_model`.
    """
    path = source if isinstance(source, Path) else source.path
    model = build_model(path, config=config, trust_remote_code=trust_remote_code)
    unfuse(model)
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = (
            False  # they would be gathered for a loss, from all blocks at once
        )
    skeleton = Skeleton(model, model.config, unbound_places(model))
    return skeleton if isinstance(source, Path) else skeleton.bound(source)


def build_model(
    path: Path, *, config: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> Any:
    """transformers' model of the config.json in `path`, parameters on the meta device, in evaluation mode.

    `config` is that of a model within the one in `path`, of a type that transformers itself knows.

    Raises UnsupportedModelError for an unknown architecture, or one that brings its own code when that
    is not trusted, and NotACheckpointError for a config that describes no model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    try:
        if config is None:
            full = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        else:
            full = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
        if hasattr(full, "quantization_config"):
            del full.quantization_config  # the skeleton is that of the full-precision model
        with _on_meta(), _without_random_weights():
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                full, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises whatever a broken config leads it to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{path} brings its own modelling code",
                expected="code from a checkpoint is not run unasked",
                remedy="read it, then add --trust-remote-code",
            ) from error
        if "model type" in str(error) or "Unrecognized" in str(error):
            raise UnsupportedModelError(
                f"transformers does not know the model in {path}: {reason}"
            ) from error
        raise NotACheckpointError(
            f"{path}/config.json does not describe a causal language model: {reason}"
        ) from error
    return model.eval()


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Parameters on the meta device, buffers real: rotary tables are computed, never loaded."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def _without_random_weights() -> contextlib.AbstractContextManager[None]:
    """Weights on the meta device need no drawing; some transformers call this elsewhere."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[None] = no_init_weights()
    return found


def set_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Replaces parameters and persistent buffers of `module` by their inner names."""
    for name, value in values.items():
        inner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(inner)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value
