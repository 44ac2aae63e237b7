"""IQ2, IQ3 and IQ4 types searched in torch, as for weights on a GPU: beside the compiled kernels.

The search runs on the CPU here, and on a GPU where there is one; fake tensors show that nothing leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qexport.errors import SpecError
from qexport.grids.ggml import blocks, iq4, lattices
from qexport.grids.ggml.device.sharing import in_pieces, kept_by_device
from qexport.grids.ggml.types import BlockType, block_type
from tests.test_ggml_types import edge_rows
from tests.test_lattices import (  # these run here, too: on the search in torch
    GGML_LOSES,
    INPUTS,
    given,
    heavy,
    importance_of,
    loss,
    normal,
    test_an_even_number_of_minus_signs_where_the_type_wants_it,  # noqa: F401
    test_binary_weights_are_kept,  # noqa: F401
    test_constants_are_kept,  # noqa: F401
    test_less_weighted_error_than_ggml_is_known_to_have,  # noqa: F401
    test_misfits_are_refused,  # noqa: F401
    test_no_rows,  # noqa: F401
    test_one_large_weight_of_a_block_loses_less_than_by_ggml,  # noqa: F401
    test_rows_and_blocks_are_encoded_apart,  # noqa: F401
    test_scales_below_fp16_give_zeros,  # noqa: F401
    test_scales_beyond_fp16_are_its_largest_number,  # noqa: F401
    test_types_that_need_importance_say_so,  # noqa: F401
    test_weights_without_importance_stay_near,  # noqa: F401
    test_what_is_no_number_makes_no_harm,  # noqa: F401
    test_zeros_stay_zeros_and_their_neighbours_stay_near,  # noqa: F401
)

LATTICES = sorted({name for name, _ in GGML_LOSES})
IQ4 = ["iq4_nl", "iq4_xs"]
NAMES = [*LATTICES, *IQ4]
# where fake tensors lie: fake CUDA tensors cannot be indexed where torch has no CUDA
PRETENDED = "cuda:0" if torch.cuda.is_available() else "meta"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def _in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "in_torch", lambda weight: True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def compiled(kind: BlockType, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Blocks by the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "in_torch", lambda weight: False)
        return kind.encode(weight, importance)


def encode(
    kind: BlockType, weight: torch.Tensor, importance: torch.Tensor | None, device: str
) -> torch.Tensor:
    """Blocks by the search in torch."""
    found = kind.encode(weight.to(device), None if importance is None else importance.to(device))
    assert found.device.type == device
    return found.cpu()


def flavours(kind: BlockType) -> Iterator[torch.Tensor | None]:
    for name in ["random", "spiky"] if kind.needs_importance else ["none", "random", "spiky"]:
        yield importance_of(name)


def hard_rows() -> torch.Tensor:
    """Rows of 512 with something to trip over: of zeros, ties, one huge weight, sizes that fp16 has not."""
    edges = edge_rows().repeat(1, 2)
    tails = heavy(6, INPUTS)
    tails[0] *= 1e30
    tails[1] *= 1e-6
    tails[2] *= 1e-38
    tails[3, 300] = -3e38
    tails[4, 32:64] = 0
    tails[5, 256:] = 1e-44
    return torch.cat((edges, tails))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_search_of_the_kernels(name: str, device: str) -> None:
    """Sums in another order, and so now and then another choice of two that are equally good."""
    kind, weight = block_type(name), torch.cat((normal(12, INPUTS), heavy(12, INPUTS)))
    before = weight.clone()
    for importance in flavours(kind):
        ours, theirs = encode(kind, weight, importance, device), compiled(kind, weight, importance)
        assert ours.shape == theirs.shape
        same = (ours == theirs).view(-1, kind.size).all(dim=1).double().mean()
        assert float(same) > 0.95
        found, wanted = (loss(weight, kind.decode(made), importance) for made in (ours, theirs))
        assert found == pytest.approx(wanted, rel=1e-3)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_as_good_on_hard_rows(name: str, device: str) -> None:
    kind, weight = block_type(name), hard_rows()
    gaps = torch.ones(INPUTS)
    gaps[::3] = 0
    gaps[128:384] = 0
    for importance in (given(kind, INPUTS), gaps):
        ours = kind.decode(encode(kind, weight, importance, device))
        theirs = kind.decode(compiled(kind, weight, importance))
        assert bool(ours.isfinite().all())
        by = torch.ones(INPUTS) if importance is None else importance
        sizes = weight.abs().amax(dim=1, keepdim=True).double().clamp(min=1e-30)
        for row, one, other in zip(weight / sizes, ours / sizes, theirs / sizes, strict=True):
            # where several scales are nearly exact, rounding decides: fp16 costs up to 2^-12 of a weight
            assert loss(row, one, by) <= 1.001 * loss(row, other, by) + INPUTS * 2.0**-24


@pytest.mark.parametrize("name", IQ4)
def test_iq4_loses_less_than_ggml(name: str, device: str) -> None:
    pytest.importorskip("xllamacpp")
    from benchmarks import ggml

    kind = block_type(name)
    for weight in (normal(8, INPUTS), heavy(8, INPUTS)):
        for importance in flavours(kind):
            ours = kind.decode(encode(kind, weight, importance, device))
            theirs = kind.decode(ggml.encode(kind, weight, importance))
            assert loss(weight, ours, importance) < loss(weight, theirs, importance)


@pytest.mark.parametrize("name", IQ4)
def test_iq4_survives_what_is_no_number(name: str, device: str) -> None:
    kind, weight = block_type(name), normal(3, 256)
    weight[0, 7], weight[1, 9], weight[1, 70] = torch.nan, torch.inf, -torch.inf
    importance = torch.ones(256)
    found = encode(kind, weight, importance, device)
    assert torch.equal(found[2:], encode(kind, weight[2:], importance, device))
    assert bool(kind.decode(found).isfinite().all())
    importance[3], importance[90] = torch.nan, torch.inf
    assert encode(kind, weight, importance, device).shape == found.shape


@pytest.mark.parametrize("name", IQ4)
def test_iq4_fits_rounds_and_packs_what_it_encodes(name: str, device: str) -> None:
    kind, weight = block_type(name), heavy(5, INPUTS).to(device)
    affine = kind.affine
    assert affine is not None
    scales = affine.fit(weight, None)
    step, origin = (part[..., None] for part in affine.lines(scales))
    codes, values = affine.round(weight.view(5, -1, affine.width), step, origin)
    packed = affine.pack(codes.view(5, INPUTS), scales)
    assert torch.equal(packed, kind.encode(weight))
    assert torch.equal(values.view(5, INPUTS), kind.decode(packed))
    with pytest.raises(SpecError, match="rows"):
        kind.encode(weight[:, :300])


@pytest.mark.parametrize("name", IQ4)
def test_iq4_of_no_rows(name: str) -> None:
    kind = block_type(name)
    assert kind.encode(torch.empty(0, 512)).shape == (0, kind.row_bytes(512))


@pytest.mark.parametrize("name", NAMES)
def test_pieces_make_the_same_blocks(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of several pieces, the last one a part, that is strided and needs a gradient."""
    kind, importance = block_type(name), importance_of("random")
    weight = heavy(INPUTS, 7).to(device).t().requires_grad_()
    kept = weight.detach().clone()
    whole = kind.encode(weight, importance)
    for module in (iq4, lattices):
        monkeypatch.setattr(module, "PIECE", 5 * 256)
    found = kind.encode(weight, importance)
    same = (found == whole).view(-1, kind.size).all(dim=1)
    # sums of other lengths may be added up in another order
    assert float(same.double().mean()) > 0.9
    assert not found.requires_grad
    assert torch.equal(weight, kept)


