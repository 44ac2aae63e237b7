"""llama.cpp's mixes: which type each tensor of a Q4_K_M file gets, and of its kin.

The rules are those of `llama_tensor_get_type` in llama.cpp's llama-quant.cpp (2026), as tables: a mix has a
type for most matrices, and gives some kinds of tensors, or some blocks of the model, more bits.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qexport.errors import SpecError
from qexport.grids.ggml.types import TYPES, BlockType


@dataclass(frozen=True)
class Mix:
    """A mix by its name in lower case: llama.cpp's number of it (`general.file_type`) and its main type."""

    name: str
    file_type: int
    main: str


_MIXES = (
    Mix("f32", 0, "f32"),
    Mix("f16", 1, "f16"),
    Mix("bf16", 32, "bf16"),
    Mix("q8_0", 7, "q8_0"),
    Mix("q4_0", 2, "q4_0"),
    Mix("q4_1", 3, "q4_1"),
    Mix("q5_0", 8, "q5_0"),
    Mix("q5_1", 9, "q5_1"),
    Mix("q2_k", 10, "q2_k"),
    Mix("q2_k_s", 21, "q2_k"),
    Mix("q3_k_s", 11, "q3_k"),
    Mix("q3_k_m", 12, "q3_k"),
    Mix("q3_k_l", 13, "q3_k"),
    Mix("q4_k_s", 14, "q4_k"),
    Mix("q4_k_m", 15, "q4_k"),
    Mix("q5_k_s", 16, "q5_k"),
    Mix("q5_k_m", 17, "q5_k"),
    Mix("q6_k", 18, "q6_k"),
    Mix("iq2_xxs", 19, "iq2_xxs"),
    Mix("iq2_xs", 20, "iq2_xs"),
    Mix("iq2_s", 28, "iq2_xs"),
    Mix("iq2_m", 29, "iq2_s"),
    Mix("iq3_xxs", 23, "iq3_xxs"),
    Mix("iq3_xs", 22, "iq3_s"),
    Mix("iq3_s", 26, "iq3_s"),
    Mix("iq3_m", 27, "iq3_s"),
    Mix("iq4_nl", 25, "iq4_nl"),
    Mix("iq4_xs", 30, "iq4_xs"),
    Mix("tq1_0", 36, "tq1_0"),
    Mix("tq2_0", 37, "tq2_0"),
    Mix("mxfp4_moe", 38, "mxfp4"),
)
MIXES: dict[str, Mix] = {mix.name: mix for mix in _MIXES}
_SHORT = {
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "mxfp4": "mxfp4_moe",
}  # as llama-quantize has it
BY_BITS = {8: "q8_0", 6: "q6_k", 5: "q5_k_m", 4: "q4_k_m", 3: "q3_k_m", 2: "q2_k"}  # what --bits alone means

