"""--override, --skip, --lm-head and --embeddings: every layer gets what it was given, and the file tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.errors import SpecError
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.whole import load_whole
from qexport.specs import spec_of
from tests.conftest import RunCli
from tests.tiny import logits, tiny_model, tokens

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
DOWN = "model.layers.0.mlp.down_proj"
MIXING = ["gptq", "gptq_v2", "hqq", "hqq-safetensors", "compressed-tensors", "mlx"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a head of its own."""
    return tiny_model(tmp_path_factory.mktemp("untied") / "model", tied=False)


def most_values(weight: torch.Tensor, width: int) -> int:
    """The largest number of different values in a group of `width` inputs of [out, in]."""
    groups = weight.float().reshape(-1, width)
    ordered = groups.sort(dim=1).values
    return int((ordered.diff(dim=1) > 0).sum(dim=1).max()) + 1


def figures(path: Path) -> dict[str, Any]:
    """What qexport.json tells."""
    found: dict[str, Any] = json.loads((path / "qexport.json").read_text())["figures"]
    return found


def test_the_counting_of_values_itself() -> None:
    assert most_values(torch.tensor([[1.0, 2, 1, 2], [5, 6, 7, 7]]), 4) == 3
    assert most_values(torch.tensor([[1.0, 2, 1, 2], [5, 6, 7, 7]]), 2) == 2


@pytest.mark.parametrize("format_name", MIXING)
def test_each_layer_has_the_bits_it_was_given(format_name: str, untied: Path, tmp_path: Path) -> None:
    """Seen in the decoded weights: a group of b bits has at most 2^b values."""
    low = 4 if format_name == "compressed-tensors" else 2
    common = 8 if low == 4 else 4
    spec = spec_of(
        "rtn",
        format=format_name,
        bits=common,
        group_size=64,
        override=(
            f"model.layers.0.*={low}",
            "model.layers.0.mlp=8:32",
            "*.1.self_attn.[qk]_proj=16",
            f"{DOWN}=16",
        ),
    )
    result = qexport.quantize(untied, tmp_path / "out", spec)
    before, after = qexport.open_checkpoint(untied), qexport.open_checkpoint(tmp_path / "out")
    kept = {DOWN, "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"}
    told = {error.tensor: error.bits for error in result.tensors}
    assert len(told) == 14 - len(kept)
    assert not kept & told.keys()
    assert kept == set(result.layers_left)
    for index in range(2):
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{module}"
            weight = after.read(f"{name}.weight")
            if name in kept:
                assert not after.is_quantized(f"{name}.weight")
                assert torch.equal(weight, before.read(f"{name}.weight"))
                continue
            bits, width = common, 64
            if index == 0:
                bits, width = (8, 32) if "mlp" in module else (low, 64)
            assert told[name] == bits
            assert after.is_quantized(f"{name}.weight")
            assert most_values(weight, width) <= 2**bits
            if bits < 8:  # a group of 64 cannot show that 8 bits are more than 6
                assert most_values(weight, 128) > 2**bits


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_overrides_reach_calibrated_solvers(method: str, untied: Path, text: Path, tmp_path: Path) -> None:
    spec = spec_of(
        method,
        format="mlx",
        group_size=64,
        calibration=str(text),
        samples=4,
        sequence_length=32,
        override=("*.v_proj=2:32", "*.gate_proj=6", "*.1.mlp.down_proj=16"),
    )
    result = qexport.quantize(untied, tmp_path / "out", spec)
    after = qexport.open_checkpoint(tmp_path / "out")
    bits = {error.tensor.rpartition(".")[2]: error.bits for error in result.tensors}
    assert bits == {
        "q_proj": 4,
        "k_proj": 4,
        "v_proj": 2,
        "o_proj": 4,
        "gate_proj": 6,
        "up_proj": 4,
        "down_proj": 4,
    }
    assert most_values(after.read("model.layers.0.self_attn.v_proj.weight"), 32) == 4
    assert most_values(after.read("model.layers.0.self_attn.k_proj.weight"), 64) <= 16
    assert most_values(after.read("model.layers.0.mlp.gate_proj.weight"), 64) > 16
    assert result.layers_left == ("model.layers.1.mlp.down_proj",)
    if method == "gptq":
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(after.read(name), qexport.open_checkpoint(untied).read(name))


