"""Every architecture: names on disk, blocks, groups and folds, with transformers itself as the judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qexport
from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import UnsupportedModelError
from qexport.modeling import architectures
from qexport.modeling.architectures import ARCHITECTURES, Architecture, architecture_of, stored_transposed
from qexport.modeling.blocks import BlockStream, set_weight, weight_of
from qexport.modeling.folding import Fold, apply_fold
from qexport.modeling.skeleton import Skeleton, build_skeleton
from qexport.modeling.structure import structure_problems
from qexport.modeling.whole import load_whole
from qexport.verification.integrity import check_integrity
from tests.tiny import edit_weights, in_transformers, logits, tokens
from tests.zoo import LENGTH, ROWLESS, VARIANTS, ZOO, zoo_model

WITH_ROW = {**ZOO, **VARIANTS}
ALL = {**WITH_ROW, **ROWLESS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            make = ALL[name]
            made[name] = make(tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return get


def opened(path: Path) -> tuple[Checkpoint, Skeleton]:
    checkpoint = qexport.open_checkpoint(path)
    return checkpoint, build_skeleton(checkpoint)


def through(stream: BlockStream, batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    hidden = stream.embed(batches)
    for index in range(len(stream)):
        with stream.block(index):
            hidden = [stream.run(index, batch) for batch in hidden]
    return stream.logits(batches, hidden)


def fp32_logits(path: Path, batch: torch.Tensor) -> torch.Tensor:
    return logits(in_transformers(path, dtype=torch.float32), batch)


def test_every_row_has_a_tiny_model() -> None:
    assert {name for row in ARCHITECTURES for name in row.model_types} == set(ZOO)


@pytest.mark.parametrize("name", WITH_ROW)
def test_block_by_block_gives_transformers_logits(name: str, models: Any) -> None:
    path = models(name)
    checkpoint, skeleton = opened(path)
    batches = [tokens(3, LENGTH), tokens(2, LENGTH), tokens(1, 7)]
    for batch, found in zip(batches, through(BlockStream(skeleton, checkpoint), batches), strict=True):
        torch.testing.assert_close(found, fp32_logits(path, batch), rtol=1e-4, atol=1e-4)
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ALL)
def test_the_whole_model_is_transformers(name: str, models: Any) -> None:
    path = models(name)
    checkpoint, skeleton = opened(path)
    assert structure_problems(checkpoint, skeleton) == []
    assert check_integrity(checkpoint, skeleton) == len(list(checkpoint.names()))
    whole = load_whole(skeleton, checkpoint)
    torch.testing.assert_close(
        logits(whole, tokens(2, LENGTH)), fp32_logits(path, tokens(2, LENGTH)), rtol=1e-4, atol=1e-4
    )
    answer = whole.generate(tokens(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=2)
    theirs = in_transformers(path, dtype=torch.float32).generate(
        tokens(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=2
    )
    assert torch.equal(answer, theirs)


def _matrices_in_blocks(path: Path) -> set[str]:
    """The 2-D tensors on disk whose name has the number of a block, which no embedding's has."""
    tensors = load_file(path / "model.safetensors")
    blocks = ("layers.", "h.")
    return {
        name.removesuffix(".weight")
        for name, value in tensors.items()
        if value.dim() == 2 and any(f".{name}".find(f".{block}") >= 0 for block in blocks)
    }


@pytest.mark.parametrize("name", ALL)
def test_linears_are_called_as_on_disk(name: str, models: Any) -> None:
    path = models(name)
    _, skeleton = opened(path)
    stored, linears = load_file(path / "model.safetensors"), skeleton.linears()
    assert set(linears) | set(skeleton.routers) == _matrices_in_blocks(path)
    assert not set(linears) & set(skeleton.routers)
    transposed = stored_transposed(json.loads((path / "config.json").read_text()))
    for linear, shape in linears.items():
        found = tuple(stored[f"{linear}.weight"].shape)
        assert shape == (found[::-1] if linear in skeleton.transposed else found), linear
        assert transposed(linear) == transposed(f"{linear}.weight") == (linear in skeleton.transposed)
    assert {n for n, value in stored.items() if value.dim() == 3} == set(skeleton.fused)


