"""What more effort buys, on the text of the calibration itself: less divergence from the full model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import qexport
from qexport.calibrate.texts import read_documents
from qexport.events import Advanced
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.tokenizer import load_tokenizer
from qexport.modeling.whole import load_whole
from qexport.specs import spec_of
from tests.tiny import calibration_windows, logits, tiny_model
from tests.zoo import zoo_model

_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
_WINDOWS = {"samples": 48, "sequence_length": 64}


def divergence(model: Path, candidate: Path, text: Path) -> float:
    """KL(full || quantized), nats a token, on the calibration's own windows: nothing is left to chance."""
    windows = calibration_windows(
        read_documents(text),
        load_tokenizer(model),
        samples=_WINDOWS["samples"],
        length=_WINDOWS["sequence_length"],
        seed=0,
    )
    models = (load_whole(build_skeleton(model), qexport.open_checkpoint(path)) for path in (model, candidate))
    full, found = (logits(one, windows).log_softmax(-1) for one in models)
    return float((full.exp() * (full - found)).sum(-1).mean())


def losses(model: Path, text: Path, directory: Path, efforts: Sequence[str], **options: Any) -> list[float]:
    """One number an effort."""
    found = []
    for effort in efforts:
        out = directory / effort
        values = {"calibration": str(text), **_WINDOWS, "solver": "gptq", "effort": effort, **options}
        if "type" in options:
            qexport.quantize(model, out, spec_of("gguf", **values))
            (out,) = out.glob("*.gguf")
        else:
            qexport.quantize(model, out, spec_of("gptq", **{"bits": 3, "group_size": 32, **values}))
        found.append(divergence(model, out, text))
    return found


@pytest.fixture(scope="module")
def llama64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of a Llama, 64 wide."""
    return tiny_model(tmp_path_factory.mktemp("llama64") / "model", **_SIZES)


ALL = ("fast", "balanced", "best")
WAYS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "groups in their own order": {"act_order": "full", "static_groups": False},
    "scaled before": {"solver": "awq+gptq"},
    "integer zeros": {"symmetric": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_more_effort_loses_less(way: str, llama64: Path, text: Path, tmp_path: Path) -> None:
    fast, balanced, best = losses(llama64, text, tmp_path, ALL, **WAYS[way])
    assert 0 < best < balanced < 0.75 * fast, (fast, balanced, best)


_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "tied": False}
_GPT2 = {
    "hidden_size": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize(("model_type", "sizes"), [("gpt2", _GPT2), ("mixtral", {**_SIZES, **_MIXTRAL})])
def test_more_effort_on_weights_that_lie_transposed_and_on_experts(
    model_type: str, sizes: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    model = zoo_model(tmp_path / "model", model_type, **sizes)
    fast, balanced, best = losses(model, text, tmp_path, ALL)
    assert 0 < balanced < 0.9 * fast, (fast, balanced, best)
    assert 0 < best < balanced, (fast, balanced, best)


_NF4 = {"format": "bitsandbytes", "bits": 4, "group_size": 64}


@pytest.mark.parametrize(
    ("efforts", "options"),
    [
        (ALL, _NF4),
        (ALL[:2], {"type": ("q4_0",)}),
        pytest.param(ALL, {"type": ("q4_k_m",)}, marks=pytest.mark.slow),
    ],
)
def test_more_effort_on_other_grids(
    efforts: Sequence[str], options: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    """Their scales are quantized together or a format's own, of either sign: only codes are refined."""
    model = tiny_model(tmp_path / "model", **{**_SIZES, "intermediate_size": 64, "num_hidden_layers": 1})
    method = "gguf" if "type" in options else "gptq"
    searched = tmp_path / "searched"
    qexport.quantize(model, searched, spec_of(method, **{**options, "solver": "search"}))
    without_text = divergence(model, next(searched.glob("*.gguf"), searched), text)
    fast, balanced, *best = losses(model, text, tmp_path, efforts, **options)
    assert 0 < balanced < 0.95 * fast < 0.8 * without_text, (without_text, fast, balanced, best)
    assert all(0 < one < 1.05 * balanced for one in best), (fast, balanced, best)


class OwnError(Exception):
    """Not one of the project's own."""


@pytest.mark.parametrize("error", [OwnError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["gradients", "layers"])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_nothing_is_left_of_what_was_interrupted(
    stage: str, error: type[BaseException], memory: int, llama64: Path, text: Path, tmp_path: Path
) -> None:
    """Neither of the output nor of the hidden states, gradients and curvatures that lay beside it."""
    parent = tmp_path / "parent"
    parent.mkdir()
    seen: list[str] = []
    files: list[set[str]] = []

    def stop(event: object) -> None:
        if isinstance(event, Advanced) and event.what.startswith("model.layers"):
            seen.append(event.what)
            files.append({file.name for file in parent.iterdir()})
            done = [name for name in seen if "proj" in name]
            if len(done) == 9 or (stage == "gradients" and len(seen) == 3):
                raise error

    options = {"calibration": str(text), "samples": 8, "sequence_length": 32, "memory": memory}
    with pytest.raises(error):
        qexport.quantize(llama64, parent / "out", spec_of("gptq", effort="best", **options), on_event=stop)
    assert (len(seen) == 3) is (stage == "gradients"), seen
    assert any(files)  # else there was nothing to clean up
    assert list(parent.iterdir()) == []


def test_memory_changes_no_byte(llama64: Path, text: Path, tmp_path: Path) -> None:
    written = []
    for number, memory in enumerate((1, 1 << 30)):
        out = tmp_path / str(number)
        options = {"calibration": str(text), "samples": 8, "sequence_length": 32, "memory": memory}
        qexport.quantize(llama64, out, spec_of("gptq", effort="best", **options))
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]
