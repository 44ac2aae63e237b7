"""merge against hostile, broken and interrupted inputs: one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qexport
from qexport.errors import CorruptFileError, QexportError, StorageError
from qexport.events import Advanced, Event, Finished, Noted, Started
from qexport.modeling.skeleton import quiet_transformers
from qexport.specs import MergeSpec
from tests.adapters import make_adapter
from tests.conftest import RunCli
from tests.tiny import edit_json, edit_weights, tiny_adapter, tiny_model

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
LONG = "x" * 70_000
BOMB = "((.|.)+)+$^"
_PROBLEM_SECONDS = 30


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    """A merge that waits for ever, or whose regular expression does, fails its own test only."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"still at work after {_PROBLEM_SECONDS} s")

    quiet_transformers()  # its bars, while adapters are made, go to stderr too
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_PROBLEM_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def lora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `llama` in good order. Not to be changed."""
    return tiny_adapter(tmp_path_factory.mktemp("lora") / "adapter", llama)


@pytest.fixture
def adapter(lora: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(lora, tmp_path / "adapter")


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / ADAPTER)


def change(adapter: Path, **changes: torch.Tensor | None) -> None:
    """Tensors added, replaced or, for None, taken out; `A=` and `B=` are those of the first q_proj."""
    held = tensors(adapter)
    for name, tensor in changes.items():
        key = f"{Q_PROJ}.lora_{name}.weight" if name in "AB" else name
        if tensor is None:
            held.pop(key)
        else:
            held[key] = tensor
    save_file(held, adapter / ADAPTER)


def content(*places: Path) -> dict[str, bytes]:
    files = (file for place in places for file in [place, *place.rglob("*")] if file.is_file())
    return {str(file): file.read_bytes() for file in files}


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if "partial" in path.name or path == out)


class Refusal:
    """Merges that must be refused: one line on stderr, exit code 2, no output, the inputs as they were."""

    def __init__(self, cli: RunCli, base: Path, out: Path) -> None:
        self.cli, self.base, self.out = cli, base, out

    def __call__(self, *adapters: Path | str, options: tuple[str, ...] = (), longest: int = 4000) -> str:
        places = [Path(adapter) for adapter in adapters if len(str(adapter)) < 200]
        before, threads = content(self.base, *places), threading.active_count()
        named = [word for adapter in adapters for word in ("-a", adapter)]
        code, said, err = self.cli("merge", self.base, *named, "-o", self.out, *options)
        assert (code, said) == (2, ""), err
        told = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert len(told) == 1, err
        assert told[0].startswith("error: ")
        assert "Traceback" not in err
        assert told[0].isprintable()
        assert len(told[0]) < longest
        assert beside(self.out) == []
        assert content(self.base, *places) == before
        assert threading.active_count() == threads
        return told[0]


@pytest.fixture
def refused(cli: RunCli, llama: Path, tmp_path: Path) -> Refusal:
    return Refusal(cli, llama, tmp_path / "out")


# --- keys ---------------------------------------------------------------------------------------------


def test_every_key_that_matches_nothing_is_told_with_the_nearest(adapter: Path, refused: Refusal) -> None:
    renamed = {
        f"base_model.model.model.layers.{n + 2}.mlp.down_prj.lora_{side}.weight": torch.zeros(shape)
        for n in range(60)
        for side, shape in (("A", (4, 256)), ("B", (128, 4)))
    }
    save_file({**tensors(adapter), **renamed}, adapter / ADAPTER)
    err = refused(adapter, longest=20_000)
    assert "60 of its 64 modules are not in" in err
    for n in range(60):
        assert f"model.layers.{n + 2}.mlp.down_prj (nearest: model.layers.1.mlp.down_proj)" in err


def test_thousands_of_strange_keys_are_told_soon(cli: RunCli, tmp_path: Path) -> None:
    """A mixture of experts against another one: comparing every name with every other takes hours."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "mixtral"}')
    held = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight": torch.zeros(2, 2)
        for layer in range(24)
        for expert in range(64)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    save_file(held, base / "model.safetensors")
    adapter.mkdir()
    (adapter / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    made = {}
    for name in held:
        stem = name.removesuffix(".weight").replace("mlp.experts", "moe.experts")
        made[f"base_model.model.{stem}.lora_A.weight"] = torch.zeros(1, 2)
        made[f"base_model.model.{stem}.lora_B.weight"] = torch.zeros(2, 1)
    save_file(made, adapter / ADAPTER)
    begun = time.monotonic()
    err = Refusal(cli, base, out)(adapter, longest=1 << 20)
    assert time.monotonic() - begun < 20
    assert "4608 of its 4608 modules are not in" in err
    assert "model.layers.23.moe.experts.63.up_proj (nearest: model.layers.23.mlp.experts.63.up_proj)" in err


@pytest.mark.parametrize(
    "key",
    [
        *("", ".", "..", " ", "weight", "base_model.model.", "lora_A.weight", ".lora_A.weight"),
        *("base_model.model.x..weight", "größe.語.weight", "a\nb.weight", "\x1b[31mred.weight", "a\x00b"),
        *("../../etc/passwd", "\u2028.\u202e", LONG, LONG + ".weight", LONG + ".lora_A.weight", "." * 5000),
        *("base_layer.weight", "..lora_magnitude_vector", "x.modules_to_save.", ".original_module."),
        "y.trainable_tokens_delta",
    ],
    ids=lambda key: repr(key)[:30],
)
def test_keys_that_are_garbage(adapter: Path, refused: Refusal, key: str) -> None:
    change(adapter, **{key: torch.zeros(4, 128)})
    err = refused(adapter, longest=100_000)
    shown = key.removeprefix("base_model.model.").split(".lora_")[0].split(".train")[0]
    assert "made for another base" in err or "has only lora_A" in err or "has neither lora_A nor" in err, err
    assert not shown.isascii() or not shown.isprintable() or shown.removesuffix(".weight")[:200] in err


def test_a_key_that_stands_twice_once_the_prefix_is_gone(adapter: Path, refused: Refusal) -> None:
    held = tensors(adapter)
    key = f"{Q_PROJ}.lora_B.weight"
    change(adapter, **{key.removeprefix("base_model.model."): held[key] + 1})
    assert "model.layers.0.self_attn.q_proj.lora_B.weight stands twice" in refused(adapter)


# --- factors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"A": None}, "has only lora_B of model.layers.0.self_attn.q_proj; both matrices of every pair"),
        ({"B": None}, "has only lora_A of model.layers.0.self_attn.q_proj; both matrices of every pair"),
        ({"A": torch.zeros(3, 128)}, "lora_A has 3, lora_B 4"),
        ({"A": torch.zeros(3, 128), "B": torch.zeros(128, 3)}, "has rank 3, its config says 4"),
        ({"A": torch.zeros(512)}, "has [512] and [128, 4]; matrices of two sides"),
        ({"A": torch.tensor(1.0)}, "has [] and [128, 4]; matrices of two sides"),
        ({"B": torch.zeros(1, 128, 4)}, "has [4, 128] and [1, 128, 4]; matrices of two sides"),
        ({"B": torch.zeros(0)}, "has [4, 128] and [0]; matrices of two sides"),
        ({"A": torch.zeros(0, 128), "B": torch.zeros(128, 0)}, "has rank 0, its config says 4"),
        ({"B": torch.zeros(0, 4)}, "[128, 128] in the base, [0, 128] in the adapter"),
        ({"B": torch.zeros(129, 4)}, "[128, 128] in the base, [129, 128] in the adapter"),
        ({"A": torch.zeros(4, 128, dtype=torch.int32)}, "lora_A.weight holds torch.int32; floats"),
        ({"B": torch.ones(128, 4, dtype=torch.bool)}, "lora_B.weight holds torch.bool; floats"),
        ({"B": torch.ones(128, 4, dtype=torch.uint64)}, "lora_B.weight holds torch.uint64; floats"),
    ],
)
def test_factors_that_are_none(adapter: Path, refused: Refusal, changes: dict[str, Any], told: str) -> None:
    change(adapter, **changes)
    assert told in refused(adapter)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.bfloat16])
