"""The model that a config describes, without its weights: names, shapes, modules, on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexport.errors import NotACheckpointError, UnsupportedModelError


@dataclass(frozen=True)
class Skeleton:
    """A transformers model whose parameters are on the meta device and whose buffers are real."""

    model: Any
    config: Any

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
        """Every tensor that a checkpoint of this model holds, tied pairs under both names."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

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
        """Full name of the output head; empty when the model has none."""
        head = self.model.get_output_embeddings()
        return next((name for name, module in self.model.named_modules() if module is head), "")

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name and shape [out, in] of every linear layer but the output head, in order."""
        head = self.head_name
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != head
        }


def quiet_transformers() -> None:
    """transformers tells by logs and bars what qexport tells itself, or raises."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def build_skeleton(path: Path, *, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of the model in `path`, from its config.json alone.

    Raises UnsupportedModelError for an unknown architecture, or one that brings its own code when that
    is not trusted, and NotACheckpointError for a config that describes no model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the skeleton is that of the full-precision model
        with _on_meta():
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
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
    return Skeleton(model.eval(), config)


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Parameters on the meta device, buffers real: rotary tables are computed, never loaded."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def set_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Replaces parameters and persistent buffers of `module` by their inner names."""
    for name, value in values.items():
        inner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(inner)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value
