"""Opening a model and writing it again: what is refused, what is carried, what transformers loads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qexport
from qexport.checkpoint.hub import MODEL_FILES
from qexport.checkpoint.sharding import INDEX_FILE, SINGLE_FILE
from qexport.checkpoint.sidecars import sidecar_files
from qexport.specs import ShardSpec
from tests.conftest import RunCli
from tests.tiny import edit_json, edit_weights, logits, tiny_model, tokens

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def small(directory: Path) -> Path:
    """What `qexport shard` takes for a model: a config and two tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, directory / SINGLE_FILE)
    return directory


def small_sharded(directory: Path) -> Path:
    """The same in two files with an index."""
    small(directory)
    (directory / SINGLE_FILE).unlink()
    save_file({"a": torch.arange(6.0)}, directory / ONE)
    save_file({"b": torch.ones(2, 2)}, directory / TWO)
    place(directory, {"a": ONE, "b": TWO})
    return directory


def place(directory: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 40}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index))


def refused(cli: RunCli, *arguments: str | Path) -> str:
    """The one line on stderr of a call that must be refused."""
    code, out, err = cli(*arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    assert err.rstrip("\n").isprintable(), "a file's bytes must not steer the terminal"
    return err


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def adapter(model: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")
    (model / SINGLE_FILE).rename(model / "adapter_model.safetensors")


def truncated(model: Path) -> None:
    os.truncate(model / SINGLE_FILE, (model / SINGLE_FILE).stat().st_size - 1)


def only(name: str) -> Callable[[Path], None]:
    """The weights under another name."""

    def damage(model: Path) -> None:
        (model / SINGLE_FILE).rename(model / name)

    return damage


def config(text: str | bytes) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def directory_for_weights(model: Path) -> None:
    (model / SINGLE_FILE).unlink()
    (model / SINGLE_FILE).mkdir()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (no_config, "{model} has no config.json; a Hugging Face model directory has one"),
    "an adapter": (adapter, "{model} is an adapter, not a model; merge it into its base: qexport merge BASE"),
    "config empty": (config(""), "{model}/config.json is not valid JSON"),
    "config no JSON": (config("{model_type: llama}"), "{model}/config.json is not valid JSON"),
    "config no text": (config(b"\xff\xfe{}"), "{model}/config.json is not valid JSON"),
    "config list": (config("[1]"), "{model}/config.json holds list, expected an object"),
    "config null": (config("null"), "{model}/config.json holds NoneType, expected an object"),
    "config nested": (config("[" * 200_000), "{model}/config.json is not valid JSON"),
    "config half a character": (config('{"a": "\\ud800"}'), "{model}/config.json"),
    "weights truncated": (truncated, "{model}/model.safetensors is not a whole safetensors file"),
    "weights empty": (
        lambda model: os.truncate(model / SINGLE_FILE, 0),
        "{model}/model.safetensors is not a whole safetensors file: it has 0 bytes",
    ),
    "weights without a tensor": (lambda model: save_file({}, model / SINGLE_FILE), "{model}"),
    "no weights": (lambda model: (model / SINGLE_FILE).unlink(), f"{{model}} has no {SINGLE_FILE} and no"),
    "weights a directory": (directory_for_weights, f"{{model}} has no {SINGLE_FILE} and no"),
    "weights under another name": (only("weights.safetensors"), "only weights.safetensors"),
    "pickle .bin": (only("pytorch_model.bin"), "pytorch_model.bin, a pickle that can run code"),
    "pickle in parts": (
        only("pytorch_model-00001-of-00002.bin"),
        "pytorch_model-00001-of-00002.bin, a pickle",
    ),
    "pickle .pt": (only("model.pt"), "model.pt, a pickle that can run code"),
    "pickle .pth": (only("consolidated.00.pth"), "consolidated.00.pth, a pickle that can run code"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_model_is_refused(
    tmp_path: Path, cli: RunCli, damage: Callable[[Path], None], message: str
) -> None:
    model = small(tmp_path / "model")
    damage(model)
    assert message.format(model=model) in refused(cli, "shard", model, "-o", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [model]


def test_the_way_to_convert_a_pickle_works(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    torch.save(load_file(model / SINGLE_FILE), model / "pytorch_model.bin")
    (model / SINGLE_FILE).unlink()
    err = refused(cli, "shard", model, "-o", tmp_path / "out")
    command = err[err.index("python -c") :].strip().replace("'OUT'", f"'{tmp_path}/converted'", 1)
    command = command.replace("python", sys.executable, 1)
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    qexport.shard(tmp_path / "converted", tmp_path / "out")
    assert same_tensors(tmp_path / "out", llama)


INDEXES: dict[str, tuple[object, str]] = {
    "a missing file": (
        {"a": ONE, "b": "model-00003-of-00003.safetensors"},
        "names model-00003-of-00003.safetensors, which is not there",
    ),
    "a file outside": ({"a": ONE, "b": "../../x.safetensors"}, "'b' in '../../x.safetensors'"),
    "a file beside the model": ({"a": ONE, "b": "../outside.safetensors"}, "only files beside the index are"),
    "an absolute path": ({"a": ONE, "b": "/etc/x.safetensors"}, "'b' in '/etc/x.safetensors'"),
    "a folder": ({"a": ONE, "b": "sub/x.safetensors"}, "'b' in 'sub/x.safetensors'"),
    "a backslash": ({"a": ONE, "b": "..\\x.safetensors"}, "only files beside the index are read"),
    "the folder above": ({"a": ONE, "b": ".."}, "only files beside the index are read"),
    "no name": ({"a": ONE, "b": ""}, "places 'b' in ''"),
    "null": ({"a": ONE, "b": None}, "only files beside the index are read"),
    "a list": ({"a": ONE, "b": [TWO]}, "only files beside the index are read"),
    "a pickle": (
        {"a": ONE, "b": "pytorch_model.bin"},
        "'b' in 'pytorch_model.bin'; qexport reads safetensors",
    ),
    "a tensor that is not in its file": (
        {"a": ONE, "b": TWO, "c": TWO},
        f"'c' in {TWO}, which does not hold",
    ),
    "swapped files": ({"a": TWO, "b": ONE}, "which does not hold it"),
    "weight_map empty": ({}, "has no weight_map"),
    "weight_map null": (None, "has no weight_map"),
    "weight_map a list": ([["a", ONE]], "has no weight_map"),
    "a name with a NUL": ({"a": ONE, "b": "x\0.safetensors"}, "which is not there"),
    "a name with half a character": ({"a": ONE, "b": "\ud800.safetensors"}, "is not valid JSON"),
    "a name too long for a file": ({"a": ONE, "b": "x" * 300 + ".safetensors"}, "which is not there"),
    "a name with lines and colours": ({"a": ONE, "b": "x\n\x1b[31my.safetensors"}, "which is not there"),
}


@pytest.mark.parametrize(("weight_map", "message"), INDEXES.values(), ids=INDEXES.keys())
def test_hostile_indexes_are_refused(tmp_path: Path, cli: RunCli, weight_map: object, message: str) -> None:
    save_file({"b": torch.zeros(1)}, tmp_path / "outside.safetensors")
    model = small_sharded(tmp_path / "model")
    torch.save({"b": torch.zeros(1)}, model / "pytorch_model.bin")
    place(model, weight_map)
    err = refused(cli, "shard", model, "-o", tmp_path / "out")
    assert message in err
    assert str(model / INDEX_FILE) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["stray", "st\nray"])
def test_tensors_that_are_not_in_the_index_are_refused(tmp_path: Path, cli: RunCli, name: str) -> None:
    model = small_sharded(tmp_path / "model")
    save_file({"b": torch.ones(2, 2), name: torch.ones(1)}, model / TWO)
    err = refused(cli, "shard", model, "-o", tmp_path / "out")
    assert f"1 tensors lie in the files but not in {model / INDEX_FILE}" in err
    # one tensor in both files: the index can mean one of them only
    save_file({"a": torch.zeros(6), "b": torch.ones(2, 2)}, model / TWO)
    assert "not in" in refused(cli, "shard", model, "-o", tmp_path / "out")


def test_an_index_that_is_no_json_is_refused(tmp_path: Path, cli: RunCli) -> None:
    model = small_sharded(tmp_path / "model")
    (model / INDEX_FILE).write_text("weight_map")
    assert f"{model / INDEX_FILE} is not valid JSON" in refused(cli, "shard", model, "-o", tmp_path / "out")


@pytest.mark.parametrize("name", ["nowhere", "file", "deep/down/nowhere", "n" * 300])
def test_no_such_model(tmp_path: Path, cli: RunCli, name: str) -> None:
    (tmp_path / "file").touch()
    err = refused(cli, "shard", tmp_path / name, "-o", tmp_path / "out")
    found = "is a file" if name == "file" else "does not exist"
    assert f"{tmp_path / name} {found}; a model is a directory with config.json and safetensors" in err


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere/at/all", "~nobody-of-this-name/model", "a/b/c"])
def test_no_such_model_by_a_relative_name(tmp_path: Path, cli: RunCli, name: str) -> None:
    assert "does not exist" in refused(cli, "shard", name, "-o", tmp_path / "out")


@pytest.mark.parametrize("name", ["org/" + "n" * 300, "n" * 300, "bad..name/x", "-/-", "a b"])
def test_names_that_no_hub_id_can_have(tmp_path: Path, cli: RunCli, name: str) -> None:
    assert "is no directory" in refused(cli, "shard", "--output", tmp_path / "out", "--", name)


@pytest.mark.parametrize("command", ["shard", "quantize", "verify", "merge"])
def test_every_command_refuses_alike(
    llama: Path, text: Path, tmp_path: Path, cli: RunCli, command: str
) -> None:
    lora = small(tmp_path / "lora")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{module}.lora_A.weight": torch.ones(1, 128), f"{module}.lora_B.weight": torch.ones(128, 1)}
    save_file(pair, lora / "adapter_model.safetensors")
    rest: dict[str, list[str | Path]] = {
        "shard": ["-o", tmp_path / "out"],
        "quantize": ["-o", tmp_path / "out", "--method", "rtn"],
        "verify": ["--reference", llama, "--text", text],
        "merge": ["-o", tmp_path / "out", "-a", lora],
    }
    assert "does not exist" in refused(cli, command, tmp_path / "nowhere", *rest[command])
    broken = shutil.copytree(llama, tmp_path / "broken")
    truncated(broken)
    err = refused(cli, command, broken, *rest[command])
    assert f"{broken}/model.safetensors is not a whole safetensors file" in err
    assert not (tmp_path / "out").exists()


def cached(cache: Path, model: Path, revision: str = "0123456789abcdef" * 2 + "01234567") -> Path:
    """Lays a model into a Hub cache as `org/tiny`, the way huggingface_hub does: links to blobs."""
    repository = cache / "models--org--tiny"
    snapshot = repository / "snapshots" / revision
    for directory in (repository / "refs", repository / "blobs", snapshot):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for file in model.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def offline(cache: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, for huggingface_hub reads its settings at import."""
    return subprocess.run(
        [sys.executable, "-m", "qexport", *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_hub_id_comes_from_the_cache(llama: Path, tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "cache", llama)
    before = {file.name: file.readlink() for file in snapshot.iterdir()}
    ran = offline(tmp_path / "cache", "shard", "org/tiny", "-o", tmp_path / "out")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert {file.name: file.readlink() for file in snapshot.iterdir()} == before
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert same_tensors(tmp_path / "out", llama)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["org/absent", "absent"])
def test_a_hub_id_that_is_not_cached(tmp_path: Path, name: str) -> None:
    (tmp_path / "cache").mkdir()
    ran = offline(tmp_path / "cache", "shard", name, "-o", tmp_path / "out")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: {name} is no directory, is not in the Hub cache")
    assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def same_tensors(one: Path, other: Path) -> bool:
    first, second = stored(one), stored(other)
    return first.keys() == second.keys() and all(
        first[name].dtype == tensor.dtype and torch.equal(first[name], tensor)
        for name, tensor in second.items()
    )


def stored(model: Path) -> dict[str, torch.Tensor]:
    """What the library reads from a directory's files."""
    return {n: t for file in model.glob("*.safetensors") for n, t in load_file(file).items()}


def load(model: Path) -> Any:
    """transformers' model; every tensor of it must have come from the files."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
    return loaded[0].eval()


def test_shards_are_what_transformers_loads(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    out = tmp_path / "out"
    code, said, err = cli("shard", llama, "-o", out, "--max-shard-size", "50KB")
    shards = sorted(out.glob("*.safetensors"))
    assert (code, said) == (0, f"{out}: {len(shards)} files, 673 KB\n")
    large = [n for n, t in stored(llama).items() if t.nbytes > 50_000]
    assert len(large) == 7
    assert err.splitlines() == [
        f"note: {EMBEDDING} (81.9 KB) and 6 more tensors are larger than the shard size 50 KB: "
        "each gets a file of its own"
    ]
    assert [file.name for file in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    for file in shards:
        held = load_file(file)
        assert sum(t.nbytes for t in held.values()) <= 50_000 or len(held) == 1
    assert same_tensors(out, llama)
    assert torch.equal(logits(load(out), tokens()), logits(load(llama), tokens()))


def test_the_index_is_the_one_that_transformers_writes(llama: Path, tmp_path: Path) -> None:
    # above the largest tensor, so that both plans are the same
    load(llama).save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    qexport.shard(tmp_path / "theirs", tmp_path / "ours", ShardSpec(max_shard_size=100_000))
    ours, theirs = (json.loads((tmp_path / n / INDEX_FILE).read_text()) for n in ("ours", "theirs"))
    assert len(set(ours["weight_map"].values())) > 5
    assert ours == theirs


def test_one_file_needs_no_index_and_shards_come_together_again(llama: Path, tmp_path: Path) -> None:
    parts = qexport.shard(llama, tmp_path / "parts", ShardSpec(max_shard_size=30_000))
    whole = qexport.shard(tmp_path / "parts", tmp_path / "whole")
    assert list(parts.stored) == list(whole.stored)
    assert not (tmp_path / "whole" / INDEX_FILE).exists()
    assert [file.name for file in (tmp_path / "whole").glob("*.safetensors")] == [SINGLE_FILE]
    assert same_tensors(tmp_path / "whole", llama)


def test_small_files_are_carried_byte_for_byte_and_others_stay(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    # odd line ends and no text at all: nothing may be rewritten on the way
    (model / "modeling_x.py").write_bytes(b"raise SystemExit('run')\r\n")
    (model / "tokenizer.model").write_bytes(bytes(range(256)))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_bytes(b"{{ x }}\r\n")
    (model / "NOTICE.txt").write_bytes(b"")
    kept = {file.relative_to(model).as_posix() for file in model.rglob("*") if file.is_file()}
    kept -= {"config.json", SINGLE_FILE}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"} < kept
    for name in ("optimizer.pt", "README.md", "training_args.bin", "trainer_state.json", "x.gguf"):
        (model / name).write_bytes(b"stays")
    (model / "checkpoint-5").mkdir()
    (model / "checkpoint-5" / "tokenizer.json").write_bytes(b"{}")
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    out = tmp_path / "out"
    qexport.shard(model, out)
    written = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert written == kept | {"config.json", SINGLE_FILE, "qexport.json"}
    assert [name for name in kept if (out / name).read_bytes() != (model / name).read_bytes()] == []
    assert json.loads((out / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    assert before == {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    assert AutoTokenizer.from_pretrained(out)("a small").input_ids == (
        AutoTokenizer.from_pretrained(model)("a small").input_ids
    )


def test_the_manifest_tells_every_files_hash(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qexport.shard(llama, out, ShardSpec(max_shard_size=100_000))
    recorded = json.loads((out / "qexport.json").read_text())["files"]
    found = {
        file.relative_to(out).as_posix(): {
            "size": file.stat().st_size,
            "blake3": blake3(file.read_bytes()).hexdigest(),
        }
        for file in out.rglob("*")
        if file.name != "qexport.json"
    }
    assert INDEX_FILE in found
    assert recorded == found


def test_what_is_carried_is_also_fetched_from_the_hub(tmp_path: Path) -> None:
    names = [
        "COPYING",
        "LICENCE.md",
        "LICENSE",
        "NOTICE",
        "USE_POLICY.md",
        "added_tokens.json",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "preprocessor_config.json",
        "processor_config.json",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.bpe",
        "vocab.json",
        "vocab.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.as_posix() for file in sidecar_files(tmp_path)] == names
    assert list(filter_repo_objects(names, allow_patterns=MODEL_FILES)) == names


def test_a_quantized_model_keeps_its_second_config(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    assert cli("quantize", llama, "-o", tmp_path / "rtn", "--method", "rtn", "--quiet")[0] == 0
    assert cli("shard", tmp_path / "rtn", "-o", tmp_path / "out", "--max-shard-size", "50KB", "-q")[0] == 0
    assert same_tensors(tmp_path / "out", tmp_path / "rtn")
    name = "quantize_config.json"  # vLLM and older AutoGPTQ read this one
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "rtn" / name).read_bytes()


def test_things_that_only_look_like_weights_do_no_harm(tmp_path: Path, cli: RunCli) -> None:
    model = small(tmp_path / "model")
    (model / "old.safetensors").mkdir()
    (model / "gone.safetensors").symlink_to("nowhere")
    assert cli("shard", model, "-o", tmp_path / "out", "-q") == (0, "", "")


def test_a_single_file_and_an_index_side_by_side(llama: Path, tmp_path: Path, cli: RunCli) -> None:
    """A directory saved into twice: what is exported must be what transformers runs, or be refused."""
    model = tmp_path / "model"
    qexport.shard(llama, model, ShardSpec(max_shard_size=100_000))
    tiny_model(tmp_path / "later", seed=1)
    shutil.copyfile(tmp_path / "later" / SINGLE_FILE, model / SINGLE_FILE)
    theirs = logits(load(model), tokens())
    code, _, err = cli("shard", model, "-o", tmp_path / "out")
    if code == 2:
        assert INDEX_FILE in err
        return
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), theirs)


def test_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    model = small(tmp_path / "model")
    save_file({f"t{n}": torch.full((100,), n) for n in range(200)}, model / SINGLE_FILE)
    limited = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)); "
        "os.execv(sys.executable, [sys.executable, '-m', 'qexport', *sys.argv[1:]])"
    )
    call = ["shard", str(model), "-o", str(tmp_path / "out"), "--max-shard-size", "800B", "-q"]
    ran = subprocess.run([sys.executable, "-c", limited, *call], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert same_tensors(tmp_path / "out", model)


def tied(directory: Path, embedding: bool, head: bool, differ: bool, **options: Any) -> Path:
    """A model under tie_word_embeddings=true that stores one name of the pair, or both."""
    model = tiny_model(directory, **options)
    assert json.loads((model / "config.json").read_text()).get("tie_word_embeddings", True)
    name = next(name for name in stored(model) if name.endswith(("embed_tokens.weight", "wte.weight")))
    matrix = stored(model)[name]
    other = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(8)).half() if differ else matrix
    edit_weights(model, **{name: matrix if embedding else None})
    if head:
        edit_weights(model, **{HEAD: other.clone()})
    return model


@pytest.mark.parametrize(
    ("held", "differ", "kept"),
    [
        ((True, False), False, {EMBEDDING}),
        ((False, True), False, {EMBEDDING}),
        ((True, True), False, {EMBEDDING}),
        ((True, True), True, {EMBEDDING, HEAD}),
    ],
    ids=["embedding only", "head only", "both equal", "both different"],
)
def test_tied_pairs(tmp_path: Path, held: tuple[bool, bool], differ: bool, kept: set[str]) -> None:
    model = tied(tmp_path / "model", *held, differ)
    qexport.shard(model, tmp_path / "out", ShardSpec(max_shard_size=100_000))
    assert {EMBEDDING, HEAD} & stored(tmp_path / "out").keys() == kept
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), logits(load(model), tokens()))


def test_a_tie_that_the_config_denies_is_none(tmp_path: Path) -> None:
    model = tied(tmp_path / "model", True, True, differ=False)
    edit_json(model / "config.json", tie_word_embeddings=False)
    qexport.shard(model, tmp_path / "out")
    assert {EMBEDDING, HEAD} <= stored(tmp_path / "out").keys()


@pytest.mark.parametrize("held", [(True, False), (False, True), (True, True)])
def test_tied_pairs_of_gpt2(tmp_path: Path, held: tuple[bool, bool]) -> None:
    """Its embedding has another name, which must be the one written."""
    model = tied(tmp_path / "model", *held, differ=False, model_type="gpt2", n_positions=128)
    qexport.shard(model, tmp_path / "out")
    assert {n for n in stored(tmp_path / "out") if "wte" in n or "embed" in n or "head" in n} == {
        "transformer.wte.weight"
    }
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), logits(load(model), tokens()))
