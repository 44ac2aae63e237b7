"""`qexport convert`: what the dtype that is asked for cannot hold is told as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexport.conversion import convert
from qexport.errors import NonFiniteError
from qexport.specs import ConvertSpec
from tests.conftest import RunCli
from tests.tiny import tiny_model

NAME = "model.layers.1.mlp.down_proj.weight"


def with_weight(path: Path, value: float, dtype: torch.dtype) -> Path:
    """A tiny model with that value in one matrix."""
    model = tiny_model(path, dtype=dtype)
    file = model / "model.safetensors"
    weights = load_file(file)
    weights[NAME][3, 5] = value
    save_file(weights, file, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("value", "dtype", "target", "remedy"),
    [
        (1e5, torch.bfloat16, "float16", "--dtype bfloat16"),
        (-1e5, torch.float32, "float16", "--dtype bfloat16"),
        (3.4e38, torch.float32, "bfloat16", "--dtype float32"),
        (3.4e38, torch.float32, "float16", "--dtype float32"),
    ],
)
def test_a_weight_beyond_the_dtype(
    tmp_path: Path, value: float, dtype: torch.dtype, target: str, remedy: str, cli: RunCli
) -> None:
    model = with_weight(tmp_path / "model", value, dtype)
    code, said, err = cli("convert", model, "-o", tmp_path / "out", "--dtype", target)
    assert (code, said) == (2, "")
    assert f"error: {model} has weights of up to " in err
    assert NAME in err
    assert target in err
    assert err.endswith(f"; {remedy}\n")
    assert "diverged" not in err
    assert not (tmp_path / "out").exists()
    assert cli("convert", model, "-o", tmp_path / "out", *remedy.split())[0] == 0


def test_a_coded_gguf_with_a_weight_beyond_its_default(tmp_path: Path, cli: RunCli) -> None:
    """The user did not ask for float16."""
    pytest.importorskip("gguf")
    model = with_weight(tmp_path / "model", 2e5, torch.float32)
    made = cli("quantize", model, "-o", tmp_path / "gguf", "--method", "gguf", "--type", "q8_0", "-q")
    assert made[0] == 0, made[2]
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    code, _, err = cli("convert", file, "-o", tmp_path / "out", "-q")
    assert code == 2
    assert "at most 65504, where float16 ends; --dtype bfloat16" in err
    code, _, err = cli("convert", file, "-o", tmp_path / "out", "--dtype", "bfloat16", "-q")
    assert (code, err) == (0, "")
    assert float(load_file(tmp_path / "out" / "model.safetensors")[NAME][3, 5]) == pytest.approx(
        2e5, rel=0.01
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model = with_weight(tmp_path / "model", value, torch.bfloat16)
    with pytest.raises(NonFiniteError, match=f"NaN or infinity in {NAME}"):
        convert(model, tmp_path / "out", ConvertSpec(dtype="float16"))
