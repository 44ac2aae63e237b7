"""Several adapters in one merge: in turn, weighted, combined as PEFT combines them, or in conflict."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

import qexport
from qexport.errors import AdapterError, CheckpointNotFoundError, SpecError
from qexport.events import Noted
from qexport.merging.combine import Combining, Pair, combine
from qexport.merging.merge import planned_merge
from qexport.specs import MergeSpec
from tests.adapters import BASES, make_adapter
from tests.conftest import RunCli
from tests.tiny import edit_json, in_transformers, logits, tiny_adapter, tokens

FULL = MergeSpec(dtype="float32")
State = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def slow(*values: Any) -> Any:
    """A case that its neighbours nearly cover."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Workshop:
    """Bases and adapters of this file, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def base(self, architecture: str = "llama", *, tied: bool = False) -> Path:
        path = self.root / f"{architecture}{'-tied' if tied else ''}"
        if path.exists():
            return path
        if architecture in ("llama", "qwen2"):
            return BASES[architecture](path, tied=tied, dtype=torch.float32)  # type: ignore[call-arg]
        return BASES[architecture](path, dtype=torch.float32)  # type: ignore[call-arg]

    def kind(self, kind: str, architecture: str = "llama", seed: int = 1, *, tied: bool = False) -> Path:
        base = self.base(architecture, tied=tied)
        path = self.root / f"{base.name}-{kind}-{seed}"
        return path if path.exists() else make_adapter(kind, base, path, seed=seed)

    def lora(self, name: str, architecture: str = "llama", *, tied: bool = False, **options: Any) -> Path:
        base = self.base(architecture, tied=tied)
        path = self.root / f"{base.name}-lora-{name}"
        if path.exists():
            return path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, that embeddings are saved along
            return tiny_adapter(path, base, **options)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("several"))


def state(model: Any) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def in_memory(base: Path) -> Any:
    return in_transformers(base, dtype=torch.float32)


def put_in(model: Any, adapter: Path) -> Any:
    """PEFT's own merge of one adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def in_turn(base: Path, *adapters: tuple[Path, float]) -> State:
    """PEFT merges one after the other; of each change a share is taken."""
    model = in_memory(base)
    for adapter, weight in adapters:
        before = state(model)
        model = put_in(model, adapter)
        mixed = {name: before[name] + weight * (value - before[name]) for name, value in state(model).items()}
        model.load_state_dict(mixed)
    return state(model)


def shares(base: Path, *adapters: tuple[Path, float]) -> State:
    """W + sum of w (T - W), each T what PEFT makes of the base with that adapter alone."""
    start = state(in_memory(base))
    mixed = {name: value.clone() for name, value in start.items()}
    for adapter, weight in adapters:
        for name, value in state(put_in(in_memory(base), adapter)).items():
            mixed[name] += weight * (value - start[name])
    return mixed


def named(adapter: Path, weight: float) -> str:
    return f"{adapter}:{weight}"


def require_same(out: Path, expected: State, base: Path) -> None:
    """Every parameter, as transformers loads it; and not all of them those of the base."""
    found, start = state(in_memory(out)), state(in_memory(base))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        far = ~torch.isclose(found[name], value, rtol=1e-4, atol=2e-5)
        assert not far.any(), f"{name}: {int(far.sum())} values, up to {(found[name] - value).abs().max()}"
    assert any((value - start[name]).abs().max() > 1e-3 for name, value in expected.items())


# ---- one after the other


@pytest.mark.parametrize(
    "kinds",
    [
        ("lora", "rslora"),
        ("lora", "dora"),
        ("dora", "lora"),
        ("bias_all", "ia3"),
        ("lora", "loha"),
    ],
    ids="-".join,
)
def test_adapters_go_in_one_after_the_other(shop: Workshop, tmp_path: Path, kinds: tuple[str, str]) -> None:
    base = shop.base("qwen2")
    one, two = (shop.kind(kind, "qwen2", seed) for seed, kind in enumerate(kinds, start=1))
    qexport.merge(base, [one, two], tmp_path / "out", FULL)
    require_same(tmp_path / "out", in_turn(base, (one, 1), (two, 1)), base)


def test_a_replacement_and_then_a_lora_on_it(shop: Workshop, tmp_path: Path) -> None:
    base = shop.base("qwen2")
    one, two = shop.kind("saved_embedding_and_head", "qwen2"), shop.kind("embedding_and_head", "qwen2", 2)
    qexport.merge(base, [one, two], tmp_path / "out", FULL)
    # PEFT saves the base's own matrices beside the LoRA, and would load them over the replacement
    bare = shutil.copytree(two, tmp_path / "bare")
    held = load_file(two / "adapter_model.safetensors")
    own = {name: value for name, value in held.items() if "base_layer" not in name}
    assert len(own) == len(held) - 2
    save_file(own, bare / "adapter_model.safetensors", metadata={"format": "pt"})
    require_same(tmp_path / "out", in_turn(base, (one, 1), (bare, 1)), base)


