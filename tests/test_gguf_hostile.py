"""GGUF on bad input: one line that says what to do, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qexport
from qexport.formats.gguf.rows import BY_TYPE
from qexport.quantization.gguf import stream as gguf_stream
from qexport.quantization.imatrix import make_imatrix
from qexport.specs import CalibrationSpec, spec_of
from tests.conftest import SHARED, RunCli, shared
from tests.test_staging import INTERRUPTED, START
from tests.tiny import edit_json, edit_weights, tiny_adapter, tiny_model
from tests.zoo import ROWLESS, ZOO

pytest.importorskip("gguf")
pytest.importorskip("numba")

Refused = Callable[..., str]


@pytest.fixture
def refused(cli: RunCli, tmp_path: Path) -> Refused:
    """Runs a command that must refuse; gives the line. Nothing may have come into being."""

    def call(*arguments: str | Path, code: int = 2) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        found, shown, err = cli(*arguments)
        assert (found, shown) == (code, ""), (found, shown, err)
        assert "Traceback" not in err
        assert "defect" not in err
        *notes, line = err.splitlines()
        assert line.startswith("error: "), err
        assert all(note.startswith("note: ") for note in notes), err
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert not [path for path in Path.cwd().iterdir() if path.name.startswith(".out")]
        return line

    return call


@pytest.fixture
def gguf(refused: Refused, tmp_path: Path) -> Refused:
    """The same for `quantize MODEL --method gguf`."""

    def call(model: Path, *options: str | Path, code: int = 2) -> str:
        return refused("quantize", model, "-o", tmp_path / "out", "--method", "gguf", *options, code=code)

    return call


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows hold super-blocks."""
    return tiny_model(tmp_path_factory.mktemp("wide") / "wide", hidden_size=256, num_hidden_layers=1)


@pytest.fixture(scope="module")
def file(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a Q8_0 file."""
    out = tmp_path_factory.mktemp("file") / "out"
    return out / qexport.quantize(llama, out, spec_of("gguf", type="q8_0")).files[0].file


@pytest.fixture(scope="module")
def matrix(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An importance matrix of the tiny Llama, in the older form too."""
    out = tmp_path_factory.mktemp("matrix") / "m.gguf"
    spec = CalibrationSpec(calibration=(str(text),), samples=4, sequence_length=32)
    make_imatrix(llama, out, spec)
    make_imatrix(llama, out.with_suffix(".dat"), spec)
    return out


# --- options -----------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, list[str]]] = [
    ("--type nonsense", ["no GGUF type or mix 'nonsense'", "q4_k_m", "iq2_xxs"]),
    ("--type q4km", ["did you mean q4_k_m?"]),
    ("--type q8_0,q8", ["no GGUF type or mix 'q8'"]),
    ("--type q8_0,Q8_0", ["--type q8_0,Q8_0 names a type twice"]),
    ("--type q4_k --type q4_k_m", ["names a type twice"]),  # two names of one mix
    ("--type iq1_s", ["no GGUF type or mix 'iq1_s'"]),
    ("--bits 1", ["no type that 1 bits alone would mean", "2 (q2_k)", "--type iq2_xxs"]),
    ("--bits 8 --type q4_0", ["--bits 8 beside --type q4_0"]),
    ("--group-size 64", ["--group-size with gguf", "--type"]),
    ("--symmetric", ["--symmetric with gguf"]),
    ("--no-symmetric", ["--symmetric with gguf"]),
    ("--quant-type nf4", ["--quant-type with gguf"]),
    ("--double-quant", ["--double-quant with gguf"]),
    ("--solver hqq", ["--solver hqq with gguf", "importance", "gptq"]),
    ("--solver rtn", ["--solver rtn with gguf"]),
    ("--solver importance --damp 0.1", ["--damp is no option of solver importance"]),
    ("--solver gptq --imatrix x", ["--imatrix is no option of solver gptq"]),
    ("--type iq2_xs", ["without an importance matrix", "--calibration TEXT", "--imatrix FILE", "q2_k"]),
    ("--type iq2_m", ["without an importance matrix"]),
    ("--type q2_k_s", ["without an importance matrix"]),
    ("--override blk.0.attn_q=8", ["--override 'blk.0.attn_q=8': there is no GGUF type '8'", "q8_0"]),
    ("--override blk.*.attn_q=q4_k_m", ["there is no GGUF type 'q4_k_m'", "did you mean q4_k?"]),
    ("--override blk.*.attn_q", ["'PATTERN=TYPE'", "'blk.*.ffn_down=q6_k'"]),
    ("--override =q8_0", ["'PATTERN=TYPE'"]),
    ("--override blk.9.*=q8_0", ["'blk.9.*=q8_0' matches no layer of the model", "blk.1."]),
    ("--override model.layers.*=q8_0", ["matches no layer of the model", "names such as"]),
    ("--override *norm*=q8_0", ["matches no layer of the model"]),
    ("--override blk.0.ffn_up=iq2_xs", ["--override", "blk.0.ffn_up.weight", "128 weights", "iq4_nl"]),
    ("--skip model.layers.0.*", ["--skip 'model.layers.0.*' matches no layer"]),
    ("--pre-tokenizer nonsense", ["the pre-tokenizer 'nonsense'", "llama-bpe", "qwen2"]),
    ("--device gpu", ["--device gpu", "cpu, cuda or cuda:N"]),
    ("--device cuda:99", ["--device cuda:99: this machine has", "leave it out"]),
    ("--max-shard-size nonsense", ["--max-shard-size"]),
    ("--max-shard-size 0", ["--max-shard-size"]),
    ("--calibration none.txt", ["none.txt is no file"]),
    ("--imatrix none.gguf", ["importance matrix none.gguf does not exist"]),
    ("--imatrix .", ["importance matrix . is no file"]),
]


