"""What the peers' modules share: the clock, and files beside the weights."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Outcome

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Clock(AbstractContextManager["Clock"]):
    """Wall and CPU seconds of what is done within; adds up when entered again."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Clock:
        self._begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begun[0]
        self.cpu_seconds += time.process_time() - self._begun[1]

    def outcome(self, *packages: str) -> Outcome:
        """The report, with the versions of `packages` and of what all stand on."""
        names = (*packages, "torch", "transformers")
        return {
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "versions": {name: version(name) for name in names},
        }


def load(model: str, **options: Any) -> Any:
    """The model in transformers, on the CPU, in its own dtype unless `options` say otherwise."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "auto", **options})
    return loaded.eval()


def save_decoded(model: str, decoded: Mapping[str, torch.Tensor], out: str) -> None:
    """`model` with the weights [out, in] of the named modules replaced, as plain safetensors in fp32.

    Raises AssertionError where the tool left some in 16 or 32 bits: it would lose less than others.
    """
    plain = load(model, dtype=torch.float32)
    left = []
    for name, weight in decoded.items():
        before = plain.get_submodule(name).weight
        if any(before.to(dtype).float().equal(weight.float()) for dtype in _FLOATS):
            left.append(name)
    if left:
        raise AssertionError(
            f"{len(left)} of {len(decoded)} layers are left in full precision, such as {left[0]}"
        )
    for name, weight in decoded.items():
        plain.get_submodule(name).weight.data = weight.float().contiguous()
    plain.save_pretrained(out)
    copy_tokenizer(model, out)


def copy_tokenizer(model: str, out: str) -> None:
    """Tokenizers' files, where the peer wrote none."""
    for file in sorted(Path(model).iterdir()):
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            target = Path(out) / file.name
            if not target.exists():
                shutil.copy(file, target)
