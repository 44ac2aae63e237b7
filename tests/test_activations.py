"""Hidden states past a budget: what comes back is what went in, and nothing is left on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import qexport
from qexport.errors import StorageError
from qexport.modeling.activations import Activations, scratch_directory
from qexport.quantization.quantize import quantize_recipe
from qexport.specs import VerifySpec, spec_of, with_preset
from qexport.verification.evaluate import evaluate_recipe
from tests.conftest import RunCli
from tests.test_staging import limited

BUDGETS = [10**9, 70_000, 1]  # all in memory, some of it, nothing


def batches(count: int = 6, width: int = 48, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 + n % 3, 100, width, generator=generator) * 10.0 ** (n - 2) for n in range(count)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("budget", BUDGETS)
def test_fp32_comes_back_bit_for_bit(tmp_path: Path, budget: int) -> None:
    first, second = batches(seed=0), batches(seed=1)
    odd = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3.4028235e38, 65504.0]
    first[3][0, 0, :8] = second[5][0, 7, :8] = torch.tensor(odd)
    with Activations(budget, tmp_path, torch.float32) as kept:
        kept.extend(first)
        assert len(kept) == len(first)
        assert all(same_bits(a, b) for a, b in zip(kept, first, strict=True))
        assert same_bits(kept[-1], first[-1])
        for number, batch in enumerate(kept):
            assert same_bits(batch, first[number])
            kept[number] = second[number]
        assert all(same_bits(a, b) for a, b in zip(kept, second, strict=True))
    assert len(kept) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_budget_is_kept_to_the_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    """The first batches stay in memory; a value takes 2 or 4 bytes, and a token one more for its factor."""
    batch = torch.ones(2, 10, 64)
    size = 20 * (64 * 2 + 1) if dtype == torch.float16 else 20 * 64 * 4
    for budget, fit in ((3 * size, 3), (3 * size - 1, 2), (size - 1, 0), (100 * size, 5)):
        with Activations(budget, tmp_path, dtype) as kept:
            kept.extend([batch] * 5)
            assert (kept.in_memory, kept.on_disk) == (fit * size, (5 - fit) * size)
            for number in range(5):
                kept[number] = batch + number
            assert (kept.in_memory, kept.on_disk) == (fit * size, (5 - fit) * size)
            assert [float(each[0, 0, 0]) for each in kept] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_goes_in_and_what_comes_out_is_not_shared(
    tmp_path: Path, budget: int, dtype: torch.dtype
) -> None:
    whole = torch.ones(100, 8, 16)
    with Activations(budget, tmp_path, dtype) as kept:
        kept.append(whole[3:4])
        whole += 1
        before = kept[0]
        kept[0] = before * 5
        assert float(before.amax()) == 1
        before.zero_()
        assert torch.equal(kept[0], torch.full((1, 8, 16), 5.0))


def rounded(value: float, largest: float) -> Fraction:
    """How far `value` may be off: half a unit of 11 significant bits, or 2^-39 of the token's largest."""
    return max(abs(Fraction(value)) / 2**11, abs(Fraction(largest)) / 2**39)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 7e4, 1e9, 3e38])
def test_sixteen_bits_hold_eleven_digits_of_any_size(tmp_path: Path, budget: int, size: float) -> None:
    """Against exact fractions: tokens whose values span twelve powers of ten below `size`."""
    generator = torch.Generator().manual_seed(1)
    spans = 10 ** (-12 * torch.rand(1, 40, 32, generator=generator, dtype=torch.float64))
    signs = torch.randint(0, 2, spans.shape, generator=generator) * 2 - 1
    batch = (spans * signs * size).float()
    with Activations(budget, tmp_path) as kept:
        kept.append(batch)
        found = kept[0]
    assert found.dtype == torch.float32
    assert not same_bits(found, batch)  # it is rounded
    for token, values in zip(batch[0].tolist(), found[0].tolist(), strict=True):
        largest = max(map(abs, token))
        for value, back in zip(token, values, strict=True):
            assert abs(Fraction(back) - Fraction(value)) <= rounded(value, largest)