@pytest.mark.parametrize("format_name", ["bitsandbytes", "awq", "eetq"])
@pytest.mark.parametrize("override", ["*.q_proj=8", "*.q_proj=4:32", "*.q_proj=4"])
def test_formats_with_one_grid_refuse_a_second(
    format_name: str, override: str, untied: Path, tmp_path: Path, cli: RunCli
) -> None:
    out = tmp_path / "out"
    bits = "8" if format_name == "eetq" else "4"
    code, shown, err = cli(
        *("quantize", untied, "-o", out, "--method", "rtn", "--format", format_name, "--bits", bits),
        *("--override", override),
    )
    same = override.endswith(f"={bits}")  # no other grid after all
    assert code == (0 if same else 2), err
    assert out.exists() is same
    if not same:
        assert shown == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_bits_that_a_format_has_not_are_refused_for_one_layer_too(untied: Path, tmp_path: Path) -> None:
    for format_name, bits in (("compressed-tensors", 3), ("gptq", 5), ("mlx", 1), ("hqq", 7)):
        spec = spec_of("rtn", format=format_name, override=(f"*.q_proj={bits}",))
        with pytest.raises(SpecError, match=f"{bits} bits"):
            qexport.quantize(untied, tmp_path / "out", spec)
    spec = spec_of("rtn", format="mlx", override=("*.q_proj=4:48",))
    with pytest.raises(SpecError, match="group size of 48"):
        qexport.quantize(untied, tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--override", "*.w_proj=8"),
        ("--override", "lm_head=8"),  # not asked for, so there is nothing to give other bits
        ("--override", "q_proj=8"),
        ("--override", "*.q_proj=9"),
        ("--override", "*.q_proj"),
        ("--skip", "model.layer.*"),
        ("--skip", ""),
    ],
)
def test_a_choice_that_is_none_is_told_in_one_line(
    option: str, value: str, untied: Path, tmp_path: Path, cli: RunCli
) -> None:
    code, shown, err = cli("quantize", untied, "-o", tmp_path / "out", "--method", "rtn", option, value)
    assert (code, shown) == (2, "")
    assert err.startswith(f"error: {option} '{value}'")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_skipping_all_layers_is_refused(untied: Path, tmp_path: Path, cli: RunCli) -> None:
    out = tmp_path / "out"
    code, _, err = cli("quantize", untied, "-o", out, "--method", "rtn", "--skip", "model.*")
    assert code == 2
    assert "no linear layer" in err
    assert "leave out fewer" in err
    code, _, err = cli("quantize", untied, "-o", out, "--method", "rtn", "--override", "*=16")
    assert code == 2
    assert "no linear layer" in err
    assert not out.exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["rtn", "bnb", "hqq", "mlx", "eetq"])
def test_skipping_the_head_is_no_mistake(
    tied: bool, method: str, llama: Path, untied: Path, tmp_path: Path, cli: RunCli
) -> None:
    """People write it, for other tools quantize the head unless told not to."""
    model = llama if tied else untied
    code, _, err = cli("quantize", model, "-o", tmp_path / "out", "--method", method, "--skip", "lm_head")
    assert code == 0, err
    after = qexport.open_checkpoint(tmp_path / "out")
    assert figures(tmp_path / "out")["quantized_layers"] == 14
    if not tied:
        assert torch.equal(
            after.read("lm_head.weight"), qexport.open_checkpoint(untied).read("lm_head.weight")
        )


def test_a_skipped_head_stays_though_it_was_asked_for(untied: Path, tmp_path: Path) -> None:
    spec = spec_of("rtn", lm_head=True, skip=("lm_head",))
    assert qexport.quantize(untied, tmp_path / "out", spec).quantized_layers == 14
    assert not qexport.open_checkpoint(tmp_path / "out").is_quantized("lm_head.weight")