def test_factors_of_any_float_are_their_values(
    adapter: Path, llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    held = {name: tensor.to(dtype) for name, tensor in tensors(adapter).items()}
    save_file(held, adapter / ADAPTER)
    qexport.merge(llama, [adapter], tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (held[f"{Q_PROJ}.lora_{side}.weight"].double() for side in "AB")
    expected = load_file(llama / "model.safetensors")[name].double() + 2 * b @ a
    found = load_file(tmp_path / "out" / "model.safetensors")[name].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_partitioned_run_is_recognised(adapter: Path, refused: Refusal) -> None:
    """ZeRO-3 leaves empty tensors where the values lay on other ranks."""
    save_file({name: torch.zeros(0) for name in tensors(adapter)}, adapter / ADAPTER)
    assert "an adapter saved from a partitioned run (ZeRO-3, FSDP) must be gathered first" in refused(adapter)


# --- values -------------------------------------------------------------------------------------------


def put(adapter: Path, key: str, value: float, dtype: torch.dtype | None = None) -> None:
    """One value of a tensor of the adapter."""
    held = tensors(adapter)
    name = next(name for name in held if key in name)
    held[name] = held[name].clone().to(dtype or held[name].dtype)
    held[name].view(-1)[-1] = value
    save_file(held, adapter / ADAPTER)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "lora_A"),
        ({}, "lora_B"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"trainable_token_indices": [3, 7]}, "trainable_tokens_delta"),
        ({"modules_to_save": ["norm"]}, "norm.weight"),
    ],
    ids=["A", "B", "magnitude", "token rows", "saved"],
)
def test_nan_in_an_adapter_is_named(
    llama: Path, tmp_path: Path, refused: Refusal, options: dict[str, Any], key: str, value: float
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama, **options)
    put(adapter, key, value)
    err = refused(adapter)
    assert f"error: {adapter} has NaN or infinity in " in err
    assert key in err