def test_the_factor_is_exact() -> None:
    """Values of 11 digits come back as they were, whatever their token's power of two; so twice is once."""
    generator = torch.Generator().manual_seed(2)
    digits = torch.randint(-2047, 2048, (4, 50, 24), generator=generator).float()
    powers = torch.randint(-100, 110, (4, 50, 1), generator=generator)
    batch = digits * 2.0**powers
    with Activations(10**9, Path("/nowhere")) as kept:
        kept.append(batch)
        assert torch.equal(kept[0], batch)
        kept.append(batch.bfloat16())  # 8 digits
        assert same_bits(kept[1], batch.bfloat16())
        kept.append(torch.randn(4, 50, 24, generator=generator))
        kept.append(kept[2])
        assert same_bits(kept[2], kept[3])


def test_what_is_not_a_number_stays_so_and_spoils_nothing_else(tmp_path: Path) -> None:
    batch = torch.randn(2, 6, 16)
    batch[0, 0, 3], batch[0, 1, 4], batch[1, 2, 5] = float("nan"), float("inf"), -float("inf")
    batch[1, 3], batch[1, 4], batch[1, 5] = 0.0, float("nan"), 1e-45
    with Activations(1, tmp_path) as kept:
        kept.append(batch)
        found = kept[0]
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(found), test(batch))
    fine = batch.isfinite()
    assert torch.allclose(found[fine], batch[fine], rtol=2**-11, atol=1e-11)
    assert torch.equal(found[1, 5], batch[1, 5])


def test_what_is_no_use_of_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float16 or float32, not torch\.int8"):
        Activations(1, tmp_path, torch.int8)
    with Activations(1, tmp_path) as kept:
        kept.append(torch.zeros(1, 2, 3))
        with pytest.raises(ValueError, match=r"a batch \[1, 3, 3\] in the place of one \[1, 2, 3\]"):
            kept[0] = torch.zeros(1, 3, 3)
        with pytest.raises(IndexError):
            kept[1]


def test_a_disk_that_is_full_or_closed(tmp_path: Path) -> None:
    told = rf"hidden states past 1 B go to a temporary file in {tmp_path}: File too large; free some space"
    batch = torch.zeros(1, 100, 500)  # 100 kB
    with Activations(1, tmp_path) as kept:
        with limited(250_000):
            kept.extend([batch, batch])
            with pytest.raises(StorageError, match=told):
                kept.append(batch)
        assert torch.equal(kept[1], batch)
    with (
        Activations(1, Path("/proc")) as kept,
        pytest.raises(StorageError, match="temporary file in /proc: "),
    ):
        kept.append(batch)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_yet_to_be_made(tmp_path: Path) -> None:
    with Activations(1, tmp_path / "runs" / "out") as kept:
        kept.append(torch.ones(1, 2, 3))
        assert torch.equal(kept[0], torch.ones(1, 2, 3))
    assert list(tmp_path.iterdir()) == []