def test_conv1d_is_told_from_the_layers_around_it(models: Any) -> None:
    _, skeleton = opened(models("gpt2"))
    assert skeleton.linears()["transformer.h.0.attn.c_attn"] == (384, 128)
    asked = stored_transposed({"model_type": "gpt2"})
    assert not asked("transformer.wte.weight")
    assert not asked("transformer.h.0.ln_1.weight")
    assert not stored_transposed({"model_type": "gpt_bigcode"})("transformer.h.0.attn.c_attn.weight")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "phimoe"])
def test_routers_are_kept(name: str, models: Any) -> None:
    _, skeleton = opened(models(name))
    assert any("gate" in router for router in skeleton.routers)
    rows = {load_file(models(name) / "model.safetensors")[f"{r}.weight"].shape[0] for r in skeleton.routers}
    assert rows <= {4, 1}  # experts; qwen2_moe's shared expert has a gate of one row


@pytest.mark.parametrize("name", WITH_ROW)
def test_groups_hold_every_linear_once_and_share_their_input(name: str, models: Any) -> None:
    checkpoint, skeleton = opened(models(name))
    stream = BlockStream(skeleton, checkpoint)
    layers = [layer for i in range(len(stream)) for group in stream.groups(i) for layer in group]
    assert sorted(layer.name for layer in layers) == sorted(skeleton.linears())
    assert {layer.name for layer in layers if layer.transposed} == skeleton.transposed
    hidden = stream.embed([tokens(2, LENGTH)])[0]
    for index in range(len(stream)):
        seen: dict[str, torch.Tensor] = {}
        wanted = [layer.inner for group in stream.groups(index) for layer in group]
        with stream.block(index):
            whole = stream.run(index, hidden)
            result = stream.inputs(index, hidden, wanted, seen.__setitem__, stop=False)
        assert result is not None
        assert torch.equal(result, whole)
        order = list(seen)
        firsts = [group[0].inner for group in stream.groups(index) if group[0].inner in seen]
        if not any("experts" in inner for inner in firsts):
            assert [inner for inner in order if inner in firsts] == firsts
        for group in stream.groups(index):
            inputs = [seen[layer.inner] for layer in group if layer.inner in seen]
            assert all(torch.equal(inputs[0], other) for other in inputs)
        hidden = whole


@pytest.mark.parametrize("name", WITH_ROW)
def test_names_of_a_block_are_those_on_disk(name: str, models: Any) -> None:
    checkpoint, skeleton = opened(models(name))
    stream = BlockStream(skeleton, checkpoint)
    for index in range(len(stream)):
        names = stream.stored_names(index)
        prefix = stream.block_name(index) + "."
        assert set(names.values()) >= {n for n in checkpoint.names() if n.startswith(prefix)}
        with stream.block(index) as block:
            for group in stream.groups(index):
                for layer in group:
                    assert names[f"{layer.inner}.weight"] == f"{layer.name}.weight"
                    stored = checkpoint.read(f"{layer.name}.weight").float()
                    assert torch.equal(weight_of(block, layer), stored.T if layer.transposed else stored)


def test_a_weight_is_put_back_as_it_lies(models: Any) -> None:
    checkpoint, skeleton = opened(models("gpt2"))
    stream = BlockStream(skeleton, checkpoint)
    hidden = stream.embed([tokens()])[0]
    with stream.block(0) as block:
        before = stream.run(0, hidden)
        layer = stream.groups(0)[0][0]
        weight = weight_of(block, layer).clone()
        assert weight.shape == (384, 128)
        set_weight(block, layer, torch.zeros_like(weight))
        assert not torch.allclose(stream.run(0, hidden), before)
        set_weight(block, layer, weight)
        assert torch.equal(stream.run(0, hidden), before)
        assert block.get_parameter("attn.c_attn.weight").is_contiguous()


