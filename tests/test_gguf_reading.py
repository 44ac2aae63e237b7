"""A GGUF file opens as a checkpoint: transformers' names and values, tokenizer and settings beside them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.gguf_files import in_the_users_words
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import fingerprint
from qexport.checkpoint.weights_files import LastOpened
from qexport.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    NotACheckpointError,
    QexportError,
    UnsupportedModelError,
)
from qexport.formats.gguf.container import READABLE, Metadata, PlannedTensor, Typed, array, text, u32
from qexport.formats.gguf.settings import settings
from qexport.formats.gguf.slabs import read_tensor
from qexport.formats.gguf.splitting import plan_split, read_model
from qexport.formats.gguf.tensors import gguf_tensors
from qexport.formats.gguf.tokenizer.vocabulary import vocabulary
from qexport.formats.gguf.writing import GgufFile
from qexport.formats.opening import open_checkpoint
from qexport.modeling.skeleton import build_skeleton
from qexport.modeling.whole import load_whole
from tests.conftest import RunCli, shared
from tests.tiny import in_transformers, logits, tiny_adapter, tiny_model, tokens

gguf = pytest.importorskip("gguf")

HARD = "Grüße, 层 12345  <|user|>code_x() \U0001f600 don't"
Blocks = Callable[[PlannedTensor, torch.Tensor], bytes]


def their_blocks(planned: PlannedTensor, values: torch.Tensor) -> bytes:
    """The tensor's bytes by gguf-py."""
    kind = gguf.GGMLQuantizationType(planned.type.number)
    found: bytes = gguf.quants.quantize(values.numpy(), kind).tobytes()
    return found


def export(
    model: Path,
    out: Path,
    kind: str = "f16",
    *,
    max_size: int | None = None,
    blocks: Blocks = their_blocks,
    changes: Mapping[str, Typed | None] | None = None,
) -> list[Path]:
    """The model's GGUF: matrices of `kind`, the rest in fp32. `changes` are settings, None takes one out."""
    checkpoint = open_checkpoint(model)
    skeleton = build_skeleton(checkpoint)
    found = {tensor.name: tensor for tensor in gguf_tensors(checkpoint, skeleton)}
    types = {row.name: row for row in READABLE.values()}
    planned = [
        PlannedTensor(t.name, types[kind if len(t.shape) > 1 else "f32"], t.shape) for t in found.values()
    ]
    size = checkpoint.info(skeleton.embedding_weight).shape[0]
    metadata: Metadata = {"general.file_type": u32({"f32": 0, "f16": 1, "bf16": 32}.get(kind, 7))}
    metadata |= settings(checkpoint.config) | vocabulary(model, vocab_size=size).metadata
    metadata["general.architecture"] = text(
        next(key for key in metadata if "block_count" in key).split(".")[0]
    )
    changed: dict[str, Typed | None] = {**metadata, **(changes or {})}
    metadata = {key: value for key, value in changed.items() if value is not None}
    out.parent.mkdir(parents=True, exist_ok=True)
    files, opened = [], LastOpened()
    for part in plan_split(out.stem, metadata, planned, max_size):
        files.append(out.with_name(part.name))
        file = GgufFile(files[-1], part.metadata, part.tensors, opened)
        for tensor in part.tensors:
            values = read_tensor(found[tensor.name], checkpoint)
            file.write(tensor.name, 0, memoryview(blocks(tensor, values)))
        file.close()
    opened.close()
    return files


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.names()}


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as an F16 file."""
    return export(llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf")[0]


@pytest.fixture(scope="module")
def made_q8(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a Q8_0 file."""
    return export(llama, tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf", "q8_0")[0]


# --- values, names, settings -------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tied": False},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3_text": {"num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32},
    "phi3": {"tied": False},
    "gpt2": {"n_positions": 128, "n_inner": 256, "n_head": 4, "n_layer": 2, "n_embd": 128},
    "mixtral": {"tied": False, "num_local_experts": 4},
    "qwen3_moe": {
        "tied": False,
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
    },
}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_file_gives_back_the_model_that_it_was_made_of(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(tmp_path / "model", model_type=model_type, **MODELS[model_type])
    source = open_checkpoint(model)
    opened = open_checkpoint(export(model, tmp_path / "x.gguf", "f32")[0])
    before, after = values(source), values(opened)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        assert opened.info(name).shape == after[name].shape
        # Gemma's norms went through one plus themselves
        assert torch.allclose(after[name], tensor.float(), rtol=0, atol=1e-7), name
    assert opened.tie == source.tie
    assert opened.quantization is None
    assert not any(map(opened.is_quantized, after))
    ids = tokens()
    theirs = logits(load_whole(build_skeleton(source), source), ids)
    ours = logits(load_whole(build_skeleton(opened), opened), ids)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5), "the settings came back too"