PEAK = """
import sys
from pathlib import Path
import torch
from qexport.modeling.activations import Activations

torch.set_num_threads(1)

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def fill(kept, count):
    kept.extend(torch.full((4, 512, 1024), float(n)) for n in range(count))  # 8.4 MB each in fp32
    for _ in range(2):
        for number, batch in enumerate(kept):
            kept[number] = batch + 1
    assert [float(batch[3, 511, 1023]) for batch in kept] == [n + 2 for n in range(count)]

directory, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
with Activations(1, directory, dtype) as kept:
    fill(kept, 2)
before = peak()
with Activations(int(sys.argv[3]), directory, dtype) as kept:
    fill(kept, int(sys.argv[4]))
    print(peak() - before, kept.in_memory, kept.on_disk)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_peak_memory_is_the_budget(tmp_path: Path, dtype: str) -> None:
    """A store of ten times its budget, all of it replaced twice, in a process of its own."""
    budget, count = (16_000_000, 40) if dtype == "float16" else (32_000_000, 40)
    command = [sys.executable, "-c", PEAK, str(tmp_path), dtype, str(budget), str(count)]
    # large pieces are mapped one by one: how the heap falls into pieces is not the question here
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    grown, held, on_disk = map(int, ran.stdout.split())
    assert held <= budget < held + 8_400_000
    assert held + on_disk == count * 2048 * (2 * 1024 + 1 if dtype == "float16" else 4 * 1024)
    assert grown < budget + 8_400_000  # the largest batch, beside what such a store of two has at its peak


KILLED = """
import os, sys, signal
from pathlib import Path
import torch
from qexport.modeling.activations import Activations

kept = Activations(1, Path(sys.argv[1]))
kept.append(torch.zeros(1, 100, 100))
print(os.listdir(sys.argv[1]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there the file has a name as long as it is open")
def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == -signal.SIGKILL
    assert ran.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_scores_are_the_same_spilled_or_not(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity to the last digit, and the logits that are kept byte for byte."""
    seen: list[tuple[Path, int, int]] = []
    close = Activations.close

    def noted(self: Activations) -> None:
        seen.append((self._directory, self.in_memory, self.on_disk))
        close(self)

    monkeypatch.setattr(Activations, "close", noted)
    logits = {memory: tmp_path / str(memory) / "logits" for memory in ("4GB", "300KB", "1B")}
    found = {
        memory: qexport.evaluate(
            llama, VerifySpec(text=str(text), window=64, max_documents=30, memory=memory), keep_logits=path
        )
        for memory, path in logits.items()
    }
    (_, all_held, _), (_, some_held, some_spilled), (beside, nothing_held, all_spilled) = seen
    assert 0 < some_held <= 300_000
    assert some_held + some_spilled == all_held == all_spilled
    assert nothing_held == 0
    assert beside == tmp_path  # logits/.. is made later
    assert (
        asdict(found["1B"].perplexity) == asdict(found["4GB"].perplexity) == asdict(found["300KB"].perplexity)
    )
    assert logits["1B"].read_bytes() == logits["4GB"].read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["logits"] * 3


def test_a_full_disk_while_scoring_is_told_in_one_line(
    llama: Path, text: Path, tmp_path: Path, cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with limited(50_000):
        code, _, err = cli(
            "verify", llama, "--reference", llama, "--text", text, "--memory", "1B", "--window", "64"
        )
    assert code == 2
    assert err.splitlines()[-1].startswith(
        f"error: hidden states past 1 B go to a temporary file in {tmp_path}"
    )
    assert err.splitlines()[-1].endswith("with --memory")
    assert list(tmp_path.iterdir()) == []


def test_memory_determines_no_result(llama: Path, text: Path) -> None:
    """Neither the recipe of a model nor that of its scores; and it does not ask GGUF to heed a text."""
    options = {"calibration": str(text)}
    keys = [
        quantize_recipe(llama, spec_of("gptq", **options, **more)).key for more in ({}, {"memory": "1KB"})
    ]
    assert keys[0] == keys[1]
    specs = [VerifySpec(text=str(text)), VerifySpec(text=str(text), memory="1KB")]
    assert evaluate_recipe(llama, specs[0]).key == evaluate_recipe(llama, specs[1]).key
    assert with_preset({"method": "gguf", "memory": "1GB"})["solver"] == "search"
    assert with_preset({"method": "gguf", "memory": "1GB", "samples": 3})["solver"] == "importance"


def test_where_large_temporary_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert scratch_directory() == tmp_path
    monkeypatch.delenv("TMPDIR")
    large = Path("/var/tmp")  # noqa: S108
    assert scratch_directory() == large or not large.is_dir()