@pytest.mark.parametrize(("options", "parts"), OPTIONS, ids=[options for options, _ in OPTIONS])
def test_options_that_cannot_be(options: str, parts: list[str], llama: Path, gguf: Refused) -> None:
    line = gguf(llama, *options.split())
    for part in parts:
        assert part in line


def test_types_that_no_row_can_hold_or_that_see_nothing(
    wide: Path, matrix: Path, text: Path, gguf: Refused
) -> None:
    line = gguf(wide, "--override", "blk.0.ffn_up=iq2_xs")
    assert "--override makes blk.0.ffn_up.weight iq2_xs, which loses far too much" in line
    little = ("--calibration", text, "--samples", "4", "--sequence-length", "32")
    line = gguf(wide, "--override", "token_embd=iq2_xs", *little)
    assert "token_embd.weight becomes iq2_xs, which needs importance, and no inputs are seen of it" in line
    line = gguf(wide, "--solver", "awq", "--type", "iq2_xs", *little)
    assert "has no codes to be rounded one by one" in line
    assert "--solver importance" in line
    line = gguf(wide, "--imatrix", matrix, "--calibration", text)
    assert "--calibration beside --imatrix" in line


def test_an_output_that_looks_like_a_file(llama: Path, refused: Refused, tmp_path: Path) -> None:
    line = refused("quantize", llama, "-o", tmp_path / "model.gguf", "--method", "gguf")
    assert f"-o {tmp_path / 'model.gguf'}; a directory to make" in line
    assert line.endswith(f"-o {tmp_path / 'model'}")
    line = refused("convert", llama, "-o", tmp_path / "model.gguf")
    assert "qexport quantize --method gguf --type f16" in line


def test_an_output_that_is_there(llama: Path, gguf: Refused, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert str(tmp_path / "out") in gguf(llama)
    line = refused("imatrix", llama, "-o", tmp_path / "out")
    assert f"{tmp_path / 'out'} is a directory" in line
    line = refused("imatrix", llama, "-o", tmp_path / "out" / "mine.txt")
    assert "mine.txt is there already" in line
    assert "--overwrite" in line


# --- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["granite", "bloom", "opt"])
def test_an_architecture_that_gguf_has_no_row_for(
    name: str, gguf: Refused, refused: Refused, tmp_path: Path
) -> None:
    model = {**ROWLESS, "opt": ZOO["opt"]}[name](tmp_path / name)
    for line in (gguf(model), refused("imatrix", model, "-o", tmp_path / "m.gguf")):
        assert f"a model of type '{name}' cannot be written as GGUF so far" in line
        for known in BY_TYPE:
            assert re.search(rf"\b{known}\b", line), line


def test_a_tokenizer_that_is_not_known(llama: Path, gguf: Refused, tmp_path: Path) -> None:
    """Another way to cut a text into words; setting a name helps."""
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    content = json.loads((model / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "..."}, "behavior": "Isolated", "invert": False},
            content["pre_tokenizer"],
        ],
    }
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert "--pre-tokenizer" in gguf(model)
    out = tmp_path / "set"
    spec = spec_of("gguf", type="q8_0", pre_tokenizer="llama-bpe")
    assert qexport.quantize(model, out, spec).files
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    shutil.rmtree(out)
    assert "tokenizer" in gguf(model)


