"""Which type each tensor gets: held against what llama-quantize itself would do, mix by mix."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qexport.errors import SpecError
from qexport.formats.gguf.container import read_header
from qexport.formats.gguf.mixes import (
    MIXES,
    ModelFacts,
    fallback,
    mix_of,
    needs_importance,
    quantizable,
    tensor_type,
)
from qexport.grids.ggml.types import TYPES
from tests.llamacpp_c import base_gguf
from tests.tiny import tiny_model

# The output, the embeddings and the blocks whose types the rules change: shapes that tell all rules apart.
_WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "head_dim": 32,
}
MODELS: dict[str, Callable[[Path], Path]] = {
    "shared keys": partial(tiny_model, num_hidden_layers=17, num_key_value_heads=2, tied=False, **_WIDE),
    "own keys, tied": partial(tiny_model, num_hidden_layers=9, num_key_value_heads=8, tied=True, **_WIDE),
    "fused": partial(
        tiny_model, model_type="phi3", num_hidden_layers=8, tied=False, **{**_WIDE, "num_key_value_heads": 2}
    ),
    "eight experts": partial(
        tiny_model,
        model_type="mixtral",
        num_hidden_layers=8,
        num_key_value_heads=8,
        num_local_experts=8,
        tied=False,
        **_WIDE,
    ),
    "uneven rows": partial(
        tiny_model, num_hidden_layers=3, tied=False, **{**_WIDE, "intermediate_size": 352, "hidden_size": 288}
    ),
}
_LINE = re.compile(r"\] +(\S+) +- \[.*\], type = +(\w+), size =.*?(?:\((\w+)\))?\s*$", re.MULTILINE)


@pytest.fixture(scope="module", params=MODELS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp")
    home = tmp_path_factory.mktemp("mixes")
    return base_gguf(MODELS[request.param](home / "model"), home / "model.gguf")


def facts(settings: dict[str, Any], names: set[str]) -> ModelFacts:
    arch = settings["general.architecture"]
    return ModelFacts(
        arch,
        settings[f"{arch}.block_count"],
        settings[f"{arch}.attention.head_count"],
        settings[f"{arch}.attention.head_count_kv"],
        settings.get(f"{arch}.expert_count", 0),
        tied="output.weight" not in names,
    )


def theirs(file: Path, file_type: int) -> dict[str, str]:
    """What llama-quantize says that it would make of each tensor."""
    llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp")
    talk: list[str] = []
    llama_cpp.set_log_callback(lambda level, text: talk.append(text))
    options = llama_cpp.LlamaModelQuantizeParams()
    options.ftype, options.dry_run, options.nthread = file_type, True, 1
    llama_cpp.model_quantize(str(file), str(file.with_name("none.gguf")), options)
    return {name: (made or before).lower() for name, before, made in _LINE.findall("".join(talk))}


@pytest.mark.slow
def test_every_mix_is_llama_cpps(file: Path) -> None:
    header = read_header(file)
    known = facts(header.plain(), set(header.tensors))
    wrong = []
    for mix in MIXES.values():
        found = theirs(file, mix.file_type)
        assert found.keys() == header.tensors.keys()
        for name, tensor in header.tensors.items():
            ours = tensor_type(mix, name, tensor.shape, known)
            if not quantizable(name, tensor.shape):
                ours = tensor.type  # llama-quantize leaves them
            if found[name] != ours.name:
                wrong.append(f"{mix.name} {name}: {found[name]} there, {ours.name} here")
    assert not wrong, f"{len(wrong)}: " + "; ".join(wrong[:20])


def test_names_of_mixes() -> None:
    assert mix_of(" Q4_K_M ").name == "q4_k_m"
    assert mix_of("q4_k").name == "q4_k_m"
    with pytest.raises(SpecError, match="did you mean q4_k_m"):
        mix_of("q4_km")


def test_rows_that_do_not_fit_get_smaller_blocks() -> None:
    assert fallback(TYPES["q4_k"], 288).name == "q5_0"
    assert fallback(TYPES["iq3_s"], 288).name == "iq4_nl"
    assert fallback(TYPES["q6_k"], 172).name == "f16"
    assert fallback(TYPES["q6_k"], 512).name == "q6_k"


def test_which_need_importance() -> None:
    assert needs_importance(mix_of("iq2_xs"), "blk.0.ffn_up.weight", TYPES["iq2_xs"])
    assert needs_importance(mix_of("q2_k_s"), "blk.0.ffn_up.weight", TYPES["q2_k"])
    assert not needs_importance(mix_of("q2_k"), "blk.0.ffn_up.weight", TYPES["q2_k"])
    assert not needs_importance(mix_of("iq3_xxs"), "token_embd.weight", TYPES["iq3_xxs"])
    assert not needs_importance(mix_of("iq3_s"), "blk.0.ffn_up.weight", TYPES["iq3_s"])


def test_models_of_80_blocks_are_70b_if_keys_are_shared() -> None:
    def value(architecture: str, kv_heads: int) -> str:
        known = ModelFacts(architecture, 80, 64, kv_heads)
        return tensor_type(mix_of("q4_k_m"), "blk.20.attn_v.weight", (1024, 8192), known).name

    assert [value("llama", 8), value("llama", 64), value("qwen2", 8)] == ["q5_k", "q4_k", "q5_k"]
