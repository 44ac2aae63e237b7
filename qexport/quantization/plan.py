"""Everything that is known before the first tensor is read: which layers become codes, on which grid."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.tensors import TensorInfo
from qexport.devices import device_of
from qexport.errors import SpecError, UnsupportedModelError, first_of
from qexport.events import Noted, OnEvent
from qexport.formats.format import Facts
from qexport.formats.opening import float_dtype
from qexport.grids.grid import Grid
from qexport.methods import FORMATS, Method, method_of
from qexport.modeling.architectures import architecture_of
from qexport.modeling.blocks import fused_layers, layer_names
from qexport.modeling.skeleton import Skeleton
from qexport.modeling.structure import structure_problems
from qexport.quantization.choice import FULL, Override, chosen_bits, skipped
from qexport.specs import AnyQuantizeSpec, CalibrationSpec

_EXPERT = re.compile(r"\.experts\.\d+\.")
_GGUF_ONLY = ("type", "pre_tokenizer", "imatrix")
_QUANTIZABLE = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Plan:
    """A quantization of one checkpoint. Names of layers are those on disk, without `.weight`.

    `shapes` [out, in] and `grids` have the layers that become codes; `alone` those of them that are solved
    without data though the method has some: the output head and the embeddings. `left` tells why each other
    linear layer stays. `infos` are the tensors of the output.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    method: Method
    shapes: Mapping[str, tuple[int, int]]
    grids: Mapping[str, Grid]
    alone: frozenset[str]
    left: Mapping[str, str]
    infos: Sequence[TensorInfo]
    config_entries: Mapping[str, Any]

    @cached_property
    def weights(self) -> frozenset[str]:
        """Names of the weights that become codes."""
        return frozenset(f"{module}.weight" for module in self.grids)

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Layers whose weight lies as [in, out]."""
        return self.skeleton.transposed

    def kept(self) -> list[str]:
        """Names of the tensors that stay as they are, in file order."""
        return [name for name in self.checkpoint.names() if name not in self.weights]

    def layer_tensors(self, module: str, codes: Any) -> dict[str, torch.Tensor]:
        """The tensors of a solved layer, by their names."""
        return self.method.format.encode(module, codes, self.grids[module])


def plan_quantization(
    checkpoint: Checkpoint, skeleton: Skeleton, spec: AnyQuantizeSpec, on_event: OnEvent
) -> Plan:
    """Checks everything that can be checked without reading a tensor. Raises InputError."""
    for name in _GGUF_ONLY:
        if getattr(spec, name, None):
            raise SpecError(
                f"--{name.replace('_', '-')} with --format {spec.format}",
                expected="it is for --method gguf alone",
            )
    if spec.device and not isinstance(spec, CalibrationSpec):
        raise SpecError(
            f"--device with --solver {spec.solver} and --format {spec.format}",
            expected="it is for calibrated methods, such as gptq and awq, and for gguf",
        )
    device_of(spec.device)
    if checkpoint.quantization:
        raise UnsupportedModelError(
            f"{checkpoint.path} is quantized already ({checkpoint.quantization.get('quant_method')})",
            expected="a 16- or 32-bit model",
            remedy="--method gguf takes it so; for others decode it first: qexport convert MODEL -o OUT",
        )
    skeleton = skeleton.bound(checkpoint)
    if problems := structure_problems(checkpoint, skeleton):
        raise UnsupportedModelError(
            f"{checkpoint.path} does not hold the model of its config.json: {', '.join(problems)}"
        )
    inner = skeleton.linears()
    outer = _outer_layers(checkpoint, skeleton)
    asked = _asked_for(spec, skeleton, outer, checkpoint)
    names = [*inner, *asked]
    shapes = {**inner, **{name: outer[name] for name in asked}}
    for name in names:
        if (dtype := checkpoint.info(f"{name}.weight").dtype) not in _QUANTIZABLE:
            raise UnsupportedModelError(f"{name}.weight is {dtype}", expected="weights in fp16, bf16 or fp32")
    module = FORMATS[spec.format].module
    if module.EXPERTS == "none" and (skeleton.fused or any(map(_EXPERT.search, inner))):
        reading = [name for name, row in FORMATS.items() if row.module.EXPERTS == "codes"]
        raise SpecError(
            f"no runtime of {spec.format} reads a mixture of experts",
            expected=f"--format {' or '.join(reading)}",
        )
    skip = skipped(names, spec.skip, [name for name in outer if name not in asked])
    overrides = chosen_bits(names, spec.override)
    skip |= {name for name, override in overrides.items() if override.bits == FULL}
    wanted = {name: shapes[name] for name in names if name not in skip}
    method = method_of(spec, wanted or shapes, float_dtype(checkpoint))

    grids: dict[str, Grid] = {}
    made: dict[tuple[int, int | None], Grid] = {}
    for name in wanted:
        override = overrides.get(name)
        if override is None:
            grids[name] = method.common
            continue
        key = (override.bits, override.group_size)
        if key not in made:
            made[key] = _overridden(method, override)
        grids[name] = made[key]
    obstacles = _obstacles(method, skeleton, wanted, grids, frozenset(asked))
    grids = {name: grid for name, grid in grids.items() if name not in obstacles}
    for name, grid in grids.items():
        if (size := getattr(grid, "group_size", -1)) not in (-1, 0) and shapes[name][1] % size:
            raise SpecError(
                f"group size {size} does not divide the {shapes[name][1]} inputs of {name}",
                expected="a group size that does, or -1 for a whole row",
            )
    if not grids and not wanted:
        raise SpecError("--skip and --override leave no linear layer to quantize", remedy="leave out fewer")
    if not grids:
        raise SpecError(
            f"no linear layer of {checkpoint.path} can be stored in the {spec.format} format: "
            f"{next(iter(obstacles.values()))}",
            remedy="try another method, such as bnb with 8 bits",
        )
    _tell(obstacles, inner, on_event)
    if fused := skeleton.fused:
        on_event(
            Noted(f"{len(fused)} tensors of fused experts stay in full precision: {first_of(list(fused), 2)}")
        )
    left = {**dict.fromkeys(sorted(skip), "left out by --skip"), **obstacles}
    output = _output(checkpoint, skeleton, method, shapes, grids, [*left, *skeleton.routers])
    _tell_of_loaders(method, skeleton, grids, on_event)
    _tell_of_parted(method, skeleton, grids, on_event)
    return Plan(
        checkpoint,
        skeleton,
        method,
        {name: shapes[name] for name in grids},
        grids,
        frozenset(asked) & grids.keys(),
        left,
        *output,
    )


def _overridden(method: Method, override: Override) -> Grid:
    try:
        return method.grid(override.bits, override.group_size)
    except SpecError as error:
        raise SpecError(
            f"--override '{override}': {error.found}", expected=error.expected, remedy=error.remedy
        ) from error


def _outer_layers(checkpoint: Checkpoint, skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    """The output head and the embedding table, as far as they are matrices of their own: [out, in]."""
    found: dict[str, tuple[int, int]] = {}
    for weight in (skeleton.embedding_weight, skeleton.head_weight):
        if weight and weight in checkpoint and len(shape := checkpoint.info(weight).shape) == 2:
            found[weight.removesuffix(".weight")] = (shape[0], shape[1])
    return found


def _asked_for(
    spec: AnyQuantizeSpec,
    skeleton: Skeleton,
    outer: Mapping[str, tuple[int, int]],
    checkpoint: Checkpoint,
) -> list[str]:
    """Names of the output head and the embeddings, as far as the user wants them quantized."""
    row = FORMATS[spec.format]
    embedding = skeleton.embedding_weight.removesuffix(".weight")
    head = skeleton.head_weight.removesuffix(".weight")
    asked: list[str] = []
    if spec.embeddings or (spec.lm_head and checkpoint.tie):
        if not row.module.HOLDS_EMBEDDINGS:
            holding = [name for name, other in FORMATS.items() if other.module.HOLDS_EMBEDDINGS]
            why = "the output head is tied to them" if not spec.embeddings else "they were asked for"
            raise SpecError(
                f"{spec.format} has no quantized embeddings, and {why}",
                expected=f"a format that has: {', '.join(holding)}",
                remedy="leave --embeddings and --lm-head away",
            )
        asked.append(embedding)
    if spec.lm_head and not checkpoint.tie:
        if not row.module.HOLDS_HEAD:
            holding = [name for name, other in FORMATS.items() if other.module.HOLDS_HEAD]
            raise SpecError(
                f"no runtime reads a quantized output head in {spec.format}",
                expected=f"a format where one does: {', '.join(holding)}",
                remedy="leave --lm-head away",
            )
        asked.append(head)
    missing = [name for name in asked if name not in outer]
    if missing:
        raise SpecError(f"the model has no {first_of(missing)} that could be quantized")
    return asked


def _obstacles(
    method: Method,
    skeleton: Skeleton,
    shapes: Mapping[str, tuple[int, int]],
    grids: Mapping[str, Grid],
    alone: frozenset[str],
) -> dict[str, str]:
    """Layers that cannot become codes, and why."""
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        if reason := method.format.obstacle(shape, grids[name]):
            found[name] = f"they have {reason}"
        elif method.format.EXPERTS == "plain" and _EXPERT.search(name):
            found[name] = f"{method.spec.format}'s runtimes read the experts of a mixture only so"
        elif name in skeleton.transposed and not method.format.HOLDS_CONV1D:
            found[name] = f"no runtime of {method.spec.format} reads Conv1D layers"
    if method.calibrated:
        architecture_of(skeleton.model_type)
        known = layer_names(skeleton)
        for name in shapes:
            if name not in known and name not in alone:
                found.setdefault(name, f"they have no place in the architecture row of {skeleton.model_type}")
    return found


def _tell(obstacles: Mapping[str, str], linears: Mapping[str, Sequence[int]], on_event: OnEvent) -> None:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in obstacles.items():
        by_reason[reason].append(name)
    for reason, names in sorted(by_reason.items()):
        shape = "x".join(map(str, linears.get(names[0], ())))
        on_event(
            Noted(
                f"{len(names)} of {len(linears)} linear layers stay in full precision, {reason}: "
                f"{first_of(names, 2)} ({shape})"
            )
        )


def _tell_of_loaders(
    method: Method, skeleton: Skeleton, grids: Mapping[str, Grid], on_event: OnEvent
) -> None:
    """What transformers itself does not read of the files, though other runtimes do."""
    special = {
        "layers of differing bits": any(grid != method.common for grid in grids.values()),
        "Conv1D layers": any(name in skeleton.transposed for name in grids),
        "experts": any(map(_EXPERT.search, grids)),
    }
    found = [what for what, there in special.items() if there]
    if found and (loader := FORMATS[method.spec.format].not_by_transformers):
        on_event(
            Noted(f"{' and '.join(found)} in {method.spec.format} are read by {loader}, not by transformers")
        )


def _tell_of_parted(method: Method, skeleton: Skeleton, grids: Mapping[str, Grid], on_event: OnEvent) -> None:
    """Layers that vLLM fuses, on grids that differ: by --override, --skip or a plan, or as the format holds
    not all of them."""
    if "vLLM" not in FORMATS[method.spec.format].runtimes:
        return
    try:
        sets = [names for names in fused_layers(skeleton) if len(names) > 1]
    except UnsupportedModelError:  # nothing is known of this architecture's layers
        return
    parted = [names for names in sets if any(grids.get(name) != grids.get(names[0]) for name in names)]
    if parted:
        on_event(
            Noted(
                f"vLLM fuses {first_of(list(parted[0]), 3)}, and refuses them on grids that differ; so it is "
                f"with {len(parted)} of {len(sets)} such sets"
            )
        )


def _in_memory(skeleton: Skeleton) -> dict[str, str]:
    """What modules are called in memory, where the checkpoint has another name: runtimes know either."""
    names = {
        place.name.removesuffix(".weight"): key.removesuffix(".weight")
        for key, place in skeleton.places.items()
    }
    names[skeleton.head_weight.removesuffix(".weight")] = skeleton.head_name
    return {stored: name for stored, name in names.items() if stored and name and stored != name}


def _under_both(names: Iterable[str], in_memory: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(n for name in names for n in (name, in_memory.get(name, name)) if n))


def _output(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    method: Method,
    shapes: Mapping[str, tuple[int, int]],
    grids: Mapping[str, Grid],
    left: Sequence[str],
) -> tuple[list[TensorInfo], dict[str, Any]]:
    """The tensors of the output, and what its config gets."""
    spec = method.spec
    infos: list[TensorInfo] = []
    for name in checkpoint.names():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in grids:
            infos += method.format.layout(module, shapes[module], grids[module])
        else:
            infos.append(checkpoint.info(name))
    embedding = skeleton.embedding_weight.removesuffix(".weight")
    head = skeleton.head_weight.removesuffix(".weight")
    in_memory = _in_memory(skeleton)
    facts = Facts(
        grids=grids,
        left=_under_both([*left, *([head] if head not in grids else [])], in_memory),
        common=method.common,
        dtype=method.dtype,
        model_type=skeleton.model_type,
        head=head or "lm_head",
        embeddings=[embedding] if embedding in grids else [],
        in_memory=in_memory,
        damp=getattr(spec, "damp", None),
        desc_act=any(method.reorders_groups(grid, shapes[name][1]) for name, grid in grids.items()),
        static_groups=getattr(spec, "static_groups", False),
        true_sequential=method.follows,
    )
    return infos, method.format.config_entries(facts)
