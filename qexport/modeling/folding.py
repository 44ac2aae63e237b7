"""Scales that move from a layer's output channels into the columns of the layers that read them.

AWQ's equivalence (Lin et al. 2023, section 3.2): W X = (W diag(s)) (diag(s)^-1 X).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qexport.modeling.architectures import Architecture, FoldRule
from qexport.modeling.skeleton import is_conv1d

_EXPERT = re.compile(r"\d+")


@dataclass(frozen=True)
class Fold:
    """Output channels `begin` to `end` of `source` are the input channels of all `targets`, in order.

    Inner names of a block. `source` is a norm or a linear layer; `plus_one`: a norm that multiplies by
    1 + weight.
    """

    source: str
    targets: tuple[str, ...]
    begin: int
    end: int
    plus_one: bool = False


def folds_of(block: nn.Module, row: Architecture, config: Any) -> list[Fold]:
    """The folds of a block that row, config and shapes admit. Weights may be on the meta device."""
    modules = dict(block.named_modules())
    found = []
    for rule in row.folds:
        if rule.when and getattr(config, rule.when[0], None) != rule.when[1]:
            continue
        for source, targets in _expanded(rule, modules):
            fold = _checked(modules, rule, source, targets, row.norm_plus_one)
            if fold:
                found.append(fold)
    return found


def expand(pattern: str, modules: Mapping[str, Any]) -> list[str]:
    """The names in `modules` that a pattern of a row stands for, in the experts' order."""
    if "*" not in pattern:
        return [pattern] if pattern in modules else []
    head, _, tail = pattern.partition("*")
    numbers = [
        int(number)
        for name in modules
        if name.startswith(head)
        and name.endswith(tail)
        and _EXPERT.fullmatch(number := name[len(head) : len(name) - len(tail)])
    ]
    return [f"{head}{number}{tail}" for number in sorted(numbers)]


def _expanded(rule: FoldRule, modules: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    sources = expand(rule.source, modules)
    if "*" not in rule.source:
        for source in sources:
            yield source, [name for target in rule.targets for name in expand(target, modules)]
        return
    head, _, tail = rule.source.partition("*")
    for source in sources:
        number = source[len(head) : len(source) - len(tail)]
        named = [target.replace("*", number) for target in rule.targets]
        yield source, [name for name in named if name in modules]


def _checked(
    modules: Mapping[str, Any], rule: FoldRule, source: str, targets: list[str], plus_one: bool
) -> Fold | None:
    weight = modules[source]._parameters.get("weight")
    if weight is None or not targets:  # a norm without weights has nothing that could take the scales
        return None
    norm = weight.dim() == 1
    channels = weight.shape[0] if norm else _matrix(modules[source]).shape[0]
    part, parts = rule.part
    if channels % parts:
        return None
    size = channels // parts
    if any(_matrix(modules[target]).shape[1] != size for target in targets):
        return None
    return Fold(source, tuple(targets), part * size, (part + 1) * size, plus_one and norm)


def _matrix(module: Any) -> torch.Tensor:
    """The module's weight as [out, in], a view."""
    weight: torch.Tensor = module.weight.data
    return weight.T if is_conv1d(module) else weight


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scales: torch.Tensor) -> None:
    """Divides the source's channels by `scales` [end - begin], positive, and multiplies the targets' columns.

    Changes the parameters of the loaded block in place; what it computes stays the same but for rounding.
    """
    source: Any = block.get_submodule(fold.source)
    weight, bias = source.weight.data, source._parameters.get("bias")
    scales = scales.to(weight.device, torch.float32)
    if weight.dim() == 1:
        channels = weight[fold.begin : fold.end]
        one = 1.0 if fold.plus_one else 0.0
        channels.copy_((channels.float() + one) / scales - one)
    else:
        rows = _matrix(source)[fold.begin : fold.end]
        rows.copy_(rows.float() / scales[:, None])
    if bias is not None:
        channels = bias.data[fold.begin : fold.end]
        channels.copy_(channels.float() / scales)
    for target in fold.targets:
        columns = _matrix(block.get_submodule(target))
        columns.copy_(columns.float() * scales)
