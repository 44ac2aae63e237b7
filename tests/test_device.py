"""`--device`: the model runs elsewhere, a block at a time, and the files are those that the CPU makes.

The device is the pretended one (tests/pretend_device.py): it sums in the CPU's order, so bytes are compared,
and it raises where a tensor was left behind on the CPU. A GPU sums in orders of its own: codes may differ
there where two are all but equally good.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qexport
from qexport import devices
from qexport.checkpoint.manifest import MANIFEST_FILE
from qexport.grids import products
from qexport.modeling.blocks import BlockStream
from qexport.modeling.skeleton import Skeleton
from qexport.quantization.imatrix import make_imatrix
from qexport.quantization.quantize import quantize_several
from qexport.specs import CalibrationSpec, spec_of
from tests.conftest import RunCli
from tests.pretend_device import DEVICE, register
from tests.tiny import tiny_model
from tests.zoo import zoo_model

register()  # before any test's backward: autograd counts the devices once

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_key_value_heads": 4}
MIXTRAL: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tied": False,
    "head_dim": 16,
}
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: tiny_model(path, **SIZES),
    "mixtral": lambda path: zoo_model(path, "mixtral", **SIZES, **MIXTRAL),
    "gpt2": lambda path: zoo_model(path, "gpt2", tied=True, **GPT2),
}
WAYS: dict[str, dict[str, Any]] = {
    "fast": {"method": "gptq", "group_size": 32, "effort": "fast"},
    "balanced": {"method": "gptq", "bits": 3, "group_size": 32},
    "best": {"method": "gptq", "bits": 2, "group_size": 32, "effort": "best"},
    "in order": {"method": "gptq", "group_size": 32, "static_groups": False},
    "awq": {"method": "awq", "format": "gptq", "group_size": 32},
    "awq and best": {"method": "awq", "solver": "awq+gptq", "format": "gptq", "bits": 3, "effort": "best"},
    "allotted": {"method": "gptq", "bits": 3.5, "effort": "fast"},
    "allotted to a loss": {"method": "gptq", "max_loss": 0.5, "effort": "fast"},
    "importance": {"method": "gguf", "solver": "importance", "type": "q8_0"},
    "gguf by gptq": {"method": "gguf", "solver": "gptq", "type": "q8_0"},
}
TOGETHER = ["fast", "awq", "best"]
CASES = [("llama", way) for way in WAYS if way not in (*TOGETHER, "allotted")]
CASES += [("mixtral", way) for way in ("fast", "balanced", "best", "awq")]
CASES += [("gpt2", way) for way in ("fast", "balanced", "best", "allotted")]


@pytest.fixture(scope="module")
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture
def pretend(_thawed: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device's name, which options may give; afterwards nothing is left there."""
    monkeypatch.setattr(devices, "_TYPES", (*devices._TYPES, DEVICE))
    monkeypatch.setattr(products, "fast_in_bf16", lambda: False)  # it is for CPUs alone
    gc.collect()
    gc.freeze()  # what there is by now is not looked through
    yield DEVICE
    assert [tensor.shape for tensor in on_device()] == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The models, made when they are first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = MODELS[name](tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return get


def on_device() -> list[torch.Tensor]:
    """What lies on the device, of what the test made."""
    gc.collect()
    kinds = (torch.Tensor, nn.Parameter)
    return [found for found in gc.get_objects() if type(found) in kinds and found.device.type == DEVICE]


class Seen:
    """Where blocks ran, and of which models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices: set[str] = set()
        self.streams = 0
        self.skeletons: list[Skeleton] = []
        forward, make = BlockStream.forward, BlockStream.__init__

        def made(stream: BlockStream, skeleton: Skeleton, *args: Any, **options: Any) -> None:
            self.streams += 1
            self.skeletons.append(skeleton)
            make(stream, skeleton, *args, **options)

        def spied(stream: BlockStream, index: int, hidden: torch.Tensor, block: Any = None) -> torch.Tensor:
            ran = stream._blocks[index] if block is None else block
            tensors = [hidden]
            if isinstance(ran, nn.Module):
                tensors += [*ran.parameters(), *ran.buffers()]
            found = forward(stream, index, hidden, block)
            self.devices |= {tensor.device.type for tensor in (*tensors, found)}
            return found

        monkeypatch.setattr(BlockStream, "__init__", made)
        monkeypatch.setattr(BlockStream, "forward", spied)


def spec(way: str, text: Path, **more: Any) -> Any:
    options = {"calibration": str(text), "samples": 8, "sequence_length": 32, **WAYS[way], **more}
    return spec_of(options.pop("method"), **options)


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the manifest, which tells the device."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != MANIFEST_FILE}


@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_files_are_those_of_the_cpu(
    name: str,
    way: str,
    pretend: str,
    model: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = {}
    for device in (None, pretend):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache of {device}"))  # losses are measured anew
        with pytest.MonkeyPatch.context() as patch:
            seen = Seen(patch)
            qexport.quantize(model(name), tmp_path / str(device), spec(way, text, device=device))
        assert seen.devices == {device or "cpu"}
        for skeleton in seen.skeletons:
            assert {value.device.type for value in skeleton.model.parameters()} == {"meta"}
            assert {value.device.type for value in skeleton.model.buffers()} <= {"cpu"}
        made[device] = contents(tmp_path / str(device))
    assert made[None].keys() == made[pretend].keys()
    assert [file for file, content in made[None].items() if made[pretend][file] != content] == []


def test_several_outputs_share_a_pass_on_a_device(
    pretend: str,
    model: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        seen = Seen(patch)
        quantize_several(
            model("llama"), {tmp_path / way: spec(way, text, device=pretend) for way in TOGETHER}
        )
    assert (seen.devices, seen.streams) == ({pretend}, 1)
    for way in TOGETHER:
        qexport.quantize(model("llama"), tmp_path / f"{way} alone", spec(way, text))
        assert contents(tmp_path / way) == contents(tmp_path / f"{way} alone")


@pytest.mark.parametrize(("way", "most"), [("fast", 1), ("balanced", 2), ("best", 3)])
def test_one_block_at_a_time_lies_there(
    way: str, most: int, pretend: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as it runs, with a copy that takes the codes; where two are tuned, with the one before."""
    path = tiny_model(tmp_path / "model", **SIZES, num_hidden_layers=3)
    found: dict[tuple[int, str], int] = {}
    forward = BlockStream.forward

    def spied(stream: BlockStream, index: int, hidden: torch.Tensor, block: Any = None) -> torch.Tensor:
        own = block is None or block is stream._blocks[index]
        key = index, "own" if own else type(block).__name__  # or a copy, or the function of a tuned one
        if key not in found:
            there = [tensor for tensor in on_device() if isinstance(tensor, nn.Parameter)]
            found[key] = sum(tensor.shape == (64, 128) for tensor in there)  # each block has one such
        return forward(stream, index, hidden, block)

    monkeypatch.setattr(BlockStream, "forward", spied)
    qexport.quantize(path, tmp_path / "out", spec(way, text, device=pretend))
    assert len(found) >= 3
    assert set(found.values()) == set(range(1, most + 1))


def test_an_importance_matrix(
    pretend: str, model: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"calibration": str(text), "samples": 4, "sequence_length": 32}
    make_imatrix(model("llama"), tmp_path / "cpu.gguf", CalibrationSpec(**options))
    seen = Seen(monkeypatch)
    make_imatrix(model("llama"), tmp_path / "device.gguf", CalibrationSpec(**options, device=pretend))
    assert seen.devices == {pretend}
    assert (tmp_path / "cpu.gguf").read_bytes() == (tmp_path / "device.gguf").read_bytes()


REFUSED = [
    ("quantize --method gptq --device cuda:99", "--device cuda:99: this machine has"),
    ("quantize --method awq --bits 3.5 --device cuda:99", "--device cuda:99: this machine has"),
    ("quantize --method gptq --device tpu", "--device tpu; cpu, cuda or cuda:N"),
    (
        "quantize --method rtn --device cpu",
        "it is for calibrated methods, such as gptq and awq, and for gguf",
    ),
    (
        "quantize --method hqq --device cuda",
        "it is for calibrated methods, such as gptq and awq, and for gguf",
    ),
    ("imatrix --device cuda:99", "--device cuda:99: this machine has"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_devices_that_cannot_be(line: str, message: str, llama: Path, cli: RunCli, tmp_path: Path) -> None:
    command, *options = line.split()
    code, out, err = cli(command, llama, "-o", tmp_path / "out", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