def test_nan_in_a_bias_and_in_8_bit_floats(
    tmp_path: Path, adapter: Path, cli: RunCli, refused: Refusal
) -> None:
    put(adapter, "q_proj.lora_B", torch.nan, torch.float8_e4m3fn)
    assert "self_attn.q_proj.lora_B.weight" in refused(adapter)
    base = tiny_model(tmp_path / "base", model_type="qwen2")
    biased = tiny_adapter(tmp_path / "biased", base, bias="lora_only")
    put(biased, "bias", torch.nan)
    assert "self_attn.q_proj.base_layer.bias" in Refusal(cli, base, tmp_path / "out")(biased)


@pytest.mark.parametrize(
    ("name", "also"),
    [
        ("model.layers.0.mlp.gate_proj.weight", ()),
        ("model.layers.1.self_attn.q_proj.weight", ()),
        ("model.embed_tokens.weight", ()),
        ("model.embed_tokens.weight", ("lm_head", "q_proj")),
        ("model.norm.weight", ()),
    ],
    ids=["untouched", "touched", "tied", "tied and touched", "a vector"],
)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_nan_in_the_base_is_the_bases(
    tmp_path: Path, llama: Path, cli: RunCli, name: str, also: tuple[str, ...], value: float
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama, modules=also or ("q_proj", "down_proj"))
    copies = [key for key in tensors(adapter) if "base_layer" in key]  # would replace what the base has
    change(adapter, **dict.fromkeys(copies))
    base = shutil.copytree(llama, tmp_path / "base")
    held = load_file(base / "model.safetensors")[name]
    held.view(-1)[held.numel() // 2] = value
    edit_weights(base, **{name: held})
    err = Refusal(cli, base, tmp_path / "out")(adapter)
    assert err.startswith(f"error: {base} has NaN or infinity in {name}")
    assert str(adapter) not in err


@pytest.mark.parametrize("factor", [3e6, 1e18, 3e38])
def test_a_merge_that_leaves_fp16s_range_is_told(adapter: Path, refused: Refusal, factor: float) -> None:
    held = tensors(adapter)
    change(adapter, A=torch.full((4, 128), factor), B=held[f"{Q_PROJ}.lora_B.weight"])
    err = refused(adapter)
    assert "the merged model has NaN or infinity in model.layers.0.self_attn.q_proj.weight" in err


@pytest.mark.parametrize("alpha", [1e30, 1e39, 1e200, -1e308, 10**400], ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scale_beyond_all_numbers_is_never_written(
    tmp_path: Path, cli: RunCli, dtype: torch.dtype, alpha: float
) -> None:
    base = tiny_model(tmp_path / "base", dtype=dtype)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    edit_json(adapter / CONFIG, lora_alpha=alpha)
    code, _, err = cli("merge", base, "-a", adapter, "-o", tmp_path / "out")
    if code == 0:  # in range after all
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert all(bool(tensor.float().isfinite().all()) for tensor in written.values())
    else:
        assert code == 2, err
        assert len(err.splitlines()) == 1
        assert beside(tmp_path / "out") == []
        assert "lora_alpha" in err or "NaN or infinity in model.layers" in err


# --- adapter_config.json ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (None, "has no adapter_config.json"),
        (b"", "is not valid JSON"),
        (b"[]", "holds list, expected an object"),
        (b"null", "holds NoneType, expected an object"),
        (b'"LORA"', "holds str, expected an object"),
        (b'{"peft_type": "LORA"', "is not valid JSON"),
        (b'{"peft_type": "\xff"}', "is not valid JSON"),
        (b'{"peft_type": "\\ud800"}', "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"peft_type": "LORA", "lora_alpha": 1, "r": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"{}", "names no peft_type"),
        (b'{"peft_type": 1}', "names no peft_type"),
        (b'{"peft_type": ["LORA"]}', "names no peft_type"),
        (b'{"peft_type": {"LORA": 1}}', "names no peft_type"),
        (b'{"peft_type": ""}', "PEFT does not take"),
        (b'{"peft_type": "lora"}', "PEFT does not take"),
        (b'{"peft_type": "__class__"}', "PEFT does not take"),
        (b'{"peft_type": "\\u001b[31m\\n"}', "PEFT does not take"),
        (b'{"peft_type": "XLORA"}', "is a XLORA adapter and cannot be merged: it weighs its experts anew"),
        (b'{"peft_type": "LORA"}', "r is None; a rank of 1 or more"),
        (b'{"peft_type": "LORA", "r": 4}', "lora_alpha is None; a number"),
    ],
)
def test_configs_that_are_none(adapter: Path, refused: Refusal, raw: bytes | None, told: str) -> None:
    if raw is None:
        (adapter / CONFIG).unlink()
    else:
        (adapter / CONFIG).write_bytes(raw)
    assert told in refused(adapter)


def test_a_huge_config_is_not_read(adapter: Path, refused: Refusal) -> None:
    with (adapter / CONFIG).open("r+b") as file:
        file.truncate(1 << 30)
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code, _, err = refused.cli("merge", refused.base, "-a", adapter, "-o", refused.out)
        assert code == 2
        assert "has 1073741824 bytes, too many for JSON" in err
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # 256 MB, in KB
    finally:
        (adapter / CONFIG).unlink()


WRONG: list[tuple[dict[str, Any], str]] = [
    *[({"r": r}, "r is ") for r in (-1, 0, 1.5, "4", True, [4], {"q_proj": 4}, 10**300)],
    *[({"lora_alpha": a}, "lora_alpha is ") for a in ("8", True, [8], {"q": 8}, float("inf"), float("nan"))],
    *[({"rank_pattern": p}, "rank_pattern is ") for p in ([1], "q_proj", 3, True)],
    *[({"alpha_pattern": p}, "alpha_pattern is ") for p in ([1], "q_proj", 3, True)],
    *[({"rank_pattern": {"q_proj": v}}, "rank_pattern is ") for v in ("4", 0, None, 4.0, True, [4])],
    *[({"alpha_pattern": {"q_proj": v}}, "alpha_pattern is ") for v in ("4", None, True, [4], float("inf"))],
    ({"rank_pattern": {"q_proj": 10**400}}, "rank_pattern is "),
    ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern is "),
    ({"rank_pattern": {"": 3, ".*": 5}}, "its config says 5"),
    ({"rank_pattern": {"(": 4}}, "the pattern '(' is no regular expression"),
    ({"rank_pattern": {BOMB: 4}}, "takes too long"),
    ({"alpha_pattern": {BOMB: 4}}, "takes too long"),
    ({"alpha_pattern": {"(" * 5000 + ")" * 5000: 4}}, "pattern"),
    ({"alpha_pattern": {"(?:" * 3000 + "a{1000}" + "){1000}" * 3000: 4}}, "pattern"),
    *[({"modules_to_save": m}, "modules_to_save is ") for m in ("lm_head", 3, True, {"lm_head": 1}, [["a"]])],
    *[({"target_parameters": m}, "target_parameters is ") for m in ("experts", 3, {"experts": 1}, [1])],
    *[({"layer_replication": m}, "layer_replication is ") for m in ("0:1", 3, {"0": 1}, [0, 2])],
    *[({"layer_replication": [m]}, "layer_replication is ") for m in (["0", "2"], [2, 0], [-1, 1], [0, 3])],
    *[({"layer_replication": [m]}, "layer_replication is ") for m in ([0, 1, 2], [False, True], [0.0, 2.0])],
    ({"layer_replication": [[0, 10**30]]}, "layer_replication is "),
    *[({"use_dora": v}, "use_dora is ") for v in ("false", "no", [0], {"a": 1}, 2)],
    *[({"use_rslora": v}, "use_rslora is ") for v in ("false", [0], 3.5)],
    *[({"fan_in_fan_out": v}, "fan_in_fan_out is ") for v in ("false", [1], {"a": 1})],
    ({"ensure_weight_tying": "no"}, "ensure_weight_tying is "),
    ({"use_dora": True}, "is a DoRA without lora_magnitude_vector of model.layers.0"),
    *[({"init_lora_weights": i}, "") for i in ("pissa_niter_x", "magic", 7.5)],
    ({"init_lora_weights": "corda"}, "was initialised by corda"),
    ({"init_lora_weights": "loftq"}, "was initialised by loftq"),
    ({"alora_invocation_tokens": "x"}, "activated LoRA"),
    ({"arrow_config": {"top_k": 1}}, "routed by Arrow"),
    ({"kasa_config": "x"}, ""),
    ({"velora_config": 7}, ""),
]


@pytest.mark.parametrize(("changes", "told"), WRONG, ids=lambda value: str(value)[:60])
def test_fields_of_another_type(adapter: Path, refused: Refusal, changes: dict[str, Any], told: str) -> None:
    begun = time.monotonic()
    edit_json(adapter / CONFIG, **changes)
    assert told in refused(adapter, longest=20_000)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "changes",
    [
        *[{"bias": v} for v in (None, "none", 3, ["all"], {"a": 1})],
        *[{"target_modules": v} for v in (None, 3, "(", BOMB, {"a": 1}, [["a"]], [])],
        *[{"exclude_modules": v} for v in (3, "(", BOMB)],
        {"init_lora_weights": {"gaussian": 1}},
        {"base_model_name_or_path": ["x"]},
        {"base_model_name_or_path": "\x00\n../.."},
        {"task_type": 3},
        {"lora_dropout": "NaN"},
        {"megatron_config": {"a": 1}, "megatron_core": "os"},
        {"auto_mapping": {"base_model_class": "x", "parent_library": "os"}},
        {"unheard_of": {"deep": [1, 2]}},
        {"peft_version": -1},
    ],
    ids=lambda value: str(value)[:60],
)
def test_fields_that_do_not_matter_to_a_pair_are_let_be_or_refused(
    adapter: Path, llama: Path, tmp_path: Path, cli: RunCli, lora: Path, changes: dict[str, Any]
) -> None:
    """The pairs say all. Whatever else the config says, the result is the right one, or there is none."""
    content = {**json.loads((adapter / CONFIG).read_text()), **changes}
    (adapter / CONFIG).write_text(json.dumps(content))
    code, _, err = cli("merge", llama, "-a", adapter, "-o", tmp_path / "out")
    if code:
        assert (code, len(err.splitlines()), err[:7]) == (2, 1, "error: ")
        return
    qexport.merge(llama, [lora], tmp_path / "expected")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected")]
    assert written[0] == written[1]