def test_the_run_stops_after_what_is_wanted(models: Any) -> None:
    checkpoint, skeleton = opened(models("mixtral"))
    stream = BlockStream(skeleton, checkpoint)
    hidden = stream.embed([tokens(1, 1)])[0]  # one token, so two of four experts get none
    seen: dict[str, torch.Tensor] = {}
    with stream.block(0) as block:
        router = block.get_submodule("mlp.gate")
        calls: list[int] = []
        hook = router.register_forward_pre_hook(lambda module, args: calls.append(1))
        assert stream.inputs(0, hidden, ["self_attn.q_proj", "self_attn.o_proj"], seen.__setitem__) is None
        assert set(seen) == {"self_attn.q_proj", "self_attn.o_proj"}
        assert not calls
        experts = [f"mlp.experts.{n}.down_proj" for n in range(4)]
        seen.clear()
        out = stream.inputs(0, hidden, experts, seen.__setitem__)
        assert out is not None
        assert torch.equal(out, stream.run(0, hidden))
        assert len(seen) == 2
        assert {x.shape for x in seen.values()} == {(1, 256)}
        hook.remove()
    assert not any(module._forward_pre_hooks for module in skeleton.model.modules())


FOLDS_PER_BLOCK = {
    "llama": 3,
    "mistral": 3,
    "qwen2": 3,
    "qwen3": 3,
    "gemma": 4,
    "gemma2": 3,
    "gemma3_text": 3,
    "phi3": 3,
    "gpt2": 3,
    "gpt_neox": 2,
    "opt": 4,
    "mixtral": 2 + 4,
    "qwen3_moe": 2 + 4,
    "llama_as_many_kv_heads": 4,
    "phi3_as_many_kv_heads": 4,
    "opt_norms_after": 2,
    "opt_gelu": 3,
    "gpt_neox_one_after_the_other": 2,
    "gpt2_without_prefix": 3,
    "mixtral_fused": 1,
    "qwen3_moe_fused": 1,
    "mixtral_router_logits": 2 + 4,
}


@pytest.mark.parametrize("name", WITH_ROW)
def test_a_fold_changes_no_logits(name: str, models: Any) -> None:
    """Each by itself, and without its targets' side the logits do change: the scales are not lost."""
    path = models(name)
    checkpoint, skeleton = opened(path)
    folds = {index: BlockStream(skeleton, checkpoint).folds(index) for index in range(2)}
    if name in FOLDS_PER_BLOCK:
        assert [len(found) for found in folds.values()] == [FOLDS_PER_BLOCK[name]] * 2
    else:  # a dense block, then one of experts
        assert [len(found) for found in folds.values()] == [3, 2 + 4]
    model = load_whole(skeleton, checkpoint)
    batch = tokens(2, LENGTH)
    before = logits(model, batch)
    blocks = model.get_submodule(architecture_of(skeleton.model_type).blocks)
    generator = torch.Generator().manual_seed(5)
    for index, found in folds.items():
        for fold in found:
            scales = torch.exp(torch.rand(fold.end - fold.begin, generator=generator) * 2 - 1)
            start = {key: value.clone() for key, value in blocks[index].state_dict().items()}
            apply_fold(blocks[index], fold, scales)
            torch.testing.assert_close(logits(model, batch), before, rtol=2e-3, atol=2e-3)
            for key, value in start.items():
                if not key.startswith(f"{fold.source}."):
                    blocks[index].get_parameter(key).data.copy_(value)
            assert (logits(model, batch) - before).abs().max() > 0.02, fold
            for key, value in start.items():
                blocks[index].get_parameter(key).data.copy_(value)


@pytest.mark.parametrize("name", WITH_ROW)
def test_a_folds_targets_are_every_reader_in_a_group(name: str, models: Any) -> None:
    """Layers of one input stand in one fold together, or the others would get a changed input."""
    checkpoint, skeleton = opened(models(name))
    stream = BlockStream(skeleton, checkpoint)
    for index in range(len(stream)):
        for fold in stream.folds(index):
            for group in stream.groups(index):
                inners = {layer.inner for layer in group}
                assert not inners & set(fold.targets) or inners <= set(fold.targets)


