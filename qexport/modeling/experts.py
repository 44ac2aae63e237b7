"""Experts one by one: transformers keeps those of a block in two 3-D parameters, here each is a module.

So an expert's matrices are ordinary linear layers, with a name, a hook and a place on disk of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Expert(nn.Module):
    """One gated feed-forward network: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden, inner, bias=False, device="meta")
        self.down_proj = nn.Linear(inner, hidden, bias=False, device="meta")
        self._act = [act]  # in a list, so that it is no submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        gated: torch.Tensor = self._act[0](self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(gated)  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Stands where transformers' fused experts stood; expert N is the submodule named N."""

    def __init__(
        self, count: int, hidden: int, inner: int, act: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.count = count
        for number in range(count):
            self.add_module(str(number), Expert(hidden, inner, act))

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`hidden` [tokens, hidden], each through its `chosen` [tokens, k] experts, summed by `weights`.

        An expert that no token chose is not called.
        """
        total = torch.zeros_like(hidden)
        for number in torch.unique(chosen).tolist():
            if number < self.count:  # transformers marks what another device does by a number beyond
                token, rank = torch.where(chosen == number)
                out = self.get_submodule(str(number))(hidden[token]) * weights[token, rank, None]
                total.index_add_(0, token, out.to(total.dtype))
        return total


def unfuse(model: nn.Module) -> None:
    """Replaces the fused experts in a model on the meta device, where they are of the plain gated kind."""
    fused = [(name, module) for name, module in model.named_modules() if _is_plain(module)]
    for name, module in fused:
        count, rows, hidden = module.gate_up_proj.shape
        model.set_submodule(name, Experts(count, hidden, rows // 2, module.act_fn))


def _is_plain(module: Any) -> bool:
    """Experts as Mixtral has them: gate above up, no bias, nothing else between (transformers'
    use_experts_implementation tells by these attributes)."""
    parameters = dict(module.named_parameters(recurse=False))
    return (
        {name: value.dim() for name, value in parameters.items()} == {"gate_up_proj": 3, "down_proj": 3}
        and hasattr(module, "act_fn")
        and getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not any(
            getattr(module, flag, True) for flag in ("has_bias", "is_transposed", "has_post_expert_norm")
        )
        and getattr(type(module)._apply_gate, "__name__", "") == "_default_apply_gate"
    )