def test_a_config_imports_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT imports the module that `megatron_core` names."""
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    adapter = make_adapter("olora", llama, tmp_path / "adapter")
    for config in ({"tensor_model_parallel_size": 1}, {"a": 1}):
        edit_json(adapter / CONFIG, megatron_config=config, megatron_core="hostile_module")
        with contextlib.suppress(QexportError):
            qexport.merge(llama, [adapter], tmp_path / "out", overwrite=True)
        assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        ([-1, 7], "names no token indices that could be: [-1, 7]"),
        (["3", 7], "names no token indices that could be"),
        ([3.0, 7.0], "names no token indices that could be"),
        ([True, False], "names no token indices that could be"),
        ("37", "names no token indices that could be"),
        (37, "names no token indices that could be"),
        ({"embed_tokens": 3}, "names no token indices that could be"),
        ({"embed_tokens": [3, -7]}, "names no token indices that could be"),
        ([[3], [7]], "names no token indices that could be"),
        ([3], "the trained rows of model.embed_tokens are [2, 128]; [1, 128], a row for each index"),
        ([3, 7, 9], "the trained rows of model.embed_tokens are [2, 128]; [3, 128]"),
        ([], "names no token indices that could be"),
        ({"a": [3, 7], "b": [5]}, "the trained rows of model.embed_tokens are [2, 128]"),
        ([3, 10**15], "nor the tokenizer has"),
        ([3, 10**30], "nor the tokenizer has"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_token_indices_that_are_none(
    llama: Path, tmp_path: Path, refused: Refusal, indices: Any, told: str
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", llama, trainable_token_indices=[3, 7])
    edit_json(adapter / CONFIG, trainable_token_indices=indices)
    assert told in refused(adapter)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("loha", {"r": -1}),
        ("loha", {"r": "x"}),
        ("loha", {"alpha": [1]}),
        ("loha", {"rank_pattern": [1]}),
        ("loha", {"rank_pattern": {BOMB: 4}}),
        ("loha", {"alpha_pattern": {BOMB: 4}}),
        ("loha", {"alpha_pattern": {"(": 4}}),
        ("loha", {"target_modules": BOMB}),
        ("loha", {"target_modules": "("}),
        ("loha", {"target_modules": 3}),
        ("loha", {"target_modules": []}),
        ("loha", {"target_modules": ["nothing"]}),
        ("loha", {"exclude_modules": BOMB}),
        ("loha", {"modules_to_save": [BOMB]}),
        ("loha", {"layers_to_transform": 0, "layers_pattern": BOMB}),
        ("loha", {"layers_to_transform": ["x"]}),
        ("ia3", {"feedforward_modules": BOMB, "target_modules": r".*(q_proj|down_proj)"}),
        ("ia3", {"feedforward_modules": ["o_proj"]}),
        ("ia3", {"feedforward_modules": 3}),
        ("vera", {"r": 0}),
        ("vera", {"r": 9}),
        ("vera", {"d_initial": "x"}),
        ("vera", {"projection_prng_key": "x", "save_projection": False}),
        ("oft", {"oft_block_size": 7}),
        ("oft", {"oft_block_size": 0}),
        ("oft", {"oft_block_size": -16}),
        ("oft", {"r": 10**9}),
        ("oft", {"oft_block_size": "16"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_configs_of_other_kinds_that_make_no_sense(
    made: Callable[[str], Path], tmp_path: Path, refused: Refusal, kind: str, changes: dict[str, Any]
) -> None:
    adapter = shutil.copytree(made(kind), tmp_path / "adapter")
    edit_json(adapter / CONFIG, **changes)
    refused(adapter, longest=20_000)  # all keys, where nothing is chosen


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Adapters of other kinds than LoRA, in good order, made once. Not to be changed."""
    root, known = tmp_path_factory.mktemp("made"), dict[str, Path]()

    def make(kind: str) -> Path:
        if kind not in known:
            known[kind] = make_adapter(kind, llama, root / kind)
        return known[kind]

    return make


