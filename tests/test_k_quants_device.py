"""K-quants searched in torch, as for weights that lie on a GPU: beside the compiled kernels, and their tests.

There need be no GPU: the search runs on a CPU, and once more upon tensors that only pretend to lie elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qexport.grids.ggml import blocks, k_quants
from qexport.grids.ggml.device import k_search
from qexport.grids.ggml.types import block_type
from tests.test_k_quants import (  # these run here, too: on the search in torch
    NAMES,
    error,
    heavy_tailed,
    importance,
    normal,
    test_edges,  # noqa: F401
    test_encodes_its_own_values_again,  # noqa: F401
    test_fit_round_and_pack_are_the_encoder,  # noqa: F401
    test_importance_moves_the_error,  # noqa: F401
    test_importance_of_zeros,  # noqa: F401
    test_loses_less_than_ggml,  # noqa: F401
    test_packs_what_it_unpacks,  # noqa: F401
)


@pytest.fixture(autouse=True)
def _in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "in_torch", lambda weight: True)


def compiled(encode: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What the compiled kernels make."""
    with mock.patch.object(blocks, "in_torch", return_value=False):
        return encode()


def relative_error(weight: torch.Tensor, found: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Of each super-block, in double precision."""
    squares = torch.stack(((weight - found).double().square() * by, weight.double().square() * by))
    sums = squares.view(2, -1, 256).sum(2)
    return torch.div(*sums)


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", NAMES)
def test_is_the_compiled_search(name: str, weighed: bool) -> None:
    """Sums in another order, and so another choice where two are equally good: the same errors."""
    kind = block_type(name)
    weight = torch.cat((normal(96), heavy_tailed(96)))
    h = importance(1024) if weighed else None
    ours, theirs = kind.encode(weight, h), compiled(lambda: kind.encode(weight, h))
    same = (ours.view(-1, kind.size) == theirs.view(-1, kind.size)).all(1).float().mean()
    assert same > 0.88
    by = torch.ones(1024) if h is None else h
    ratio = relative_error(weight, kind.decode(ours), by).mean()
    assert ratio / relative_error(weight, kind.decode(theirs), by).mean() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_hard_rows_as_the_compiled_search(name: str) -> None:
    kind = block_type(name)
    rows = normal(12, 512)
    rows[0] = 0
    rows[1] = 0.37
    rows[2, 300] = 1e38
    rows[3] *= 1e-38
    rows[4] = 1e-42
    rows[5, :256] = 0
    rows[6] *= 1e-4
    rows[7] *= 1e7
    rows[8] = rows[8].sign()
    rows[9, 1:] = 0
    rows[10] = rows[10].abs()
    h = importance(512)
    h[64:160] = 0
    for by in (None, h):
        ours = kind.decode(kind.encode(rows, by))
        theirs = kind.decode(compiled(lambda by=by: kind.encode(rows, by)))  # type: ignore[misc]
        assert ours.isfinite().all()
        for row, one, other in zip(rows, ours, theirs, strict=True):
            # rows of one or two values fit in many ways, of which only roundings of d and dmin are left
            assert error(row, one, by) <= 1.05 * error(row, other, by) + 3e-5 * error(row, 0 * row, by)


@pytest.mark.parametrize("name", NAMES)
def test_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of several pieces, the last one a part, that are strided and need a gradient."""
    kind = block_type(name)
    weight = heavy_tailed(512, 7).t().requires_grad_()
    kept = weight.detach().clone()
    h = importance(512)
    affine = kind.affine
    assert affine is not None
    whole = affine.lines(affine.fit(weight, h))
    monkeypatch.setattr(k_search, "PIECE", 3 * 512)
    for one, other in zip(affine.lines(affine.fit(weight, h)), whole, strict=True):
        assert one.shape == other.shape
        assert not one.requires_grad
        assert (one == other).float().mean() > 0.9
    found = kind.encode(weight, h)
    assert torch.equal(weight, kept)
    step, origin = affine.lines(affine.fit(weight, h))
    codes, _ = affine.round(kept.view(7, -1, affine.width), step[..., None], origin[..., None])
    assert torch.equal(found, affine.pack(codes.view(7, 512), affine.fit(weight, h)))


@pytest.mark.parametrize("name", NAMES)
def test_stays_on_the_device_of_the_weight(name: str) -> None:
    """Pretended: what would mix devices, or read numbers back, raises. The importance is read back, once."""
    kind = k_quants.AFFINE[name]
    assert isinstance(kind, k_quants.KQuant)
    kind = dataclasses.replace(kind, tried=(2, 2))  # the others are done alike, and pretending takes its time
    with FakeTensorMode(), mock.patch.object(k_quants, "_refuse_bad"):
        weight, h = torch.empty(4, 512, device="meta"), torch.empty(512)
        packed = [kind.encode(weight), kind.encode(weight, h.to("meta"))]
        scales = kind.fit(weight, h)
        lines = kind.lines(scales)
        step, origin = (each[..., None] for each in lines)
        codes, values = kind.round(weight.view(4, -1, kind.width), step, origin)
        packed.append(kind.pack(codes.view(4, 512), scales))
        assert all(part.shape == (4, 2 * kind.size) for part in packed)
        made = (*packed, *lines, codes, values, kind.decode(packed[0]))
        assert all(part.device == weight.device for part in made)


@pytest.mark.parametrize("name", NAMES)
def test_holds_weights_of_two_and_three_values(name: str) -> None:
    """They fit exactly in several ways: sub-blocks must agree on one."""
    kind = block_type(name)
    values = torch.randint(-1, 2, (16, 512), generator=torch.Generator().manual_seed(0)).float()
    for weight in (values, (values + 0.5).sign()):
        assert error(weight, kind.decode(kind.encode(weight))) < 1e-4 * error(weight, 0 * weight)
