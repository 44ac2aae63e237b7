"""The runtimes that users have compute what our decoded weights compute, and what they lack is told.

Runtimes take many seconds to start: one process loads all models of a test.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.errors import (
    GateError,
    MachineError,
    MissingDependencyError,
    QexportError,
    SpecError,
    UnsafeFileError,
    VerificationError,
)
from qexport.events import Advanced, Event
from qexport.modeling.skeleton import build_skeleton
from qexport.results import RuntimeCheck
from qexport.specs import RtnSpec
from qexport.verification.runtimes import check as checking
from qexport.verification.runtimes.check import (
    check_runtime,
    compare,
    our_logits,
    require_agreement,
    stored_layers,
    token_ids,
    tolerance_of,
)
from qexport.verification.runtimes.drivers.driver import RUNTIMES, Job, Outcome
from qexport.verification.runtimes.process import run_jobs
from tests.conftest import RunCli
from tests.runtimes import python_of, run_in_runtime
from tests.tiny import edit_json, edit_weights

Q_PROJ = "model.layers.0.self_attn.q_proj"
BLOCK_LINEARS = 7
LINEARS = 2 * BLOCK_LINEARS

Written = tuple[
    str, dict[str, Any], int, float
]  # name, options of rtn, layers with codes, largest difference

# The bounds are a few times what was measured, and the runtime's own: see TOLERANCES.
WRITTEN: dict[str, tuple[Written, ...]] = {
    "transformers": (
        ("nf4", {"format": "bitsandbytes"}, LINEARS, 1e-5),
        ("fp4", {"format": "bitsandbytes", "quant_type": "fp4", "double_quant": False}, LINEARS, 1e-5),
        ("int8", {"format": "bitsandbytes", "bits": 8}, LINEARS, 0.1),
        ("ct4", {"format": "compressed-tensors", "symmetric": True}, LINEARS, 1e-5),
        ("ct8", {"format": "compressed-tensors", "symmetric": True, "bits": 8}, LINEARS, 1e-5),
    ),
    "gptqmodel": (
        ("gptq2", {"bits": 2, "group_size": 16}, LINEARS, 3e-3),
        ("gptq3", {"bits": 3}, LINEARS, 3e-3),
        ("gptq4", {"bits": 4}, LINEARS, 3e-3),
        ("gptq4-rows", {"bits": 4, "group_size": -1}, LINEARS, 4e-2),
        ("gptq8", {"bits": 8}, LINEARS, 3e-3),
        ("gptq_v2", {"format": "gptq_v2", "symmetric": False}, LINEARS, 3e-3),
        ("awq", {"format": "awq"}, LINEARS, 3e-3),
        ("awq32", {"format": "awq", "group_size": 32, "skip": ("*.1.mlp.down_proj",)}, LINEARS - 1, 3e-3),
    ),
    "hqq": (
        ("hqq4", {"format": "hqq"}, LINEARS, 1e-5),
        ("hqq3", {"format": "hqq", "bits": 3}, LINEARS, 1e-5),
        ("hqq8", {"format": "hqq", "bits": 8, "skip": ("*.q_proj",)}, LINEARS - 2, 1e-5),
    ),
    "mlx": (
        ("mlx4", {"format": "mlx"}, LINEARS, 1e-5),
        ("mlx3", {"format": "mlx", "bits": 3, "group_size": 32}, LINEARS, 1e-5),
        ("mlx-embedding", {"format": "mlx", "bits": 8, "embeddings": True}, LINEARS + 1, 1e-5),
    ),
}


def damaged(source: Path, out: Path, **changes: torch.Tensor | None) -> Path:
    shutil.copytree(source, out)
    edit_weights(out, **changes)
    return out


class Flawed:
    """Models that a runtime opens though they are broken, and what is to be told of them.

    hqq's loader passes over what it has no place for, transformers over most, mlx-lm tells of one kind only.
    """

    def __init__(self, llama: Path, home: Path) -> None:
        self._llama, self._home = llama, home
        self._weight = qexport.open_checkpoint(llama).read(f"{Q_PROJ}.weight")

    def transformers(self) -> list[Path]:
        """One tensor taken out, put in, renamed, cut; of a plain model and of a quantized one."""
        nf4 = self._home / "nf4-part"
        qexport.quantize(self._llama, nf4, RtnSpec(format="bitsandbytes", skip=("*.1.mlp.*",)))
        weight = self._weight
        plain: dict[str, dict[str, torch.Tensor | None]] = {
            "gone": {f"{Q_PROJ}.weight": None},
            "extra": {f"{Q_PROJ}.extra": weight},
            "renamed": {f"{Q_PROJ}.weight": None, "model.layers.0.attention.wq.weight": weight},
            "cut": {f"{Q_PROJ}.weight": weight[:64].clone()},
        }
        models = [damaged(self._llama, self._home / name, **changes) for name, changes in plain.items()]
        models.append(damaged(nf4, self._home / "nf4-gone", **{f"{Q_PROJ}.weight.absmax": None}))
        forgot = shutil.copytree(nf4, self._home / "nf4-forgot")
        config = json.loads((forgot / "config.json").read_text())["quantization_config"]
        edit_json(
            forgot / "config.json", quantization_config={**config, "llm_int8_skip_modules": ["lm_head"]}
        )
        evil = shutil.copytree(self._llama, self._home / "evil")
        edit_json(evil / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil")
        (evil / "evil.py").write_text(f"open({str(self._home / 'ran')!r}, 'w')\n")
        return [*models, forgot, evil]

    def told_by_transformers(self, found: Mapping[str, Outcome]) -> None:
        q_proj, renamed = f"{Q_PROJ}.weight", "model.layers.0.attention.wq.weight"
        assert (found["gone"]["missing"], found["gone"]["unexpected"]) == ([q_proj], [])
        assert (found["extra"]["missing"], found["extra"]["unexpected"]) == ([], [f"{Q_PROJ}.extra"])
        assert (found["renamed"]["missing"], found["renamed"]["unexpected"]) == ([q_proj], [renamed])
        assert found["cut"]["mismatched"] == [q_proj]
        assert found["nf4-gone"]["error"] == f"ValueError: its parts do not make {q_proj}"
        # transformers makes them 4-bit layers all the same, and fails when it computes
        assert found["nf4-forgot"]["layers"] == {"Linear4bit": LINEARS}
        assert stored_layers(qexport.open_checkpoint(self._home / "nf4-forgot")) == LINEARS - 3
        assert "error" in found["evil"]
        assert not (self._home / "ran").exists(), "code from a checkpoint is not run"

    def gptqmodel(self) -> list[Path]:
        """A head with codes and a layer without them: transformers replaces neither as the file has it."""
        whole = self._home / "gptq4"
        bare = {f"{Q_PROJ}.{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")}
        return [
            damaged(whole, self._home / "gone", **{f"{Q_PROJ}.scales": None}),
            damaged(whole, self._home / "plain", **bare, **{f"{Q_PROJ}.weight": self._weight}),
        ]

    def told_by_gptqmodel(self, found: Mapping[str, Outcome]) -> None:
        assert (found["gone"]["missing"], found["gone"]["unexpected"]) == ([f"{Q_PROJ}.scales"], [])
        parts = ("qweight", "qzeros", "scales", "g_idx")
        assert found["plain"]["missing"] == sorted(f"{Q_PROJ}.{part}" for part in parts)
        assert found["plain"]["unexpected"] == [f"{Q_PROJ}.weight"]

    def hqq(self) -> list[Path]:
        def changed(name: str, change: Callable[[dict[str, Any]], None]) -> Path:
            out = shutil.copytree(self._home / "hqq4", self._home / name)
            held = torch.load(out / "qmodel.pt", weights_only=True)
            change(held)
            torch.save(held, out / "qmodel.pt")
            return out

        return [
            changed("gone", lambda held: held.pop(Q_PROJ)),
            changed("extra", lambda held: held.update({"model.extra": {"weight": torch.ones(2)}})),
            changed("head", lambda held: held.pop("lm_head")),
            changed("cut", lambda held: held[Q_PROJ].update(shape=torch.Size([64, 128]))),
            changed("eval", lambda held: held[Q_PROJ].update(encoded_state_dict=torch.tensor(1))),
        ]

    def told_by_hqq(self, found: Mapping[str, Outcome]) -> None:
        assert found["gone"]["missing"] == [f"{Q_PROJ}.weight"]
        assert found["extra"]["unexpected"] == ["model.extra.weight"]
        assert found["head"]["missing"] == ["lm_head.weight"]
        assert found["cut"]["mismatched"] == [f"{Q_PROJ}.W_q"]
        assert "would eval()" in found["eval"]["error"]

    def mlx(self) -> list[Path]:
        extra, whole = torch.ones(2, dtype=torch.float16), self._home / "mlx4"
        both = {"model.norm.weight": None, "model.extra": extra}
        return [
            damaged(whole, self._home / "both", **both),
            damaged(whole, self._home / "bent", **{"model.norm.weight": extra}),
        ]

    def told_by_mlx(self, found: Mapping[str, Outcome]) -> None:
        assert (found["both"]["missing"], found["both"]["unexpected"]) == (
            ["model.norm.weight"],
            ["model.extra"],
        )
        assert found["bent"]["mismatched"] == ["model.norm.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", WRITTEN)
def test_what_a_runtime_computes_and_what_it_lets_pass(runtime: str, llama: Path, tmp_path: Path) -> None:
    """Its logits are those of the decoded weights, and what it lacks is told: see WRITTEN and Flawed."""
    python_of(runtime)
    models = [llama] if runtime in ("transformers", "mlx") else []
    for name, options, _, _ in WRITTEN[runtime]:
        models.append(tmp_path / name)
        qexport.quantize(llama, models[-1], RtnSpec(**options))
    flawed = Flawed(llama, tmp_path)
    broken: list[Path] = getattr(flawed, runtime)()
    ids = token_ids(build_skeleton(llama))
    runs = run_in_runtime(runtime, [*models, *broken], ids, tmp_path / "logits")
    expected = {name: (layers, bound) for name, _, layers, bound in WRITTEN[runtime]}
    for model, (outcome, theirs) in zip(models, runs[: len(models)], strict=True):
        layers, bound = expected.get(model.name, (0, 1e-5))
        assert "error" not in outcome, (model.name, outcome)
        assert [outcome["missing"], outcome["unexpected"], outcome["mismatched"]] == [[], [], []], model.name
        checkpoint = qexport.open_checkpoint(model)
        assert sum(outcome["layers"].values()) == stored_layers(checkpoint) == layers, model.name
        assert theirs is not None
        difference, _, same_top = compare(theirs, our_logits(build_skeleton(model), checkpoint, ids))
        assert difference < bound < tolerance_of(checkpoint), model.name
        assert same_top > 0.9, model.name
    told = {model.name: outcome for model, (outcome, _) in zip(broken, runs[len(models) :], strict=True)}
    getattr(flawed, f"told_by_{runtime}")(told)


@pytest.mark.slow
def test_the_command(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    """With mlx-lm, which starts soonest; the command knows no difference between runtimes."""
    python_of("mlx")
    out = tmp_path / "mlx4"
    qexport.quantize(llama, out, RtnSpec(format="mlx"))
    code, stdout, stderr = cli("verify", out, "--runtime", "mlx", "--json")
    assert (code, stderr) == (0, "")
    (found,) = json.loads(stdout)["runtimes"]
    assert found["layers"] == {"QuantizedLinear": LINEARS}
    assert found["dtype"] == "float32"
    assert found["difference"] < 1e-4
    edit_weights(out, **{"model.norm.weight": None, "model.extra": torch.ones(2)})
    code, stdout, stderr = cli("verify", out, "--runtime", "mlx")
    assert code == 1
    assert stdout.splitlines()[1].split("\t")[2:5] == [str(LINEARS), "1", "1"]
    assert stderr.splitlines()[-1].startswith(
        "error: mlx left 1 tensor (model.extra) of the file unread and started 1 tensor "
        "(model.norm.weight) with random weights"
    )


def outcome_of(**changes: Any) -> RuntimeCheck:
    """A check that found nothing wrong, but for `changes`."""
    good: dict[str, Any] = {
        "model": "out",
        "runtime": "transformers",
        "versions": {},
        "dtype": "float32",
        "layers": {"Linear4bit": 14},
        "stored_layers": 14,
        "decodes_at_load": False,
        "missing": (),
        "unexpected": (),
        "mismatched": (),
        "problems": (),
        "tokens": 64,
        "difference": 1e-4,
        "largest": 1e-3,
        "same_top": 1.0,
        "tolerance": 1e-3,
    }
    return RuntimeCheck(**{**good, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"missing": ("a", "b")}, VerificationError, r"started 2 tensors \(a, b\) with random weights"),
        (
            {"unexpected": tuple("abcde")},
            VerificationError,
            r"left 5 tensors \(a, b, c and 2 more\) of the f",
        ),
        ({"mismatched": ("a",)}, VerificationError, r"found 1 tensor \(a\) of another shape"),
        ({"layers": {"Linear4bit": 15}}, VerificationError, "made 15 quantized layers of 14"),
        ({"layers": {}}, VerificationError, "made 0 quantized layers of 14"),
        ({"layers": {"Linear": 15}, "decodes_at_load": True}, VerificationError, "made 15 quantized"),
        ({"problems": ("x",), "difference": None}, VerificationError, "failed: x"),
        ({"difference": 0.5}, GateError, "differ by 0.5 of their size"),
        ({"difference": float("inf")}, GateError, "differ by inf"),
        ({"difference": float("nan")}, GateError, "differ by nan"),
    ],
)
def test_what_fails_a_check(changes: dict[str, Any], error: type[QexportError], match: str) -> None:
    require_agreement(outcome_of())
    require_agreement(outcome_of(layers={"Linear": 8}, decodes_at_load=True))
    with pytest.raises(error, match=match) as caught:
        require_agreement(outcome_of(**changes))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_comparison() -> None:
    ours = torch.tensor([[[3.0, 0.0, 4.0]]])
    assert compare(ours.clone(), ours) == (0, 0, 1)
    assert compare(torch.tensor([[[3.0, 0.0, 4.5]]]), ours) == pytest.approx((0.1, 0.5, 1))
    assert compare(torch.tensor([[[5.0, 0.0, 4.0, 99.0]]]), ours)[1:] == (2, 0)  # rows beyond are padding
    assert compare(torch.full((1, 1, 3), torch.nan), ours)[0] == float("inf")


# --- processes that are no runtime ---------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], Path]:
    """An "interpreter" that is a shell script: $1 the driver, $2 the runtime, $3 the jobs, $4 the report."""

    def make(script: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


JOB: Job = {"model": "none", "ids": [[1]], "logits": "none", "trust_remote_code": False}


@pytest.mark.parametrize(
    ("script", "error", "match"),
    [
        ("kill -9 $$", MachineError, r"it was killed \(SIGKILL\), most likely for want of memory"),
        ("kill -11 $$", VerificationError, r"it crashed \(SIGSEGV\)"),
        (
            "echo one >&2; echo last words >&2; exit 3",
            VerificationError,
            "ended with exit code 3: last words",
        ),
        ("exit 0", VerificationError, "ended with exit code 0: it said nothing"),
        ("""printf '{"error": "half a li' > $4; exit 1""", VerificationError, "ended with exit code 1"),
        (f'exec {sys.executable} -S "$@"', MissingDependencyError, "No module named torch.*--runtime-python"),
    ],
)
def test_a_process_that_dies_is_told_in_one_line(
    fake: Callable[[str], Path], llama: Path, script: str, error: type[QexportError], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        check_runtime(llama, "transformers", python=fake(script))
    assert "\n" not in str(caught.value)


def test_jobs_before_a_crash_count(fake: Callable[[str], Path]) -> None:
    python = fake("""echo '{"error": "first", "error_kind": "ValueError"}' > $4; kill -11 $$""")
    assert [outcome["error"] for outcome in run_jobs("transformers", [JOB, JOB, JOB], python=python)] == [
        "first",
        "it crashed (SIGSEGV)",
        "it crashed (SIGSEGV)",
    ]


def test_the_process_does_not_outlive_an_interruption(fake: Callable[[str], Path], tmp_path: Path) -> None:
    python = fake(f"echo $$ > {tmp_path}/pid; echo '{{}}' > $4; exec sleep 60")

    def interrupt(event: Event) -> None:
        if isinstance(event, Advanced):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs("transformers", [JOB, JOB], python=python, on_event=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_process_is_offline_and_not_led_to_our_packages(
    fake: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    run_jobs("transformers", [JOB], python=fake(f"env > {tmp_path}/env"))
    env = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert "PYTHONPATH" not in env
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["PATH"].split(os.pathsep)[0] == str(tmp_path)


def test_its_words_are_shown_for_debugging(
    fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = fake("echo long traceback >&2")
    run_jobs("transformers", [JOB], python=python)
    assert "long traceback" not in capsys.readouterr().err
    monkeypatch.setenv("QEXPORT_DEBUG", "1")
    run_jobs("transformers", [JOB], python=python)
    assert "long traceback" in capsys.readouterr().err


def test_interpreters_that_are_none(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    (tmp_path / "text").write_text("no program")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x7fELF no program")
    garbage.chmod(0o755)
    cases = {
        tmp_path / "none": "does not exist",
        tmp_path: "is a directory",
        tmp_path / "text": "may not be executed",
        garbage: "does not start",
    }
    for python, told in cases.items():
        code, stdout, stderr = cli("verify", llama, "--runtime", "transformers", "--runtime-python", python)
        assert (code, stdout) == (2, ""), python
        assert stderr.startswith("error: ")
        assert told in stderr
        assert stderr.count("\n") == 1


def test_the_drivers_import_nothing_of_qexport() -> None:
    """They run where qexport is not installed."""
    import ast

    for file in (Path(checking.__file__).parent / "drivers").glob("*.py"):
        for node in ast.parse(file.read_text()).body:  # what stands under TYPE_CHECKING is not run
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                )
                assert not any(name.startswith("qexport") for name in names), file


def test_every_table_has_the_runtimes_that_there_are() -> None:
    assert {name for names in checking.READERS.values() for name in names} == set(RUNTIMES)
    assert set(checking.TOLERANCES) == set(checking.READERS)


def test_a_runtime_that_reads_another_format(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    qexport.quantize(llama, tmp_path / "gptq", RtnSpec())
    code, _, stderr = cli("verify", tmp_path / "gptq", "--runtime", "hqq")
    assert code == 2
    assert stderr.endswith("(gptq); --runtime gptqmodel\n")
    with pytest.raises(SpecError, match=r"\(16-bit\); --runtime transformers or mlx"):
        check_runtime(llama, "gptqmodel")
    with pytest.raises(SpecError, match="no runtime 'vllm'"):
        check_runtime(llama, "vllm")


def test_wrong_options(llama: Path, cli: RunCli) -> None:
    wrong: Mapping[Sequence[str], str] = {
        (): "nothing to verify against; --reference MODEL, --runtime RUNTIME, or both of them",
        (
            "--runtime",
            "transformers",
            "--max-loss",
            "8%",
        ): "--max-loss measures a loss; --reference beside it",
        ("--reference", str(llama), "--runtime-python", sys.executable): "--runtime-python without --runtime",
    }
    for options, told in wrong.items():
        code, stdout, stderr = cli("verify", llama, *options)
        assert (code, stdout, stderr) == (2, "", f"error: {told}\n")


def test_hqq_gets_no_pickle_but_our_own(llama: Path, tmp_path: Path) -> None:
    """Its loader evaluates the names of dtypes in the file."""
    qexport.quantize(llama, tmp_path / "hqq", RtnSpec(format="hqq"))
    with (tmp_path / "hqq" / "qmodel.pt").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        UnsafeFileError, match=r"qmodel.pt changed since qexport wrote it.*--trust-remote-code"
    ):
        check_runtime(tmp_path / "hqq", "hqq")
    (tmp_path / "hqq" / "qexport.json").unlink()
    with pytest.raises(UnsafeFileError, match=r"qmodel.pt was not written by qexport"):
        check_runtime(tmp_path / "hqq", "hqq")