@pytest.mark.parametrize("kind", ["loha", "ia3", "vera", "oft"])
@pytest.mark.parametrize("damage", ["nan", "missing", "strange", "shape", "integer", "scalar", "empty"])
def test_tensors_of_other_kinds_that_are_damaged(
    made: Callable[[str], Path], tmp_path: Path, refused: Refusal, kind: str, damage: str
) -> None:
    adapter = shutil.copytree(made(kind), tmp_path / "adapter")
    held = tensors(adapter)
    name = next(name for name in held if "layers.0" in name)
    changes: dict[str, torch.Tensor | None] = {
        "nan": torch.full_like(held[name], torch.nan),
        "missing": None,
        "shape": torch.zeros(3, 5, 7),
        "integer": held[name].to(torch.int32),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0),
        "strange": torch.zeros(2, 2),
    }
    change(adapter, **{"base_model.model.strange.key" if damage == "strange" else name: changes[damage]})
    refused(adapter)


# --- files --------------------------------------------------------------------------------------------


def header(raw: bytes) -> bytes:
    return len(raw).to_bytes(8, "little") + raw


LIES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "seven bytes": lambda raw: raw[:7],
    "half": lambda raw: raw[: len(raw) // 2],
    "a byte less": lambda raw: raw[:-1],
    "a byte more": lambda raw: raw + b"\0",
    "long header": lambda raw: (1 << 62).to_bytes(8, "little") + raw[8:],
    "no json": lambda raw: header(b"{'a': 1}" + b" " * 100),
    "a list": lambda raw: header(b"[]"),
    "wrong offsets": lambda raw: raw.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
    "huge shape": lambda raw: header(
        b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,0]}}'
    ),
    "negative shape": lambda raw: header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'),
    "unknown dtype": lambda raw: header(b'{"a":{"dtype":"F3","shape":[0],"data_offsets":[0,0]}}'),
    "twice": lambda raw: header(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 2 + b'"b":1}'),
    "html": lambda raw: b"<!DOCTYPE html><html>404</html>" * 10,
    "lfs": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(adapter: Path, refused: Refusal, lie: str) -> None:
    file = adapter / ADAPTER
    file.write_bytes(LIES[lie](file.read_bytes()))
    assert f"{file} is not a whole safetensors file" in refused(adapter)