def test_16_bits_come_back_as_they_are(llama: Path, made: Path) -> None:
    source, opened = open_checkpoint(llama), open_checkpoint(made)
    for name in source.names():
        found = opened.read(name)
        assert found.dtype == (torch.float16 if found.dim() > 1 else torch.float32)
        assert torch.equal(found, source.read(name).to(found.dtype)), name
    assert opened.config["dtype"] == "float16"
    assert opened.weights_size == sum(info.size for info in map(opened.info, opened.names()))


def test_bf16(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    source, opened = open_checkpoint(model), open_checkpoint(export(model, tmp_path / "x.gguf", "bf16")[0])
    for name in source.names():
        assert torch.equal(opened.read(name).to(torch.bfloat16), source.read(name))
    assert opened.info("model.embed_tokens.weight").dtype == torch.bfloat16
    assert opened.config["dtype"] == "bfloat16"


def random_blocks(planned: PlannedTensor, tensor: torch.Tensor) -> bytes:
    """Blocks of random bytes, the scale in the first two small; vectors as they are."""
    if planned.type.values == 1:
        return their_blocks(planned, tensor)
    blocks = np.frombuffer(random.Random(planned.name).randbytes(planned.size), dtype=np.uint8).copy()
    blocks = blocks.reshape(-1, planned.type.size)
    blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    found: bytes = blocks.tobytes()
    return found


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q5_1", "mxfp4", "iq1_s"])
def test_blocks_are_decoded_as_gguf_py_decodes_them(tmp_path: Path, kind: str) -> None:
    """Types with an encoder here, and one that gguf-py alone decodes; q and k lie in another order."""
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    model = tiny_model(tmp_path / "model", **sizes)
    blocks = random_blocks if kind == "iq1_s" else their_blocks
    file = export(model, tmp_path / "x.gguf", kind, blocks=blocks)[0]
    opened = open_checkpoint(file)
    theirs = {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(file).tensors
    }
    block = "model.layers.0"
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        f"{block}.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        f"{block}.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        f"{block}.input_layernorm.weight": "blk.0.attn_norm.weight",
    }
    for name, other in pairs.items():
        assert torch.equal(opened.read(name), theirs[other]), name
    for leaf, heads in (("q", 4), ("k", 2)):
        rows = theirs[f"blk.0.attn_{leaf}.weight"].reshape(heads, 32, 2, 256).transpose(1, 2).reshape(-1, 256)
        assert torch.equal(opened.read(f"{block}.self_attn.{leaf}_proj.weight"), rows)
    assert opened.is_quantized(f"{block}.mlp.down_proj.weight")
    assert not opened.is_quantized(f"{block}.input_layernorm.weight")
    assert opened.info("lm_head.weight").dtype == torch.float32
    assert opened.quantization == {"quant_method": "gguf", "types": [kind]}
    assert opened.weights_size < 4 * sum(opened.info(name).numel for name in opened.names()) / 3


def test_experts_are_decoded_one_by_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_hidden_layers": 1, **MODELS["mixtral"]}
    model = tiny_model(tmp_path / "model", model_type="mixtral", **options)
    file = export(model, tmp_path / "x.gguf", "q8_0")[0]
    opened = open_checkpoint(file)
    stack = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up_exps.weight")
    theirs = torch.tensor(gguf.quants.dequantize(stack.data, stack.tensor_type))
    assert theirs.shape[0] == 4
    for expert in range(4):
        name = next(n for n in opened.names() if f"experts.{expert}.w3" in n or f".{expert}.up_proj" in n)
        assert torch.equal(opened.read(name), theirs[expert])


