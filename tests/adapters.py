"""Makers of one small random adapter of every kind that PEFT saves, and of tiny bases for them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.tiny import edit_weights, in_transformers, logits, tiny_model, tokens

VISIBLE = 0.3  # the logits' largest change that the random values are scaled up to
DENSE = ("llama", "qwen2", "gpt2")
LINEAR_ONLY = ("llama", "qwen2")  # PEFT has no layer of that kind for GPT-2's Conv1D
TRAINED = sorted({*tokens()[0, :2].tolist(), 5})  # tokens whose embeddings alone are trained
MOE = ("qwen3_moe", "mixtral", "gpt_oss", "llama4_text")


@dataclass(frozen=True)
class Names:
    """What the modules of an architecture are called, as adapters' configurations name them."""

    linears: tuple[str, ...]
    query: str  # a projection in the attention
    down: str  # the feed-forward's last projection
    layers: str
    embedding: str
    head: str
    norm: str
    first_down: str  # one module, by its full name
    experts: tuple[str, ...] = ()  # parameters, for target_parameters


_LLAMA = Names(
    linears=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    query="q_proj",
    down="down_proj",
    layers="model.layers",
    embedding="embed_tokens",
    head="lm_head",
    norm="norm",
    first_down="model.layers.0.mlp.down_proj",
)
_GPT2 = Names(
    linears=("c_attn", "c_proj", "c_fc"),
    query="c_attn",
    down="mlp.c_proj",
    layers="transformer.h",
    embedding="wte",
    head="lm_head",
    norm="ln_f",
    first_down="transformer.h.0.mlp.c_proj",
)
_FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def _moe(experts: tuple[str, ...]) -> Names:
    return Names(
        linears=("q_proj", "v_proj"),
        query="q_proj",
        down="o_proj",
        layers="model.layers",
        embedding="embed_tokens",
        head="lm_head",
        norm="norm",
        first_down="model.layers.0.self_attn.o_proj",
        experts=experts,
    )


NAMES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": _GPT2,
    "qwen3_moe": _moe(_FUSED),
    "mixtral": _moe(_FUSED),
    "gpt_oss": _moe(_FUSED),
    "llama4_text": _moe(("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")),
}


def tiny_llama(directory: Path, **options: Any) -> Path:
    """Linears without biases; the head is tied to the embeddings."""
    return tiny_model(directory, **{"tied": True, **options})


def tiny_qwen2(directory: Path, **options: Any) -> Path:
    """q, k and v have biases, not all zero; the head is not tied."""
    return _with_biases(tiny_model(directory, **{"model_type": "qwen2", "tied": False, **options}))


def tiny_gpt2(directory: Path, **options: Any) -> Path:
    """Conv1D modules, whose weights lie transposed, all with biases; the head is tied."""
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "num_key_value_heads": 4}
    given = {"model_type": "gpt2", "tied": True, **sizes, **options}
    return _with_biases(tiny_model(directory, **given))


def tiny_moe(directory: Path, model_type: str, **options: Any) -> Path:
    """A mixture of 4 experts whose weights transformers 5 keeps in one 3-D parameter, as loaded."""
    sizes: dict[str, Any] = {"num_experts_per_tok": 2, "head_dim": 32}
    if model_type == "qwen3_moe":
        sizes |= {"num_experts": 4, "moe_intermediate_size": 48}
    elif model_type == "llama4_text":
        sizes |= {"num_local_experts": 4, "intermediate_size_mlp": 48, "intermediate_size": 48}
        sizes |= {"num_experts_per_tok": 1, "attention_chunk_size": 64}
    else:
        sizes |= {"num_local_experts": 4, "intermediate_size": 48}
    return _with_biases(
        tiny_model(directory, **{"model_type": model_type, "tied": False, **sizes, **options})
    )


BASES: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    **{name: partial(tiny_moe, model_type=name) for name in MOE},
}


def _with_biases(directory: Path) -> Path:
    """transformers starts all biases at zero: a merge that forgets them would not be seen."""
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(11)
    biases = {
        name: (torch.randn(tensor.shape, generator=generator) * 0.2).to(tensor.dtype)
        for name, tensor in tensors.items()
        if name.endswith("bias")
    }
    if biases:
        edit_weights(directory, **biases)
    return directory


Options = Callable[[Names], dict[str, Any]]