@pytest.mark.parametrize(
    "format_name", ["gptq", "gptq_v2", "bitsandbytes", "hqq", "compressed-tensors", "mlx", "eetq"]
)
def test_the_head_is_quantized_if_asked_for(format_name: str, untied: Path, tmp_path: Path) -> None:
    spec = spec_of("rtn", format=format_name, lm_head=True, bits=8 if format_name == "eetq" else 4)
    result = qexport.quantize(untied, tmp_path / "out", spec)
    after = qexport.open_checkpoint(tmp_path / "out")
    assert [error.tensor for error in result.tensors].count(HEAD) == 1
    assert result.quantized_layers == 15
    assert after.is_quantized("lm_head.weight")
    assert not after.is_quantized(f"{EMBEDDING}.weight")
    found = logits(load_whole(build_skeleton(tmp_path / "out"), after), tokens())
    assert found.isfinite().all()


@pytest.mark.parametrize("format_name", [*MIXING, "bitsandbytes", "eetq", "awq"])
@pytest.mark.parametrize("option", ["--lm-head", "--embeddings"])
def test_a_tied_head_is_the_embeddings_which_mlx_alone_holds(
    format_name: str, option: str, llama: Path, tmp_path: Path, cli: RunCli
) -> None:
    out = tmp_path / "out"
    bits = "8" if format_name == "eetq" else "4"
    code, shown, err = cli(
        *("quantize", llama, "-o", out, "--method", "rtn", "--format", format_name, "--bits", bits, option)
    )
    if format_name == "mlx":
        assert code == 0, err
        after = qexport.open_checkpoint(out)
        assert after.is_quantized(f"{EMBEDDING}.weight")
        assert [e["tensor"] for e in figures(out)["tensor_errors"]].count(EMBEDDING) == 1
        assert "lm_head.weight" not in set(after.names())
        return
    assert (code, shown) == (2, "")
    assert err.count("\n") == 1
    assert "mlx" in err
    assert not out.exists()


@pytest.mark.parametrize("method", ["mlx", "gptq", "awq"])
def test_embeddings_and_head_of_their_own_in_mlx(
    method: str, untied: Path, text: Path, tmp_path: Path
) -> None:
    data: dict[str, Any] = {"calibration": str(text), "samples": 4, "sequence_length": 32}
    spec = spec_of(
        method,
        format="mlx",
        embeddings=True,
        lm_head=True,
        override=(f"{EMBEDDING}=8",),
        **({} if method == "mlx" else data),
    )
    result = qexport.quantize(untied, tmp_path / "out", spec)
    assert result.quantized_layers == 16
    bits = {error.tensor: error.bits for error in result.tensors}
    assert (bits[EMBEDDING], bits[HEAD]) == (8, 4)
    before, after = qexport.open_checkpoint(untied), qexport.open_checkpoint(tmp_path / "out")
    for name, error in ((EMBEDDING, 0.02), (HEAD, 0.15)):
        weight = before.read(f"{name}.weight").float()
        found = after.read(f"{name}.weight").float()
        assert 0 < (found - weight).norm() / weight.norm() < error, name


def test_awq_has_no_quantized_head(untied: Path, tmp_path: Path, cli: RunCli) -> None:
    code, _, err = cli("quantize", untied, "-o", tmp_path / "out", "--method", "awq", "--lm-head")
    assert code == 2
    assert "no runtime reads a quantized output head in awq" in err
    assert err.count("\n") == 1


def test_a_head_alone(untied: Path, text: Path, tmp_path: Path) -> None:
    """Nothing in the blocks is quantized: all of them keep their bytes, with a calibrated method too."""
    for name, solver in (("rtn", "rtn"), ("gptq", "gptq")):
        options = {"calibration": str(text), "samples": 4, "sequence_length": 32} if name == "gptq" else {}
        spec = spec_of(name, solver=solver, format="mlx", lm_head=True, skip=("model.layers",), **options)
        out = tmp_path / name
        assert qexport.quantize(untied, out, spec).quantized_layers == 1
        before, after = qexport.open_checkpoint(untied), qexport.open_checkpoint(out)
        for tensor in before.names():
            assert after.is_quantized(tensor) is (tensor == "lm_head.weight")
            if tensor != "lm_head.weight":
                assert torch.equal(before.read(tensor), after.read(tensor)), tensor
