"""Every architecture in the real llama.cpp: its logits are transformers'; and back, bit by bit."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qexport.checkpoint.checkpoint import Checkpoint, open_directory
from qexport.errors import CorruptFileError, UnsupportedModelError
from qexport.formats.gguf.rows import BY_TYPE
from qexport.formats.gguf.settings import computed_tensors, config_of, settings
from qexport.formats.gguf.slabs import SlabReader, read_tensor, slabs_of
from qexport.formats.gguf.tensors import COMPUTED, GgufTensor, Origin, gguf_tensors, origins, restore
from qexport.modeling.skeleton import build_skeleton
from tests.conftest import shared
from tests.tiny import edit_json, edit_weights, in_transformers, logits
from tests.zoo import LENGTH, VARIANTS, ZOO, zoo_model

gguf = pytest.importorskip("gguf")

Maker = Callable[[Path], Path]
IDS = torch.randint(0, 300, (1, LENGTH), generator=torch.Generator().manual_seed(3))
EXACT, GELU = 1e-5, 1e-3  # llama.cpp looks GELU up in a table of 16-bit floats
_GELU_TYPES = ("gemma", "gpt")


def case(model_type: str, **options: Any) -> Maker:
    return lambda directory: zoo_model(directory, model_type, **{"tied": False, **options})


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG, SHORT = [1.0 + 0.1 * n for n in range(16)], [1.0 + 0.05 * n for n in range(16)]
LONGROPE = {"long_factor": LONG, "short_factor": SHORT}
GEMMA: dict[str, Any] = {"tied": True, "head_dim": 32}
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS: dict[str, Any] = {**GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 8}
PAIR = [SLIDING, FULL]
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "head_dim": 32}
MOE3 = {**MOE, "num_experts": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}
GPT2: dict[str, Any] = {
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "num_key_value_heads": 4,
}
NEOX: dict[str, Any] = {"num_key_value_heads": 4}

UNSAYABLE = ("opt", "mistral", "qwen3_moe_with_dense_layer")  # mistral's window: llama.cpp passes over it
CASES: dict[str, Maker] = {
    **{name: make for name, make in {**ZOO, **VARIANTS}.items() if not name.startswith(UNSAYABLE)},
    "mistral_wide_window": case("mistral", sliding_window=2 * LENGTH),
    "llama_biases": case("llama", attention_bias=True, mlp_bias=True),
    "llama_large_heads": case("llama", tied=True, head_dim=64),
    "llama_linear": case("llama", **rope("linear", factor=4.0)),
    "llama_yarn": case("llama", **rope("yarn", **YARN)),
    "llama_yarn_attention": case("llama", **rope("yarn", **YARN, attention_factor=1.0)),
    "llama_yarn_mscale": case("llama", **rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.7)),
    "llama_llama3": case("llama", **rope("llama3", **LLAMA3)),
    "llama_longrope": case(
        "llama",
        max_position_embeddings=1024,
        **rope("longrope", **LONGROPE, original_max_position_embeddings=512),
    ),
    "mixtral_yarn": case("mixtral", num_local_experts=4, **MOE, **rope("yarn", **YARN)),
    "qwen2_yarn": case("qwen2", **rope("yarn", **YARN)),
    "qwen2_linear": case("qwen2", tied=True, **rope("linear", factor=4.0)),
    "qwen3_yarn": case("qwen3", head_dim=32, **rope("yarn", **YARN)),
    "qwen3_moe_yarn": case("qwen3_moe", **MOE3, **rope("yarn", **YARN)),
    "gemma_linear": case("gemma", **GEMMA, **rope("linear", factor=4.0)),
    "gemma2_yarn": case("gemma2", **WINDOWS, layer_types=PAIR, **rope("yarn", **YARN)),
    "gemma2_caps": case(
        "gemma2", **WINDOWS, layer_types=PAIR, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma2_full": case("gemma2", **WINDOWS, layer_types=[FULL] * 2),
    "gemma2_by_threes": case(
        "gemma2", **WINDOWS, layer_types=[SLIDING, SLIDING, FULL] * 2, num_hidden_layers=6
    ),
    "gemma3_by_sixes": case("gemma3_text", **WINDOWS, layer_types=None, num_hidden_layers=6),
    "gemma3_full": case("gemma3_text", **WINDOWS, layer_types=[FULL] * 2),
    "gemma3_cap_untied": case(
        "gemma3_text", **{**WINDOWS, "tied": False}, layer_types=PAIR, final_logit_softcapping=3.0
    ),
    "gemma3_linear": case(
        "gemma3_text",
        **WINDOWS,
        layer_types=PAIR,
        rope_parameters={
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    "phi3_part_turned": case("phi3", partial_rotary_factor=0.5),
    "phi3_long": case("phi3", original_max_position_embeddings=32, **rope("longrope", **LONGROPE)),
    "phi3_short": case(
        "phi3",
        max_position_embeddings=1024,
        original_max_position_embeddings=512,
        **rope("longrope", **LONGROPE),
    ),
    "gpt2_inner": case("gpt2", **{**GPT2, "tied": True}, n_inner=192),
    "gpt2_untied": case("gpt2", **GPT2),
    "gpt_neox_tied": case("gpt_neox", **{**NEOX, "tied": True}, rotary_pct=0.25),
    "gpt_neox_yarn": case("gpt_neox", **NEOX, **rope("yarn", **YARN, partial_rotary_factor=0.5)),
}


def opened(path: Path) -> tuple[Checkpoint, list[GgufTensor]]:
    checkpoint = open_directory(path)
    return checkpoint, gguf_tensors(checkpoint, build_skeleton(checkpoint))


def write(path: Path, out: Path) -> None:
    """An F32 file by gguf-py's own writer, without a vocabulary."""
    checkpoint, tensors = opened(path)
    metadata = settings(checkpoint.config)
    writer = gguf.GGUFWriter(out, BY_TYPE[checkpoint.config["model_type"]].arch)
    writer.add_tokenizer_model("no_vocab")
    add = {
        "u32": writer.add_uint32,
        "f32": writer.add_float32,
        "bool": writer.add_bool,
        "str": writer.add_string,
    }
    for key, typed in metadata.items():
        add[typed.kind](key, typed.value)
    for name, tensor in computed_tensors(checkpoint.config).items():
        writer.add_tensor(name, tensor.numpy())
    for each in tensors:
        value = read_tensor(each, checkpoint)
        assert tuple(value.shape) == each.shape
        assert (value.dtype, value.is_contiguous()) == (torch.float32, True)
        writer.add_tensor(each.name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# in a process of its own: where llama.cpp does not like a file it may end the process
LLAMACPP = """
import sys, numpy
from cyllama.llama import llama_cpp as lib
lib.disable_logging()
class Model(lib.LlamaModel):
    n_vocab = 320
ids = [int(word) for word in sys.argv[1].split(",")]
for name in sys.argv[2:]:
    print(name, file=sys.stderr, flush=True)
    options = lib.LlamaModelParams()
    options.use_extra_bufts = False
    model = Model(name, options)
    options = lib.LlamaContextParams()
    options.n_ctx = options.n_batch = 256
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = options.flash_attn_type = 0  # fp32, and no flash attention
    context = lib.LlamaContext(model, options)
    batch = lib.LlamaBatch(n_tokens=256, embd=0, n_seq_max=1)
    batch.add_sequence(ids, 0, True)
    context.decode(batch)
    numpy.save(name + ".npy", numpy.array([context.get_logits_ith(n) for n in range(len(ids))]))
"""


def run_llamacpp(files: list[Path]) -> dict[Path, torch.Tensor]:
    words = ",".join(str(number) for number in IDS[0].tolist())
    done = subprocess.run(
        [sys.executable, "-c", LLAMACPP, words, *map(str, files)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {file: torch.from_numpy(np.load(f"{file}.npy")) for file in files}


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata in plain values and tensors, by gguf-py's own reader."""
    reader = gguf.GGUFReader(file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(np.array(tensor.data)).reshape(*tensor.shape.tolist()[::-1])
        for tensor in reader.tensors
    }
    return metadata, tensors


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Made:
    """A case's model, its GGUF file, what transformers makes of it, and its logits [tokens, vocabulary]."""

    path: Path
    file: Path
    model: Any
    logits: torch.Tensor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Makes each case once."""
    home = tmp_path_factory.mktemp("made")

    @functools.cache
    def make(name: str) -> Made:
        path = CASES[name](home / name)
        write(path, home / f"{name}.gguf")
        model = in_transformers(path, dtype=torch.float32)
        return Made(path, home / f"{name}.gguf", model, logits(model, IDS)[0])

    return make


@pytest.mark.slow
def test_llama_cpp_computes_what_transformers_does(made: Callable[[str], Made]) -> None:
    pytest.importorskip("cyllama")
    cases = {name: made(name) for name in CASES}
    assert {case.model.config.model_type for case in cases.values()} == BY_TYPE.keys()
    found = run_llamacpp([case.file for case in cases.values()])
    off = {n: float((found[c.file] - c.logits).norm() / c.logits.norm()) for n, c in cases.items()}
    limits = {name: GELU if name.startswith(_GELU_TYPES) else EXACT for name in off}
    assert {name: value for name, value in off.items() if not value < limits[name]} == {}


def test_a_sliding_window_in_mistral_counts_within_itself_only(tmp_path: Path) -> None:
    """What `remarks` tells: up to the window all is the same."""
    pytest.importorskip("cyllama")
    path = ZOO["mistral"](tmp_path / "model")
    write(path, tmp_path / "model.gguf")
    ours = logits(in_transformers(path, dtype=torch.float32), IDS)[0]
    (theirs,) = run_llamacpp([tmp_path / "model.gguf"]).values()
    assert (theirs - ours)[:8].norm() < EXACT * ours[:8].norm()
    assert (theirs - ours)[16:].norm() > 0.1 * ours[16:].norm()


@pytest.mark.parametrize("name", CASES)
def test_back_to_transformers(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    """The same tensors under names that transformers loads, and a config that computes the same."""
    case = made(name)
    metadata, tensors = read(case.file)
    shapes = shapes_of(tensors)
    places = origins(metadata, shapes)
    restored = {}
    for tensor, origin in places.items():
        restored[tensor] = restore(tensors[origin.tensor], origin)
        assert tuple(restored[tensor].shape) == origin.shape
        if origin.expert is not None:  # its own matrix alone will do
            assert torch.equal(restored[tensor], restore(tensors[origin.tensor][origin.expert], origin))
    back = tmp_path / "back"
    back.mkdir()
    save_file(restored, back / "model.safetensors", metadata={"format": "pt"})
    factors = {tensor: tensors[tensor] for tensor in COMPUTED & tensors.keys()}
    config = config_of(metadata, shapes, factors)
    (back / "config.json").write_text(json.dumps(config))
    twin, kept = in_transformers(back, dtype=torch.float32), case.model.state_dict()
    assert twin.state_dict().keys() == kept.keys()
    plus_one = BY_TYPE[case.model.config.model_type].plus_one
    for key, value in twin.state_dict().items():
        if plus_one and "norm" in key:  # fp32 holds the 16-bit weight + 1 up to here
            assert (value - kept[key]).abs().max() < 1.2e-7
        else:
            assert torch.equal(value, kept[key]), key
    assert (logits(twin, IDS)[0] - case.logits).norm() < 1e-6 * case.logits.norm()
    told, again = settings(json.loads((case.path / "config.json").read_text())), settings(config)
    assert again.keys() == told.keys()
    for key, typed in told.items():
        same = pytest.approx(typed.value, rel=1e-6) if typed.kind == "f32" else typed.value
        assert (again[key].kind, again[key].value) == (typed.kind, same), key


@pytest.mark.parametrize("name", CASES)
def test_every_value_has_its_place(name: str, made: Callable[[str], Made]) -> None:
    checkpoint, tensors = opened(made(name).path)
    held = sum(checkpoint.info(tensor).numel for tensor in checkpoint.names())
    doubled = checkpoint.info("gpt_neox.embed_in.weight").numel if name == "gpt_neox_tied" else 0
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors) == held + doubled
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    reader = SlabReader(checkpoint)
    for tensor in tensors:
        whole = read_tensor(tensor, checkpoint)
        pieces = [reader.read(slab) for slab in slabs_of(tensor, 1000)]
        assert all(piece.numel() <= max(1000, tensor.shape[-1]) for piece in pieces)
        rows = whole.shape[-2] if whole.dim() > 1 else 1
        per_expert = -(-rows // max(1, 1000 // whole.shape[-1]))
        assert len(pieces) == per_expert * (len(whole) if whole.dim() == 3 else 1)
        assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), whole.reshape(-1))


def test_rows_that_are_already_quantized_can_be_brought_to_order(tmp_path: Path) -> None:
    checkpoint, tensors = opened(ZOO["llama"](tmp_path / "model"))
    by_name = {tensor.name: tensor for tensor in tensors}
    for kind, leaf, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        tensor = by_name[f"blk.0.{kind}.weight"]
        weight = checkpoint.read(f"model.layers.0.self_attn.{leaf}.weight").float()
        order = tensor.row_order()
        assert order is not None
        assert torch.equal(read_tensor(tensor, checkpoint), weight[order])
        # by hand: rows 0 and 16 of a head of 32 are a rotary pair, and become neighbours
        assert order[:4].tolist() == [0, 16, 1, 17]
        assert (tensor.heads, tensor.order, tensor.kind) == (heads, "rotary", kind)
    assert by_name["blk.1.attn_v.weight"].row_order() is None
    assert by_name["token_embd.weight"].kind == "token_embd"


def test_experts_that_lie_fused_are_read_as_those_that_do_not(tmp_path: Path) -> None:
    one_by_one, fused = (
        opened(make(tmp_path / name))
        for name, make in (("one", ZOO["mixtral"]), ("fused", VARIANTS["mixtral_fused"]))
    )
    assert [tensor.name for tensor in one_by_one[1]] == [tensor.name for tensor in fused[1]]
    for left, right in zip(one_by_one[1], fused[1], strict=True):
        assert torch.equal(read_tensor(left, one_by_one[0]), read_tensor(right, fused[0]))
    gate = next(tensor for tensor in fused[1] if tensor.kind == "ffn_up_exps")
    assert gate.shape == (4, 256, 128)
    assert [(p.expert, p.source_expert, p.rows) for p in gate.parts][1] == (1, 1, slice(256, 512))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = ZOO["llama"](tmp_path / "model")
    stranger = "model.layers.0.self_attn.sinks"
    edit_weights(path, **{stranger: torch.zeros(4)})
    with pytest.raises(UnsupportedModelError, match=rf"{stranger} has no name in a GGUF file of arch"):
        opened(path)
    edit_weights(path, **{stranger: None, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    opened(path)  # old checkpoints hold it, and nobody reads it
    edit_weights(path, **{"model.norm.weight": torch.ones(64)})
    with pytest.raises(CorruptFileError, match=r"model.norm.weight is \[64\], its config.json says \[128\]"):
        opened(path)
    edit_weights(path, **{"model.norm.weight": None})
    with pytest.raises(CorruptFileError, match=r"lacks model.norm.weight"):
        opened(path)


def test_gemma_has_no_head_of_its_own(tmp_path: Path) -> None:
    path = ZOO["gemma"](tmp_path / "model")
    edit_weights(path, **{"lm_head.weight": torch.ones(320, 128)})
    edit_json(path / "config.json", tie_word_embeddings=False)
    with pytest.raises(UnsupportedModelError, match=r"lm_head.weight has no name in a GGUF file .* gemma"):
        opened(path)


def test_an_unknown_architecture_brings_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'opt' cannot be written .*one of llama, mixtral,"):
        opened(ZOO["opt"](tmp_path / "model"))


LLAMA_FILE: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}
Q = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("changes", "shapes", "error", "match"),
    [
        ({"general.architecture": "rwkv"}, {}, UnsupportedModelError, "architecture 'rwkv' cannot .*llama"),
        ({"general.architecture": None}, {}, UnsupportedModelError, "architecture None"),
        ({"llama.block_count": None}, {}, CorruptFileError, "llama.block_count is None"),
        ({"llama.block_count": 1 << 40}, {}, CorruptFileError, "1099511627776 blocks and holds 1 tensors"),
        ({"llama.block_count": True}, {}, CorruptFileError, "block_count is True"),
        ({"llama.attention.head_count": 0}, {}, CorruptFileError, "0 heads"),
        ({"llama.attention.head_count": 3}, {}, CorruptFileError, f"{Q} has 128 rows, .* 3 heads"),
        ({"llama.attention.head_count_kv": "2"}, {}, CorruptFileError, "'2' of keys"),
        ({}, {"blk.0.attn_sinks.weight": (4,)}, UnsupportedModelError, "holds blk.0.attn_sinks.weight"),
        ({}, {Q: ()}, CorruptFileError, "attn_q.weight is a single number"),
        (
            {"llama.expert_count": 4},
            {"blk.0.ffn_up_exps.weight": (1 << 40, 1, 1)},
            CorruptFileError,
            r"expected \[experts, out, in\]",
        ),
        (
            {"llama.expert_count": 4},
            {"blk.0.ffn_up_exps.weight": (64, 64)},
            CorruptFileError,
            r"expected \[experts, out, in\]",
        ),
    ],
)
def test_a_file_that_contradicts_itself(
    changes: dict[str, Any], shapes: dict[str, tuple[int, ...]], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        origins({**LLAMA_FILE, **changes}, {Q: (128, 128), **shapes})


def test_a_file_by_llama_cpps_own_tools() -> None:
    """ollama's random Llama: every tensor has its place, and the config is the one it was made of."""
    metadata, tensors = read(shared("gguf", "llama-2-tiny-random.gguf"))
    shapes = shapes_of(tensors)
    places = origins(metadata, shapes)
    assert {origin.tensor for origin in places.values()} == tensors.keys() - COMPUTED
    assert places["model.layers.0.self_attn.q_proj.weight"].order == "rotary"
    config = config_of(metadata, shapes)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert places["lm_head.weight"] == Origin("output.weight", (config["vocab_size"], config["hidden_size"]))
