"""Shard plans: what every plan keeps to, what the Hub's own planner says, and sizes as people write them."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from qexport.checkpoint.sharding import SINGLE_FILE, ShardPlan, plan_shards
from qexport.checkpoint.tensors import TensorInfo
from qexport.sizes import format_size, parse_share, parse_size


def byte_tensors(sizes: list[int]) -> list[TensorInfo]:
    return [TensorInfo(f"t{n}", torch.uint8, (size,)) for n, size in enumerate(sizes)]


def files(plan: ShardPlan) -> list[list[int]]:
    return [[tensor.size for tensor in shard.tensors] for shard in plan.shards]


@pytest.mark.parametrize("seed", range(100))
def test_what_every_plan_keeps_to(seed: int) -> None:
    chance = random.Random(seed)
    limit = chance.randint(1, 60)
    tensors = byte_tensors([chance.randint(0, 40) for _ in range(chance.randint(1, 60))])
    plan = plan_shards(tensors, limit)
    assert [tensor for shard in plan.shards for tensor in shard.tensors] == tensors
    for shard in plan.shards:
        assert shard.tensors
        assert shard.size == sum(tensor.size for tensor in shard.tensors)
        assert shard.size <= limit or len(shard.tensors) == 1
    for shard, after in zip(plan.shards, plan.shards[1:], strict=False):
        if shard.size <= limit:  # greedy: a file ends only where the next tensor no longer fits
            assert shard.size + after.tensors[0].size > limit
    assert plan.oversized == tuple(tensor for tensor in tensors if tensor.size > limit)
    assert plan.size == sum(tensor.size for tensor in tensors)
    count = len(plan.shards)
    names = [shard.file for shard in plan.shards]
    numbered = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert names == ([SINGLE_FILE] if count == 1 else numbered)
    assert plan.index() == {
        "metadata": {"total_parameters": plan.size, "total_size": plan.size},
        "weight_map": {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors},
    }


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([6, 6, 2, 6, 2, 2], 10, [[6], [6, 2], [6, 2, 2]]),  # the example in the Hub's own planner
        ([5, 5], 10, [[5, 5]]),
        ([5, 5, 1], 10, [[5, 5], [1]]),
        ([11], 10, [[11]]),
        ([1, 11, 1], 10, [[1], [11], [1]]),
        ([11, 11], 10, [[11], [11]]),
        ([11, 0], 10, [[11], [0]]),
        ([0, 10, 0, 1], 10, [[0, 10, 0], [1]]),
        ([0, 0], 10, [[0, 0]]),
        ([], 10, []),
    ],
)
def test_plans_by_hand(sizes: list[int], limit: int, expected: list[list[int]]) -> None:
    assert files(plan_shards(byte_tensors(sizes), limit)) == expected


def test_size_and_parameters_count_the_dtype() -> None:
    tensors = [
        TensorInfo("a", torch.float16, (3, 5)),
        TensorInfo("b", torch.float64, ()),
        TensorInfo("c", torch.int8, (2, 0)),
    ]
    plan = plan_shards(tensors, 1000)
    assert [tensor.size for tensor in tensors] == [30, 8, 0]
    assert plan.index()["metadata"] == {"total_parameters": 16, "total_size": 38}
    assert [shard.file for shard in plan.shards] == ["model.safetensors"]


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_is_the_hubs(seed: int) -> None:
    """Both fill in the given order; they differ only after an oversized tensor, which theirs fills past."""
    chance = random.Random(seed)
    dtypes = [torch.float32, torch.float16, torch.int8]
    # every third plan fits one file
    limit = chance.randint(4 * 50, 2000) if seed % 3 else 10**6
    state = {
        f"block.{n}": torch.empty(chance.randint(1, 50), dtype=chance.choice(dtypes))
        for n in range(chance.randint(1, 60))
    }
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=limit)
    ours = plan_shards([TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in state.items()], limit)
    assert ours.index()["weight_map"] == theirs.tensor_to_filename
    assert ours.size == theirs.metadata["total_size"]
    assert [s.file for s in ours.shards] == list(theirs.filename_to_tensors)
    assert (len(ours.shards) > 1) is theirs.is_sharded is bool(limit < 10**6 and ours.size > limit)


def test_oversized_tensors_are_alone_in_both() -> None:
    state = {f"t{n}": torch.empty(size, dtype=torch.uint8) for n, size in enumerate([4, 20, 4, 30, 8])}
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=10)
    plan = plan_shards(byte_tensors([4, 20, 4, 30, 8]), 10)
    assert [tensor.name for tensor in plan.oversized] == ["t1", "t3"]
    for groups in (
        list(theirs.filename_to_tensors.values()),
        [[t.name for t in s.tensors] for s in plan.shards],
    ):
        assert ["t1"] in groups
        assert ["t3"] in groups


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        (7, 7),
        ("12B", 12),
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("5G", 5_000_000_000),
        ("5 GB", 5_000_000_000),
        ("  500MB ", 500_000_000),
        ("10KB", 10_000),
        ("1TB", 10**12),
        ("2GiB", 2**31),
        ("2Gi", 2**31),
        ("1KiB", 1024),
        ("1.5MiB", 3 * 2**19),
        ("1tib", 2**40),
        ("0.5KB", 500),
        ("8.2MB", 8_200_000),  # 8.2 * 10**6 is 8199999.999... in floating point
        ("1.001KB", 1001),
        ("9007199254740993", 2**53 + 1),  # not a whole number of float64
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GB",
        "big",
        "-1",
        -1,
        "-5GB",
        0,
        "0",
        "0GB",
        "0.1B",
        "5XB",
        "5PB",
        "5i",
        "5iB",
        "5GBB",
        "5GB 3",
        "1e3",
        "1_000",
        "1,5GB",
        ".5GB",
        "5.GB",
        "0x10",
        "nan",
        "inf",
        "infGB",
        "5G\u0130B",
        "5\u212aB",  # the Kelvin sign, which is no K here
        True,
        "9" * 400 + "GB",
        None,
        5.5,
    ],
)
def test_wrong_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1234, "1.23 KB"),
        (81_920, "81.9 KB"),
        (999_499, "999 KB"),
        (999_500, "1 MB"),
        (12_345_678, "12.3 MB"),
        (3_090_000_000, "3.09 GB"),
        (999_499_999_999, "999 GB"),
        (999_500_000_000, "1 TB"),
        (5e15, "5000 TB"),
        (-1234, "-1.23 KB"),
    ],
)
def test_format_size(size: float, text: str) -> None:
    assert format_size(size) == text


def test_a_size_shown_is_a_size_read() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        size = int(10 ** chance.uniform(0, 14.9))
        shown = format_size(size)
        assert re.fullmatch(r"\d+(\.\d+)? [KMGT]?B", shown), "no exponents"
        assert parse_size(shown) == pytest.approx(size, rel=0.00501)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("8%", 0.08),
        ("8 %", 0.08),
        (" 0.5% ", 0.005),
        ("100%", 1.0),
        ("150%", 1.5),
        ("0%", 0.0),
        ("0.08", 0.08),
        ("0", 0.0),
        (0.08, 0.08),
        (0, 0.0),
    ],
)
def test_shares(text: str | float, share: float) -> None:
    assert parse_share(text) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "%",
        "8",
        "1",
        1,
        8.0,
        "-1%",
        -0.1,
        "8%%",
        "%8",
        "8 percent",
        "nan",
        float("nan"),
        "inf",
        True,
        "1e-2",
    ],
)
def test_wrong_shares(text: Any) -> None:
    with pytest.raises(ValueError, match="share"):
        parse_share(text)