def test_the_order_counts_where_it_must(shop: Workshop, tmp_path: Path) -> None:
    """DoRA gives its own length to what was there: put in before or after a LoRA it makes another model."""
    base, one, two = shop.base(), shop.lora("three-1", seed=1), shop.kind("dora", seed=2)
    for out, adapters in (("ab", (one, two)), ("ba", (two, one))):
        qexport.merge(base, adapters, tmp_path / out, FULL)
        require_same(tmp_path / out, in_turn(base, *((adapter, 1) for adapter in adapters)), base)
    ab, ba = (load_file(tmp_path / out / "model.safetensors")[Q] for out in ("ab", "ba"))
    assert (ab - ba).abs().max() > 1e-3


def test_disjoint_tokens_of_two_adapters(shop: Workshop, tmp_path: Path) -> None:
    base = shop.base()
    one = shop.lora("tokens-7-9", trainable_token_indices=[7, 9])
    two = shop.lora("tokens-8-11", seed=2, trainable_token_indices=[11, 8])
    for adapter in (one, two):
        grow(adapter, "trainable_tokens_delta")
    qexport.merge(base, [one, two], tmp_path / "out", FULL)
    require_same(tmp_path / "out", in_turn(base, (one, 1), (two, 1)), base)
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert sorted(set((rows != old).nonzero()[:, 0].tolist())) == [7, 8, 9, 11]


def grow(adapter: Path, part: str) -> None:
    """Tells the trained tensors of that name apart from the base's."""
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    generator = torch.Generator().manual_seed(len(str(adapter)))
    for name in held:
        if part in name:
            held[name] = held[name] + torch.randn(held[name].shape, generator=generator)
    save_file(held, file, metadata={"format": "pt"})


# ---- weights


def scaled_on(base: Path, *adapters: tuple[Path, float]) -> torch.Tensor:
    """PEFT's forward pass with all of them on, each scaled by PEFT itself."""
    model: Any = PeftModel.from_pretrained(in_memory(base), str(adapters[0][0]), adapter_name="0")
    for number, (adapter, _) in enumerate(adapters[1:], start=1):
        model.load_adapter(str(adapter), adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for number, (_, weight) in enumerate(adapters):
                module.set_scale(str(number), weight)
    return logits(model.eval(), tokens())


@pytest.mark.parametrize("weights", [(0.7, 0.3), (-0.5, 1.25), slow((1, 0)), (1, 1), slow((1e-3, 2))])
@pytest.mark.parametrize("architecture", ["llama", slow("gpt2")])
def test_weights_scale_each_lora(
    shop: Workshop, tmp_path: Path, weights: tuple[float, float], architecture: str
) -> None:
    base = shop.base(architecture)
    adapters = [shop.kind("lora", architecture, 1), shop.kind("patterns_rslora", architecture, 2)]
    given = list(zip(adapters, weights, strict=True))
    qexport.merge(base, [named(*pair) for pair in given], tmp_path / "out", FULL)
    expected = scaled_on(base, *given)
    assert (expected - logits(in_memory(base), tokens())).abs().max() > 1e-3
    torch.testing.assert_close(logits(in_memory(tmp_path / "out"), tokens()), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("architecture", "kind", "weight"),
    [
        slow("qwen2", "dora", 0.3),
        ("qwen2", "dora_embedding", -0.5),
        slow("qwen2", "ia3", 0.3),
        ("gpt2", "ia3", 1.5),
        ("qwen2", "saved_embedding_and_head", 0.3),
        ("qwen2", "saved_norm", -0.5),
        ("qwen2", "bias_all", 0.3),
        slow("qwen2", "lora_bias", 0.3),
        slow("qwen2", "token_indices", 0.3),
        ("qwen2", "token_indices_head", 2),
        ("qwen2", "embedding_and_head", 0.3),
        slow("qwen2", "loha", -0.5),
        ("qwen3_moe", "experts_and_linears", 0.3),
        slow("gpt_oss", "experts", -0.5),
    ],
)
def test_a_weight_takes_a_share_of_any_kind(
    shop: Workshop, tmp_path: Path, architecture: str, kind: str, weight: float
) -> None:
    base, adapter = shop.base(architecture), shop.kind(kind, architecture)
    qexport.merge(base, [named(adapter, weight)], tmp_path / "out", FULL)
    require_same(tmp_path / "out", in_turn(base, (adapter, weight)), base)


@pytest.mark.parametrize("kind", ["saved_embedding_and_head", "ln_tuning"])
@pytest.mark.parametrize("weights", [slow((0.7, 0.3)), (1, 1), (0.5, 1), (1, -0.5), slow((0, 1))])
def test_shares_of_two_replacements_are_shares_of_the_bases_change(
    shop: Workshop, tmp_path: Path, weights: tuple[float, float], kind: str
) -> None:
    base = shop.base("qwen2")
    adapters = [shop.kind(kind, "qwen2", seed) for seed in (1, 2)]
    given = list(zip(adapters, weights, strict=True))
    qexport.merge(base, [named(*pair) for pair in given], tmp_path / "out", FULL)
    require_same(tmp_path / "out", shares(base, *given), base)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (0.5, -1)])