def test_a_fold_has_the_norms_own_arithmetic() -> None:
    norm, linear = nn.LayerNorm(3), nn.Linear(3, 2)
    block = nn.Sequential(norm, linear)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0])
    norm.bias.data = torch.tensor([2.0, 4.0, 6.0])
    scales = torch.tensor([2.0, 4.0, 0.5])
    columns = linear.weight.data.clone()
    apply_fold(block, Fold("0", ("1",), 0, 3), scales)
    assert norm.weight.tolist() == [0.5, 0.5, 6.0]
    assert norm.bias.tolist() == [1.0, 1.0, 12.0]
    assert torch.equal(linear.weight.data, columns * scales)
    norm.weight.data = torch.tensor([1.0, 3.0, 0.0])
    apply_fold(block, Fold("0", ("1",), 0, 3, plus_one=True), scales)
    assert norm.weight.tolist() == [0.0, 0.0, 1.0]


def test_experts_fused_on_disk_are_left_out_by_name(models: Any) -> None:
    checkpoint, skeleton = opened(models("mixtral_fused"))
    assert skeleton.fused == {
        f"model.layers.{layer}.mlp.experts.{leaf}": shape
        for layer in range(2)
        for leaf, shape in (("gate_up_proj", (4, 512, 128)), ("down_proj", (4, 128, 256)))
    }
    stream = BlockStream(skeleton, checkpoint)
    assert not any("experts" in layer.name for group in stream.groups(0) for layer in group)
    edit_weights(
        models("mixtral_fused"),
        **{
            "model.layers.0.mlp.experts.down_proj": torch.zeros(4, 128, 64),
            "model.layers.1.mlp.experts.down_proj": None,
        },
    )
    problems = structure_problems(qexport.open_checkpoint(models("mixtral_fused")), skeleton)
    assert len(problems) == 2
    assert "down_proj" in problems[0]
    assert "[4, 128, 64], expected [4, 128, 256]" in problems[1]


def test_an_expert_that_is_not_there_is_missed(tmp_path: Path) -> None:
    path = ZOO["mixtral"](tmp_path / "model")
    edit_weights(path, **{"model.layers.1.block_sparse_moe.experts.3.w2.weight": None})
    checkpoint, skeleton = opened(path)
    (problem,) = structure_problems(checkpoint, skeleton)
    assert problem.startswith("1 tensors missing")
    assert "experts.3" in problem


def test_an_unknown_architecture_names_the_way_out(models: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="no architecture row for 'granite'") as raised:
        BlockStream(build_skeleton(models("granite")), qexport.open_checkpoint(models("granite")))
    assert "bnb, eetq, rtn, search, hqq, mlx's default" in str(raised.value)


def test_a_path_alone_gives_the_names_in_memory(models: Any) -> None:
    linears = build_skeleton(models("gpt2_without_prefix")).linears()
    assert "transformer.h.0.mlp.c_fc" in linears
    assert "h.0.mlp.c_fc" in opened(models("gpt2_without_prefix"))[1].linears()


@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_that_return_tuples(blocks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bloom's and Falcon's do; a shell that returned tensors would lose the batch without a word."""
    row = Architecture(("falcon",), "transformer.h", (("mlp.dense_h_to_4h",),), ())
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*ARCHITECTURES, row))
    path = zoo_model(tmp_path / "model", "falcon", tied=True, num_hidden_layers=blocks)
    checkpoint, skeleton = opened(path)
    assert skeleton.model.config.num_hidden_layers == blocks
    (found,) = through(BlockStream(skeleton, checkpoint), [tokens(2, 9)])
    torch.testing.assert_close(found, fp32_logits(path, tokens(2, 9)), rtol=1e-4, atol=1e-4)
