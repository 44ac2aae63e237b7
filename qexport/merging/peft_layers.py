"""PEFT's own layers do the arithmetic, one module at a time: for every kind of adapter but plain LoRA.

Modules are put into a tree of empty containers under their full dotted names; PEFT wraps that tree, loads
the adapter's tensors that concern it, and merges. Only the module in question has weights; where a kind
must know of the adapter's other modules, they lie beside it without any.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qexport.errors import AdapterError, MissingDependencyError
from qexport.merging.adapter import Adapter
from qexport.merging.settings import ALL_LINEAR, PLAIN_NAME, by_pattern, matches_whole

PREFIX = "base_model.model."
# Projections as large as the largest module, or indices dealt out over all modules; nothing of the base
# enters when PEFT wraps these: all are wrapped once, without weights.
_WRAPPED_ONCE = frozenset({"VERA", "PVERA", "RANDLORA", "UNILORA"})
# A module's number picks its projection and its vector, but wrapping takes the SVD of its weights.
_WRAPPED_EACH = frozenset({"TINYLORA"})
# What names modules or picks layers is settled by the choice of the module; the rest asks for a whole model.
_SETTLED: dict[str, Any] = {
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "ensure_weight_tying": False,
    "bias": "none",
    "task_type": None,
    "progressbar": False,
    "megatron_config": None,  # PEFT would import whatever module `megatron_core` names
}
# expressions that PEFT matches against the names of all modules, without a limit of time
_EXPRESSIONS = ("target_modules", "exclude_modules", "feedforward_modules")
_BY_EXPRESSION = ("rank_pattern", "alpha_pattern", "lambda_pattern")

Modules = Mapping[str, nn.Module]


class PeftLayers:
    """An adapter's config and tensors, merged into one module after the other.

    `skeleton` is the whole model on the meta device. Raises MissingDependencyError without PEFT, and
    AdapterError for a config that PEFT does not take.
    """

    def __init__(self, adapter: Adapter, skeleton: nn.Module) -> None:
        try:
            # bitsandbytes, which PEFT loads where it is installed, tells of a kernel that nobody needs here
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            with _quiet():
                import peft
        except ImportError as error:
            raise MissingDependencyError(
                f"{adapter.path} is a {adapter.kind} adapter, whose arithmetic is PEFT's",
                remedy="pip install 'qexport[peft]'",
            ) from error
        self._adapter, self._peft = adapter, peft
        self._lock = threading.Lock()
        self._tops = {name for name, _ in skeleton.named_children()}
        self._once: Any = None
        try:
            with _quiet():
                self._config: Any = peft.PeftConfig.from_pretrained(str(adapter.path))
                self._name_modules(skeleton)
                names = self._targets(skeleton)
        except AdapterError:
            raise
        except Exception as error:  # PEFT raises whatever a config leads it to
            raise AdapterError(f"PEFT does not take {adapter.path}: {_reason(error)}") from error
        self.modules = {name: skeleton.get_submodule(name) for name in names}

    def _name_modules(self, skeleton: nn.Module) -> None:
        """Puts names of modules in the place of the config's expressions, which may take forever to match."""
        config, where = self._config, str(self._adapter.path)
        names = [name for name, _ in skeleton.named_modules() if name]
        for option in _EXPRESSIONS:
            pattern = getattr(config, option, None)
            if isinstance(pattern, str) and pattern.lower() != ALL_LINEAR:
                setattr(config, option, {name for name in names if matches_whole(where, pattern, name)})
        for option in _BY_EXPRESSION:
            patterns = getattr(config, option, None)
            if isinstance(patterns, dict) and self._adapter.kind != "ADALORA":  # there they are parameters
                values = {name: by_pattern(where, patterns, name, None) for name in names}
                setattr(config, option, {name: v for name, v in values.items() if v is not None})
        if saved := getattr(config, "modules_to_save", None):
            pattern = "|".join(saved)
            found = [name for name in names if matches_whole(where, pattern, name, before=r"(.*\.)?")]
            config.modules_to_save = [re.escape(name) for name in found]
        layers = getattr(config, "layers_pattern", None) or ()
        for pattern in [layers] if isinstance(layers, str) else layers:
            if not PLAIN_NAME.fullmatch(pattern):
                raise AdapterError(f"{where}: layers_pattern is {pattern[:80]!r}", expected="a module's name")

    def _targets(self, skeleton: nn.Module) -> list[str]:
        """The names of the modules that PEFT puts this adapter on, in the model's order."""
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, _maybe_include_all_linear_layers

        kind: Any = PEFT_TYPE_TO_TUNER_MAPPING[self._config.peft_type]
        config = copy.deepcopy(self._config)
        if getattr(config, "target_modules", None) is None:  # PEFT's own choice by the architecture
            model_type = BaseTuner.get_model_config(skeleton)["model_type"]
            config.target_modules = set(kind.target_module_mapping[model_type])
        config = _maybe_include_all_linear_layers(config, skeleton)
        names = []
        for name, _ in skeleton.named_modules():
            found = kind._check_target_module_exists(config, name) if name else False
            if found and not isinstance(found, _ExcludedModule):
                names.append(name)
        return names

    def merge(self, name: str, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters fp32 of one module with the adapter merged in. They may be changed in place."""
        module = _with_parameters(self.modules[name], parameters)
        try:
            # PEFT's wrapping draws from the process's one random generator
            with self._lock, _quiet():
                merged = self._merge(name, module)
        except Exception as error:
            raise AdapterError(
                f"PEFT cannot merge {self._adapter.path} into {name}: {_reason(error)}"
            ) from error
        return {leaf: value.detach() for leaf, value in merged.named_parameters()}

    def _merge(self, name: str, module: nn.Module) -> nn.Module:
        kind = self._adapter.kind
        if kind in _WRAPPED_ONCE:
            if self._once is None:
                others = {other: _stand_in(given) for other, given in self.modules.items()}
                self._once = self._wrapped(others)
                self._load(self._once, list(others))
            wrapper = self._once.base_model.model.get_submodule(name)
            wrapper.base_layer = module
            merged = _merged(wrapper, kind)
            wrapper.base_layer = _stand_in(module)  # lets go of the weights
            return merged
        tree: dict[str, nn.Module] = {name: module}
        if kind in _WRAPPED_EACH:
            tree = {other: _stand_in(given, sized=False) for other, given in self.modules.items()}
            tree[name] = module
        wrapped = self._wrapped(tree)
        self._load(wrapped, [name])
        return _merged(wrapped.base_model.model.get_submodule(name), kind)

    def _wrapped(self, tree: Modules) -> Any:
        config = copy.deepcopy(self._config)
        for key, value in _SETTLED.items():
            if hasattr(config, key):
                setattr(config, key, value)
        if hasattr(config, "target_modules"):
            config.target_modules = set(tree)
        if self._adapter.kind == "ADALORA" and config.rank_pattern:
            own = tuple(f"{name}." for name in tree)
            config.rank_pattern = {
                key: kept for key, kept in config.rank_pattern.items() if key.startswith(own)
            }
        config.inference_mode = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what PEFT draws the file replaces; else it is at least always the same
            wrapped: Any = self._peft.get_peft_model(_tree(tree), config)
        return wrapped.eval()  # VB-LoRA refuses pruned logits in training

    def _load(self, wrapped: Any, names: list[str]) -> None:
        """Loads what concerns the modules; PEFT must find all that it has for them, and know all of it."""
        own = tuple(f"{name}." for name in names)
        chosen = {}
        for key, tensor in self._adapter.tensors.items():
            if key.startswith(own):
                if ".base_layer." not in key:  # those are trained as a whole, and entered as such
                    chosen[PREFIX + key] = tensor.read()
            elif self._concerns(wrapped, key):
                chosen[f"base_model.{key}"] = tensor.read()
        # what PEFT itself would save of them: what is drawn again from a seed is not expected in the file
        saved = self._peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        concerned = tuple(PREFIX + prefix for prefix in own)
        missing = sorted(
            key for key in set(saved) - set(chosen) if key.startswith(concerned) or not key.startswith(PREFIX)
        )
        for key, given in chosen.items():  # PEFT would take whole numbers for weights; its indices are such
            if key in saved and saved[key].is_floating_point() and not given.is_floating_point():
                raise ValueError(f"{key.removeprefix(PREFIX)} holds {given.dtype}; floats")
        result: Any = self._peft.set_peft_model_state_dict(wrapped, chosen)
        strange = list(result.unexpected_keys)
        if missing or strange:
            found = [("missing", missing), ("unknown", strange)]
            raise ValueError("; ".join(f"{what}: {', '.join(keys[:3])}" for what, keys in found if keys))

    def is_shared(self, key: str) -> bool:
        """Whether a key of the adapter belongs to no module of the model, but to several of them."""
        return key.partition(".")[0] not in self._tops

    def _concerns(self, wrapped: Any, key: str) -> bool:
        """Whether shared state belongs to these modules: FRoD has a projection for every sort of module."""
        if not self.is_shared(key):
            return False
        return self._adapter.kind != "FROD" or key.rpartition(".")[2] in wrapped.base_model.frod_V


def _merged(wrapper: Any, kind: str) -> nn.Module:
    if kind == "FROD":
        _settle_frod(wrapper)
    if hasattr(wrapper, "unload_and_optionally_merge_module"):
        unloaded: nn.Module = wrapper.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
        return unloaded
    wrapper.merge()
    base: nn.Module = wrapper.get_base_layer()
    return base


def _settle_frod(wrapper: Any) -> None:
    """PEFT computes U when it wraps a module, from a projection that the file has replaced by now."""
    weight = wrapper.get_base_layer().weight
    weight = weight.T if wrapper.fan_in_fan_out else weight
    for adapter in list(wrapper.frod_U.keys()):
        rotation, _ = wrapper._calculate_frod_u_and_lambda(wrapper.frod_V[adapter], weight)
        wrapper.frod_U[adapter] = rotation.to(weight.dtype)


def _tree(modules: Modules) -> nn.Module:
    """A model of nothing but these modules, each under its full name."""
    root = nn.Module()
    for name, module in modules.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    return root


def _with_parameters(module: nn.Module, parameters: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module like `module`, which stays as it is, with these parameters."""
    clone = copy.copy(module)
    clone._parameters = {
        leaf: None if value is None else nn.Parameter(parameters[leaf], requires_grad=False)
        for leaf, value in module._parameters.items()
    }
    return clone


def _stand_in(module: nn.Module, *, sized: bool = True) -> nn.Module:
    """A module of the same class and shape, or of size 1, whose weights are one zero in memory.

    Not on the meta device: PEFT moves what the modules share to where the last of them lies.
    """
    return _with_parameters(
        module,
        {
            leaf: torch.zeros((), dtype=torch.float32).expand(value.shape if sized else (1,) * value.dim())
            for leaf, value in module._parameters.items()
            if value is not None
        },
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of what it does anyway, such as drawing a projection again from its seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