def test_shares_of_one_tokens_rows(shop: Workshop, tmp_path: Path, weights: tuple[float, float]) -> None:
    base = shop.base()
    adapters = [shop.kind("token_indices", seed=seed) for seed in (1, 2)]
    given = list(zip(adapters, weights, strict=True))
    qexport.merge(base, [named(*pair) for pair in given], tmp_path / "out", FULL)
    require_same(tmp_path / "out", shares(base, *given), base)


@pytest.mark.parametrize(
    "order", [("lora", "saved"), ("saved", "lora"), ("tokens", "saved"), ("lora", "tokens")]
)
def test_shares_of_unlike_edits_of_one_tensor(shop: Workshop, tmp_path: Path, order: tuple[str, str]) -> None:
    """Shares were asked for: neither undoes a part of the other, whatever comes first."""
    base = shop.base()
    kinds = {"lora": "embedding", "saved": "saved_embedding", "tokens": "token_indices"}
    given = [(shop.kind(kinds[kind]), weight) for kind, weight in zip(order, (0.75, 0.5), strict=True)]
    qexport.merge(base, [named(*pair) for pair in given], tmp_path / "out", FULL)
    require_same(tmp_path / "out", shares(base, *given), base)


def test_a_weight_of_nought_changes_nothing_and_one_is_no_weight(shop: Workshop, tmp_path: Path) -> None:
    base, adapter = shop.base("qwen2"), shop.kind("saved_embedding_and_head", "qwen2")
    for out, given in (("plain", str(adapter)), ("one", named(adapter, 1.0)), ("nought", f"{adapter}:0")):
        result = qexport.merge(base, [given], tmp_path / out, FULL)
        assert bool(result.changes) == (out != "nought")
    files = {out: (tmp_path / out / "model.safetensors").read_bytes() for out in ("plain", "one", "nought")}
    assert files["plain"] == files["one"]
    assert files["nought"] == (base / "model.safetensors").read_bytes()