def test_pieces_of_blocks_have_their_own_importance() -> None:
    values, importance = torch.arange(14.0).view(7, 2), torch.arange(6.0).view(3, 2)
    pieces = list(in_pieces(values, importance, 4))
    assert torch.equal(torch.cat([piece for piece, _ in pieces]), values)
    assert torch.equal(torch.cat([weights for _, weights in pieces]), importance.repeat(3, 1)[:7])
    assert [len(piece) for piece, _ in in_pieces(values[:0], importance, 4)] == [0]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaves_the_device(name: str) -> None:
    """Pretended: what would mix devices, or ask for a number, raises. Importance may lie elsewhere."""
    kind = block_type(name)
    with FakeTensorMode():
        weight, importance = torch.empty(4, 512, device=PRETENDED), torch.empty(512)
        made = [kind.encode(weight, importance.to(PRETENDED))]
        if not kind.needs_importance:
            made.append(kind.encode(weight))
        assert all(part.shape == (4, kind.row_bytes(512)) for part in made)
        made.append(kind.decode(made[0]))
        if kind.affine is not None:
            scales = kind.affine.fit(weight, importance)
            step, origin = kind.affine.lines(scales)
            codes, values = kind.affine.round(weight.view(4, -1, 32), step[..., None], origin[..., None])
            made += [step, origin, codes, values, kind.affine.pack(codes.view(4, 512), scales)]
        assert all(part.device == weight.device for part in made)


@GPU
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_decodes_as_a_cpu(name: str) -> None:
    kind, generator = block_type(name), torch.Generator().manual_seed(3)
    raw = torch.randint(0, 256, (5, 4 * kind.size), dtype=torch.uint8, generator=generator)
    assert torch.equal(kind.decode(raw).nan_to_num(), kind.decode(raw.cuda()).cpu().nan_to_num())


def test_constants_are_kept_but_not_of_fake_tensors() -> None:
    tables = kept_by_device(lambda device: (torch.arange(3, device=device),))
    weight = torch.zeros(2)
    kept = tables(weight)[0]
    for _ in range(2):
        with FakeTensorMode():
            fake = torch.zeros(2)
            assert (tables(fake)[0] + fake.sum()).shape == (3,)
    assert tables(torch.nn.Parameter(weight))[0] is kept
