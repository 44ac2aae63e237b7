"""The model block by block gives what transformers gives all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qexport
from qexport.errors import NotACheckpointError, UnsupportedModelError
from qexport.modeling.blocks import BlockStream
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.whole import load_whole
from tests.conftest import shared
from tests.tiny import edit_json, in_transformers, logits, tiny_model, tokens


def streamed(path: Path, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    stream = BlockStream(build_skeleton(path), qexport.open_checkpoint(path))
    hidden = stream.embed(batches)
    for index in range(len(stream)):
        with stream.block(index):
            hidden = [stream.run(index, batch) for batch in hidden]
    return list(stream.logits(batches, hidden))


def reference(path: Path, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    model = in_transformers(path, dtype=torch.float32)
    return [logits(model, batch) for batch in batches]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_blocks_add_up_to_the_model(model_type: str, tied: bool, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model", model_type=model_type, tied=tied, dtype=torch.float32)
    batches = [tokens(3, 40), tokens(2, 40), tokens(1, 7)]
    for ours, theirs in zip(streamed(path, batches), reference(path, batches), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sliding_windows_are_the_models_own(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model", model_type="mistral", sliding_window=8, dtype=torch.float32)
    batches = [tokens(2, 40)]
    (ours,), (theirs,) = streamed(path, batches), reference(path, batches)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    edit_json(path / "config.json", sliding_window=None)
    assert (reference(path, batches)[0] - theirs).abs().max() > 0.01  # the window does matter here


def test_nothing_stays_in_memory(llama: Path) -> None:
    skeleton = build_skeleton(llama)
    stream = BlockStream(skeleton, qexport.open_checkpoint(llama))
    hidden = stream.embed([tokens()])
    with stream.block(1) as block:
        assert {p.device.type for p in block.parameters()} == {"cpu"}
        stream.run(1, hidden[0])
    list(stream.logits([tokens()], hidden))
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}


def test_the_input_of_an_inner_layer(llama: Path) -> None:
    stream = BlockStream(build_skeleton(llama), qexport.open_checkpoint(llama))
    hidden = stream.embed([tokens()])[0]
    model = in_transformers(llama, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, tokens())
    found: dict[str, torch.Tensor] = {}
    with stream.block(0):
        assert stream.inputs(0, hidden, ["mlp.down_proj"], found.__setitem__) is None  # it stopped there
    torch.testing.assert_close(found["mlp.down_proj"], seen[0], rtol=1e-5, atol=1e-6)


def test_the_whole_model_at_once(llama: Path) -> None:
    ours = load_whole(build_skeleton(llama), qexport.open_checkpoint(llama))
    assert torch.equal(logits(ours, tokens()), reference(llama, [tokens()])[0])


def test_configs_that_describe_no_model(llama: Path, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model")
    edit_json(path / "config.json", model_type="lama")
    with pytest.raises(UnsupportedModelError, match="transformers does not know"):
        build_skeleton(path)
    edit_json(path / "config.json", model_type="llama", hidden_size="wide")
    with pytest.raises(NotACheckpointError, match="does not describe"):
        build_skeleton(path)


def test_a_checkpoints_own_code_is_not_run_unasked(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model")
    proof = tmp_path / "ran"
    (path / "modeling_own.py").write_text(
        f"open({str(proof)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_json(path / "config.json", model_type="own", auto_map=auto_map)
    with pytest.raises(UnsupportedModelError, match="add --trust-remote-code"):
        build_skeleton(path)
    assert not proof.exists()
    build_skeleton(path, trust_remote_code=True)
    assert proof.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["captions22m", "tinystories-656k", "stories260k", "babyllama-105"])
def test_real_models(name: str) -> None:
    path = shared("models", name)
    batches = [tokens(2, 64, 100)]
    (ours,), (theirs,) = streamed(path, batches), reference(path, batches)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
