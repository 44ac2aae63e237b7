"""Blocks that are tuned: codes stay, scales and norms move, and only where text that was held out gains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qexport
from qexport.formats.opening import open_checkpoint
from qexport.grids.grid import encode
from qexport.grids.integer import IntegerGrid
from qexport.modeling.activations import Activations
from qexport.modeling.blocks import BlockStream, Layer, set_weight, weight_of
from qexport.modeling.skeleton import build_skeleton
from qexport.quantization.blockwise import one_block
from qexport.quantization.blockwise.tuning import Cost, Tunable, Tuned, tune_blocks, weighed_error
from qexport.specs import spec_of
from tests.tiny import tiny_model, tokens
from tests.zoo import zoo_model

GRID = IntegerGrid(2, 32, "integer")
BATCHES = 17  # numbers 0, 8 and 16 are held out
NORMED = {"input_layernorm", "post_attention_layernorm"}
NORMS = {"llama": "input_layernorm.weight", "gpt2": "ln_1.weight"}


@dataclass
class Case:
    stream: BlockStream
    original: nn.Module
    block: nn.Module
    solved: dict[str, tuple[Layer, Any, IntegerGrid]]
    full: Activations
    wanted: Activations

    def tuned(self, cost: Cost, free: set[str], now: Activations | None = None) -> Tuned:
        block = Tunable(0, self.block, self.solved, free, lambda inner, value: value.half())
        return tune_blocks(self.stream, [block], wanted=self.wanted, now=now or self.full, cost=cost)[0]


@contextmanager
def rounded(path: Path, directory: Path) -> Iterator[Case]:
    """The first block of a model, and a copy of it whose layers are rounded to 2 bits."""
    stream = BlockStream(build_skeleton(path), open_checkpoint(path))
    with Activations(1 << 30, directory) as full, Activations(1 << 30, directory) as wanted:
        full.extend(stream.embeddings(list(torch.split(tokens(rows=2 * BATCHES, length=16), 2))))
        with stream.block(0) as original:
            wanted.extend(stream.run(0, batch) for batch in full)
            block = copy.deepcopy(original)
            solved = {}
            for group in stream.groups(0):
                for layer in group:
                    weight = weight_of(block, layer)
                    codes = encode(GRID, weight, GRID.fit(weight))
                    set_weight(block, layer, GRID.decode(codes))
                    solved[layer.inner] = layer, codes, GRID
            yield Case(stream, original, block, solved, full, wanted)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: tiny_model(path, hidden_size=64, intermediate_size=128),
    "gpt2": lambda path: zoo_model(
        path, "gpt2", hidden_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=128, num_key_value_heads=4
    ),
}


def state(block: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in block.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def error(case: Case, numbers: range) -> float:
    """Of what the block puts out, as a share, on some batches."""
    lost, whole = 0.0, 0.0
    for number in numbers:
        x = case.full[number]
        wanted = case.stream.run(0, x, case.original)
        lost += float((case.stream.run(0, x, case.block) - wanted).square().sum())
        whole += float(wanted.square().sum())
    return lost / whole


@pytest.mark.parametrize("name", MAKERS)
def test_what_the_block_puts_out_comes_nearer(name: str, tmp_path: Path) -> None:
    path = MAKERS[name](tmp_path / "model")
    with rounded(path, tmp_path) as case:
        original, before, codes = state(case.original), state(case.block), dict(case.solved)
        vectors = {key for key, value in before.items() if value.dim() == 1}
        free = {next(iter(sorted(vectors))), NORMS[name]}
        was, held_was = error(case, range(BATCHES)), error(case, range(0, BATCHES, 8))
        tuned = case.tuned(weighed_error(torch.eye(64)), free)
        assert error(case, range(BATCHES)) < 0.9 * was
        assert error(case, range(0, BATCHES, 8)) < 0.9 * held_was
        assert equal(state(case.original), original)
        # what is to be written is what the block has
        after = state(case.block)
        assert tuned.codes.keys() == codes.keys()
        for inner, (layer, old, grid) in codes.items():
            new = tuned.codes[inner]
            assert torch.equal(new.codes, old.codes)
            assert not torch.equal(new.scales, old.scales)
            assert new.scales.dtype == torch.float16
            assert torch.equal(weight_of(case.block, layer), grid.decode(new))
        assert tuned.changed == free
        for inner in free:
            assert torch.equal(after[inner], after[inner].half().float())
        assert not torch.equal(after[NORMS[name]], before[NORMS[name]])
        for inner in vectors - free:
            assert torch.equal(after[inner], before[inner])


def no_gain(number: int, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The same whatever is done."""
    return found.sum() * 0 + 1


