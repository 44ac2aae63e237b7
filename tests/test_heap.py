"""Freed memory is given back, also from between what is in use."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_CODE = """
import torch
from qexport.heap import trim
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
tensors = [torch.ones(16_000) for _ in range(3000)]
full = resident()
tensors = tensors[-1:]
freed = resident()
trim()
print(full - freed, freed - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has malloc_trim")
def test_free_pages_below_what_is_in_use_go_back() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    by_itself, trimmed = map(int, done.stdout.split())
    assert by_itself < 10e6  # of 192 MB
    assert trimmed > 150e6