def test_no_tensors(adapter: Path, refused: Refusal) -> None:
    (adapter / ADAPTER).write_bytes(header(b"{}"))
    assert "holds no tensors" in refused(adapter)


class _Runs:
    """What a hostile pickle is made of."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def tar_format(held: dict[str, torch.Tensor]) -> bytes:
    """The outside of PyTorch 0.1's format: a tar of pickles."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            raw = pickle.dumps({"protocol_version": 1000})
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return stream.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


Pickles = dict[str, Callable[[dict[str, torch.Tensor], Path], bytes]]
PICKLES: Pickles = {
    "code": lambda held, mark: saved({**held, "x": _Runs(mark)}),
    "plain pickle of code": lambda held, mark: pickle.dumps(_Runs(mark)),
    "old code": lambda held, mark: saved({"x": _Runs(mark)}, _use_new_zipfile_serialization=False),
    "list": lambda held, mark: saved(list(held.values())),
    "nested": lambda held, mark: saved({"state_dict": held}),
    "numbers for names": lambda held, mark: saved(dict(enumerate(held.values()))),
    "numbers for tensors": lambda held, mark: saved(dict.fromkeys(held, 1.0)),
    "tensor": lambda held, mark: saved(next(iter(held.values()))),
    "none": lambda held, mark: saved(None),
    "empty": lambda held, mark: saved({}),
    "tar": lambda held, mark: tar_format(held),
    "half": lambda held, mark: saved(held)[:5000],
    "no bytes": lambda held, mark: b"",
    "text": lambda held, mark: b"hello",
    "sparse": lambda held, mark: saved({name: tensor.to_sparse() for name, tensor in held.items()}),
    "meta": lambda held, mark: saved({name: tensor.to("meta") for name, tensor in held.items()}),
    "a petabyte": lambda held, mark: saved({n: torch.zeros(1).expand(1 << 24, 1 << 24) for n in held}),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning")
def test_pickles_that_are_no_adapter(adapter: Path, tmp_path: Path, refused: Refusal, kind: str) -> None:
    raw = PICKLES[kind](tensors(adapter), tmp_path / "mark")
    (adapter / ADAPTER).unlink()
    (adapter / "adapter_model.bin").write_bytes(raw)
    assert str(adapter) in refused(adapter)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("how", ["views", "old format", "parameters", "shared"])
def test_pickles_of_tensors_in_any_form(
    adapter: Path, llama: Path, lora: Path, tmp_path: Path, how: str
) -> None:
    held: dict[str, torch.Tensor] = tensors(adapter)
    if how == "views":
        held = {name: tensor.t().contiguous().t() for name, tensor in held.items()}
        assert not any(tensor.is_contiguous() for tensor in held.values())
    elif how == "parameters":
        held = {name: torch.nn.Parameter(tensor) for name, tensor in held.items()}
    elif how == "shared":  # all are cut out of one storage
        whole = torch.cat([tensor.reshape(-1) for tensor in held.values()])
        sizes = [tensor.numel() for tensor in held.values()]
        cut = torch.split(whole, sizes)
        held = {name: part.view(old.shape) for (name, old), part in zip(held.items(), cut, strict=True)}
    options = {"_use_new_zipfile_serialization": False} if how == "old format" else {}
    (adapter / ADAPTER).unlink()
    (adapter / "adapter_model.bin").write_bytes(saved(held, **options))
    qexport.merge(llama, [adapter], tmp_path / "out")
    qexport.merge(llama, [lora], tmp_path / "expected")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected")]
    assert written[0] == written[1]


def test_symlinks_are_followed_as_the_hub_cache_needs_it(
    adapter: Path, llama: Path, lora: Path, tmp_path: Path, refused: Refusal
) -> None:
    blob = tmp_path / "blob"
    (adapter / ADAPTER).rename(blob)
    (adapter / ADAPTER).symlink_to("../blob")
    link = tmp_path / "link"
    link.symlink_to(adapter)
    qexport.merge(llama, [link], tmp_path / "linked")
    qexport.merge(llama, [lora], tmp_path / "expected")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("linked", "expected")]
    assert written[0] == written[1]
    blob.unlink()
    assert "has no adapter_model.safetensors" in refused(adapter)
    (adapter / ADAPTER).unlink()
    (adapter / ADAPTER).symlink_to(ADAPTER)
    assert "has no adapter_model.safetensors" in refused(adapter)
    (adapter / ADAPTER).unlink()
    (adapter / ADAPTER).symlink_to("/dev/zero")
    assert "has no adapter_model.safetensors" in refused(adapter)