@pytest.mark.parametrize(
    "options",
    [
        ("--type", "q4_0"),
        ("--type", "f16"),
        ("--samples", "4", "--sequence-length", "32"),
        ("--solver", "gptq", "--samples", "4", "--sequence-length", "32"),
    ],
    ids=" ".join,
)
def test_weights_that_are_not_finite(options: tuple[str, ...], gguf: Refused, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(model / "model.safetensors")[name].clone()
    weight[3, 5] = torch.nan
    edit_weights(model, **{name: weight})
    assert f"has NaN or infinity in {name}" in gguf(model, *options)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q4_k", "q2_k", "q6_k"])
def test_weights_that_a_type_cannot_hold(kind: str, gguf: Refused, tmp_path: Path) -> None:
    """Scales of blocks have 16 bits."""
    model = tiny_model(tmp_path / "model", dtype=torch.float32, num_hidden_layers=1)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(model / "model.safetensors")[name].clone()
    weight[3, 5] = 1e30
    edit_weights(model, **{name: weight})
    line = gguf(model, "--type", kind)
    assert "blk.0.ffn_down.weight: a weight of 1e+30, too large for" in line
    assert "bf16" in line


def test_a_directory_that_is_not_the_model_of_its_config(gguf: Refused, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    edit_weights(model, **{"model.layers.1.mlp.up_proj.weight": None})
    assert "model.layers.1.mlp.up_proj.weight" in gguf(model)
    edit_json(model / "config.json", num_hidden_layers=1)
    assert "model.layers.1" in gguf(model)


def test_sources_that_are_none(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (("convert",), ("quantize", "--method", "gguf"), ("imatrix",)):
        line = refused(*command, tmp_path / "empty", "-o", tmp_path / "out")
        assert "has no config.json" in line


# --- importance matrices -----------------------------------------------------------------------------


def test_importance_matrices_that_are_none(
    llama: Path, file: Path, matrix: Path, gguf: Refused, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("a text that is no importance matrix " * 50)
    assert "text.txt is no importance matrix" in gguf(llama, "--imatrix", tmp_path / "text.txt")
    assert "its general.type is 'model'" in gguf(llama, "--imatrix", file)
    for form in (matrix, matrix.with_suffix(".dat")):
        cut = tmp_path / f"cut{form.suffix}"
        cut.write_bytes(form.read_bytes()[: form.stat().st_size // 2])
        line = gguf(llama, "--imatrix", cut)
        assert cut.name in line
        assert "not a whole GGUF file" in line or "is no importance matrix" in line


def test_importance_matrices_of_another_model(
    llama: Path, wide: Path, matrix: Path, text: Path, gguf: Refused, tmp_path: Path, cli: RunCli
) -> None:
    line = gguf(wide, "--imatrix", matrix)
    assert (
        f"{matrix}: the importance matrix has 128 values for blk.0.attn_q.weight, whose rows have 256" in line
    )
    # GPT-2 has none of Llama's inputs of attention and gate; the others have another width
    spec = CalibrationSpec(calibration=(str(text),), samples=4, sequence_length=32)
    strange = make_imatrix(ZOO["gpt_neox"](tmp_path / "neox"), tmp_path / "neox.gguf", spec)
    assert strange.entries
    shorter = tiny_model(tmp_path / "shorter", num_hidden_layers=1)
    make_imatrix(shorter, tmp_path / "shorter.gguf", spec)
    out = ("-o", tmp_path / "out", "--method", "gguf", "--imatrix", tmp_path / "shorter.gguf")
    code, _, err = cli("quantize", llama, *out, "--type", "q4_0")
    assert code == 0
    assert "shorter.gguf does not know 7 tensors, whose inputs all count alike: blk.1." in err
    shutil.rmtree(tmp_path / "out")
    line = gguf(llama, "--imatrix", tmp_path / "shorter.gguf", "--type", "iq2_xs")
    assert "blk.1.ffn_down.weight becomes iq2_xs, which needs importance, and " in line
    assert "shorter.gguf does not know it" in line
    assert "--override" in line


# --- GGUF as input -----------------------------------------------------------------------------------

COMMANDS: list[tuple[str, ...]] = [
    ("convert", "FILE", "-o", "OUT"),
    ("convert", "FILE", "-o", "OUT.gguf", "--to", "gguf-lora"),
    ("quantize", "FILE", "-o", "OUT", "--method", "gguf"),
    ("quantize", "FILE", "-o", "OUT", "--method", "gptq"),
    ("quantize", "MODEL", "-o", "OUT", "--method", "gguf", "-a", "FILE"),
    ("imatrix", "FILE", "-o", "OUT.gguf"),
    ("shard", "FILE", "-o", "OUT"),
    ("merge", "FILE", "-o", "OUT", "-a", "ADAPTER"),
    ("merge", "MODEL", "-o", "OUT", "-a", "FILE"),
    ("verify", "FILE", "--runtime", "llamacpp"),
    ("verify", "FILE", "--reference", "MODEL"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_file_that_is_cut_short(
    command: tuple[str, ...], llama: Path, file: Path, refused: Refused, tmp_path: Path
) -> None:
    content, cut, adapter = file.read_bytes(), tmp_path / "cut.gguf", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}'
    )
    save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 4)}, adapter / "adapter_model.safetensors")
    for length in (20, 1000, len(content) - 5000):
        cut.write_bytes(content[:length])
        places = {"FILE": cut, "MODEL": llama, "OUT": tmp_path / "out", "OUT.gguf": tmp_path / "out.gguf"}
        places["ADAPTER"] = adapter
        line = refused(*(places.get(word, word) for word in command))
        assert "cut.gguf is not a whole GGUF file" in line
        assert "download or write the file again" in line


@pytest.mark.skipif(not (SHARED / "gguf").is_dir(), reason="needs ../shared")
def test_a_vocabulary_alone(refused: Refused, tmp_path: Path) -> None:
    vocabulary = shared("gguf", "ggml-vocab-gpt-2.gguf")
    for command in (("convert",), ("quantize", "--method", "gguf"), ("imatrix",)):
        line = refused(*command, vocabulary, "-o", tmp_path / "out")
        assert f"{vocabulary} holds a vocabulary alone" in line


def test_a_file_that_is_quantized_already(file: Path, refused: Refused, tmp_path: Path) -> None:
    line = refused("quantize", file, "-o", tmp_path / "out", "--method", "gptq")
    assert f"{file} is quantized already (gguf)" in line


def test_conversions_that_cannot_be(
    llama: Path, file: Path, refused: Refused, tmp_path: Path, text: Path
) -> None:
    lora = ("--to", "gguf-lora", "-o", tmp_path / "out.gguf")
    assert "has no adapter_config.json" in refused("convert", llama, *lora)
    dora = tiny_adapter(tmp_path / "dora", llama, use_dora=True)
    line = refused("convert", dora, *lora)
    assert "cannot become a GGUF adapter: it is a DoRA" in line
    assert "merge the adapter into its base" in line
    assert "is an adapter, not a model" in refused("convert", dora, "-o", tmp_path / "out")
    assert "--base is for --to gguf-lora" in refused("convert", llama, "-o", tmp_path / "out", "--base", "x")
    assert "'gguf'" in refused("convert", llama, "-o", tmp_path / "out", "--to", "gguf")


# --- the machine -------------------------------------------------------------------------------------


def test_a_disk_that_is_full(llama: Path, gguf: Refused, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    for options in ((), ("--calibration", text)):
        assert re.search(r"out needs \d+ KB, the disk has 1 KB free", gguf(llama, *options))


def test_without_gguf(llama: Path, gguf: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert gguf(llama).endswith("pip install 'qexport[gguf]'")


@pytest.mark.slow
def test_without_numba(llama: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "from qexport.cli.main import run\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", program, "quantize", str(llama), "-o", "out", "--method", "gguf"]
    ran = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    *notes, line = ran.stderr.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert "needs numba, which is not installed" in line
    assert line.endswith("pip install 'qexport[gguf]'")
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(
    llama: Path, cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    original = gguf_stream.TensorStream._write

    def write(*arguments: Any) -> None:
        written.append(len(list(tmp_path.rglob("*.gguf"))))
        if len(written) > 5:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(gguf_stream.TensorStream, "_write", write)
    arguments = ("quantize", llama, "-o", tmp_path / "out", "--method", "gguf", "--type", "q8_0,q4_0")
    code, _, err = cli(*arguments)
    assert (code, err.splitlines()[-1] + "\n") == (130, INTERRUPTED)
    assert written == [2] * 6  # files were there
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """In the middle of the work, with threads that encode; a GGUF source's own directory goes too."""
    model = tiny_model(tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    qexport.quantize(model, tmp_path / "f16", spec_of("gguf", type="f16"))
    work = tmp_path / "work"
    work.mkdir()
    command = [
        "quantize",
        str(tmp_path / "f16"),
        "-o",
        "out",
        "--method",
        "gguf",
        "--type",
        "q2_k,q4_k_m,q6_k",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *command],
        cwd=work,
        env={**os.environ, "TMPDIR": str(work)},
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not any(size(path) for path in work.rglob("*.gguf") if path.parent.name.startswith(".")):
        assert time.monotonic() < until
        assert process.poll() is None, "it was done before it could be stopped"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1] + "\n") == (130, INTERRUPTED)
    assert not list(work.iterdir())


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