def test_colons_in_names(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = shop.base(), shop.kind("lora")
    for name in ("a:b", "c:0.5"):
        shutil.copytree(adapter, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = {}
    for given in ("a:b", "a:b:0.5", "c:0.5", "c:0.5:0.5", "./c:0.5:1e-1"):
        qexport.merge(base, [given], tmp_path / "out", FULL, overwrite=True)
        found[given] = load_file(tmp_path / "out" / "model.safetensors")[Q]
    start = load_file(base / "model.safetensors")[Q]
    assert torch.equal(found["a:b"], found["c:0.5"])  # the name of a directory, no weight
    assert torch.equal(found["a:b:0.5"], found["c:0.5:0.5"])
    whole = found["a:b"] - start
    torch.testing.assert_close(found["a:b:0.5"] - start, whole / 2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found["./c:0.5:1e-1"] - start, whole / 10, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e400"])
def test_a_weight_is_finite(shop: Workshop, tmp_path: Path, cli: RunCli, weight: str) -> None:
    code, stdout, stderr = cli(
        "merge", shop.base(), "-a", f"{shop.kind('lora')}:{weight}", "-o", tmp_path / "o"
    )
    assert (code, stdout) == (2, "")
    assert stderr.endswith(f"lora-1 is {weight}; a finite number, as in A:0.7\n")
    assert stderr.count("\n") == 1


def test_a_weight_that_is_none(shop: Workshop, tmp_path: Path) -> None:
    for tail in ("x", "", "0,5"):
        with pytest.raises(AdapterError, match=f"the weight of .* is '{tail}'; a number"):
            qexport.merge(shop.base(), [f"{shop.kind('lora')}:{tail}"], tmp_path / "out")
    with pytest.raises(CheckpointNotFoundError, match=r":0\.7: does not exist"):
        qexport.merge(shop.base(), [f"{shop.kind('lora')}:0.7:"], tmp_path / "out")


# ---- combined


def combined_on(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], how: str, **options: Any
) -> State:
    """PEFT's add_weighted_adapter, with the scale that its factors were made for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(in_memory(base), str(adapters[0]), adapter_name="0")
        for number, adapter in enumerate(adapters[1:], start=1):
            model.load_adapter(str(adapter), adapter_name=str(number))
        names = [str(number) for number in range(len(adapters))]
        model.add_weighted_adapter(names, list(weights), "all", combination_type=how, **options)
        model.set_adapter("all")
        for module in model.modules():
            if isinstance(module, LoraLayer) and "all" in module.scaling:
                module.scaling["all"] = 1.0
        return state(model.merge_and_unload())


def our_combination(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], out: Path, how: str, **options: Any
) -> Path:
    spec = MergeSpec.model_validate({"combine": how, "dtype": "float32", **options})
    given = [named(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    qexport.merge(base, given, out, spec)
    return out


PRUNED = ("ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd")


@pytest.mark.parametrize("weights", [slow((0.7, 0.3)), (1.5, -0.5)])
@pytest.mark.parametrize("how", ["cat", "linear", "svd", *PRUNED])
def test_combined_is_what_peft_combines(
    shop: Workshop, tmp_path: Path, how: str, weights: tuple[float, float]
) -> None:
    """Other modules in each, embeddings among them, other scales."""
    base = shop.base()
    adapters = [
        shop.lora("qd", modules=("q_proj", "down_proj", "embed_tokens"), lora_alpha=6),
        shop.lora("qu", seed=2, modules=("q_proj", "up_proj", "embed_tokens", "lm_head"), lora_alpha=3),
    ]
    density = {"density": 0.4} if how in PRUNED else {}
    out = our_combination(base, adapters, weights, tmp_path / "out", how, **density)
    require_same(out, combined_on(base, adapters, weights, how, **density), base)


@pytest.mark.parametrize(
    ("how", "sign"), [("ties", "frequency"), ("ties_svd", "frequency"), ("ties", "total")]
)
def test_three_adapters_elect_a_sign(shop: Workshop, tmp_path: Path, how: str, sign: str) -> None:
    base = shop.base()
    adapters = [shop.lora(f"three-{seed}", seed=seed) for seed in (1, 2, 3)]
    weights, made = (1.0, 0.5, 2.0), {}
    for one in ("frequency", "total"):
        made[one] = our_combination(
            base, adapters, weights, tmp_path / one, how, density=0.7, majority_sign=one
        )
    expected = combined_on(base, adapters, weights, how, density=0.7, majority_sign_method=sign)
    require_same(made[sign], expected, base)
    files = [load_file(out / "model.safetensors") for out in made.values()]
    assert not torch.equal(files[0][Q], files[1][Q])


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("cat", {}),
        ("svd", {}),
        ("svd", {"svd_rank": 3}),
        ("svd", {"svd_rank": 64}),
        ("ties_svd", {"density": 0.5, "svd_rank": 5}),
        ("magnitude_prune_svd", {"density": 1.0}),
    ],
)
@pytest.mark.parametrize("architecture", [slow("llama"), "gpt2"])
def test_ranks_may_differ_where_products_are_added(
    shop: Workshop, tmp_path: Path, how: str, options: dict[str, Any], architecture: str
) -> None:
    base = shop.base(architecture)
    two = {"gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "up_proj")}[architecture]
    adapters = [
        shop.lora("r3", architecture, r=3, modules=two),
        shop.lora("r6", architecture, seed=2, r=6, modules=two, rank_pattern={two[0]: 9}),
    ]
    out = our_combination(base, adapters, (0.6, 0.8), tmp_path / "out", how, **options)
    require_same(out, combined_on(base, adapters, (0.6, 0.8), how, **options), base)


@pytest.mark.parametrize("how", ["linear", "ties", "cat"])
def test_gpt2s_transposed_modules(shop: Workshop, tmp_path: Path, how: str) -> None:
    base = shop.base("gpt2")
    adapters = [
        shop.lora(f"four-{seed}", "gpt2", seed=seed, modules=("c_attn", "c_proj"), use_rslora=seed == 2)
        for seed in (1, 2)
    ]
    options = {"density": 0.5} if how == "ties" else {}
    out = our_combination(base, adapters, (0.6, -0.8), tmp_path / "out", how, **options)
    require_same(out, combined_on(base, adapters, (0.6, -0.8), how, **options), base)


def test_pefts_combination_of_rslora_is_too_large(shop: Workshop, tmp_path: Path) -> None:
    """cat is exact: the sum of both. PEFT's inherits use_rslora and is then scaled by sqrt(r) once more."""
    base = shop.base()
    adapters = [shop.lora(f"rs-{seed}", seed=seed, use_rslora=True) for seed in (1, 2)]
    out = our_combination(base, adapters, (0.7, 0.3), tmp_path / "out", "cat")
    expected = scaled_on(base, (adapters[0], 0.7), (adapters[1], 0.3))
    torch.testing.assert_close(logits(in_memory(out), tokens()), expected, rtol=1e-4, atol=2e-4)
    require_same(out, combined_on(base, adapters, (0.7, 0.3), "cat"), base)
    model: Any = PeftModel.from_pretrained(in_memory(base), str(adapters[0]), adapter_name="0")
    model.load_adapter(str(adapters[1]), adapter_name="1")
    model.add_weighted_adapter(["0", "1"], [0.7, 0.3], "all", combination_type="cat")
    model.set_adapter("all")
    assert (logits(model, tokens()) - expected).abs().max() > 0.05
    scales = [m.scaling["all"] for m in model.modules() if isinstance(m, LoraLayer) and "all" in m.scaling]
    assert scales == [pytest.approx(math.sqrt(8))] * 4


def test_a_tied_pair_combines_as_one(shop: Workshop, tmp_path: Path) -> None:
    """Both sides get the same combination, so they stay tied."""
    base = shop.base(tied=True)
    adapters = [shop.kind("tied_targets", seed=seed, tied=True) for seed in (1, 2)]
    for how, options in (("cat", {}), ("dare_linear", {"density": 0.5})):
        out = our_combination(base, adapters, (0.6, 0.4), tmp_path / how, how, **options)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
        assert "lm_head.weight" not in load_file(out / "model.safetensors")
    plain = tmp_path / "plain"
    qexport.merge(
        base, [named(adapter, w) for adapter, w in zip(adapters, (0.6, 0.4), strict=True)], plain, FULL
    )
    require_same(tmp_path / "cat", state(in_memory(plain)), base)


def test_one_adapter_is_merged_plainly(shop: Workshop, tmp_path: Path) -> None:
    """As PEFT does: of one adapter every method makes that adapter."""
    base, adapter = shop.base(), shop.kind("lora")
    qexport.merge(base, [named(adapter, 0.5)], tmp_path / "plain", FULL)
    out = our_combination(base, [adapter], (0.5,), tmp_path / "out", "ties", density=0.1)
    require_same(out, combined_on(base, [adapter], (0.5,), "ties", density=0.1), base)
    assert torch.equal(*(load_file(path / "model.safetensors")[Q] for path in (out, tmp_path / "plain")))


# ---- DARE: the arithmetic under equal draws, and where the draws come from


def random_pairs(count: int = 3) -> list[Pair]:
    generator = torch.Generator().manual_seed(8)
    return [
        Pair(
            torch.randn(4, 30, generator=generator),
            torch.randn(20, 4, generator=generator),
            scale=0.5 + n,
            weight=(-1) ** n * 0.7,
        )
        for n in range(count)
    ]


def pefts(
    name: str, tensors: Sequence[torch.Tensor], weights: Sequence[float], density: float
) -> torch.Tensor:
    kind: Any = getattr(merge_utils, name)
    found: torch.Tensor = kind(list(tensors), torch.tensor(weights), density)
    return found


@pytest.mark.parametrize("density", [0.3, 0.9])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_under_equal_draws(name: str, density: float) -> None:
    pairs = random_pairs()
    a, b = combine(pairs, Combining(name, 4, density), torch.Generator().manual_seed(12))
    torch.manual_seed(12)
    roots = [math.sqrt(abs(pair.scale * pair.weight)) for pair in pairs]
    signed = [math.copysign(root, pair.weight) for root, pair in zip(roots, pairs, strict=True)]
    torch.testing.assert_close(a, pefts(name, [pair.a for pair in pairs], signed, density))
    torch.testing.assert_close(b, pefts(name, [pair.b for pair in pairs], roots, density))
    a, b = combine(pairs, Combining(f"{name}_svd", 20, density), torch.Generator().manual_seed(13))
    torch.manual_seed(13)
    products = [pair.scale * (pair.b @ pair.a) for pair in pairs]
    expected = pefts(name, products, [pair.weight for pair in pairs], density)
    torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-4)
    undropped = torch.stack([pair.weight * pair.scale * (pair.b @ pair.a) for pair in pairs]).sum(dim=0)
    assert not torch.allclose(expected, undropped)


def test_the_share_that_is_kept() -> None:
    ones = Pair(torch.ones(100, 300), torch.ones(200, 100), 1.0, 1.0)
    a, b = combine([ones], Combining("dare_linear", 100, 0.2), torch.Generator().manual_seed(1))
    for factor in (a, b):
        spread = math.sqrt(0.2 * 0.8 / factor.numel())
        assert abs(float((factor != 0).float().mean()) - 0.2) < 5 * spread
        torch.testing.assert_close(factor[factor != 0], torch.full_like(factor[factor != 0], 5.0))
    random = Pair(torch.randn(10, 33), torch.randn(21, 10), 1.0, 1.0)
    a, b = combine([random], Combining("magnitude_prune", 10, 0.35), torch.Generator())
    assert [int((factor != 0).sum()) for factor in (a, b)] == [int(0.35 * 330), int(0.35 * 210)]
    assert a[a != 0].abs().min() >= random.a[a == 0].abs().max()


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties_svd"])
def test_what_dare_drops_hangs_on_seed_and_name_alone(shop: Workshop, tmp_path: Path, how: str) -> None:
    base = shop.base()
    adapters = [shop.lora(f"three-{seed}", seed=seed) for seed in (1, 2)]
    few = []
    for number, adapter in enumerate(adapters):  # the same pairs, one module of them only
        copy = shutil.copytree(adapter, tmp_path / f"few{number}")
        held = load_file(copy / "adapter_model.safetensors")
        kept = {name: value for name, value in held.items() if "layers.1.mlp.down_proj" in name}
        assert 0 < len(kept) < len(held)
        save_file(kept, copy / "adapter_model.safetensors")
        few.append(copy)
    cases: dict[str, tuple[list[Path], dict[str, Any]]] = {
        "one": (adapters, {"seed": 3}),
        "again": (adapters, {"seed": 3}),
        "pieces": (adapters, {"seed": 3, "max_shard_size": "150KB"}),
        "few": (few, {"seed": 3}),
        "other": (adapters, {"seed": 4}),
    }
    found = {}
    for name, (given, options) in cases.items():
        out = our_combination(base, given, (1, 1), tmp_path / name, how, density=0.5, **options)
        found[name] = state(in_memory(out))
    for name in ("again", "pieces"):
        assert all(torch.equal(found["one"][key], value) for key, value in found[name].items()), name
    assert torch.equal(found["few"][DOWN], found["one"][DOWN])
    assert not torch.equal(found["other"][DOWN], found["one"][DOWN])
    layers = [found["one"][f"model.layers.{n}.mlp.down_proj.weight"] for n in (0, 1)]
    assert not torch.equal(*layers)
    keys = [
        json.loads((tmp_path / name / "qexport.json").read_text())["key"]
        for name in ("one", "again", "other")
    ]
    assert keys[0] == keys[1] != keys[2]


# ---- what does not fit


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--density", "0.5"), "--density without --combine; a combination to use it in"),
        (("--svd-rank", "3"), "--svd-rank without --combine"),
        (("--combine", "ties"), "--combine ties needs --density; the share of values to keep"),
        (("--combine", "dare_linear_svd"), "--combine dare_linear_svd needs --density"),
        (("--combine", "magnitude_prune"), "--combine magnitude_prune needs --density"),
        (("--combine", "cat", "--density", "0.5"), "--density is no option of --combine cat"),
        (
            ("--combine", "linear", "--svd-rank", "2"),
            "--svd-rank is no option of --combine linear; svd or *_svd",
        ),
        (
            ("--combine", "ties", "--density", "0.5", "--svd-rank", "2"),
            "--svd-rank is no option of --combine ties",
        ),
        (("--combine", "ties", "--density", "0"), "--density 0"),
        (("--combine", "ties", "--density", "1.5"), "--density 1.5"),
        (("--combine", "ties", "--density", "nan"), "--density nan"),
        (("--combine", "svd", "--svd-rank", "0"), "--svd-rank 0"),
        (("--combine", "soup"), "Invalid value for '--combine'"),
        (("--majority-sign", "most"), "Invalid value for '--majority-sign'"),
        (("--device", "tpu"), "--device tpu; cpu, cuda or cuda:N"),
        (("--device", "mps"), "--device mps; cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "--device cuda:99: this machine has"),
        (("--device", ""), "--device"),
        (("--seed", "-1"), "--seed -1"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_fit(
    shop: Workshop, tmp_path: Path, cli: RunCli, options: tuple[str, ...], told: str
) -> None:
    adapters = [shop.lora(f"three-{seed}", seed=seed) for seed in (1, 2)]
    given = [part for adapter in adapters for part in ("-a", adapter)]
    code, stdout, stderr = cli("merge", shop.base(), *given, *options, "-o", tmp_path / "out")
    assert (code, stdout) == (2, "")
    assert told in stderr
    assert stderr.count("\n") == 1 or "Usage" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "how", "told"),
    [
        ("dora", "cat", "is no plain LoRA and cannot be combined by cat"),
        ("ia3", "linear", "is no plain LoRA and cannot be combined by linear"),
        ("pissa", "svd", "is no plain LoRA and cannot be combined by svd"),
        ("saved_head", "cat", "does more to lm_head.weight than LoRA does and cannot be combined by cat"),
        ("bias_all", "cat", "than LoRA does and cannot be combined by cat"),
        ("token_indices", "cat", "does more to model.embed_tokens.weight than LoRA does"),
    ],
)
def test_what_cannot_be_combined(
    shop: Workshop, tmp_path: Path, cli: RunCli, kind: str, how: str, told: str
) -> None:
    base = shop.base("qwen2")
    two = ("-a", shop.kind("lora", "qwen2"), "-a", shop.kind(kind, "qwen2", 2))
    code, stdout, stderr = cli("merge", base, *two, "--combine", how, "-o", tmp_path / "out")
    assert (code, stdout) == (2, "")
    assert told in stderr
    assert "merge the adapters one after the other: leave --combine out" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("how", ["linear", "ties", "dare_ties", "magnitude_prune"])
def test_ranks_must_agree_where_factors_are_added(
    shop: Workshop, tmp_path: Path, cli: RunCli, how: str
) -> None:
    base = shop.base()
    density = () if how == "linear" else ("--density", "0.5")
    two = ("-a", shop.lora("four"), "-a", shop.lora("six", r=6))
    code, stdout, stderr = cli("merge", base, *two, "--combine", how, *density, "-o", tmp_path / "out")
    assert (code, stdout) == (2, "")
    assert f"--combine {how} needs adapters of one rank, these have 4, 6; choose cat, svd or a" in stderr
    # the largest ranks agree, those of single modules do not
    one = shop.lora("pattern-q", rank_pattern={"q_proj": 6})
    other = shop.lora("pattern-down", rank_pattern={"down_proj": 6})
    two = ("-a", one, "-a", other)
    code, stdout, stderr = cli("merge", base, *two, "--combine", how, *density, "-o", tmp_path / "out")
    assert (code, stdout) == (2, ""), stderr
    assert f"--combine {how} needs adapters of one rank" in stderr
    assert stderr.count("\n") == 1


# ---- conflicts


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ("saved_head", "saved_embedding_and_head", "lm_head.weight"),
        ("bias_all", "bias_lora_only", "bias"),
        ("head", "saved_head", "lm_head.weight"),
        ("token_indices", "token_indices_dict", "model.embed_tokens.weight"),
        ("token_indices", "saved_embedding", "model.embed_tokens.weight"),
        ("saved_embedding", "token_indices", "model.embed_tokens.weight"),
        ("embedding", "token_indices", "model.embed_tokens.weight"),
        ("token_indices", "trainable_tokens", "model.embed_tokens.weight"),
        ("ln_tuning", "ln_tuning", "norm"),
        ("saved_norm", "ln_tuning", "norm"),
    ],
)
def test_what_would_undo_another_is_refused(
    shop: Workshop, tmp_path: Path, cli: RunCli, first: str, second: str, where: str
) -> None:
    base = shop.base("qwen2")
    adapters = [shop.kind(kind, "qwen2", seed) for seed, kind in enumerate((first, second), start=1)]
    code, stdout, stderr = cli("merge", base, "-a", adapters[0], "-a", adapters[1], "-o", tmp_path / "out")
    assert (code, stdout) == (2, ""), stdout
    assert stderr.startswith(f"error: conflicting edits: {adapters[0]} changes ")
    assert where in stderr
    assert f"{adapters[1]} puts values of its own there" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dropped_weight_is_no_share(shop: Workshop, tmp_path: Path) -> None:
    """A share of the one does not say what becomes of the other."""
    base = shop.base("qwen2")
    one, two = (shop.kind("saved_head", "qwen2", seed) for seed in (1, 2))
    with pytest.raises(AdapterError, match="conflicting edits"):
        qexport.merge(base, [one, named(two, 0.5)], tmp_path / "out")