def test_names_that_are_no_files(adapter: Path, refused: Refusal, lora: Path) -> None:
    (adapter / ADAPTER).unlink()
    (adapter / ADAPTER).mkdir()
    assert "has no adapter_model.safetensors" in refused(adapter)
    (adapter / ADAPTER).rmdir()
    os.mkfifo(adapter / ADAPTER)
    assert "has no adapter_model.safetensors" in refused(adapter)
    (adapter / CONFIG).unlink()
    (adapter / CONFIG).mkdir()
    assert "has no adapter_config.json" in refused(adapter)
    assert "is a file" in refused(lora / ADAPTER)
    for name in ("/" + "n" * 300, "/" + "n" * 300 + ":0.5", "/nowhere\nat all", "./a\x00b", f"{lora}:inf"):
        assert "write the result" not in refused(name)
    assert "the weight of" in refused(f"{lora}:1e")
    assert "the weight of" in refused(f"{lora}:nan")


def test_the_base_as_adapter_and_the_adapter_as_base(
    llama: Path, lora: Path, cli: RunCli, tmp_path: Path, refused: Refusal
) -> None:
    assert "has no adapter_config.json" in refused(llama)
    assert "is an adapter, not a model" in Refusal(cli, lora, tmp_path / "out")(lora)


def test_bases_of_another_size_or_kind(adapter: Path, cli: RunCli, tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
    gpt2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4}
    nearest = "model.layers.1.mlp.down_proj (nearest: model.layers.0.mlp.down_proj)"
    for name, options, told in (
        ("small", small, "4 of its 4 tensors have other shapes; model.layers."),
        ("shallow", {"num_hidden_layers": 1}, nearest),
        ("gpt2", gpt2, "4 of its 4 modules are not in"),
    ):
        base = tiny_model(tmp_path / name, **options)
        err = Refusal(cli, base, tmp_path / "out")(adapter)
        assert "was made for another base (it names " in err
        assert told in err


