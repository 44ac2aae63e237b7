"""`--calibration self`: what is sampled is the model's own distribution, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qexport.checkpoint.checkpoint import open_directory
from qexport.errors import NonFiniteError
from qexport.events import Advanced, Noted, Started
from qexport.modeling import sampling
from qexport.modeling.calibration import calibration_data
from qexport.modeling.sampling import sampled_windows
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.specs import CalibrationSpec
from tests.tiny import edit_weights, in_transformers, logits, tiny_model


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return load_tokenizer(llama)


def sampled(model: Path, tokenizer: Any, samples: int, length: int, seed: int = 0) -> torch.Tensor:
    return sampled_windows(model, tokenizer, samples=samples, length=length, seed=seed).windows


def test_windows_are_whole_and_set_by_the_seed(llama: Path, tokenizer: Any) -> None:
    one, again, other = (sampled(llama, tokenizer, 6, 48, seed) for seed in (3, 3, 4))
    assert (one.dtype, tuple(one.shape)) == (torch.int64, (6, 48))
    assert one.equal(again)
    assert not one.equal(other)
    assert set(one[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert len({tuple(row) for row in one.tolist()}) == 6
    assert int(one.max()) < len(tokenizer) < open_directory(llama).config["vocab_size"]


def test_an_end_is_followed_by_the_next_beginning(llama: Path, tokenizer: Any) -> None:
    found = sampled_windows(llama, tokenizer, samples=24, length=120, seed=0)
    begins = found.windows[:, :-1] == tokenizer.eos_token_id
    assert int(begins.sum()) > 3  # else nothing is tested
    assert bool((found.windows[:, 1:][begins] == tokenizer.bos_token_id).all())
    assert found.documents == 24 + int(begins.sum())
    for row in found.windows.tolist():
        for at in [n for n, token in enumerate(row) if token == tokenizer.eos_token_id]:
            last = max(n for n in range(at) if row[n] == tokenizer.bos_token_id)
            assert at - last > len(sampling.HEATED)


def test_the_cache_gives_what_the_whole_sequence_gives(
    llama: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At temperature 0 the windows are the greedy continuation that transformers computes without a cache."""
    monkeypatch.setattr(sampling, "HEATED", (0.0,) * 24)
    found = sampled(llama, tokenizer, 2, 24)
    model = in_transformers(llama, dtype=torch.float32)
    sequence = torch.tensor([[tokenizer.bos_token_id]])
    while sequence.shape[1] < 24:
        scores = logits(model, sequence)[0, -1]
        scores[len(tokenizer) :] = -torch.inf
        scores[[tokenizer.bos_token_id, tokenizer.eos_token_id]] = -torch.inf
        sequence = torch.cat([sequence, scores.argmax()[None, None]], dim=1)
    assert found.tolist() == sequence.tolist() * 2


def test_tokens_come_as_often_as_the_model_says(
    llama: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "HEATED", ())
    model = in_transformers(llama, dtype=torch.float32)
    scores = logits(model, torch.tensor([[tokenizer.bos_token_id]]))[0, -1]
    scores[tokenizer.bos_token_id] = -torch.inf
    expected = scores[: len(tokenizer)].softmax(0)
    drawn = sampled(llama, tokenizer, 4000, 2)[:, 1]
    found = torch.bincount(drawn, minlength=len(tokenizer)) / len(drawn)
    noise = (expected * (1 - expected) / len(drawn)).sqrt()
    assert float(((found - expected).abs() / noise.clamp(min=1e-3)).max()) < 5
    assert float((expected.max() - 1 / len(tokenizer)) / noise.max()) > 5  # uniform draws would be noticed


def test_heat_spreads_the_first_tokens(llama: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(heated: tuple[float, ...]) -> int:
        monkeypatch.setattr(sampling, "HEATED", heated)
        return len(set(sampled(llama, tokenizer, 1000, 2)[:, 1].tolist()))

    assert kinds((0.2,)) < kinds((1.0,)) <= 100
    assert kinds((9.0,)) == 100  # heated tokens are among the likeliest
    assert kinds(()) > 100


def without_bos(llama: Path) -> Any:
    """A tokenizer as Qwen2's: an EOS, no BOS, and nothing put before a text."""
    inner = Tokenizer.from_file(str(llama / "tokenizer.json"))
    inner.post_processor = None
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


def test_without_a_bos_documents_begin_anywhere_and_go_on_with_the_likeliest(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = without_bos(llama)
    found = sampled(llama, tokenizer, 40, 5)
    assert len(set(found[:, 0].tolist())) > 25
    assert not bool((found[:, 0] == tokenizer.eos_token_id).any())
    scores = logits(in_transformers(llama, dtype=torch.float32), found[:, :4])
    scores[..., len(tokenizer) :] = scores[..., tokenizer.eos_token_id] = -torch.inf
    assert found[:, 1:].equal(scores.argmax(-1))


def test_batches_hold_what_fits(llama: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_MAX_ROWS", 3)
    events: list[Any] = []
    found = sampled_windows(llama, tokenizer, samples=7, length=12, seed=0, on_event=events.append)
    assert tuple(found.windows.shape) == (7, 12)
    assert len({tuple(row) for row in found.windows.tolist()}) == 7  # no batch repeats another
    assert [e.total for e in events if isinstance(e, Started)] == [84]
    assert sum(e.steps for e in events if isinstance(e, Advanced)) == 84
    assert any("loaded whole" in e.text for e in events if isinstance(e, Noted))
    config = build_skeleton(llama).config
    row = 2 * 2 * 2 * 32 * 100 * 4  # keys and values, blocks, heads, head size, tokens, fp32
    monkeypatch.setattr(sampling, "_MAX_ROWS", 64)
    monkeypatch.setattr(sampling, "_CACHE_BYTES", 5 * row)
    assert sampling._rows(config, 100, torch.float32) == 5
    assert sampling._rows(config, 10_000, torch.float32) == 1


def test_a_large_model_stays_in_16_bits(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampling._dtype(open_directory(llama)) == torch.float32
    monkeypatch.setattr(sampling, "_FP32_BYTES", 1000)
    assert sampling._dtype(open_directory(llama)) == torch.bfloat16  # for fp16


def test_a_model_that_gives_no_numbers_is_told(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    edit_weights(model, **{"model.norm.weight": torch.full((128,), torch.nan, dtype=torch.float16)})
    with pytest.raises(NonFiniteError, match="NaN or infinite while it is sampled"):
        sampled(model, load_tokenizer(model), 1, 8)


def test_self_is_one_source_among_others(llama: Path, tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "x.txt"
    file.write_text("X" * 2000)
    skeleton = build_skeleton(llama)
    spec = CalibrationSpec(calibration=("self:3", str(file)), samples=8, sequence_length=16, seed=2)
    data = calibration_data(llama, spec, skeleton)
    own, read = data.sources
    assert (own.name, own.weight, own.samples, read.samples) == ("self", 3.0, 6, 2)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in data.windows]
    assert sum(set(text) == {"X"} for text in texts) == 2
    assert len(own.hash) == len(read.hash) == 64
    assert calibration_data(llama, spec, skeleton).sources == data.sources
    other = calibration_data(llama, spec.model_copy(update={"seed": 3}), skeleton)
    assert other.sources[0].hash != own.hash
    assert other.sources[1].hash == read.hash
    # the caller's skeleton has still no weights
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
