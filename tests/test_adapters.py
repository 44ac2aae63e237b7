"""The zoo itself: PEFT loads back what it saved over the same base, and the logits say that it is on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.adapters import BASES, FLAWED, KINDS, UNMERGEABLE, build_adapter
from tests.tiny import in_transformers, logits, tokens

# One kind of each type, on the first architecture that it is for: the merges' own tests take all.
SAMPLE = sorted(
    {kind.peft_type: name for name, kind in reversed(KINDS.items()) if not kind.requires}.values()
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases made so far, by architecture."""
    directory = tmp_path_factory.mktemp("bases")
    return {name: BASES[name](directory / name) for name in ("llama", "qwen2", "gpt2", "mixtral")}


@pytest.mark.parametrize("name", [*SAMPLE, "experts", "prompt_tuning"])
@pytest.mark.filterwarnings("ignore")  # PEFT's, on tied heads and on projections not saved
def test_adapter_loads_back(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind = {**KINDS, **UNMERGEABLE}[name]
    base = bases[next(architecture for architecture in kind.architectures if architecture in bases)]
    saved = logits(build_adapter(name, base, tmp_path / "adapter"), tokens())
    model: Any = PeftModel.from_pretrained(
        in_transformers(base, dtype=torch.float32), str(tmp_path / "adapter")
    )
    loaded = logits(model.eval(), tokens())
    torch.testing.assert_close(loaded, saved, rtol=1e-4, atol=1e-4)
    plain = logits(in_transformers(base, dtype=torch.float32), tokens())
    assert (loaded[:, -plain.shape[1] :] - plain).abs().max() > 0.05


def test_tables_name_a_kind_once() -> None:
    names = [*KINDS, *FLAWED, *UNMERGEABLE]
    assert len(names) == len(set(names))
    assert all(kind.flaw for kind in FLAWED.values())
    assert {kind.requires for kind in KINDS.values()} <= {"", "attr", "sklearn"}
