"""The real runtimes for the tests: our own environment, and one made once for GPTQModel."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from qexport.verification.runtimes.check import read_logits
from qexport.verification.runtimes.drivers.driver import Job, Outcome
from qexport.verification.runtimes.process import run_jobs

# What goes in, step by step. torch comes from PyTorch's own index where that can be reached, as its builds
# for the CPU are smaller; GPTQModel without its dependencies, as a plain install replaces torch.
_TORCH = ["torch==2.13.0"]
_CPU_INDEX = ["--index-url", "https://download.pytorch.org/whl/cpu"]
_STEPS: tuple[list[str], ...] = (
    [
        *("transformers==5.23.0", "accelerate==1.15.0", "optimum==2.3.0", "setuptools", "wheel", "ninja"),
        *("numpy", "pillow", "requests", "datasets"),
    ],
    ["--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"],
    [
        *("--no-deps", "tokenicer", "logbar", "device-smi", "defuser", "pypcre", "threadpoolctl", "dill"),
        "torchao==0.18.0",
    ],
)
_MARKER = ".made"  # written last: a directory without it was left half made


def gptqmodel_python() -> Path:
    """The interpreter of an environment with GPTQModel 7.7, made on first use and kept.

    It lies in $QEXPORT_RUNTIMES, or ~/.cache/qexport; $QEXPORT_GPTQMODEL_PYTHON names another one. The test
    is skipped where pip reaches no registry.
    """
    if given := os.environ.get("QEXPORT_GPTQMODEL_PYTHON"):
        return Path(given)
    home = Path(os.environ.get("QEXPORT_RUNTIMES") or Path.home() / ".cache" / "qexport")
    home.mkdir(parents=True, exist_ok=True)
    directory = home / "gptqmodel-7.7"
    python = directory / "bin" / "python"
    with _locked(home / "gptqmodel-7.7.lock"):
        if not (directory / _MARKER).is_file() or not python.exists():
            shutil.rmtree(directory, ignore_errors=True)
            venv.create(directory, with_pip=True)
            if not _install(python, _TORCH, _CPU_INDEX):
                _install(python, _TORCH, required=True)
            for step in _STEPS:
                _install(python, step, required=True)
            (directory / _MARKER).touch()
    # the kernels that the first load compiles are kept beside it
    for variable in ("TORCH_EXTENSIONS_DIR", "GPTQMODEL_TORCH_EXTENSIONS_DIR"):
        os.environ.setdefault(variable, str(directory / "kernels"))
    return python


def _install(
    python: Path, packages: Sequence[str], options: Sequence[str] = (), *, required: bool = False
) -> bool:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    ran = subprocess.run(
        [*command, *options, *packages],
        capture_output=True,
        text=True,
        env={**os.environ, "BUILD_CUDA_EXT": "0", "PYTHONPATH": ""},
    )
    if ran.returncode and required:
        offline = ("Temporary failure in name resolution", "No matching distribution", "NewConnectionError")
        if any(sign in ran.stderr for sign in offline):
            pytest.skip(f"needs GPTQModel, and pip reaches no registry: {ran.stderr.splitlines()[-1]}")
        raise AssertionError(f"{' '.join(packages)} cannot be installed:\n{ran.stderr[-2000:]}")
    return ran.returncode == 0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: pytest-xdist runs tests side by side."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def python_of(runtime: str) -> Path | None:
    """The interpreter that has `runtime`; None is our own. The test is skipped where a package is absent."""
    if runtime == "gptqmodel":
        return gptqmodel_python()
    needs = {
        "transformers": ("bitsandbytes", "compressed_tensors"),
        "hqq": ("hqq",),
        "mlx": ("mlx", "mlx_lm"),
        "llamacpp": ("cyllama", "gguf", "numba"),
    }
    for package in needs[runtime]:
        pytest.importorskip(package, reason=f"needs {package}")
    return None


def run_in_runtime(
    runtime: str,
    models: Sequence[Path],
    ids: torch.Tensor,
    work: Path,
    *,
    trust_remote_code: bool = False,
) -> list[tuple[Outcome, torch.Tensor | None]]:
    """What `runtime` reports of each model, and its logits; one process for all of them."""
    work.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = [
        {
            "model": str(model),
            "ids": ids.tolist(),
            "logits": str(work / f"{number}.npy"),
            "trust_remote_code": trust_remote_code,
        }
        for number, model in enumerate(models)
    ]
    outcomes = run_jobs(runtime, jobs, python=python_of(runtime))
    return [(outcome, read_logits(job)) for outcome, job in zip(outcomes, jobs, strict=True)]