def _nothing(names: Names) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Kind:
    """How to make an adapter of one kind; `options` adds to PEFT's configuration of it."""

    peft_type: str = "LORA"
    options: Options = _nothing
    architectures: tuple[str, ...] = DENSE
    prepare: str = ""  # what must run over the base before the adapter is put on
    converted: bool = False  # saved as the difference to how it started (PiSSA and its like)
    prune: bool = False  # AdaLoRA: take away the least important ranks, as its training does
    requires: str = ""  # a package that PEFT needs for it and that is none of its dependencies
    plain_forward: bool = True  # False where the model wants more arguments than token ids
    flaw: str = ""  # why PEFT itself does not load it back as it was


def _lora(**options: Any) -> Kind:
    return Kind(options=lambda names: options)


def _on(targets: Callable[[Names], Any], **options: Any) -> Kind:
    return Kind(options=lambda names: {"target_modules": targets(names), **options})


def _tuner(peft_type: str, *, conv1d: bool = False, **options: Any) -> Kind:
    return Kind(peft_type, lambda names: options, architectures=DENSE if conv1d else LINEAR_ONLY)


_LORA_KINDS: dict[str, Kind] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "dora_rslora": _lora(use_dora=True, use_rslora=True),
    "lora_gaussian": _lora(init_lora_weights="gaussian"),
    "pissa": _lora(init_lora_weights="pissa"),
    "pissa_converted": Kind(options=lambda n: {"init_lora_weights": "pissa"}, converted=True),
    "pissa_rslora_converted": Kind(
        options=lambda n: {"init_lora_weights": "pissa", "use_rslora": True}, converted=True
    ),
    "olora": Kind(options=lambda n: {"init_lora_weights": "olora"}, architectures=LINEAR_ONLY),
    "olora_converted": Kind(
        options=lambda n: {"init_lora_weights": "olora"}, architectures=LINEAR_ONLY, converted=True
    ),
    "corda_converted": Kind(
        options=lambda n: {"init_lora_weights": "corda"}, prepare="corda", converted=True, requires="attr"
    ),
    "mica": _lora(init_lora_weights="mica"),
    "eva": Kind(options=lambda n: {"init_lora_weights": "eva"}, prepare="eva"),
    "lora_ga_converted": Kind(
        options=lambda n: {"init_lora_weights": "lora_ga"}, prepare="lora_ga", converted=True
    ),
    "orthogonal": _lora(init_lora_weights="orthogonal"),
    "patterns": Kind(
        options=lambda n: {
            # No module may match two patterns: PEFT takes the first, and saves them in another order.
            "rank_pattern": {rf"{n.layers}\.[01]\..*{n.query}": 6, f"^{n.first_down}": 2},
            "alpha_pattern": {rf"{n.layers.rpartition('.')[2]}\.1\..*({n.query}|{n.down})": 20},
        }
    ),
    "patterns_rslora": Kind(
        options=lambda n: {
            "use_rslora": True,
            "rank_pattern": {n.query: 6},
            "alpha_pattern": {rf"{n.layers}\.\d+\..*{n.down}": 20},
        }
    ),
    "bias_all": _lora(bias="all"),
    "bias_lora_only": _lora(bias="lora_only"),
    "lora_bias": Kind(
        options=lambda n: {"lora_bias": True, "target_modules": [n.query]}, architectures=("qwen2", "gpt2")
    ),
    "embedding": _on(lambda n: [n.embedding]),
    "embedding_and_linears": _on(lambda n: [n.embedding, *n.linears]),
    "head": _on(lambda n: [n.head]),
    "embedding_and_head": _on(lambda n: [n.embedding, n.head]),
    "dora_embedding": _on(lambda n: [n.embedding, n.query], use_dora=True),
    "saved_head": Kind(options=lambda n: {"modules_to_save": [n.head]}),
    "saved_embedding": Kind(options=lambda n: {"modules_to_save": [n.embedding]}),
    "saved_embedding_and_head": Kind(options=lambda n: {"modules_to_save": [n.embedding, n.head]}),
    "saved_norm": Kind(options=lambda n: {"modules_to_save": [n.norm]}),
    "token_indices": _lora(trainable_token_indices=TRAINED),
    "token_indices_dict": Kind(options=lambda n: {"trainable_token_indices": {n.embedding: TRAINED}}),
    "token_indices_head": Kind(
        options=lambda n: {"trainable_token_indices": {n.embedding: TRAINED, n.head: [4, 5, 300]}},
        architectures=("qwen2",),
    ),
    "tied_saved": Kind(
        options=lambda n: {"modules_to_save": [n.embedding], "ensure_weight_tying": True},
        architectures=("llama", "gpt2"),
    ),
    "tied_targets": Kind(
        options=lambda n: {"target_modules": [n.embedding, n.query], "ensure_weight_tying": True},
        architectures=("llama", "gpt2"),
    ),
    "tied_token_indices": Kind(
        options=lambda n: {"trainable_token_indices": {n.embedding: TRAINED}, "ensure_weight_tying": True},
        architectures=("llama", "gpt2"),
    ),
    "layers_to_transform": _lora(layers_to_transform=[1]),
    "layers_pattern": Kind(
        options=lambda n: {"layers_to_transform": 0, "layers_pattern": n.layers.rpartition(".")[2]}
    ),
    "regex_targets": _on(lambda n: rf".*\.1\..*({n.query}|{n.down})"),
    "all_linear": _on(lambda n: "all-linear"),
    "exclude_modules": Kind(options=lambda n: {"exclude_modules": [n.down]}),
    "exclude_modules_regex": Kind(options=lambda n: {"exclude_modules": rf".*\.0\..*{n.query}"}),
    "full_names": _on(lambda n: [n.first_down]),
    "layer_replication": Kind(
        options=lambda n: {"layer_replication": [(0, 2), (0, 2)]}, architectures=("llama",)
    ),
    "kasa": Kind(options=lambda n: {"kasa_config": {}}, architectures=LINEAR_ONLY),
    "monteclora": _lora(monteclora_config={"num_samples": 2}),
    "qalora": _lora(use_qalora=True, qalora_group_size=16),  # plain LoRA on all but GPTQ's own linears
    "velora": _lora(velora_config={"num_groups": 4}),
    "bdlora": Kind(
        options=lambda n: {
            "use_bdlora": {
                "target_modules_bd_a": ["o_proj", "down_proj"],
                "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
                "nblocks": 2,
            }
        },
        architectures=LINEAR_ONLY,
    ),
}