def test_the_same_adapter_twice(shop: Workshop, tmp_path: Path) -> None:
    base, adapter = shop.base(), shop.kind("lora")
    copy = shutil.copytree(adapter, tmp_path / "copy")
    for given in ([adapter, adapter], [named(adapter, 0.5), named(adapter, 0.5)], [adapter, copy]):
        with pytest.raises(AdapterError, match="is named twice; once: merging again doubles its change"):
            qexport.merge(base, given, tmp_path / "out")
    edit_json(copy / "adapter_config.json", lora_alpha=4)  # it is another one now
    qexport.merge(base, [adapter, copy], tmp_path / "out")


# ---- the report


def manifest(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "qexport.json").read_text())
    return content


def test_the_report_tells_what_changed_and_by_how_much(shop: Workshop, tmp_path: Path) -> None:
    base = shop.base("qwen2")
    adapters = [
        (shop.kind("lora", "qwen2", 1), 0.5),
        (shop.kind("saved_embedding_and_head", "qwen2", 2), 0.25),
        (shop.kind("dora", "qwen2", 3), 1.0),
    ]
    out = tmp_path / "out"
    result = qexport.merge(base, [*(named(*pair) for pair in adapters[:2]), adapters[2][0]], out, FULL)
    content = manifest(out)
    figures = content["figures"]
    old, new = (load_file(path / "model.safetensors") for path in (base, out))
    told = {change["tensor"]: change for change in figures["changes"]}
    assert set(told) == {name for name in new if not torch.equal(old[name], new[name])}
    for name, change in told.items():
        expected = float((new[name].double() - old[name].double()).norm() / old[name].double().norm())
        assert change["relative_norm"] == pytest.approx(expected, rel=1e-3), name
        embeddings = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert change["adapters"] == ([1, 2, 3] if not embeddings else [2]), name
    assert figures["tensors_changed"] == len(told) == len(result.changes)
    assert figures["tensors"] == len(new)
    assert figures["size_bytes"] == sum(value.nbytes for value in new.values())
    kinds = [
        (entry["number"], entry["path"], entry["kind"], entry["weight"]) for entry in figures["adapters"]
    ]
    paths = [str(path) for path, _ in adapters]
    assert kinds == [(1, paths[0], "LORA", 0.5), (2, paths[1], "LORA", 0.25), (3, paths[2], "LORA", None)]
    assert content["recipe"]["options"]["weights"] == [0.5, 0.25, None]
    assert {"torch", "peft", "python", "safetensors"} <= content["versions"].keys()
    assert content["versions"]["torch"] == torch.__version__


