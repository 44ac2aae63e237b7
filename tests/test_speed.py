"""Speed: the tokens that were timed are those that the weights generate. No time is asserted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.errors import SpecError
from qexport.events import Event, Noted
from qexport.formats.opening import open_checkpoint
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.whole import load_whole
from qexport.specs import RtnSpec, spec_of
from qexport.verification import speed
from qexport.verification.runtimes.drivers import speed_driver
from qexport.verification.speed import Speed, physical_cores, speed_runtime, tokens_per_second
from tests.runtimes import python_of
from tests.tiny import tiny_model


def require_greedy(found: Speed | None, model: Path, *, allowed: float = 0.0) -> None:
    """Every token is the most likely one after those before it, to within `allowed` of the logits."""
    assert found is not None
    whole = load_whole(build_skeleton(model), open_checkpoint(model))
    with torch.no_grad():
        logits = whole(torch.tensor([[*found.prompt, *found.generated]])).logits[0]
    logits = logits[len(found.prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(found.generated)[:, None])[:, 0]
    assert bool((logits.max(dim=-1).values - chosen <= allowed).all())
    assert len(set(found.generated)) > 1
    assert len(set(found.prompt)) > 1


@pytest.mark.slow
def test_transformers(tmp_path: Path) -> None:
    python_of("transformers")
    model = tiny_model(tmp_path / "model", dtype=torch.float32)
    found = tokens_per_second(model, tokens=12, threads=1)
    require_greedy(found, model)
    assert found is not None
    assert (found.runtime, found.dtype, found.device) == ("transformers", "float32", "cpu")
    assert (found.tokens, found.threads, len(found.prompt)) == (12, 1, 16)
    assert found.tokens_per_second > 0
    assert found.versions["torch"] == torch.__version__


@pytest.mark.slow
def test_llamacpp(tmp_path: Path) -> None:
    python_of("llamacpp")
    model = tiny_model(tmp_path / "model", dtype=torch.float32)
    result = qexport.quantize(model, tmp_path / "gguf", spec_of("gguf", type="f32"))
    file = result.path / result.files[0].file
    assert speed_runtime(file) == speed_runtime(result.path) == "llamacpp"
    found = tokens_per_second(file, "llamacpp", tokens=500, threads=1)
    require_greedy(found, model, allowed=2e-2)  # its key-value cache has 16 bits
    assert found is not None
    assert found.runtime == "llamacpp"
    assert found.tokens == 128 - 16, "as many as the model's context holds"
    assert found.versions["cyllama"]


@pytest.mark.slow
def test_mlx(llama: Path, tmp_path: Path) -> None:
    python_of("mlx")
    qexport.quantize(llama, tmp_path / "mlx", RtnSpec(format="mlx"))
    found = tokens_per_second(tmp_path / "mlx", tokens=8)
    require_greedy(found, tmp_path / "mlx", allowed=5e-2)  # it computes in 16 bits
    assert found is not None
    assert found.runtime == "mlx"


@pytest.mark.slow
def test_a_runtime_that_is_not_there_or_fails_is_told(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    bare = tmp_path / "bin" / "python"  # this Python, without its packages
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    assert tokens_per_second(llama, "transformers", python=bare, on_event=events.append) is None
    (line,) = [event.text for event in events if isinstance(event, Noted)]
    assert line.startswith("no speed is measured: transformers is not installed (No module named ")

    def told(command: str) -> str:
        bare.write_text(f"#!/bin/sh\n{command}\n")
        events.clear()
        assert tokens_per_second(llama, "transformers", python=bare, on_event=events.append) is None
        (line,) = [event.text for event in events if isinstance(event, Noted)]
        return line

    assert "does not run" in told("kill -9 $$")
    assert "it ended with exit code 3" in told("exit 3")


def test_which_runtime_and_what_has_none(llama: Path, tmp_path: Path) -> None:
    qexport.quantize(llama, tmp_path / "hqq", RtnSpec(format="hqq"))
    assert speed_runtime(llama) == "transformers"
    assert speed_runtime(tmp_path / "hqq") is None
    events: list[Event] = []
    assert tokens_per_second(tmp_path / "hqq", on_event=events.append) is None
    (noted,) = events
    assert isinstance(noted, Noted)
    assert "(hqq): no runtime that is timed here reads it" in noted.text
    with pytest.raises(SpecError, match=r"is not measured in 'llamacpp'; one of transformers, mlx"):
        tokens_per_second(llama, "llamacpp")
    with pytest.raises(SpecError, match=r"--runtime-python .* does not exist"):
        tokens_per_second(llama, python=tmp_path / "none")


def test_cores_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four hyperthreads of two cores, of which three may be used; then no table at all."""
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(speed, "_CPUS", tmp_path)
    for allowed, cores in (({0, 1, 2, 3}, 2), ({0, 2, 3}, 2), ({1, 3}, 1), ({7, 8}, 2)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, allowed=allowed: allowed, raising=False)
        assert physical_cores() == cores


def test_only_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median run: a clock of our own ticks where the engine works."""
    clock = [0.0]

    class Engine:
        vocabulary, context, dtype, device = 50, 0, "none", "none"

        def __init__(self, job: Any, room: int) -> None:
            self.runs = 0

        def start(self, prompt: list[int]) -> int:
            self.runs += 1
            clock[0] += 100
            return 1

        def step(self, token: int) -> int:
            clock[0] += self.runs
            return token + 1

    monkeypatch.setitem(speed_driver.ENGINES, "none", Engine)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    job: speed_driver.SpeedJob = {
        "model": "",
        "prompt": 4,
        "tokens": 10,
        "runs": 3,
        "threads": 1,
        "trust_remote_code": False,
    }
    outcome = speed_driver.measure("none", job)
    assert outcome["seconds_per_token"] == [2, 3, 4]  # the first run warmed up
    assert outcome["generated"] == list(range(1, 11))
    assert len(outcome["prompt"]) == 4
    monkeypatch.setattr(speed_driver, "_SLOW_S", 9.5)  # for three runs, at one second a token
    assert speed_driver.measure("none", job)["generated"] == [1, 2, 3]