# --- the directory that stands for a file --------------------------------------------------------------


def test_tokenizer_and_ends_lie_beside_the_weights(llama: Path, made: Path) -> None:
    directory = resolve(made)
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (llama, directory))
    assert ours(HARD).input_ids == theirs(HARD).input_ids
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )
    assert json.loads((directory / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    (link,) = directory.glob("*.gguf")
    assert link.resolve() == made.resolve()
    assert (directory.parent.stat().st_mode & 0o777) == 0o700
    assert resolve(made) == resolve(directory) == directory, "one file has one directory"


def test_a_file_by_any_name_and_in_a_directory(made: Path, tmp_path: Path) -> None:
    """Ollama's blobs have no suffix; Hub directories hold projectors and notes besides."""
    blob = tmp_path / "sha256-0a1b"
    blob.write_bytes(made.read_bytes())
    assert list(open_checkpoint(blob).names()) == list(open_checkpoint(made).names())
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "model.gguf").write_bytes(made.read_bytes())
    (hub / "config.json").write_text('{"model_type": "llama"}')  # as some have it, of no use
    bare(hub / "mmproj-model.gguf", {"general.architecture": text("clip")})
    opened = open_checkpoint(hub)
    assert opened.config["hidden_size"] == 128
    (hub / "other.gguf").write_bytes(made.read_bytes())
    with pytest.raises(NotACheckpointError, match=r"holds 2 models: model.gguf, other.gguf") as raised:
        open_checkpoint(hub)
    assert "name its file" in str(raised.value)


def test_a_split_model_opens_by_any_file_and_by_its_directory(
    llama: Path, made: Path, tmp_path: Path
) -> None:
    files = export(llama, tmp_path / "parts" / "tiny.gguf", max_size=150_000)
    assert len(files) > 3
    whole = values(open_checkpoint(made))
    for source in (files[0], files[2], files[0].parent):
        opened = values(open_checkpoint(source))
        assert all(torch.equal(opened[name], tensor) for name, tensor in whole.items())
    files[0].unlink()
    for source in (files[2], files[0].parent):
        with pytest.raises(CorruptFileError, match=f"{files[0].name} is not beside it"):
            open_checkpoint(source)


def test_safetensors_beside_a_gguf_count(llama: Path, made: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", seed=5)
    (model / "tiny.gguf").write_bytes(made.read_bytes())
    assert resolve(model) == model
    assert open_checkpoint(model).path == model


def test_an_unknown_tokenizer_leaves_the_weights_and_the_files_beside(llama: Path, tmp_path: Path) -> None:
    changes: dict[str, Typed | None] = {
        "tokenizer.ggml.pre": text("from-the-future"),
        "tokenizer.ggml.model": text("new"),
    }
    file = export(llama, tmp_path / "x.gguf", changes=changes)[0]
    (tmp_path / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    directory = resolve(file)
    assert open_checkpoint(file).read("model.norm.weight").shape == (128,)
    assert (directory / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_messages_speak_of_the_users_file(llama: Path, made: Path, tmp_path: Path) -> None:
    directory = resolve(made)
    assert in_the_users_words(f"{directory} is x") == f"{made} is x"
    assert in_the_users_words(f"{directory / made.name} is x") == f"{made} is x"
    blob = tmp_path / "sha256-0a1b"
    blob.write_bytes(made.read_bytes())
    (link,) = resolve(blob).glob("*.gguf")
    assert in_the_users_words(f"{link} is x") == f"{blob} is x"
    files = export(llama, tmp_path / "parts" / "tiny.gguf", max_size=150_000)
    for source in (files[1], files[0].parent):
        directory = resolve(source)
        links = sorted(directory.glob("*.gguf"))
        assert in_the_users_words(f"{links[2]} and {directory}") == f"{files[2]} and {source}"


@pytest.mark.parametrize("name", ['we"ird \\größe.gguf', "wei\nrd 'one'", "\udcff.gguf"])
def test_files_of_any_name_are_told_in_json(
    made: Path, text: Path, tmp_path: Path, name: str, cli: RunCli
) -> None:
    """In JSON a path's quotes are escaped; its place in the temporary directory is nobody's business."""
    file = tmp_path / name
    file.write_bytes(made.read_bytes())
    call = ["verify", "--reference", file, file, "--text", text, "--max-documents", "1", "--json"]
    code, said, err = cli(*call)
    assert code == 0, err
    told = json.loads(said)
    assert told["candidate"]["model"] == told["reference"]["model"] == str(file)
    assert "qexport-gguf-" not in said + err


def test_licences_and_the_token_that_pads_come_along(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": [1, 3], "pad_token_id": 5}
    changes = {f"tokenizer.ggml.{key}": u32(n) for key, n in (("padding_token_id", 5), ("eot_token_id", 3))}
    file = export(llama, tmp_path / "gguf" / "x.gguf", changes=changes)[0]
    licences = ("LICENSE", "LICENSE.txt", "NOTICE", "COPYING", "USE_POLICY.md")
    for name in (*licences, "README.md", "modeling.py", "tokenizer.model"):
        (file.parent / name).write_text(f"this is {name}")
    code, _, err = cli("convert", file, "-o", tmp_path / "back")
    assert (code, err) == (0, "")
    for name in licences:
        assert (tmp_path / "back" / name).read_text() == f"this is {name}"
        assert not (tmp_path / "back" / name).is_symlink()
    assert not {"modeling.py", "tokenizer.model"} & {f.name for f in (tmp_path / "back").iterdir()}
    assert (
        "this is README.md" not in (tmp_path / "back" / "README.md").read_text()
    )  # it has a card of its own
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == ids


_ENDINGS = """
import os, signal, sys
from pathlib import Path
import qexport.formats.gguf.unpacking
from qexport.checkpoint.hub import resolve

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as qexport's command line does
file, room = sys.argv[1:]

def way(ending):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(os.listdir(room))
    directory = resolve(file)
    assert directory.is_relative_to(room) and (directory / "config.json").is_file()
    if os.fork() == 0:
        sys.exit()
    os.wait()
    assert (directory / "config.json").is_file(), "a fork took it along"
    ending()
    sys.exit()

print([way(lambda: None), way(lambda: 1 / 0), way(lambda: os.kill(os.getpid(), signal.SIGTERM))])
"""


@pytest.mark.slow
def test_the_directory_goes_with_the_process(made: Path, tmp_path: Path) -> None:
    """At its end, after an error and after SIGTERM, and not at the end of a fork."""
    call = [sys.executable, "-c", _ENDINGS, str(made), str(tmp_path)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ran = subprocess.run(call, env=environment, check=True, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "[(0, 0), (1, 0), (143, 0)]", ran.stderr


# --- verbs -------------------------------------------------------------------------------------------


def test_verify_scores_a_gguf(llama: Path, made: Path, made_q8: Path, text: Path, cli: RunCli) -> None:
    losses = []
    for file in (made, made_q8):
        call = ["verify", "--reference", llama, file, "--text", text, "--max-documents", "4", "--json"]
        code, said, err = cli(*call)
        assert code == 0, err
        losses.append(json.loads(said)["loss"]["loss"])
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert 0 < abs(losses[1]) < 0.05


def test_a_16_bit_gguf_quantizes_as_the_model_does(
    llama: Path, made: Path, tmp_path: Path, cli: RunCli
) -> None:
    for source, out in ((llama, "theirs"), (made, "ours")):
        options = ["--method", "rtn", "--bits", "8", "--group-size", "64", "-q"]
        code, _, err = cli("quantize", source, "-o", tmp_path / out, *options)
        assert code == 0, err
    theirs, ours = (values(open_checkpoint(tmp_path / out)) for out in ("theirs", "ours"))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].float(), tensor.float()), name


def test_a_gguf_of_blocks_is_quantized_already(made_q8: Path, tmp_path: Path, cli: RunCli) -> None:
    code, _, err = cli("quantize", made_q8, "-o", tmp_path / "out", "--method", "rtn")
    assert code == 2
    assert "is quantized already (gguf)" in err
    assert made_q8.name in err


def test_shard_does_not_decode_a_gguf(made: Path, tmp_path: Path, cli: RunCli) -> None:
    for source in (made, made.parent):
        code, said, err = cli("shard", source, "-o", tmp_path / "out")
        assert (code, said) == (2, "")
        assert err.startswith(f"error: {source} is a GGUF, which shard would have to decode; ")
        assert "qexport quantize --method gguf --max-shard-size SIZE; qexport convert makes safeten" in err
        assert not (tmp_path / "out").exists()


def test_convert_writes_a_gguf_as_safetensors(
    llama: Path, made: Path, made_q8: Path, tmp_path: Path, cli: RunCli
) -> None:
    for file in (made, made_q8):
        code, _, err = cli("convert", file, "-o", tmp_path / "out", "--overwrite", "-q")
        assert (code, err) == (0, "")
        opened, written = open_checkpoint(file), open_checkpoint(tmp_path / "out")
        assert written.quantization is None
        assert list(written.names()) == list(opened.names())
        for name in opened.names():
            stored, found = opened.read(name), written.read(name)
            assert found.dtype == (torch.float16 if opened.is_quantized(name) else stored.dtype)
            assert torch.equal(found, stored.to(found.dtype)), name
        theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (llama, tmp_path / "out"))
        assert ours(HARD).input_ids == theirs(HARD).input_ids
        assert not list((tmp_path / "out").glob("*.gguf"))
        ours_in_full = logits(load_whole(build_skeleton(opened), opened), tokens())
        theirs_found = logits(in_transformers(tmp_path / "out", dtype=torch.float32), tokens())
        # decoded weights became fp16
        limit = 5e-3 if opened.quantization else 1e-6
        assert float((theirs_found - ours_in_full).norm() / ours_in_full.norm()) < limit


def test_an_adapter_merges_into_a_gguf(
    llama: Path, made: Path, made_q8: Path, tmp_path: Path, cli: RunCli
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama)
    for source, out in ((llama, "theirs"), (made, "ours"), (made_q8, "decoded")):
        code, _, err = cli("merge", source, "-a", adapter, "-o", tmp_path / out, "-q")
        assert code == 0, err
    theirs, ours, decoded = (values(open_checkpoint(tmp_path / out)) for out in ("theirs", "ours", "decoded"))
    assert theirs.keys() == ours.keys() == decoded.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].to(tensor.dtype), tensor), name
        assert torch.allclose(decoded[name].float(), tensor.float(), atol=0.05), name


def test_what_was_made_of_a_gguf_is_known_by_the_files_content(made: Path, tmp_path: Path) -> None:
    other = tmp_path / made.name
    other.write_bytes(made.read_bytes())
    assert fingerprint(resolve(other)) == fingerprint(resolve(made))
    with other.open("r+b") as file:
        file.seek(-40, 2)
        file.write(b"x")
    assert fingerprint(resolve(other)) != fingerprint(resolve(made))


def test_a_gguf_is_not_replaced_by_what_is_made_of_it(made: Path, tmp_path: Path, cli: RunCli) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "x.gguf").write_bytes(made.read_bytes())
    (model / "qexport.json").write_text("{}")
    code, _, err = cli("convert", model / "x.gguf", "-o", model, "--overwrite")
    assert code == 2
    assert "is or holds the input" in err
    assert (model / "x.gguf").is_file()


def test_the_command_line_names_the_users_file(made: Path, made_q8: Path, text: Path, cli: RunCli) -> None:
    code, _, err = cli("quantize", made_q8, "-o", "out", "--method", "rtn")
    assert code == 2
    assert err.startswith(f"error: {made_q8} is quantized already (gguf)")
    code, said, _ = cli("verify", "--reference", made, made, "--text", text, "--max-documents", "1", "--json")
    assert json.loads(said)["candidate"]["model"] == str(made)


# --- what is refused -----------------------------------------------------------------------------------


def bare(path: Path, metadata: Metadata, tensors: tuple[str, ...] = ("t",)) -> Path:
    """A file of these settings and small tensors."""
    opened = LastOpened()
    planned = [PlannedTensor(name, READABLE[0], (8,)) for name in tensors]
    file = GgufFile(path, metadata, planned, opened)
    for tensor in planned:
        file.write(tensor.name, 0, memoryview(bytes(32)))
    opened.close()
    return path


LLAMA = {"general.architecture": text("llama")}
REFUSED: dict[str, tuple[Metadata, tuple[str, ...], type[QexportError], str]] = {
    "adapter": ({**LLAMA, "general.type": text("adapter")}, ("t",), NotACheckpointError, "is an adapter"),
    "vocabulary": (LLAMA, (), NotACheckpointError, "a vocabulary alone"),
    "projector": ({"general.architecture": text("clip")}, ("t",), NotACheckpointError, "projector"),
    "projector of a model": (
        {**LLAMA, "general.type": text("mmproj")},
        ("t",),
        NotACheckpointError,
        "mmproj",
    ),
    "imatrix": ({"general.type": text("imatrix")}, ("t",), NotACheckpointError, "importance matrix"),
    "unknown": ({"general.architecture": text("flux")}, ("t",), UnsupportedModelError, "flux"),
    "none": ({}, ("t",), CorruptFileError, r"general\.architecture"),
    "a number": ({"general.architecture": u32(7)}, ("t",), CorruptFileError, r"general\.architecture"),
    "no settings": (LLAMA, ("t",), CorruptFileError, "block_count"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_is_refused_by_name(tmp_path: Path, case: str) -> None:
    metadata, names, kind, said = REFUSED[case]
    path = bare(tmp_path / "x.gguf", metadata, names)
    for source in (path, tmp_path):
        with pytest.raises(kind, match=said) as raised:
            open_checkpoint(source)
        assert str(path) in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["gone.gguf", "./gone.GGUF", "org/gone.gguf", "org/repository/gone.gguf"])
def test_a_missing_file(tmp_path: Path, source: str) -> None:
    for named in (source, Path(source), tmp_path / source):
        with pytest.raises(CheckpointNotFoundError, match=r"(?i)gone.gguf does not exist") as raised:
            open_checkpoint(named)
        assert "GGUF files are read from disk" in str(raised.value)
        assert "hf download REPO FILE --local-dir ." in str(raised.value)


def on_the_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, files: list[str] | None) -> None:
    """A Hub whose repositories have these files, of which what is in `cache` is fetched; None: no network."""

    def listed(*_: Any) -> list[str]:
        if files is None:
            raise OSError("no network")
        return files

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(cache))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", listed)


