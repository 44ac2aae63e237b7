"""What a GGUF export comes to before the first tensor is read: names, types, sizes, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import SpecError, UnsupportedModelError, first_of
from qexport.events import Noted, OnEvent
from qexport.formats.gguf.container import Metadata, PlannedTensor, Typed
from qexport.formats.gguf.mixes import (
    BY_BITS,
    Mix,
    ModelFacts,
    mix_of,
    quantizable,
    tensor_type,
)
from qexport.formats.gguf.settings import computed_tensors
from qexport.formats.gguf.tensors import GgufTensor, gguf_tensors
from qexport.grids.ggml.grid import GgmlGrid
from qexport.grids.ggml.types import BlockType
from qexport.methods import Solving
from qexport.modeling.blocks import layer_names
from qexport.modeling.skeleton import Skeleton
from qexport.modeling.structure import structure_problems
from qexport.quantization.gguf.checks import check_options, check_solver, chosen_types, hungry
from qexport.specs import AnyQuantizeSpec, AwqSpec, GptqSpec


@dataclass(frozen=True)
class Variant:
    """One file: its mix, and the type of every tensor, by GGUF name in the file's order."""

    mix: Mix
    types: Mapping[str, BlockType]


@dataclass(frozen=True)
class GgufPlan:
    """An export of one checkpoint to one file or several. `metadata` is what all of them have."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    spec: AnyQuantizeSpec
    tensors: Sequence[GgufTensor]
    computed: Mapping[str, torch.Tensor]
    variants: Sequence[Variant]
    metadata: Metadata

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape in torch's order of every tensor of the files, in their order."""
        held = {name: tuple(value.shape) for name, value in self.computed.items()}
        return held | {tensor.name: tuple(tensor.shape) for tensor in self.tensors}

    def planned(self, variant: Variant) -> list[PlannedTensor]:
        """A variant's tensors, in the file's order."""
        return [PlannedTensor(name, variant.types[name], shape) for name, shape in self.shapes.items()]

    def size(self, variant: Variant) -> int:
        """Bytes of a variant's tensors."""
        return sum(tensor.size for tensor in self.planned(variant))

    def in_blocks(self, variant: Variant) -> BlockView:
        """The plan as the calibrated solvers see it."""
        return BlockView(self, variant)


@dataclass(frozen=True)
class BlockView:
    """One variant's linear layers by their names on disk; see `lanes.BlockPlan`."""

    plan: GgufPlan
    variant: Variant

    @property
    def checkpoint(self) -> Checkpoint:
        """The model."""
        return self.plan.checkpoint

    @property
    def skeleton(self) -> Skeleton:
        """Its modules."""
        return self.plan.skeleton

    @property
    def method(self) -> Solving:
        """How codes are chosen."""
        return Solving(self.plan.spec)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """[out, in] of the layers."""
        linears = self.plan.skeleton.linears()
        return {name: linears[name] for name in self.grids}

    @cached_property
    def grids(self) -> Mapping[str, GgmlGrid]:
        """The linear layers of the blocks whose type holds codes."""
        known = layer_names(self.plan.skeleton)
        found: dict[str, GgmlGrid] = {}
        for tensor in self.plan.tensors:
            kind = self.variant.types[tensor.name]
            for part in tensor.parts:
                layer = part.name.removesuffix(".weight")
                if is_coded(kind) and layer in known and part.source_expert is None:
                    found[layer] = GgmlGrid(kind)
        return found

    @cached_property
    def weights(self) -> frozenset[str]:
        """Names of the tensors that become codes here."""
        return frozenset(f"{layer}.weight" for layer in self.grids)

    def layer_tensors(self, module: str, codes: Any) -> dict[str, torch.Tensor]:
        """The layer's blocks uint8 [out, bytes]."""
        return {f"{module}.weight": codes}


def is_coded(kind: BlockType) -> bool:
    """Whether a type's weights are codes, not floats."""
    return kind.values > 1