# --- interruptions ------------------------------------------------------------------------------------


def test_the_disk_is_full_in_the_middle(cli: RunCli, lora: Path, refused: Refusal) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        err = refused(lora)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"no space left while writing {refused.out}; nothing was written under that name" in err


@pytest.mark.parametrize("event", [Started, Advanced, Finished])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_listener_that_raises(
    llama: Path, lora: Path, tmp_path: Path, event: type[Event], error: type[BaseException]
) -> None:
    def fail(told: Event) -> None:
        if isinstance(told, event):
            raise error("enough")

    before = threading.active_count()
    with pytest.raises(error, match="enough"):
        qexport.merge(llama, [lora], tmp_path / "out", MergeSpec(max_shard_size=100_000), on_event=fail)
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


def test_a_listener_that_raises_at_a_note(llama: Path, lora: Path, tmp_path: Path) -> None:
    def fail(told: Event) -> None:
        if isinstance(told, Noted):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        qexport.merge(llama, [lora], tmp_path / "out", MergeSpec(max_shard_size=10), on_event=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_file_that_shrinks_while_it_is_read(llama: Path, lora: Path, tmp_path: Path, which: str) -> None:
    """The reading thread meets it; the caller hears of it."""
    base, adapter = shutil.copytree(llama, tmp_path / "base"), shutil.copytree(lora, tmp_path / "adapter")
    file = base / "model.safetensors" if which == "base" else adapter / ADAPTER

    def cut(told: Event) -> None:
        if isinstance(told, Started):
            os.truncate(file, file.stat().st_size // 2)

    before = threading.active_count()
    with pytest.raises(CorruptFileError, match=f"{file} ends within tensor"):
        qexport.merge(base, [adapter], tmp_path / "out", on_event=cut)
    assert threading.active_count() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_file_that_goes_away_while_it_is_read(llama: Path, lora: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")

    def remove(told: Event) -> None:
        if isinstance(told, Started):
            (base / "model.safetensors").unlink()

    with pytest.raises(StorageError, match=r"cannot read .*: No such file"):
        qexport.merge(base, [lora], tmp_path / "out", on_event=remove)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


START = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, '-m', 'qexport', *sys.argv[1:]])"
)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of so many tensors that merging takes a while, and an adapter on some of them."""
    base, adapter = tmp_path_factory.mktemp("slow") / "base", tmp_path_factory.mktemp("slow") / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(30_000)]
    save_file({f"{name}.weight": torch.ones(4, 4) for name in names}, base / "model.safetensors")
    (adapter / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    pairs = {
        f"base_model.model.{name}.lora_{side}.weight": torch.ones(shape)
        for name in names[::50]
        for side, shape in (("A", (1, 4)), ("B", (4, 1)))
    }
    save_file(pairs, adapter / ADAPTER)
    return base, adapter


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGKILL, -9),
    ],
)
def test_a_merge_that_is_stopped_in_its_middle(
    slow: tuple[Path, Path], llama: Path, lora: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    base, adapter = slow
    out = tmp_path / "out"
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", START, "merge", str(base), "-a", str(adapter), "-o", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 50:
            if list(tmp_path.glob(".out.qexport-partial-*/*.safetensors")):
                process.send_signal(number)
                break
            time.sleep(0.002)
        _, err = process.communicate(timeout=50)
        if not out.exists():
            break
        shutil.rmtree(out)  # it was quicker: once more
    assert process.returncode == code, err
    assert not out.exists()
    left = [path.name for path in tmp_path.iterdir()]
    if number == signal.SIGKILL:
        assert len(left) == 1
        assert left[0].startswith(".out.qexport-partial-")
        qexport.merge(llama, [lora], out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    else:
        assert err == "error: interrupted; nothing unfinished was left behind\n"
        assert left == []
