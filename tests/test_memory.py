"""Peak memory is that of the widest block, however many there are: calibrated methods, 2 and 14 blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qexport
from qexport.modeling.activations import Activations
from qexport.specs import spec_of
from tests.tiny import tiny_model

SHALLOW, DEEP = 2, 14
SAMPLES, LENGTH = 32, 128
HIDDEN = 128
MORE = 5_000_000
# what a method would hold more of if it kept the hidden states of all blocks, or their weights
STATES = (DEEP - SHALLOW) * SAMPLES * LENGTH * HIDDEN * 2
WEIGHTS = (DEEP - SHALLOW) * HIDDEN * (4 * HIDDEN + 3 * 2 * HIDDEN) * 4

PEAKS = """
import json, sys
from pathlib import Path
import torch
import qexport
from qexport.measure import Measured
from qexport.specs import spec_of

torch.set_num_threads(1)
work, method, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
spec = spec_of(method, **options)
peaks = []
for depth in sys.argv[4:]:
    with Measured() as cost:
        qexport.quantize(work / f"model{depth}", work / f"{method}{len(peaks)}", spec)
    peaks.append(cost.peak_bytes)
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a shallow and a deep model."""
    path = tmp_path_factory.mktemp("depths")
    for depth in (SHALLOW, DEEP):
        sides: dict[str, Any] = {
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": depth,
        }
        tiny_model(path / f"model{depth}", **sides)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="starts the kernel's peak count anew")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gptq", {"effort": "fast"}),
        ("gptq", {"effort": "fast", "memory": "1KB"}),
        ("gptq", {"effort": "balanced"}),
        ("gptq", {"effort": "best"}),
        ("awq", {}),
    ],
    ids=["fast", "spilled", "balanced", "best", "awq"],
)
def test_peak_memory_does_not_grow_with_the_blocks(
    models: Path, text: Path, tmp_path: Path, method: str, options: dict[str, str]
) -> None:
    """In a process of its own that has done the work on the shallow model once: what loads at first use is
    there, and the heap has its size."""
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    asked = {"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "group_size": 64}
    depths = [SHALLOW, SHALLOW, DEEP]
    command = [sys.executable, "-c", PEAKS, str(tmp_path), method, json.dumps(asked | options)]
    # glibc's first threshold, made to stay: how the heap falls into pieces is not the question here
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    ran = subprocess.run(
        [*command, *map(str, depths)], stdout=subprocess.PIPE, text=True, check=True, env=own
    )
    _, shallow, deep = json.loads(ran.stdout)
    assert min(STATES, WEIGHTS) > 1.5 * MORE
    assert deep - shallow < MORE


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_what_is_kept_of_all_blocks_lies_on_the_disk(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str
) -> None:
    """However much --memory allows: `best` keeps the inputs of all blocks, and their outputs' curvatures."""
    closed: list[tuple[int, int]] = []
    close = Activations.close

    def noted(self: Activations) -> None:
        closed.append((self.in_memory, self.on_disk))
        close(self)

    monkeypatch.setattr(Activations, "close", noted)
    totals = []
    for depth in (2, 4):
        model = tiny_model(tmp_path / str(depth), num_hidden_layers=depth)
        spec = spec_of("gptq", calibration=str(text), samples=4, sequence_length=32, effort=effort)
        closed.clear()
        qexport.quantize(model, tmp_path / f"out{depth}", spec)
        totals.append(tuple(sum(sizes) for sizes in zip(*closed, strict=True)))
    (shallow, shallow_disk), (deep, deep_disk) = totals
    assert deep == shallow > 0
    if effort == "best":  # inputs of the blocks, and of the head; curvatures, those of the blocks
        assert deep_disk > 1.5 * shallow_disk > 0
    else:
        assert deep_disk == shallow_disk == 0
