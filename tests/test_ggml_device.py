"""ggml's encoders in torch, for weights on a GPU: legacy, ternary and MXFP4 types against compiled kernels.

They run on the CPU here, and on a GPU where there is one; fake tensors show that nothing leaves the device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import qexport
from qexport.errors import SpecError
from qexport.grids.ggml import blocks as layout
from qexport.grids.ggml.device import blocks as device_blocks
from qexport.grids.ggml.types import TYPES
from qexport.specs import spec_of
from tests.test_ggml_types import edge_rows, heavy, importances, loss, plain, spread
from tests.tiny import tiny_model

SEARCHED = ["q4_0", "q4_1", "q5_0", "q5_1"]  # with importance
LINES = [*SEARCHED, "q8_0", "tq1_0", "tq2_0", "mxfp4"]
FLOATS = ["f32", "f16", "bf16"]
# where fake tensors lie: fake CUDA tensors cannot be indexed where torch has no CUDA
PRETENDED = "cuda:0" if torch.cuda.is_available() else "meta"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def hard_rows() -> torch.Tensor:
    """Rows of 256 with something to trip over, many of them beyond fp16 scales."""
    clipped = (heavy(rows=2, inputs=256) / 40).clamp(-1, 1)
    generator = torch.Generator().manual_seed(2)
    halfway = torch.randint(-40, 40, (4, 256), generator=generator) / 8.0
    scaled = [clipped * scale for scale in (1e7, 1e30, 3e38, 1e-7, 1e-39, 1e-44)]
    near_overflow = clipped.sign() * torch.tensor([65503.0, 65505, 65519.5, 65520, 65530] * 52)[:256]
    return torch.cat((edge_rows(), *scaled, halfway, near_overflow, near_overflow * 8, near_overflow * 15))


def encode(
    name: str, weight: torch.Tensor, importance: torch.Tensor | None, device: str | None
) -> torch.Tensor:
    """By compiled kernels where no device is named, and otherwise in torch, there."""
    if device is None:
        return TYPES[name].encode(weight, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "in_torch", lambda weight: True)
        placed = None if importance is None else importance.to(device)
        return TYPES[name].encode(weight.to(device), placed).cpu()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where weights lie that are encoded in torch."""
    found: str = request.param
    return found


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("weight", [heavy(), plain(3, 256), hard_rows()], ids=["heavy", "plain", "hard"])
def test_bytes_are_those_of_the_kernels(name: str, weight: torch.Tensor, device: str) -> None:
    before = weight.clone()
    assert torch.equal(encode(name, weight, None, device), encode(name, weight, None, None))
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("name", ["q8_0", "tq1_0", "tq2_0", "mxfp4"])
def test_importance_has_no_say_where_llama_cpp_ignores_it(name: str, device: str) -> None:
    weight = heavy(rows=4)
    assert torch.equal(encode(name, weight, importances(), device), encode(name, weight, None, device))


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("weight", [heavy(), plain(), heavy(seed=7) + 0.5], ids=["heavy", "plain", "shifted"])
def test_the_search_is_that_of_the_kernels(name: str, weight: torch.Tensor, device: str) -> None:
    kind = TYPES[name]
    for importance in (importances(), torch.ones(1024)):
        ours, theirs = (encode(name, weight, importance, place) for place in (device, None))
        same = (ours == theirs).reshape(-1, kind.size).all(dim=1).double().mean()
        assert float(same) > 0.98
        losses = [loss(weight, kind.decode(blocks), importance) for blocks in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("name", SEARCHED)
def test_the_search_is_as_good_on_hard_rows(name: str, device: str) -> None:
    kind, weight = TYPES[name], hard_rows()
    # two groups have none
    importance = importances(256).clamp(0.5, 2) * (torch.arange(256) >= 64)
    ours, theirs = (kind.decode(encode(name, weight, importance, place)) for place in (device, None))
    assert bool(ours.isfinite().all())
    assert not ours[:4].any()
    weighed = torch.from_numpy(layout.importance_of_blocks(importance, 256, 32)).flatten()
    for row, our_row, their_row in zip(weight.double(), ours.double(), theirs.double(), strict=True):
        size = row.abs().amax().clamp(min=1e-30)
        found, wanted = (loss(row / size, decoded / size, weighed) for decoded in (our_row, their_row))
        # among scales that are nearly exact, rounding decides: fp16 costs up to 2^-12 of the largest weight
        assert found <= wanted * 1.001 + 256 * 2.0**-24


@pytest.mark.parametrize("name", SEARCHED)
def test_weighted_error_is_no_larger_than_ggmls(name: str, device: str) -> None:
    pytest.importorskip("xllamacpp")
    from benchmarks import ggml

    kind, weight, importance = TYPES[name], heavy(), importances()
    ours = kind.decode(encode(name, weight, importance, device))
    assert loss(weight, ours, importance) < loss(
        weight, kind.decode(ggml.encode(kind, weight, importance)), importance
    )


@pytest.mark.parametrize("name", LINES)
def test_pieces_make_the_same_blocks(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = heavy(rows=5, inputs=512), importances(512)
    whole = encode(name, weight, importance, device)
    monkeypatch.setattr(device_blocks, "_AT_ONCE", 1200)
    assert torch.equal(encode(name, weight, importance, device), whole)
    monkeypatch.setattr(device_blocks, "_AT_ONCE", 1)
    assert torch.equal(encode(name, weight, importance, device), whole)


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what leaves a device; fake tensors refuse by themselves what asks for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            places = {given.device for given in args if isinstance(given, torch.Tensor)}
            assert places <= {found.device}, f"{func} from {places} to {found.device}"
        return found


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("weighted", [True, False])
def test_encoding_never_leaves_the_device(name: str, weighted: bool) -> None:
    with FakeTensorMode():
        weight = torch.empty(4, 512, device=PRETENDED)
        importance = torch.empty(512, device=PRETENDED) if weighted else None
        with Watched():  # type: ignore[no-untyped-call]
            blocks = TYPES[name].encode(weight, importance)
        assert blocks.device == weight.device
        assert blocks.dtype == torch.uint8
        assert blocks.shape == (4, TYPES[name].row_bytes(512))


@pytest.mark.parametrize("name", LINES)
def test_scales_and_codes_stay_on_the_device(name: str) -> None:
    kind = TYPES[name]
    assert kind.affine is not None
    with FakeTensorMode():
        weight = torch.empty(4, 512, device=PRETENDED)
        scales = kind.affine.fit(weight, torch.empty(512))  # importances on the CPU
        codes, rounded = kind.affine.round(weight, *spread(kind, scales))
        packed = kind.affine.pack(codes, scales)
        decoded = kind.decode(packed)
        assert {found.device for found in (codes, rounded, packed, decoded)} == {weight.device}
        assert decoded.shape == rounded.shape == weight.shape
    # and nothing fake is kept
    real = heavy(rows=1, inputs=512)
    assert bool(kind.decode(kind.encode(real)).isfinite().all())


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_read_where_they_lie(name: str) -> None:
    with FakeTensorMode():
        decoded = TYPES[name].decode(torch.empty(4, 64, dtype=torch.uint8, device=PRETENDED))
        assert decoded.device.type == PRETENDED.partition(":")[0]


@gpu
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_on_a_gpu_are_the_same(name: str) -> None:
    weight = heavy(rows=4)
    assert torch.equal(TYPES[name].encode(weight.cuda()).cpu(), TYPES[name].encode(weight))


@gpu
@pytest.mark.parametrize("name", LINES)
def test_scales_and_codes_on_a_gpu_are_the_same(name: str) -> None:
    kind, weight, importance = TYPES[name], heavy(rows=6), importances()
    assert kind.affine is not None
    blocks = kind.encode(weight.cuda(), importance)
    assert blocks.is_cuda
    assert torch.equal(kind.decode(blocks).cpu(), kind.decode(blocks.cpu()))
    scales = kind.affine.fit(weight.cuda(), importance)
    codes, rounded = kind.affine.round(weight.cuda(), *spread(kind, scales))
    assert torch.equal(kind.decode(kind.affine.pack(codes, scales)), rounded)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="multiple of 32"):
        encode("q4_0", torch.zeros(2, 33), torch.ones(33), "cpu")
    with pytest.raises(SpecError, match="multiple of 256"):
        encode("tq1_0", torch.zeros(2, 32), None, "cpu")
    with pytest.raises(SpecError, match="multiple of 32"):
        encode("mxfp4", torch.zeros(32), None, "cpu")
    with pytest.raises(SpecError, match="one each of 64 inputs"):
        encode("q4_0", torch.zeros(2, 64), torch.ones(32), "cpu")


@pytest.mark.parametrize("name", LINES)
def test_no_rows_are_no_bytes(name: str) -> None:
    blocks = encode(name, torch.zeros(0, 256), importances(256), "cpu")
    assert blocks.dtype == torch.uint8
    assert blocks.numel() == 0


def test_blocks_lie_in_the_weights_memory() -> None:
    weight = heavy(rows=2, inputs=64)
    assert device_blocks.in_blocks(weight, 32).data_ptr() == weight.data_ptr()
    assert layout.in_blocks(weight, 32).ctypes.data == weight.data_ptr()


@pytest.mark.parametrize("where", DEVICES)
def test_a_whole_export_on_the_device(tmp_path: Path, where: str) -> None:
    """`--device`: the same tensors in the same types, and no more lost than on a CPU."""
    model = tiny_model(tmp_path / "model", hidden_size=256, num_hidden_layers=1)
    types = ["q8_0", "q4_k_m", "iq4_xs", "iq3_s", "q5_0", "bf16"]
    made = {}
    for name in ("cpu", where if where != "cpu" else "torch"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "torch":
                patch.setattr(layout, "in_torch", lambda weight: True)
            spec = spec_of("gguf", type=types, device="cpu" if name == "torch" else name)
            made[name] = qexport.quantize(model, tmp_path / name, spec)
    cpu, other = made.values()
    assert [file.types for file in cpu.files] == [file.types for file in other.files]
    assert [file.size_bytes for file in cpu.files] == [file.size_bytes for file in other.files]
    assert len(cpu.tensors) > 5
    for ours, theirs in zip(other.tensors, cpu.tensors, strict=True):
        assert ours.tensor == theirs.tensor
        assert ours.relative == pytest.approx(theirs.relative, rel=2e-3)
