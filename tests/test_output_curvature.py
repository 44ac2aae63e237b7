"""The curvature of the loss by outputs, block by block, against autograd on transformers' whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qexport.events import ignore
from qexport.formats.opening import open_checkpoint
from qexport.modeling.blocks import BlockStream
from qexport.modeling.skeleton import build_skeleton
from qexport.quantization.blockwise.output_curvature import SIZE, OutputCurvatures
from tests.tiny import in_transformers, tiny_model, tokens

WIDE = 192  # outputs of the larger layers: one block of them in full, and one in part


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model", hidden_size=64, intermediate_size=WIDE)


def gradients(path: Path, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients [tokens, out] of the outputs of all blocks and their linear layers.

    Labels are drawn a row at a time from the model's own chances, as the definition of the Fisher wants.
    """
    whole = in_transformers(path, dtype=torch.float32)
    outputs: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: object, args: object, out: torch.Tensor | tuple[torch.Tensor]) -> None:
            value = out[0] if isinstance(out, tuple) else out
            value.retain_grad()
            outputs.setdefault(name, []).append(value)

        return keep

    for name, module in whole.named_modules():
        if name.startswith("model.layers.") and (name.count(".") == 2 or isinstance(module, torch.nn.Linear)):
            module.register_forward_hook(hook(name))
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        chances = whole(row[None]).logits[0].log_softmax(-1)
        labels = torch.multinomial(chances.detach().exp(), 1, generator=generator)
        chances.gather(1, labels).sum().backward()
    return {name: torch.cat([_gradient(value) for value in values]) for name, values in outputs.items()}


def _gradient(value: torch.Tensor) -> torch.Tensor:
    assert value.grad is not None
    return value.grad[0]


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_they_are_those_of_the_whole_model(memory: int, model: Path, tmp_path: Path) -> None:
    stream = BlockStream(build_skeleton(model), open_checkpoint(model))
    rows = tokens(rows=6, length=32)
    expected = gradients(model, rows)
    with OutputCurvatures(tmp_path) as curvatures:
        curvatures.gather(stream, list(torch.split(rows, 2)), memory=memory, on_event=ignore)
        for index in (1, 0):
            found = curvatures.of_block(index)
            stem = f"model.layers.{index}"
            assert len(found.layers) == 7
            near(found.block, wanted(expected[stem], 64)[0])
            for inner in found.layers:
                layer = found.of(inner)
                assert layer is not None
                near(layer, wanted(expected[f"{stem}.{inner}"], SIZE))
            assert found.of("mlp") is None
            assert found.layers["mlp.up_proj"].shape == (2, SIZE, SIZE)
    assert list(tmp_path.iterdir()) == []


def wanted(g: torch.Tensor, size: int) -> torch.Tensor:
    """Blocks along the diagonal of the mean of g g^T, damped by a tenth of its mean diagonal, over that."""
    out = g.shape[1]
    G = (g.T.double() @ g.double()) / len(g)
    mean = G.diagonal().mean()
    G = (G + 0.1 * mean * torch.eye(out)) / (1.1 * mean)
    blocks = torch.zeros(-(-out // size), size, size, dtype=torch.float64)
    for number, block in enumerate(blocks):
        part = G[number * size : (number + 1) * size, number * size : (number + 1) * size]
        block[: len(part), : len(part)] = part
    return blocks


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of outputs that there are; what fills up the last block may be anything on the diagonal."""
    assert found.shape == expected.shape
    there = expected.reshape(-1, *expected.shape[-2:]).diagonal(dim1=1, dim2=2) > 0
    found = found.reshape(-1, *found.shape[-2:]) * there[:, None, :] * there[:, :, None]
    assert float((found - expected).norm()) < 0.01 * float(expected.norm())


def test_a_long_text_is_looked_at_here_and_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more tokens than are enough, batches are left out evenly: the others are all that counts."""
    monkeypatch.setattr("qexport.quantization.blockwise.output_curvature._TOKENS", 4 * 32)
    stream = BlockStream(build_skeleton(model), open_checkpoint(model))
    batches = list(torch.split(tokens(rows=12, length=32), 1))
    found = []
    for some in (batches, batches[::3]):
        with OutputCurvatures(tmp_path) as curvatures:
            curvatures.gather(stream, some, memory=1 << 30, on_event=ignore)
            found.append(curvatures.of_block(0))
    assert torch.equal(found[0].block, found[1].block)
    assert torch.equal(found[0].layers["mlp.up_proj"], found[1].layers["mlp.up_proj"])
