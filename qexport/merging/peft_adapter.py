"""An adapter of any kind that PEFT merges, as edits that PEFT's own layers carry out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import AdapterError
from qexport.merging.adapter import Adapter
from qexport.merging.book import EditBook
from qexport.merging.edits import Loading
from qexport.merging.peft_layers import PeftLayers
from qexport.merging.settings import not_converted
from qexport.merging.trained import add_trained
from qexport.modeling.skeleton import build_model

# kinds whose merge changes more than the weight
_CHANGES_BIAS = frozenset({"IA3", "ROAD", "ADAMSS", "GLORA", "BEFT", "LN_TUNING"})
# initialisations that changed the base in a way that its file does not tell
_LOST_INITS = {
    "pissa_niter": "a random decomposition of the base that is not saved",
    "lora_ga": "gradients that are not saved",
    "corda": "activations that are not saved",
    "loftq": "a quantization of the base that is not saved",
}


@dataclass(frozen=True)
class _PeftChange:
    edit: PeftEdit
    device: torch.device
    delta_square = None

    def apply(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        edit = self.edit
        given = {
            leaf: rows.cpu() if leaf == edit.leaf else edit.checkpoint.read(name).float()
            for leaf, name in edit.names.items()
        }
        return edit.layers.merge(edit.module, given)[edit.leaf].to(self.device)


@dataclass(frozen=True)
class PeftEdit:
    """One parameter of a module, as PEFT merges it. `names` are all the module's: leaf -> tensor."""

    module: str
    leaf: str
    names: Mapping[str, str] = field(hash=False)
    layers: PeftLayers = field(repr=False, compare=False)
    checkpoint: Checkpoint = field(repr=False, compare=False)
    whole = True

    def load(self, at: Loading) -> _PeftChange:
        """See `Edit`."""
        return _PeftChange(self, at.device)


def add_by_peft(book: EditBook, checkpoint: Checkpoint, *, trust_remote_code: bool) -> None:
    """Enters every edit of an adapter into its book; its modules are those that PEFT would choose.

    Raises AdapterError for what PEFT cannot rebuild, UnsupportedModelError for an unknown model.
    """
    adapter = book.adapter
    _require_known_base(adapter)
    if adapter.kind == "FROD" and not adapter.config.get("save_projection", True):
        raise AdapterError(
            f"{adapter.path} is a FRoD adapter without its projections, which all weights together make",
            remedy="train or save it with save_projection=True",
        )
    if adapter.kind == "TRAINABLE_TOKENS":
        for name, tensor in adapter.tensors.items():
            add_trained(book, name, tensor)
        return
    model = build_model(checkpoint.path, trust_remote_code=trust_remote_code)
    layers = PeftLayers(adapter, model)
    held: dict[str, set[str]] = {module: set() for module in layers.modules}
    for name, tensor in adapter.tensors.items():
        module = _owner(name, layers.modules)
        if ".base_layer." in name or (module is None and not layers.is_shared(name)):
            add_trained(book, name, tensor)
        elif module is not None:
            held[module].add(name.removeprefix(f"{module}."))
    _require_whole(adapter, held)
    for module, layer in layers.modules.items():
        _add_module(book, checkpoint, layers, module, layer)


def _owner(name: str, modules: Mapping[str, Any]) -> str | None:
    """The module that a key belongs to."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in modules), None)


def _require_whole(adapter: Adapter, held: Mapping[str, set[str]]) -> None:
    """Raises AdapterError when a module lacks tensors that its like in other layers has.

    `held` is what the file has for each. PEFT itself says what each needs when it merges; this is told
    before the work begins.
    """
    if not any(held.values()):
        return  # what belongs to all of them is all that there is
    likes: dict[str, set[str]] = {}
    for module, keys in held.items():
        likes.setdefault(module.rpartition(".")[2], set()).update(keys)
    for module, keys in held.items():
        if missing := sorted(likes[module.rpartition(".")[2]] - keys):
            raise AdapterError(
                f"{adapter.path} has no {', '.join(missing)} of {module}, as it has of others",
                expected="the same tensors for every layer",
                remedy="the file is not whole: save or download the adapter again",
            )


def _add_module(book: EditBook, checkpoint: Checkpoint, layers: PeftLayers, module: str, layer: Any) -> None:
    names: dict[str, str] = {}
    for leaf, value in layer._parameters.items():
        if value is None:
            continue
        name = book.names.find(module, leaf)
        if name is None:
            book.stranger(module)
            return
        if book.names.shape(name) != tuple(value.shape):
            book.misfit(name, tuple(value.shape))
            return
        names[leaf] = name
    bias = "bias" in names and book.adapter.kind in _CHANGES_BIAS
    leaves = ["bias"] if book.adapter.kind == "BEFT" else ["weight", *(["bias"] if bias else [])]
    for leaf in leaves:
        if leaf not in names:
            raise AdapterError(
                f"{book.adapter.path} changes the {leaf} of {module}, which has none in the base"
            )
        book.add(names[leaf], PeftEdit(module, leaf, names, layers, checkpoint))


def _require_known_base(adapter: Adapter) -> None:
    init = adapter.config.get("init_lora_weights")
    for start, lost in _LOST_INITS.items():
        if isinstance(init, str) and init.startswith(start):
            raise not_converted(f"{adapter.path} was initialised by {init}, which changed the base by {lost}")