def plan_gguf(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    spec: AnyQuantizeSpec,
    metadata: Metadata,
    on_event: OnEvent,
) -> GgufPlan:
    """Checks all that can be checked without reading a tensor. Raises InputError."""
    check_options(spec)
    skeleton = skeleton.bound(checkpoint)
    if problems := structure_problems(checkpoint, skeleton):
        raise UnsupportedModelError(
            f"{checkpoint.path} does not hold the model of its config.json: {', '.join(problems)}"
        )
    tensors = gguf_tensors(checkpoint, skeleton)
    computed = computed_tensors(checkpoint.config)
    shapes = {name: tuple(value.shape) for name, value in computed.items()}
    shapes |= {tensor.name: tuple(tensor.shape) for tensor in tensors}
    facts = _facts(metadata, shapes, importance=spec.solver != "search")
    wanted = [mix_of(name) for name in spec.type or (_by_bits(spec.bits),)]
    if len({mix.name for mix in wanted}) < len(wanted):
        raise SpecError(f"--type {','.join(spec.type)} names a type twice", expected="each once")
    variants = [Variant(mix, _types(mix, shapes, facts, spec, checkpoint.path, on_event)) for mix in wanted]
    plan = GgufPlan(checkpoint, skeleton, spec, tensors, computed, variants, metadata)
    if isinstance(spec, (GptqSpec, AwqSpec)):
        for variant in variants:
            fused = {t.name: variant.types[t.name] for t in tensors if t.parts[0].source_expert is not None}
            coded = {name: kind for name, kind in fused.items() if is_coded(kind)}
            check_solver(spec, variant.mix.name, plan.in_blocks(variant).grids, coded, on_event)
    return plan


def _by_bits(bits: int) -> str:
    if bits not in BY_BITS:
        raise SpecError(
            f"gguf has no type that {bits} bits alone would mean",
            expected="one of " + ", ".join(f"{width} ({name})" for width, name in BY_BITS.items()),
            remedy="name one: --type iq2_xxs",
        )
    return BY_BITS[bits]


def _facts(
    metadata: Mapping[str, Typed], shapes: Mapping[str, tuple[int, ...]], *, importance: bool
) -> ModelFacts:
    architecture = str(metadata["general.architecture"].value)

    def setting(name: str, default: int) -> int:
        found = metadata.get(f"{architecture}.{name}")
        value = default if found is None else found.value
        return int(value[0] if isinstance(value, list) else value)

    heads = setting("attention.head_count", 1)
    return ModelFacts(
        architecture,
        blocks=setting("block_count", 1),
        heads=heads,
        kv_heads=setting("attention.head_count_kv", heads),
        experts=setting("expert_count", 0),
        tied="output.weight" not in shapes,
        importance=importance,
    )


def _types(
    mix: Mix,
    shapes: Mapping[str, tuple[int, ...]],
    facts: ModelFacts,
    spec: AnyQuantizeSpec,
    path: Path,
    on_event: OnEvent,
) -> dict[str, BlockType]:
    types: dict[str, BlockType] = {}
    smaller: list[str] = []
    chosen = chosen_types(spec, shapes)
    for name, shape in shapes.items():
        types[name] = chosen.get(name) or tensor_type(mix, name, shape, facts)
        pure = tensor_type(mix, name, (*shape[:-1], 256), facts)
        if name not in chosen and pure is not types[name] and quantizable(name, shape):
            smaller.append(name)
        if not facts.importance and hungry(mix, name, types[name]):
            what = "--override" if name in chosen else mix.name
            raise SpecError(
                f"{what} makes {name} {types[name].name}, which loses far too much without an importance "
                "matrix",
                expected="--calibration TEXT (or --solver importance) to gather one, or --imatrix FILE",
                remedy="or a type that needs none, such as q2_k or q3_k_s",
            )
    if smaller:
        kinds = ", ".join(sorted({types[name].name for name in smaller}))
        on_event(
            Noted(
                f"{mix.name}: rows of {len(smaller)} tensor{'s' if len(smaller) > 1 else ''} are no whole "
                f"blocks of the usual type; as in llama.cpp they get {kinds}: {first_of(smaller, 2)}"
            )
        )
    elif mix.main not in {kind.name for kind in types.values()}:
        on_event(Noted(f"{mix.name}: no tensor of this model becomes {mix.main}"))
    if not any(is_coded(kind) for kind in types.values()) and mix.main not in ("f32", "f16", "bf16"):
        raise SpecError(f"no tensor of {path} can be stored as {mix.name}", remedy="try --type q8_0 or f16")
    return types