def content_hash(directory: Path, names: Sequence[str]) -> str:
    lines = "".join(
        f"{name}\0{blake3((directory / name).read_bytes()).hexdigest()}\n" for name in sorted(names)
    )
    return hashlib.sha256(lines.encode()).hexdigest()


def test_the_report_holds_the_inputs_hashes(shop: Workshop, tmp_path: Path) -> None:
    base, adapters = shop.base(), [shop.kind("lora", seed=seed) for seed in (1, 2)]
    qexport.merge(base, adapters, tmp_path / "out", FULL)
    content = manifest(tmp_path / "out")
    files = ("adapter_config.json", "adapter_model.safetensors")
    inputs = content["recipe"]["inputs"]
    assert set(inputs) == {"base", "adapter 1", "adapter 2"}
    for number, adapter in enumerate(adapters, start=1):
        assert inputs[f"adapter {number}"] == content_hash(adapter, files)
    beside = [file.name for file in base.iterdir() if file.name != "README.md"]
    assert inputs["base"] == content_hash(base, beside)
    for name, record in content["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert record == {"size": len(data), "blake3": blake3(data).hexdigest()}


def test_an_adapter_that_was_not_trained_changes_nothing(shop: Workshop, tmp_path: Path) -> None:
    base = shop.base()
    blank = shutil.copytree(shop.kind("lora"), tmp_path / "blank")
    held = load_file(blank / "adapter_model.safetensors")
    zeroed = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in held.items()}
    save_file(zeroed, blank / "adapter_model.safetensors")
    result = qexport.merge(base, [blank], tmp_path / "out", FULL)
    assert result.changes == ()
    figures = manifest(tmp_path / "out")["figures"]
    assert (figures["changes"], figures["tensors_changed"]) == ([], 0)
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    other = shop.lora("three-1", seed=1)
    result = qexport.merge(base, [blank, other], tmp_path / "both", FULL)
    assert {change.tensor.split(".")[-2] for change in result.changes} == {"q_proj", "down_proj"}