_EXPERT_KINDS: dict[str, Kind] = {
    "experts": Kind(
        options=lambda n: {"target_modules": [], "target_parameters": list(n.experts)}, architectures=MOE
    ),
    "experts_and_linears": Kind(options=lambda n: {"target_parameters": list(n.experts)}, architectures=MOE),
    "experts_down_only": Kind(
        options=lambda n: {"target_modules": [], "target_parameters": [n.experts[1]]}, architectures=MOE
    ),
    "experts_rslora_patterns": Kind(
        options=lambda n: {
            "target_modules": [],
            "target_parameters": list(n.experts),
            "use_rslora": True,
            "rank_pattern": {n.experts[0]: 2},
        },
        architectures=MOE,
    ),
}

_OTHER_KINDS: dict[str, Kind] = {
    "adalora": _tuner("ADALORA", conv1d=True, init_r=6, target_r=4, total_step=10, lora_alpha=8),
    "adalora_pruned": Kind("ADALORA", lambda n: {"init_r": 6, "target_r": 3, "total_step": 5}, prune=True),
    "loha": _tuner("LOHA", r=4, alpha=8),
    "loha_patterns": Kind(
        "LOHA",
        lambda n: {"r": 4, "alpha": 8, "rank_pattern": {n.query: 2}, "alpha_pattern": {n.down: 3}},
        architectures=LINEAR_ONLY,
    ),
    "lokr": _tuner("LOKR", r=4, alpha=8),
    "lokr_decompose_both": _tuner("LOKR", r=2, alpha=8, decompose_both=True, decompose_factor=8),
    "ia3": Kind("IA3", lambda n: {"target_modules": [n.query, n.down], "feedforward_modules": [n.down]}),
    "ia3_regex": Kind(
        "IA3",
        lambda n: {
            "target_modules": rf".*({n.query}|{n.down})",
            "feedforward_modules": rf".*{n.down}",
        },
    ),
    "oft": _tuner("OFT", oft_block_size=16),
    "oft_exact": _tuner("OFT", r=4, oft_block_size=0, use_cayley_neumann=False, bias="oft_only"),
    "oft_shared_coft": _tuner("OFT", oft_block_size=16, block_share=True, coft=True, eps=1e-2),
    "boft": _tuner("BOFT", boft_block_size=8, boft_n_butterfly_factor=2),
    "boft_blocks": _tuner("BOFT", boft_block_size=0, boft_block_num=8, bias="boft_only"),
    "vera": _tuner("VERA", conv1d=True, r=8),
    "vera_no_projection": _tuner("VERA", conv1d=True, r=8, save_projection=False),
    "vera_bias": _tuner("VERA", conv1d=True, r=8, bias="vera_only"),
    "unilora_bias": _tuner("UNILORA", conv1d=True, r=4, theta_d_length=64, bias="unilora_only"),
    "pvera": _tuner("PVERA", conv1d=True, r=8),
    "hra": _tuner("HRA", r=4),
    "hra_gs": _tuner("HRA", r=4, apply_GS=True),
    "ln_tuning": Kind(
        "LN_TUNING",
        lambda n: {
            "target_modules": ["ln_1", "ln_2", "ln_f"]
            if n is _GPT2
            else ["input_layernorm", "post_attention_layernorm", "norm"]
        },
    ),
    "fourierft": _tuner("FOURIERFT", conv1d=True, n_frequency=200, scaling=5.0),
    "vblora": _tuner("VBLORA", conv1d=True, r=4, num_vectors=16, vector_length=64),
    "vblora_topk": _tuner(
        "VBLORA", conv1d=True, r=4, num_vectors=16, vector_length=64, save_only_topk_weights=True
    ),
    "unilora": _tuner("UNILORA", conv1d=True, r=4, theta_d_length=64),
    "unilora_indices": _tuner("UNILORA", conv1d=True, r=4, theta_d_length=64, save_indices=True),
    "miss": _tuner("MISS", r=8),
    "miss_bat": _tuner("MISS", r=8, init_weights="bat"),
    "miss_mini": _tuner("MISS", r=8, init_weights="mini", mini_r=4),
    "randlora": _tuner("RANDLORA", conv1d=True, r=8, randlora_alpha=16),
    "randlora_sparse": _tuner("RANDLORA", conv1d=True, r=8, randlora_alpha=16, sparse=True),
    "randlora_no_projection": _tuner("RANDLORA", conv1d=True, r=8, randlora_alpha=16, save_projection=False),
    "road_1": _tuner("ROAD", variant="road_1", group_size=16),
    "road_2": _tuner("ROAD", variant="road_2", group_size=16),
    "road_4": _tuner("ROAD", variant="road_4", group_size=16),
    "trainable_tokens": Kind(
        "TRAINABLE_TOKENS", lambda n: {"token_indices": TRAINED, "target_modules": [n.embedding]}
    ),
    "hira": _tuner("HIRA", conv1d=True, r=4),
    "hira_embedding": Kind("HIRA", lambda n: {"r": 4, "target_modules": [n.embedding, n.query]}),
    "shira": _tuner("SHIRA", r=4, random_seed=5),
    "shira_no_seed": _tuner("SHIRA", r=4),
    "c3a": _tuner("C3A", block_size=32),
    "waveft": _tuner("WAVEFT", conv1d=True, n_frequency=200),
    "osf": _tuner("OSF", effective_rank=8),
    "delora": _tuner("DELORA", r=4, delora_lambda=1),
    "delora_patterns": Kind(
        "DELORA",
        lambda n: {"r": 4, "delora_lambda": 1, "rank_pattern": {n.query: 2}, "lambda_pattern": {n.down: 2}},
        architectures=LINEAR_ONLY,
    ),
    "gralora": _tuner("GRALORA", conv1d=True, r=8, gralora_k=2),
    "gralora_hybrid": _tuner("GRALORA", conv1d=True, r=8, gralora_k=2, hybrid_r=4),
    "tinylora": _tuner("TINYLORA", conv1d=True, r=2, u=16),
    "tinylora_tied": _tuner("TINYLORA", conv1d=True, r=2, u=16, weight_tying=0.7),
    "tinylora_embedding": Kind(
        "TINYLORA", lambda n: {"r": 2, "u": 16, "target_modules": [n.embedding, n.query]}
    ),
    "tinylora_no_projection": _tuner("TINYLORA", conv1d=True, r=2, u=16, save_projection=False),
    "psoft": _tuner("PSOFT", r=8),
    "psoft_pissa": _tuner("PSOFT", r=8, ab_svd_init="pissa_init", psoft_svd="lowrank"),
    "psoft_no_magnitude": _tuner("PSOFT", r=8, psoft_mag_a=False, psoft_mag_b=False),
    "peanut": _tuner("PEANUT", r=8, depth=2),
    "adamss": Kind(
        "ADAMSS", lambda n: {"r": 16, "num_subspaces": 3}, architectures=LINEAR_ONLY, requires="sklearn"
    ),
    "beft": Kind("BEFT", lambda n: {"target_modules": ["q_proj", "v_proj"]}, architectures=("qwen2",)),
    "glora": _tuner("GLORA", r=4),
    "glora_vector": _tuner("GLORA", r=4, config_A_B="vector", config_C="vector", config_D_E="vector"),
    "frod": _tuner("FROD", conv1d=True, progressbar=False),
    "frod_no_projection": _tuner("FROD", conv1d=True, progressbar=False, save_projection=False),
    "deft": _tuner("DEFT", conv1d=True, r=4),
    "deft_qr": _tuner("DEFT", conv1d=True, r=4, decomposition_method="qr"),
    "supertuning": _tuner("SUPERTUNING", sparsity=0.9),
    "supertuning_no_indices": _tuner("SUPERTUNING", sparsity=0.9, save_precomputed_indices=False),
    "supra": _tuner("SUPERTUNING", sparsity=0.9, r=4, lora_alpha=8),
}

