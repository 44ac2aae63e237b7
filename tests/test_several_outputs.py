"""`qexport quantize` with several methods, solvers or widths: a directory each, one calibration for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qexport
from qexport.checkpoint.hashing import file_hash
from qexport.errors import StorageError
from qexport.events import Event, Noted, Started
from qexport.quantization import data_free, together
from qexport.quantization.quantize import quantize_several
from qexport.specs import spec_of
from tests.conftest import RunCli

TEXT = ("--samples", "16", "--sequence-length", "32")


def test_a_directory_for_each(llama: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = cli(
        "quantize", llama, "-o", out, "--method", "gptq,awq", "--bits", "4,3", "--group-size", "32",
        "--calibration", text, *TEXT, "--json",
    )  # fmt: skip
    assert code == 0, stderr
    names = ["gptq-4bit-g32", "gptq-3bit-g32", "awq-4bit-g32"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert "awq is not made with 3 bits" in stderr  # what a format has not is left out, and told
    outputs = json.loads(stdout)["outputs"]
    assert [Path(output["path"]).name for output in outputs] == names
    assert [output["bits"] for output in outputs] == [4, 3, 4]
    for name in names:
        assert (out / name / "README.md").is_file()
        assert json.loads((out / name / "qexport.json").read_text())["figures"]["calibration"]


def test_the_same_bytes_as_one_by_one(llama: Path, text: Path, tmp_path: Path) -> None:
    """Whatever goes beside it: methods, widths, solvers and efforts, and one without data."""
    options = {"calibration": str(text), "samples": 16, "sequence_length": 32}
    specs = {
        "a": spec_of("gptq", bits=4, **options),
        "b": spec_of("gptq", bits=3, effort="fast", **options),
        "c": spec_of("awq", **options),
        "d": spec_of("awq", solver="awq+gptq", **options),
        "e": spec_of("rtn", bits=2),
    }
    together_ = quantize_several(llama, {tmp_path / "all" / name: spec for name, spec in specs.items()})
    assert [result.path.name for result in together_] == list(specs)
    for name, spec in specs.items():
        qexport.quantize(llama, tmp_path / name, spec)
        found, expected = (base / name / "model.safetensors" for base in (tmp_path / "all", tmp_path))
        assert file_hash(found) == file_hash(expected), name
        recipes = [json.loads((p.parent / "qexport.json").read_text())["recipe"] for p in (found, expected)]
        assert recipes[0] == recipes[1]


def test_one_pass_for_what_shares_a_text(llama: Path, text: Path, tmp_path: Path) -> None:
    """Another text is another calibration; without data there is none."""
    seen: list[Event] = []
    options = {"calibration": str(text), "samples": 8, "sequence_length": 32}
    specs = [
        spec_of("gptq", bits=4, **options),
        spec_of("rtn"),
        spec_of("gptq", bits=3, **options),
        spec_of("gptq", bits=2, **{**options, "samples": 4}),
    ]
    quantize_several(llama, {tmp_path / str(i): spec for i, spec in enumerate(specs)}, on_event=seen.append)
    passes = [event.stage for event in seen if isinstance(event, Started) and event.unit == "layers"]
    assert passes == ["gptq 4 bits, gptq 3 bits", "rtn 4 bits", "gptq 2 bits"]


@pytest.mark.parametrize("bits", ["3.5,4", "4,3.5"])
def test_an_average_beside_a_width(bits: str, llama: Path, text: Path, tmp_path: Path, cli: RunCli) -> None:
    """An average is measured and planned, whatever goes with it."""
    options = ("--method", "gptq", "--group-size", "32", "--calibration", text, *TEXT)
    code, _, stderr = cli("quantize", llama, "-o", tmp_path / "out", *options, "--bits", bits)
    assert code == 0, stderr
    planned = [path.parent.name for path in (tmp_path / "out").glob("*/bits_plan.json")]
    assert planned == ["gptq-3.5bit-g32"]
    assert len({file_hash(file) for file in (tmp_path / "out").glob("*/*.safetensors")}) == 2


def test_all_of_a_pass_or_none(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that fails midway leaves no output, and nothing hidden beside it either."""
    options = {"calibration": str(text), "samples": 8, "sequence_length": 32}
    specs = {tmp_path / "out" / str(bits): spec_of("gptq", bits=bits, **options) for bits in (4, 3)}
    real = data_free.quantize_alone
    calls: list[int] = []

    def full(*args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise StorageError("the disk is full")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(together, "quantize_alone", full)
    with pytest.raises(StorageError, match="full"):
        quantize_several(llama, specs)
    assert not list(tmp_path.iterdir())


def test_an_interruption_tells_what_stands(llama: Path, tmp_path: Path) -> None:
    specs = {tmp_path / str(bits): spec_of("rtn", bits=bits) for bits in (8, 4, 3)}
    notes: list[str] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, Noted):
            notes.append(event.text)
        elif isinstance(event, Started) and event.stage == "rtn 3 bits":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_several(llama, specs, on_event=interrupt)
    assert notes[-1] == f"2 of 3 outputs stand: {tmp_path / '8'}, {tmp_path / '4'}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "8"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "gptq,nope"), "'nope' is not one of"),
        (("--method", "gptq", "--solver", "gptq,nope"), "'nope' is not one of"),
        (("--method", "gptq", "--bits", "4,9"), "'9' is not one of"),
        (("--method", "gptq", "--bits", "4,"), "'' is not one of"),
        (("--method", "gptq,awq", "--plan-only"), "--plan-only with several outputs"),
        (("--method", "gptq,awq", "--quant-type", "nf4"), "no nf4"),
        (("--method", "rtn,bnb", "--damp", "0.1"), "--damp is no option of rtn, bnb"),
        (("--method", "rtn,hqq", "--device", "cpu"), "--device is no option of rtn, hqq"),
        # what only a later one runs into
        (
            ("--method", "rtn,awq", "--bits", "3.5", "--group-size", "32"),
            "awq does not take layers of differing grids",
        ),
        (("--method", "rtn,eetq", "--target-size", "300KB"), "eetq has one grid"),
        (("--method", "rtn,hqq", "--target-size", "1KB"), "the smallest that"),
        (("--method", "rtn,awq", "--calibration", "nowhere.txt"), "nowhere.txt"),
        (("--method", "rtn,awq", "--device", "cuda:99"), "--device cuda:99"),
    ],
)
def test_what_cannot_be(
    options: tuple[str, ...], told: str, llama: Path, tmp_path: Path, cli: RunCli
) -> None:
    code, stdout, stderr = cli("quantize", llama, "-o", tmp_path / "out", *options)
    assert (code, stdout) == (2, "")
    assert told in " ".join(stderr.split())
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_a_device_goes_to_those_that_run_a_model(
    llama: Path, text: Path, tmp_path: Path, cli: RunCli
) -> None:
    out = tmp_path / "out"
    options = ("--method", "gptq,hqq", "--device", "cpu", "--effort", "fast", "--calibration", text, *TEXT)
    code, _, stderr = cli("quantize", llama, "-o", out, *options)
    assert code == 0, stderr
    assert sorted(path.name for path in out.iterdir()) == ["gptq-4bit-fast", "hqq-4bit"]


@pytest.mark.parametrize(
    "options", [("--method", "hqq", "--effort", "best"), ("--method", "mlx", "--memory", "1KB")]
)
def test_only_options_are_offered(options: tuple[str, ...], tmp_path: Path, cli: RunCli) -> None:
    code, _, stderr = cli("quantize", tmp_path, "-o", tmp_path / "out", *options)
    assert code == 2
    offered = stderr.split("it takes ")[1]
    assert "--solver" in offered
    assert "--average-bits" not in offered


def test_what_stands_is_not_replaced(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    out = tmp_path / "out"
    assert cli("quantize", llama, "-o", out, "--method", "rtn", "--bits", "4,3")[0] == 0
    hashes = {name: file_hash(out / name / "model.safetensors") for name in ("rtn-4bit", "rtn-3bit")}
    code, _, stderr = cli("quantize", llama, "-o", out, "--method", "rtn", "--bits", "2,3")
    assert code == 2
    assert "rtn-3bit" in stderr
    assert sorted(path.name for path in out.iterdir()) == sorted(hashes)
    assert {name: file_hash(out / name / "model.safetensors") for name in hashes} == hashes
    assert cli("quantize", llama, "-o", out, "--method", "rtn", "--bits", "2,3", "--overwrite")[0] == 0