def misleading(number: int, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The batches that are learned from ask for the opposite of what those ask for that are held out."""
    error = (found - wanted).square().mean()
    return error if number % 8 == 0 else -error


@pytest.mark.parametrize("cost", [no_gain, misleading])
def test_where_held_out_text_does_not_gain_all_stays(cost: Cost, tmp_path: Path) -> None:
    with rounded(MAKERS["llama"](tmp_path / "model"), tmp_path) as case:
        before, original = state(case.block), state(case.original)
        tuned = case.tuned(cost, {NORMS["llama"]})
        assert tuned == Tuned({}, set())
        assert equal(state(case.block), before)
        assert equal(state(case.original), original)


def test_tuning_draws_from_no_one_elses_random_numbers(tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        with rounded(MAKERS["llama"](tmp_path / f"model{seed}"), tmp_path) as case:
            torch.manual_seed(seed)
            drawn = torch.random.get_rng_state()
            case.tuned(weighed_error(torch.eye(64)), {NORMS["llama"]})
            assert torch.equal(torch.random.get_rng_state(), drawn)
            found.append(state(case.block))
    assert equal(*found)


def test_the_weighed_error_is_a_quadratic_form_over_what_is_put_out() -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = torch.randn(2, 3, 5, 4, generator=generator)
    root = torch.randn(4, 4, generator=generator)
    M = root @ root.T
    expected = sum(e @ M @ e for e in (found - wanted).view(-1, 4)) / wanted.square().sum()
    assert float(weighed_error(M)(0, found, wanted)) == pytest.approx(float(expected), rel=1e-5)
    assert float(weighed_error(M)(0, wanted, wanted)) == 0


def test_the_files_hold_the_blocks_as_they_were_tuned(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    blocks: dict[int, dict[str, torch.Tensor]] = {}  # as they were left
    changed: dict[int, set[str]] = {}
    windows: list[list[int]] = []

    def kept(stream: BlockStream, tunable: Sequence[Tunable], **options: Any) -> list[Tuned]:
        tuned = tune_blocks(stream, tunable, **options)
        windows.append([block.index for block in tunable])
        assert all({name.rpartition(".")[0] for name in block.free} >= NORMED for block in tunable)
        for block, found in zip(tunable, tuned, strict=True):
            blocks[block.index] = state(block.module)
            changed.setdefault(block.index, set()).update(found.changed)
        return tuned

    monkeypatch.setattr(one_block, "tune_blocks", kept)
    options = {"calibration": str(text), "samples": 16, "sequence_length": 32, "bits": 2, "group_size": 32}
    qexport.quantize(model, tmp_path / "out", spec_of("gptq", effort="best", **options))
    assert windows == [[0], [0, 1], [1, 2]]
    assert any(changed.values())  # else nothing was tested
    before, after = (qexport.open_checkpoint(path) for path in (model, tmp_path / "out"))
    for index, block in blocks.items():
        for inner, value in block.items():
            name = f"model.layers.{index}.{inner}"
            assert torch.equal(after.read(name).float(), value.half().float()), name
            if value.dim() == 1:
                assert after.info(name).dtype == torch.float16
                assert torch.equal(after.read(name), before.read(name)) is not (inner in changed[index]), name
