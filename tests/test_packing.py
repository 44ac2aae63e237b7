"""Packing of codes: against a loop over single bits, and every bit width back again."""

from __future__ import annotations

import pytest
import torch

from qexport.formats.packing import pack, pack_rows, unpack, unpack_rows


def words_of(row: list[int], bits: int) -> list[int]:
    """A row of codes as one long number, lowest code first, cut into signed words."""
    number = sum(code << (place * bits) for place, code in enumerate(row))
    words = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(len(row) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 64), (40, 96)])
def test_rows_and_columns(bits: int, rows: int, columns: int) -> None:
    codes = torch.randint(
        0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    before = codes.clone()
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [words_of(row, bits) for row in codes.tolist()]
    assert torch.equal(pack(codes.t(), bits), packed.t())
    assert torch.equal(unpack_rows(packed, bits), codes)
    assert torch.equal(unpack(packed.t(), bits), codes.t())
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_more_than_a_piece_and_an_odd_place_in_memory(bits: int) -> None:
    whole = torch.randint(0, 1 << bits, (64 * 9000 + 3,), dtype=torch.uint8)
    codes = whole[3:].reshape(64, 9000)[:, :8992]
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits), codes)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    assert torch.equal(pack_rows(whole[3:67][None], bits), pack_rows(whole[3:67].clone()[None], bits))


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_full_words(bits: int) -> None:
    """Every bit set, the sign bits too."""
    codes = torch.full((32, 2), (1 << bits) - 1, dtype=torch.uint8)
    assert set(pack(codes, bits).flatten().tolist()) == {-1}
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