def test_a_dry_run_writes_nothing(shop: Workshop, tmp_path: Path, cli: RunCli) -> None:
    base, adapters = shop.base(), [shop.lora(f"three-{seed}", seed=seed) for seed in (1, 2)]
    given = ("merge", base, "-a", adapters[0], "-a", named(adapters[1], 0.5), "--max-shard-size", "300KB")
    out = tmp_path / "out"
    code, stdout, stderr = cli(*given, "-o", out, "--dry-run", "--json")
    assert (code, stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    told = json.loads(stdout)
    code, stdout, stderr = cli(*given, "--dry-run")
    assert code == 0
    assert f"4 of {told['tensors']} tensors touched" in stdout + stderr
    assert DOWN in stdout
    assert list(tmp_path.iterdir()) == []
    code, stdout, _ = cli(*given, "-o", out, "--json")
    assert code == 0
    made = json.loads(stdout)
    # the dry run's figures are those of the run
    touched = {entry["tensor"]: entry for entry in told["touched"]}
    assert {change["tensor"] for change in made["changes"]} == set(touched)
    tensors = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    for name, entry in touched.items():
        assert entry["shape"] == list(tensors[name].shape)
        assert entry["adapters"] == [1, 2]
    assert told["tensors"] == len(tensors) == made["tensors"]
    assert told["size_bytes"] == sum(value.nbytes for value in tensors.values()) == made["size_bytes"]
    assert [entry["file"] for entry in told["files"]] == sorted(f.name for f in out.glob("*.safetensors"))
    for entry in told["files"]:
        in_file = sum(value.nbytes for value in load_file(out / entry["file"]).values())
        assert entry["size_bytes"] == in_file
    assert told["peak_bytes"] > 0


def test_a_dry_run_makes_the_same_checks(shop: Workshop) -> None:
    adapters = [shop.kind("saved_head", "qwen2", seed) for seed in (1, 2)]
    with pytest.raises(AdapterError, match="conflicting edits"):
        planned_merge(shop.base("qwen2"), adapters)
    with pytest.raises(SpecError, match="--device tpu"):
        planned_merge(shop.base("qwen2"), adapters[:1], MergeSpec(device="tpu"))
    notes: list[object] = []
    planned = planned_merge(shop.base(tied=True), [shop.kind("head", tied=True)], on_event=notes.append)
    assert any(isinstance(note, Noted) and "not tied" in note.text for note in notes)
    assert {name for name, _, _ in planned.touched} == {"lm_head.weight"}