KINDS: dict[str, Kind] = {**_LORA_KINDS, **_EXPERT_KINDS, **_OTHER_KINDS}

# What PEFT saves but cannot itself load back over the base as it was: `flaw` says why.
FLAWED: dict[str, Kind] = {
    "pissa_niter_4": Kind(
        options=lambda n: {"init_lora_weights": "pissa_niter_4"},
        flaw="a random SVD is taken from the base again at loading",
    ),
    "lora_ga": Kind(
        options=lambda n: {"init_lora_weights": "lora_ga"},
        prepare="lora_ga",
        flaw="the base was changed by gradients that are not saved; loading does not say so",
    ),
    "corda": Kind(
        options=lambda n: {"init_lora_weights": "corda"},
        prepare="corda",
        requires="attr",
        flaw="the base was changed by inputs that are not saved; loading fails",
    ),
    "loftq": Kind(
        options=lambda n: {"init_lora_weights": "loftq"}, requires="scipy", flaw="wants CUDA, even to load"
    ),
    "patterns_overlap": Kind(
        options=lambda n: {"rank_pattern": {n.query: 6, rf".*\.0\..*{n.query}": 2}},
        flaw="PEFT takes the first pattern that matches, and saves patterns in alphabetical order",
    ),
}

# What no merge can hold: virtual tokens, routing by the input, extra layers.
UNMERGEABLE: dict[str, Kind] = {
    "prompt_tuning": Kind("PROMPT_TUNING", lambda n: {"num_virtual_tokens": 4}),
    "prefix_tuning": Kind("PREFIX_TUNING", lambda n: {"num_virtual_tokens": 4}),
    "p_tuning": Kind("P_TUNING", lambda n: {"num_virtual_tokens": 4, "encoder_hidden_size": 32}),
    "multitask_prompt_tuning": Kind(
        "MULTITASK_PROMPT_TUNING", lambda n: {"num_virtual_tokens": 4, "num_tasks": 2}, plain_forward=False
    ),
    "cpt": Kind(
        "CPT",
        lambda n: {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    ),
    "cartridge": Kind("CARTRIDGE", lambda n: {"num_virtual_tokens": 4}),
    "adaption_prompt": Kind(
        "ADAPTION_PROMPT", lambda n: {"adapter_len": 4, "adapter_layers": 1}, architectures=("llama",)
    ),
    "poly": Kind("POLY", lambda n: {"r": 4, "n_skills": 2}, architectures=LINEAR_ONLY, plain_forward=False),
    "lily": _tuner("LILY", r=4),
    "shadow": Kind("SHADOW", lambda n: {}, architectures=LINEAR_ONLY),
    "alora": _lora(alora_invocation_tokens=tokens()[0, 4:6].tolist()),
    "lora_bias_without_base_bias": Kind(options=lambda n: {"lora_bias": True}, architectures=("llama",)),
    "beft_without_base_bias": Kind(
        "BEFT", lambda n: {"target_modules": ["o_proj"]}, architectures=("llama",)
    ),
}

_DATACLASSES = {
    "kasa_config": "KasaConfig",
    "velora_config": "VeloraConfig",
    "monteclora_config": "MontecloraConfig",
    "use_bdlora": "BdLoraConfig",
}


def _config(kind: Kind, names: Names) -> Any:
    """PEFT's configuration of that kind, on all linears unless the kind says otherwise."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    given: dict[str, Any] = {"task_type": "CAUSAL_LM", **kind.options(names)}
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind.peft_type)]
    fields = config_class.__dataclass_fields__
    if "target_modules" in fields and kind.peft_type != "ADAPTION_PROMPT" and kind.peft_type != "SHADOW":
        given.setdefault("target_modules", list(names.linears))
    if kind.peft_type == "LORA":
        given = {"r": 4, "lora_alpha": 8, **given}
    for key, name in _DATACLASSES.items():
        if key in given:
            module: Any = peft.tuners.lora.config
            given[key] = getattr(module, name)(**given[key])
    if given.get("init_lora_weights") == "loftq":
        given["loftq_config"] = peft.LoftQConfig(loftq_bits=4)
    if given.get("init_lora_weights") == "eva":
        given["eva_config"] = peft.EvaConfig(rho=1.0)
    if given.get("init_lora_weights") == "corda":
        given["corda_config"] = peft.tuners.lora.config.CordaConfig(corda_method="kpm")
    if given.get("init_lora_weights") == "lora_ga":
        given["lora_ga_config"] = peft.tuners.lora.config.LoraGAConfig()
    return config_class(**given)


def _prepare(kind: Kind, model: Any, config: Any) -> None:
    """What must run over the base before: the inputs or gradients that the adapter starts from."""
    if kind.prepare == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        def run() -> None:
            logits(model, tokens(rows=1, length=128))

        preprocess_corda(model, config, run_model=run)
    elif kind.prepare == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        def step() -> None:
            model(tokens(), labels=tokens()).loss.backward()

        preprocess_loraga(model, config, step)


def _randomize(adapted: Any, base_logits: torch.Tensor | None, seed: int) -> None:
    """Adds noise to all that trains, no more than what makes the logits change visibly.

    Added, not set: magnitudes, rotations and scales start from other values than zero.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    starts = {name: value.detach().clone() for name, value in trained.items()}
    noise = {name: torch.randn(value.shape, generator=generator) for name, value in trained.items()}
    scale = 0.002 if base_logits is not None else 0.1
    while scale < 100:
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(starts[name] + scale * noise[name])
        if base_logits is None:
            return
        changed = logits(adapted, tokens())
        if changed.shape != base_logits.shape:  # virtual tokens in front
            changed = changed[:, -base_logits.shape[1] :]
        if (changed - base_logits).abs().max() > VISIBLE:
            assert torch.isfinite(changed).all()
            return
        scale *= 2
    raise AssertionError("this adapter does not change the logits")


def build_adapter(name: str, base: Path, out: Path, *, seed: int = 1) -> Any:
    """PEFT's model with such an adapter on, saved to `out`, in evaluation mode."""
    from peft import get_peft_model

    kind = {**KINDS, **FLAWED, **UNMERGEABLE}[name]
    names = NAMES[json.loads((base / "config.json").read_text())["model_type"]]
    model = in_transformers(base, dtype=torch.float32)
    before = logits(model, tokens())
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a tied head is adapted, that Conv1D lies transposed
        config = _config(kind, names)
        _prepare(kind, model, config)
        adapted: Any = get_peft_model(model, config)
        if kind.prepare == "eva":
            from peft import initialize_lora_eva_weights

            batches = [{"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}] * 2
            initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
        adapted.eval()
        conversion: dict[str, Any] = {}
        if kind.converted:
            start = out.parent / f"{out.name}-start" / "start"
            adapted.save_pretrained(str(start))
            conversion["path_initial_model_for_weight_conversion"] = str(start)
        _randomize(adapted, before if kind.plain_forward else None, seed)
        if kind.prune:
            adapted(tokens(), labels=tokens()).loss.backward()
            for step in range(6):
                adapted.base_model.update_and_allocate(step)
            adapted.zero_grad()
        adapted.save_pretrained(str(out), **conversion)
    return adapted


def make_adapter(kind: str, base: Path, out: Path, *, seed: int = 1) -> Path:
    """An adapter of a kind of KINDS, FLAWED or UNMERGEABLE over `base`, saved by PEFT itself."""
    build_adapter(kind, base, out, seed=seed)
    return out
