"""Tiny real models, built offline; other people's models where they lie beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qexport.cli.main import run
from tests.tiny import tiny_model

os.environ["COLUMNS"] = "80"  # click wraps its help to the terminal

SHARED = Path(__file__).resolve().parents[2] / "shared"

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """The models are tiny and the tests run side by side: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with tied embeddings, fp16, with tokenizer and chat template. Not to be changed."""
    return tiny_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def uncached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random Llama with weights of some spread, of which the user's cache knows nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny_model(tmp_path / "model", initializer_range=0.08)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of several documents for calibration and scoring."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["a", "small", "model", "reads", "many", "words", "and", "learns", "to", "write", "them", "again"]
    generator = torch.Generator().manual_seed(5)
    documents = []
    for _ in range(40):
        picks = torch.randint(0, len(words), (60,), generator=generator).tolist()
        documents.append(" ".join(words[pick] for pick in picks))
    path.write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> RunCli:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def shared(*parts: str) -> Path:
    """A file or model of ../shared; the test is skipped, saying so, where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the project")
    return path