# A row that is no whole number of blocks gets another type, and where that does not fit either, f16.
_FALLBACK = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
# Matrices of these types are refused without an importance matrix, but for embeddings and output head.
_NEED_IMPORTANCE = ("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s")
_FLOATS = ("f32", "f16", "bf16")
_BLOCK = re.compile(r"^blk\.(\d+)\.")
# The kind of a tensor, by a part of its name; the first that fits.
_KINDS = (
    ("attn_qkv.weight", "qkv"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model. `importance`: whether there is an importance matrix."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False
    importance: bool = False

    @property
    def shared(self) -> bool:
        """Whether at least 4 heads share a key and a value."""
        return self.heads // max(self.kv_heads, 1) >= 4

    @property
    def of_70b(self) -> bool:
        """Whether llama.cpp takes the model for one of 70 billion parameters."""
        if self.blocks != 80:
            return False
        # llama.cpp tells Llama's 65B and 70B apart by their keys and values
        return self.architecture == "qwen2" or (self.architecture == "llama" and self.heads != self.kv_heads)


@dataclass(frozen=True)
class _Case:
    """A matrix in a block, as the conditions of the tables see it."""

    block: int
    model: ModelFacts

    def first(self, share: int) -> bool:
        """Whether the block is among the first of so many parts."""
        return self.block < self.model.blocks // share

    def outer(self) -> bool:
        """The first and the last eighth of the blocks, and every third between."""
        n, i = self.model.blocks, self.block
        return self.first(8) or i >= 7 * n // 8 or (i - n // 8) % 3 == 2

    def middle(self) -> bool:
        """Beyond the first eighth of the blocks and before the last."""
        return self.model.blocks // 8 <= self.block < 7 * self.model.blocks // 8


_When = Callable[[_Case], bool]
# kind -> mix -> (condition, type) in order; the first condition that holds decides
_Rules = Mapping[str, Sequence[tuple[_When, str]]]


def _always(case: _Case) -> bool:
    return True


def _shared(case: _Case) -> bool:
    return case.model.shared


def _first_eighth(case: _Case) -> bool:
    return case.first(8)


_SHARED_Q4: Sequence[tuple[_When, str]] = ((_shared, "q4_k"),)
_V: _Rules = {
    "q2_k": ((_shared, "q4_k"), (_always, "q3_k")),
    "q2_k_s": _SHARED_Q4,
    "iq3_xxs": ((_shared, "q4_k"), (lambda c: not c.model.importance, "iq3_s")),
    "iq3_xs": _SHARED_Q4,
    "iq3_s": _SHARED_Q4,
    "iq3_m": ((_always, "q4_k"),),
    "q3_k_m": ((lambda c: c.block < 2, "q5_k"), (_always, "q4_k")),
    "q3_k_l": ((_always, "q5_k"),),
    "iq4_nl": ((_shared, "q5_k"),),
    "iq4_xs": ((_shared, "q5_k"),),
    "q4_k_m": ((_Case.outer, "q6_k"),),
    "q5_k_m": ((_Case.outer, "q6_k"),),
    "q4_k_s": ((lambda c: c.block < 4, "q5_k"),),
}
_DOWN: _Rules = {
    "q2_k": ((_always, "q3_k"),),
    "q2_k_s": ((_first_eighth, "q4_k"),),
    "iq3_xxs": (
        (lambda c: not c.model.importance and c.first(8), "q4_k"),
        (lambda c: not c.model.importance, "q3_k"),
    ),
    "q3_k_m": ((lambda c: c.first(16), "q5_k"), (_always, "q4_k")),
    "iq3_m": ((lambda c: c.first(8) or (c.model.experts == 8 and c.outer()), "q4_k"),),
    "q3_k_l": ((_always, "q5_k"),),
    "q4_k_m": ((_Case.outer, "q6_k"),),
    "iq4_nl": ((lambda c: c.first(8) and not c.model.importance, "q5_k"),),
    "iq4_xs": ((lambda c: c.first(8) and not c.model.importance, "q5_k"),),
    "q5_k_m": ((_Case.outer, "q6_k"),),
    "q4_k_s": ((_first_eighth, "q5_k"),),
    "q4_0": ((lambda c: c.model.importance and c.first(8), "q4_1"),),
    "q5_0": ((lambda c: c.model.importance and c.first(8), "q5_1"),),
}
_ATTENTION_OUTPUT: _Rules = {
    "q2_k": ((_always, "q3_k"),),
    "iq3_xxs": ((_always, "iq3_s"),),
    "q3_k_m": ((_always, "q4_k"),),
    "q3_k_l": ((_always, "q5_k"),),
    "iq3_m": ((_always, "q4_k"),),
}
_MIDDLE_XXS: _Rules = {"iq3_xs": ((_Case.middle, "iq3_xxs"),)}
_RULES: Mapping[str, _Rules] = {
    "v": _V,
    "qkv": _V,
    "k": {"iq3_xs": ((_always, "iq3_xxs"),), "iq3_xxs": ((_always, "iq2_s"),)},
    "q": {"iq3_xs": ((_always, "iq3_xxs"),), "iq3_xxs": ((_always, "iq2_s"),)},
    "down": _DOWN,
    "attn_output": _ATTENTION_OUTPUT,
    "gate": _MIDDLE_XXS,
    "up": _MIDDLE_XXS,
}
_TWO_BITS = ("iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")  # mixes with rules of their own
_EMBEDDINGS = {
    "iq2_xxs": "q2_k",
    "iq2_xs": "q2_k",
    "iq2_s": "iq3_s",
    "iq2_m": "iq3_s",
    "iq3_xxs": "iq3_s",
    "tq1_0": "q4_k",
    "tq2_0": "q4_k",
}
# with 8 experts the attention's output gets more bits in these
_EIGHT_EXPERTS = (
    *("q2_k", "iq3_xs", "iq3_xxs", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m"),
    "iq4_xs",
)


def mix_of(name: str) -> Mix:
    """The mix of a name, in any case; q4_k is q4_k_m. SpecError with the nearest for one that is none."""
    wanted = name.strip().lower()
    found = MIXES.get(_SHORT.get(wanted, wanted))
    if found is None:
        near = difflib.get_close_matches(wanted, MIXES, n=1)
        raise SpecError(
            f"there is no GGUF type or mix {name!r}",
            expected=", ".join(MIXES),
            remedy=f"did you mean {near[0]}?" if near else "",
        )
    return found


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor may become codes: a matrix that is no norm, no router and no table of positions."""
    return (
        len(shape) >= 2
        and name.endswith(".weight")
        and not name.endswith("_norm.weight")
        and "ffn_gate_inp.weight" not in name
        and name not in ("position_embd.weight", "token_types.weight")
    )


def tensor_type(mix: Mix, name: str, shape: Sequence[int], model: ModelFacts) -> BlockType:
    """The type of the tensor `name` ([..., out, in]) in a file of this mix."""
    if not quantizable(name, shape):
        return TYPES["f32"]
    if mix.main in _FLOATS:
        return TYPES[mix.main]
    return fallback(TYPES[_wanted(mix, name, shape, model)], shape[-1])


def fallback(wanted: BlockType, inputs: int) -> BlockType:
    """`wanted` where a row of `inputs` is made of its blocks, or what llama.cpp puts in its place."""
    if wanted.holds(inputs):
        return wanted
    smaller = TYPES[_FALLBACK.get(wanted.name, "f16")]
    return smaller if smaller.holds(inputs) else TYPES["f16"]


def needs_importance(mix: Mix, name: str, chosen: BlockType) -> bool:
    """Whether llama.cpp refuses to quantize the tensor so without an importance matrix."""
    if name in ("token_embd.weight", "output.weight"):
        return False
    return chosen.name in _NEED_IMPORTANCE or (mix.name == "q2_k_s" and chosen.name == "q2_k")


def _wanted(mix: Mix, name: str, shape: Sequence[int], model: ModelFacts) -> str:
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        return _head(mix, shape[-1])
    if mix.name == "mxfp4_moe":
        return "mxfp4" if len(shape) > 2 else "q8_0"
    if name == "token_embd.weight":
        return _EMBEDDINGS.get(mix.name, mix.main)
    block = _BLOCK.match(name)
    kind = next((kind for part, kind in _KINDS if part in name), None)
    if block is None or kind is None:
        return mix.main
    case = _Case(int(block[1]), model)
    chosen = _in_two_bits(mix, kind, case) if mix.name in _TWO_BITS else _in_block(mix, kind, case)
    return chosen or mix.main


def _head(mix: Mix, inputs: int) -> str:
    if mix.name == "mxfp4_moe" or mix.main == "q8_0" or not TYPES[mix.main].holds(inputs):
        return "q8_0"
    return "q5_k" if mix.name in (*_TWO_BITS, "iq3_xxs") else "q6_k"


def _in_block(mix: Mix, kind: str, case: _Case) -> str | None:
    eight = case.model.experts == 8
    if eight and kind in ("v", "qkv", "k"):
        return "q8_0"
    if eight and kind == "attn_output":
        return "q5_k" if mix.name in _EIGHT_EXPERTS else None
    chosen = next((found for when, found in _RULES[kind].get(mix.name, ()) if when(case)), None)
    if kind in ("v", "qkv") and case.model.of_70b and (chosen or mix.main) in ("q3_k", "q4_k"):
        return "q5_k"
    return chosen


def _in_two_bits(mix: Mix, kind: str, case: _Case) -> str | None:
    larger = mix.name in ("iq2_s", "iq2_m")
    model = case.model
    if kind in ("v", "qkv"):
        return "q4_k" if model.shared or model.experts >= 4 else ("iq3_s" if larger else "q2_k")
    if kind == "k" and model.experts == 8:
        return "q4_k"
    if kind == "down" and case.first(8):
        return "iq3_s" if larger else "q2_k"
    if kind == "attn_output":
        return "q5_k" if model.experts == 8 else ("iq3_s" if larger else None)
    return None
