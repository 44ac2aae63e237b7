"""The streamed backward pass against autograd on transformers' whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qexport.formats.opening import open_checkpoint
from qexport.modeling.backward import backward, sampled_likelihood
from qexport.modeling.blocks import BlockStream
from qexport.modeling.skeleton import build_skeleton
from tests.tiny import in_transformers, tokens
from tests.zoo import LENGTH, ZOO


class Kept:
    """A watcher that sums g^T x of every layer, as the gradient of a linear layer's weight is."""

    def __init__(self, stream: BlockStream) -> None:
        self.stream, self.found, self.order = stream, dict[str, torch.Tensor](), list[int]()
        self.inputs: list[torch.Tensor] = []

    def begin(self, index: int, block: nn.Module, inputs: Sequence[torch.Tensor]) -> Sequence[str]:
        self.order.append(index)
        self.inputs = list(inputs)
        assert not any(p.is_meta for p in block.parameters())
        return [layer.inner for group in self.stream.groups(index) for layer in group]

    def see(self, inner: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        product = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        key = f"{self.stream.architecture.blocks}.{self.order[-1]}.{inner}"
        self.found[key] = self.found.get(key, torch.zeros(())) + product

    def end(self, index: int, block: nn.Module) -> None:
        assert index == self.order[-1]


def next_tokens(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The text's log-likelihood: no chance in it."""
    chances = logits.log_softmax(-1)[:, :-1]
    return chances.gather(-1, tokens[:, 1:, None]).sum()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "mixtral", "gpt_neox", "phi3"])
def test_gradients_are_those_of_autograd_on_the_whole_model(name: str, tmp_path: Path) -> None:
    path = ZOO[name](tmp_path / "model")
    for key, (found, wanted) in both(path, name, tmp_path, dtype=torch.float32).items():
        assert float((found - wanted).norm() / wanted.norm()) < 2e-4, key


def test_16_bits_of_what_is_kept_are_enough_and_it_may_lie_in_a_file(tmp_path: Path) -> None:
    path = ZOO["llama"](tmp_path / "model")
    in_memory = both(path, "llama", tmp_path, memory=1 << 30)
    for key, (found, wanted) in both(path, "llama", tmp_path, memory=1).items():
        assert float((found - wanted).norm() / wanted.norm()) < 5e-3, key
        assert torch.equal(found, in_memory[key][0])
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def both(
    path: Path, name: str, tmp_path: Path, *, memory: int = 1 << 30, dtype: torch.dtype = torch.float16
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The weights' gradients [out, in] that the watcher saw, and those of transformers' whole model."""
    stream = BlockStream(build_skeleton(path), open_checkpoint(path))
    watcher = Kept(stream)
    rows = tokens(rows=3, length=LENGTH)
    backward(
        stream, torch.split(rows, 2), next_tokens, watcher, memory=memory, directory=tmp_path, dtype=dtype
    )
    assert watcher.order == [1, 0]
    expected = _weight_gradients(in_transformers(path, dtype=torch.float32), rows)
    pairs = {
        key: (found, expected[f"{key}.weight"].T if name == "gpt2" else expected[f"{key}.weight"])
        for key, found in watcher.found.items()
        if f"{key}.weight" in expected  # transformers has a block's experts in one
    }
    assert len(pairs) >= 8
    return pairs


def _weight_gradients(model: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    value = next_tokens(rows, model(rows).logits.float())
    value.backward()  # type: ignore[no-untyped-call]
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def test_experts_see_the_tokens_that_chose_them(tmp_path: Path) -> None:
    """transformers holds the experts of a block in one tensor: its slices are their gradients."""
    path = ZOO["mixtral"](tmp_path / "model")
    stream = BlockStream(build_skeleton(path), open_checkpoint(path))
    watcher = Kept(stream)
    rows = tokens(rows=2, length=LENGTH)
    backward(stream, [rows], next_tokens, watcher, memory=1 << 30, directory=tmp_path, dtype=torch.float32)
    model = in_transformers(path, dtype=torch.float32)
    expected = _weight_gradients(model, rows)
    fused = {name: value for name, value in expected.items() if name.endswith("experts.down_proj")}
    assert len(fused) == 2
    for name, value in fused.items():
        for expert, wanted in enumerate(value):
            found = watcher.found.get(name.replace("down_proj", f"{expert}.down_proj"), torch.zeros(()))
            assert float((found - wanted).norm()) <= 2e-3 * float(value.norm())


def test_the_likelihood_is_that_of_labels_drawn_from_the_model() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0]).expand(1, 20_000, 4).clone().requires_grad_()
    value = sampled_likelihood(3)(torch.zeros(1, 20_000, dtype=torch.long), logits)
    (gradient,) = torch.autograd.grad(value, logits)
    chances = logits[0, 0].detach().softmax(-1)
    # a label's gradient is onehot - p: its mean is 0, its second moment the Fisher matrix diag(p) - p p^T
    assert float(gradient[0].mean(0).abs().max()) < 0.02
    fisher = gradient[0].T @ gradient[0] / 20_000
    assert torch.allclose(fisher, chances.diag() - chances.outer(chances), atol=0.01)
    value = value.detach()
    again = sampled_likelihood(3)(torch.zeros(1, 20_000, dtype=torch.long), logits)
    other = sampled_likelihood(4)(torch.zeros(1, 20_000, dtype=torch.long), logits)
    assert again.item() == value.item() != other.item()
