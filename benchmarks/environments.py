"""Environments of the peers that cannot live beside qexport, each made once and kept.

    python -m benchmarks.environments [PEER ...]

makes those of the named peers, by default all, and prints each interpreter. They lie in $QEXPORT_RUNTIMES,
or ~/.cache/qexport (about 1.5 GB each); GPTQModel's is the one that the tests use too. hqq and bitsandbytes
run in qexport's own environment (pip install -e '.[dev]').
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# torch goes first and pinned: left to the resolver it comes with gigabytes of CUDA packages. PyTorch's own
# index has smaller builds for the CPU; where it cannot be reached, the usual one serves.
TORCH = ("torch==2.13.0",)
_CPU_INDEX = ("--index-url", "https://download.pytorch.org/whl/cpu")
_TRANSFORMERS = ("transformers==5.23.0", "accelerate==1.15.0", "datasets", "numpy", "setuptools", "wheel")
_MARKER = ".made"  # written last: a directory without it was left half made


@dataclass(frozen=True)
class Environment:
    """Where a peer lives: the directory's name, and pip's arguments step by step, after torch's."""

    directory: str
    steps: tuple[tuple[str, ...], ...]


ENVIRONMENTS = {
    "gptqmodel": Environment(
        "gptqmodel-7.7",
        (
            (*_TRANSFORMERS, "optimum==2.3.0", "ninja", "pillow", "requests"),
            # without its dependencies, as a plain install replaces torch
            ("--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"),
            (
                *("--no-deps", "tokenicer", "logbar", "device-smi", "defuser", "pypcre", "threadpoolctl"),
                *("dill", "torchao==0.18.0"),
            ),
        ),
    ),
    "autoawq": Environment(
        "bench-autoawq-0.2.9",
        (
            (*_TRANSFORMERS, "zstandard"),
            # a source distribution that imports torch while it is built; it wants an older transformers
            ("--no-deps", "--no-build-isolation", "autoawq==0.2.9"),
        ),
    ),
    "autoround": Environment(
        "bench-autoround-0.16.1",
        (_TRANSFORMERS, (*TORCH, "transformers==5.23.0", "auto-round==0.16.1")),
    ),
}


def python_of(peer: str) -> Path:
    """The interpreter of `peer`'s environment, made now where it is not there; for others our own.

    Raises RuntimeError with pip's last words where something cannot be installed.
    """
    if peer not in ENVIRONMENTS:
        return Path(sys.executable)
    wanted = ENVIRONMENTS[peer]
    home = Path(os.environ.get("QEXPORT_RUNTIMES") or Path.home() / ".cache" / "qexport")
    home.mkdir(parents=True, exist_ok=True)
    directory = home / wanted.directory
    python = directory / "bin" / "python"
    with _locked(home / f"{wanted.directory}.lock"):
        if not (directory / _MARKER).is_file() or not python.exists():
            print(f"making {directory}", file=sys.stderr)
            shutil.rmtree(directory, ignore_errors=True)
            venv.create(directory, with_pip=True)
            if _install(python, [*_CPU_INDEX, *TORCH]):
                _require(python, TORCH)
            for step in wanted.steps:
                _require(python, step)
            (directory / _MARKER).touch()
    return python


def _require(python: Path, arguments: Sequence[str]) -> None:
    if told := _install(python, arguments):
        raise RuntimeError(f"pip install {' '.join(arguments)} failed:\n{told}")


def _install(python: Path, arguments: Sequence[str]) -> str:
    """What pip complained of at last, nothing where it went well."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    plain = {**os.environ, "BUILD_CUDA_EXT": "0", "PYTHONPATH": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=plain)
    return (ran.stderr[-2000:] or "it said nothing") if ran.returncode else ""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time makes an environment."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="Environments of the peers.")
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(ENVIRONMENTS)}")
    for peer in parser.parse_args().peers or ENVIRONMENTS:
        if peer not in ENVIRONMENTS:
            parser.error(f"no peer {peer!r}: one of {', '.join(ENVIRONMENTS)}")
        print(python_of(peer))


if __name__ == "__main__":
    main()
