"""What is held at once does not grow with the blocks: tensors alive and hidden states, at two depths.

Peak resident memory of whole processes, on models of Qwen2.5-1.5B's sides, is benchmarks/memory.py's.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.events import Advanced, Event
from qexport.modeling import blocks
from qexport.modeling.activations import Activations
from qexport.quantization.blockwise.full_block import FullBlock
from qexport.specs import spec_of
from tests.tiny import tiny_model

SHALLOW, DEEP = 3, 6
SIDES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
BLOCK = 4 * (4 * 64 * 64 + 3 * 64 * 128)  # bytes of a block's matrices in fp32, at most
LOOKED_AT = ("o_proj", "down_proj")  # twice a block: looking takes a while
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast": ("gptq", {"effort": "fast"}),
    "spilled": ("gptq", {"effort": "balanced", "memory": "1KB"}),
    "balanced": ("gptq", {"effort": "balanced"}),
    "best": ("gptq", {"effort": "best"}),
    "awq": ("awq", {}),
    "allotted": ("gptq", {"effort": "fast", "bits": 3.5, "format": "gptq_v2"}),
}


def alive() -> int:
    """Bytes of all tensors that can be reached, each piece of memory once."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("name", METHODS)
def test_tensors_alive_do_not_grow_with_the_blocks(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    method, options = METHODS[name]
    common = {"calibration": str(text), "samples": 8, "sequence_length": 32, "group_size": 32}
    peaks: list[int] = []
    for depth in (SHALLOW, DEEP):
        model = tiny_model(tmp_path / f"model{len(peaks)}", num_hidden_layers=depth, **SIDES)
        held: list[int] = []

        def look(event: Event, held: list[int] = held) -> None:
            if isinstance(event, Advanced) and event.what.endswith(LOOKED_AT):
                held.append(alive())

        gc.collect()
        before = alive()
        spec = spec_of(method, **(common | options))
        qexport.quantize(model, tmp_path / f"out{len(peaks)}", spec, on_event=look)
        peaks.append(max(held) - before)
    shallow, deep = peaks
    assert shallow > BLOCK  # it does hold one
    assert deep - shallow < BLOCK / 4


@pytest.mark.parametrize("name", ["fast", "balanced", "awq"])
def test_memory_goes_back_after_each_block_with_nothing_of_it_held(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, options = METHODS[name]
    held: list[int] = []

    def trim() -> None:
        held.append(sum(type(thing) is FullBlock for thing in gc.get_objects()))

    monkeypatch.setattr(blocks, "trim", trim)
    model = tiny_model(tmp_path / "model", num_hidden_layers=DEEP, **SIDES)
    common = {"calibration": str(text), "samples": 8, "sequence_length": 32, "group_size": 32}
    qexport.quantize(model, tmp_path / "out", spec_of(method, **(common | options)))
    assert held == [0] * DEEP


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_hidden_states_in_memory_do_not_grow_with_the_blocks(
    effort: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `best` keeps of all blocks, their inputs and the curvatures of their outputs, lies on the disk."""
    stores: list[Activations] = []
    start, append = Activations.__init__, Activations.append
    peak = {"in_memory": 0, "on_disk": 0}

    def started(self: Activations, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        stores.append(self)

    def appended(self: Activations, batch: torch.Tensor) -> None:
        append(self, batch)
        for kind, most in peak.items():  # closed ones hold 0
            peak[kind] = max(most, sum(getattr(store, kind) for store in stores))

    monkeypatch.setattr(Activations, "__init__", started)
    monkeypatch.setattr(Activations, "append", appended)
    found = []
    for depth in (SHALLOW, DEEP):
        model = tiny_model(tmp_path / str(depth), num_hidden_layers=depth)
        spec = spec_of("gptq", calibration=str(text), samples=4, sequence_length=32, effort=effort)
        stores.clear()
        peak.update(in_memory=0, on_disk=0)
        qexport.quantize(model, tmp_path / f"out{depth}", spec)
        found.append(dict(peak))
    shallow, deep = found
    assert deep["in_memory"] == shallow["in_memory"] > 0
    if effort == "best":
        assert deep["on_disk"] > 1.5 * shallow["on_disk"] > 0
    else:
        assert deep["on_disk"] == 0