def test_a_repository_of_gguf_files_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_the_hub(monkeypatch, tmp_path, ["config.json", "q.gguf", "README.md", "b.gguf"])
    with pytest.raises(
        CheckpointNotFoundError, match=r"no safetensors, but GGUF files \(b.gguf, q.gguf\)"
    ) as e:
        resolve("org/tiny-GGUF")
    assert "hf download org/tiny-GGUF FILE --local-dir ." in str(e.value)
    for files in (["config.json", "tf_model.h5"], None):
        on_the_hub(monkeypatch, tmp_path, files)
        assert resolve("org/tiny") == tmp_path, "what is missing is told when it is opened"
    (tmp_path / "model.safetensors").write_bytes(b"")
    on_the_hub(monkeypatch, tmp_path, ["model.safetensors", "q.gguf"])
    assert resolve("org/tiny") == tmp_path


def test_a_repository_of_which_a_gguf_was_fetched(
    monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.gguf").write_bytes(made.read_bytes())
    on_the_hub(monkeypatch, tmp_path, ["x.gguf", "y.gguf"])
    assert list(open_checkpoint("org/tiny-GGUF").names()) == list(open_checkpoint(made).names())


BROKEN: dict[str, Typed | None] = {
    "llama.block_count": u32(1000),
    "llama.embedding_length": text("many"),
    "llama.attention.head_count": u32(0),
    "llama.attention.head_count_kv": array("str", ["a"]),
    "llama.attention.layer_norm_rms_epsilon": text("small"),
    "llama.attention.key_length": text("long"),
    "llama.rope.freq_base": array("f32", []),
    "llama.rope.scaling.type": u32(3),
    "llama.context_length": None,
    "general.file_type": array("u32", [1]),
    "tokenizer.ggml.model": u32(1),
    "tokenizer.ggml.tokens": text("a"),
    "tokenizer.ggml.merges": array("i32", [1, 2]),
    "tokenizer.ggml.token_type": array("i32", [1]),
    "tokenizer.ggml.bos_token_id": u32(2**32 - 1),
    "tokenizer.ggml.eos_token_id": text("</s>"),
    "tokenizer.chat_template": u32(1),
}


@pytest.mark.parametrize("key", BROKEN)
def test_settings_that_make_no_sense(llama: Path, tmp_path: Path, key: str) -> None:
    """Read as if they were not there, or refused in one line."""
    file = export(llama, tmp_path / "x.gguf", changes={key: BROKEN[key]})[0]
    try:
        values(open_checkpoint(file))
    except QexportError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - either will do


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_raise_nothing_but_our_errors(made: Path, tmp_path: Path, seed: int) -> None:
    """100 times a byte or some changed, the header's above all, and some files cut off."""
    sound = made.read_bytes()
    header = min(tensor.offset for tensor in read_model(made).tensors.values())
    path, chance = tmp_path / "x.gguf", random.Random(seed)
    opened = refused = 0
    for _ in range(100):
        raw = bytearray(sound)
        for _ in range(chance.choice((1, 1, 3))):
            end = chance.choice((header, header, len(raw)))
            raw[chance.randrange(end)] = chance.randrange(256)
        path.write_bytes(raw[: chance.choice((len(raw),) * 4 + (chance.randrange(len(raw)),))])
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.names():
                checkpoint.read(name)
            opened += 1
        except QexportError:
            refused += 1
    assert min(opened, refused) > 5


# --- the real llama.cpp, and files by others -------------------------------------------------------------

_IN_LLAMACPP = """
import sys, numpy, json
from qexport.verification.runtimes.drivers.llamacpp_loader import load
paths, ids, out = json.loads(sys.argv[1])
found = []
for path in paths:
    loaded = load({"model": path})
    assert loaded["forward"], loaded
    found.append(loaded["forward"](ids))
numpy.save(out, numpy.stack(found))
"""


def llamacpp_logits(files: list[Path], ids: torch.Tensor, out: Path) -> torch.Tensor:
    """[files, rows, length, vocabulary] of llama.cpp, in a process of its own."""
    pytest.importorskip("cyllama")
    call = json.dumps([[str(file) for file in files], ids.tolist(), str(out)])
    subprocess.run([sys.executable, "-c", _IN_LLAMACPP, call], check=True, timeout=120)
    return torch.from_numpy(np.load(out))


def test_llamacpp_loads_our_files_whole_and_split(llama: Path, made: Path, tmp_path: Path) -> None:
    files = export(llama, tmp_path / "tiny.gguf", max_size=150_000)
    ids = tokens(rows=2, length=16)
    whole, parts = llamacpp_logits([made, files[0]], ids, tmp_path / "logits.npy")
    assert torch.equal(whole, parts)
    opened = open_checkpoint(files[1])
    ours = logits(load_whole(build_skeleton(opened), opened), ids)
    assert torch.allclose(whole, ours, rtol=0, atol=2e-2 * float(ours.std()))


def test_ollamas_random_llama(tmp_path: Path) -> None:
    file = shared("gguf", "llama-2-tiny-random.gguf")
    opened = open_checkpoint(file)
    ids = tokens(rows=2, length=12, vocabulary=32_000)
    ours = logits(load_whole(build_skeleton(opened), opened), ids)
    theirs = llamacpp_logits([file], ids, tmp_path / "logits.npy")[0]
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-3
    tokenizer = AutoTokenizer.from_pretrained(opened.path)
    assert tokenizer("Hello world").input_ids == [1, 15043, 3186], "Llama 2's own ids"


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3"])
def test_llamacpps_vocabularies_are_no_models(name: str) -> None:
    with pytest.raises(NotACheckpointError, match="holds a vocabulary alone"):
        open_checkpoint(shared("gguf", f"ggml-vocab-{name}.gguf"))
