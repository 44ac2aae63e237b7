"""Every kind of adapter on what takes it: merged is as the adapter on (PEFT, fp32)."""

from __future__ import annotations

import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import qexport
from qexport.errors import AdapterError
from qexport.specs import MergeSpec
from tests.adapters import BASES, FLAWED, KINDS, NAMES, UNMERGEABLE, make_adapter
from tests.tiny import in_transformers, logits, tokens

# one of every mechanism for the fast loop; all of them with the slow tests
FAST = {
    "lora",
    "dora",
    "patterns",
    "bias_all",
    "embedding_and_head",
    "dora_embedding",
    "saved_embedding_and_head",
    "token_indices",
    "tied_targets",
    "layer_replication",
    "experts",
    "olora",
    "ia3",
    "loha",
    "vera",
    "tinylora",
    "trainable_tokens",
}
# what a kind that touches embeddings or the head says of them in its options
EMBEDDED = ("embed_tokens", "lm_head", "token_indices", "all-linear", "layer_replication")
DECOMPOSED = ("pissa", "olora", "mica", "kasa", "osf", "psoft", "deft", "frod", "tinylora")
FULL_PRECISION = MergeSpec(dtype="float32")


@cache
def base_of(architecture: str, root: Path) -> Path:
    """The tiny base, made once a process."""
    return BASES[architecture](root / architecture)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@cache
def full_precision(base: Path) -> Any:
    """transformers' own model in fp32. Not to be changed."""
    return in_transformers(base, dtype=torch.float32)


@cache
def logits_of(base: Path) -> torch.Tensor:
    return logits(full_precision(base), tokens())


@pytest.fixture(autouse=True)
def _no_model_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT takes longer to write an adapter's README.md than its weights."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


def with_adapter_on(base: Path, adapter: Path) -> torch.Tensor:
    """Logits in fp32 with the adapter still on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about projections that are drawn again
        loaded: Any = PeftModel.from_pretrained(deepcopy(full_precision(base)), str(adapter))
        return logits(loaded.eval(), tokens())


def architectures_of(kind: str) -> list[str]:
    """All that take a kind; but a kind that leaves embeddings and head alone meets no llama.

    qwen2 has the same linear layers, and biases beside them. What llama alone has are tied embeddings.
    """
    made = KINDS[kind]
    if kind in FAST or not {"llama", "qwen2"} <= {*made.architectures}:
        return list(made.architectures)
    said = f"{kind} {made.options(NAMES['llama'])}"
    tied = any(name in said for name in EMBEDDED)
    return [name for name in made.architectures if tied or name != "llama"]


def _cases() -> list[Any]:
    return [
        pytest.param(
            architecture, kind, id=f"{kind}-{architecture}", marks=() if kind in FAST else pytest.mark.slow
        )
        for kind in KINDS
        for architecture in architectures_of(kind)
    ]


@pytest.mark.parametrize(("architecture", "kind"), _cases())
def test_merged_is_adapter_on(architecture: str, kind: str, bases: Path, tmp_path: Path) -> None:
    needed = KINDS[kind].requires
    if needed:
        pytest.importorskip(needed)
    base = base_of(architecture, bases)
    adapter = make_adapter(kind, base, tmp_path / "adapter")
    out = tmp_path / "out"
    if kind == "frod_no_projection":
        with pytest.raises(AdapterError, match="FRoD adapter without its projections"):
            qexport.merge(base, [adapter], out, FULL_PRECISION)
        return
    expected = with_adapter_on(base, adapter)
    assert (expected - logits_of(base)).abs().max() > 0.05
    qexport.merge(base, [adapter], out, FULL_PRECISION)
    found = logits(in_transformers(out, dtype=torch.float32), tokens())
    # a decomposition of the base comes out a little different with every number of threads
    atol = 2e-3 if kind.startswith(DECOMPOSED) else 2e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in FLAWED if kind != "patterns_overlap"])
def test_what_peft_itself_cannot_load_back_is_refused(kind: str, bases: Path, tmp_path: Path) -> None:
    if FLAWED[kind].requires:
        pytest.importorskip(FLAWED[kind].requires)
    base = base_of("llama", bases)
    adapter = make_adapter(kind, base, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"which changed the base by .*save it converted"):
        qexport.merge(base, [adapter], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_what_no_weight_can_hold_is_refused_and_says_why(kind: str, bases: Path, tmp_path: Path) -> None:
    base = base_of("llama", bases)
    adapter = make_adapter(kind, base, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"cannot be merged: |which has none in the base"):
        qexport.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()
