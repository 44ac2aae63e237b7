"""GGUF straight from a checkpoint: no 16-bit file in between, one read for all the wanted types."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from qexport.checkpoint.finiteness import require_finite
from qexport.checkpoint.gguf_files import gguf_files
from qexport.checkpoint.manifest import Recipe
from qexport.checkpoint.safetensors_file import byte_view
from qexport.devices import device_of
from qexport.errors import SpecError
from qexport.events import Finished, Noted, OnEvent, Started
from qexport.formats.gguf.container import Metadata, PlannedTensor, text, u32
from qexport.formats.gguf.general import file_stem, general
from qexport.formats.gguf.imatrix import ImportanceMatrix
from qexport.formats.gguf.mixes import MIXES, quantizable
from qexport.formats.gguf.output import GgufOutput, PlannedModel
from qexport.formats.gguf.settings import remarks, settings
from qexport.formats.gguf.splitting import SUFFIX, read_model
from qexport.formats.gguf.tensors import GgufTensor, Part
from qexport.formats.gguf.tokenizer.vocabulary import Vocabulary, vocabulary
from qexport.measure import Measured
from qexport.modeling.activations import Activations
from qexport.modeling.calibration import CalibrationData, calibration_data, check_calibration
from qexport.modeling.skeleton import Skeleton
from qexport.quantization.blockwise.by_blocks import BlockQuantizer
from qexport.quantization.blockwise.lanes import Lane
from qexport.quantization.data_free import Write
from qexport.quantization.gguf.matrix import known_matrix
from qexport.quantization.gguf.modelfile import licences, modelfiles
from qexport.quantization.gguf.plan import GgufPlan, Variant, is_coded, plan_gguf
from qexport.quantization.gguf.stream import TensorStream, stream_bytes
from qexport.quantization.importance import gather_importance, layer_inputs
from qexport.quantization.source import Source
from qexport.results import GgufFileResult, QuantizeResult, TensorError
from qexport.specs import AnyQuantizeSpec, CalibrationSpec, ImportanceSpec

_QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION
_OF_THE_FILE = ("general.alignment", "general.file_type", "general.quantization_version")
_PHI_3 = re.compile(r"(phi)-?3", re.IGNORECASE)
_PHI_3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
_PART = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$")
_TYPE = re.compile(rf"[-_.]({'|'.join(MIXES)})$", re.IGNORECASE)


@dataclass(frozen=True)
class Prepared:
    """An export that is settled: `plan` tells the tensors of the files, which are called by `stem`."""

    source: Source
    plan: GgufPlan
    vocabulary: Vocabulary
    stem: str


def prepare_gguf(
    source: Source,
    skeleton: Skeleton,
    spec: AnyQuantizeSpec,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent,
) -> Prepared:
    """All that can be checked, and settled, before a tensor is read. Raises InputError."""
    checkpoint, config = source.checkpoint, source.checkpoint.config
    metadata = settings(config)
    for remark in remarks(config):
        on_event(Noted(remark))
    if checkpoint.quantization:
        found = checkpoint.quantization.get("quant_method")
        on_event(Noted(f"{checkpoint.path} is quantized already ({found}): what was lost there stays lost"))
    words = vocabulary(
        source.path,
        vocab_size=checkpoint.info(skeleton.bound(checkpoint).embedding_weight).shape[0],
        pre=spec.pre_tokenizer,
        trust_remote_code=trust_remote_code,
        on_event=on_event,
    )
    device_of(spec.device)
    parameters = sum(checkpoint.info(name).numel for name in checkpoint.names())
    described = general(source.path, config, parameters=parameters, name=source.name, base_model=source.base)
    told = {**described, **_carried(source), **metadata, **words.metadata}
    told |= _harmless_name(told, words, on_event)
    plan = plan_gguf(checkpoint, skeleton, spec, told, on_event)
    if isinstance(spec, CalibrationSpec) and getattr(spec, "imatrix", None) is None:
        check_calibration(spec)
    called = source.directories[-1] if source.name else source.path
    stem = file_stem(called.with_name(_without_type(called.name)), config)
    return Prepared(source, plan, words, stem)


def _carried(source: Source) -> Metadata:
    """What a GGUF file that is encoded anew says of the model: its name, licence, what it was made from."""
    files = [] if source.name else gguf_files(source.path)
    found = read_model(files[0]).metadata if files else {}
    return {
        key: value for key, value in found.items() if key.startswith("general.") and key not in _OF_THE_FILE
    }


def _harmless_name(metadata: Metadata, words: Vocabulary, on_event: OnEvent) -> Metadata:
    """Another name for a model whose own llama.cpp takes for Phi-3's, and asks for tokens that it has not.

    It then does not load the file: llama-vocab.cpp, `_contains_any(model_name, {"phi-3", "phi3"})`.
    """
    name = metadata.get("general.name", text("")).value
    if not _PHI_3.search(name) or _PHI_3_TOKENS.issubset(words.tokens):
        return {}
    other = _PHI_3.sub(r"\1 3", name)
    on_event(Noted(f"it is called {other!r} in the file: llama.cpp would expect tokens of Phi-3 in {name!r}"))
    return {"general.name": text(other)}


def _without_type(name: str) -> str:
    """A GGUF file's name without its type: "model" of "model-Q4_K_M.gguf"; other names as they are."""
    stem = _PART.sub("", name)
    return stem if stem == name else _TYPE.sub("", stem) or stem


def quantize_gguf(
    source: Source,
    skeleton: Skeleton,
    out: Path,
    spec: AnyQuantizeSpec,
    *,
    recipe: Callable[[], Recipe],
    overwrite: bool,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> QuantizeResult:
    """Writes a file for each type. Raises as `quantize` does."""
    if out.suffix == SUFFIX:
        raise SpecError(
            f"-o {out}",
            expected="a directory to make: a Modelfile and qexport.json lie beside the .gguf file",
            remedy=f"-o {out.with_suffix('')}",
        )
    prepared = prepare_gguf(source, skeleton, spec, trust_remote_code=trust_remote_code, on_event=on_event)
    plan = prepared.plan
    matrix = known_matrix(plan, on_event)
    models = [_planned_model(prepared, variant, matrix) for variant in plan.variants]
    with (
        Measured() as cost,
        GgufOutput(
            out,
            models,
            recipe=recipe,
            sidecars=licences(source.path),
            sources=source.directories,
            overwrite=overwrite,
        ) as output,
    ):
        data = None
        if isinstance(spec, CalibrationSpec) and matrix is None:
            require_finite(plan.checkpoint, on_event=on_event)
            data = calibration_data(
                source.path, spec, plan.skeleton, trust_remote_code=trust_remote_code, on_event=on_event
            )
            output.figures["calibration"] = data.figures()
        if data is not None and isinstance(spec, ImportanceSpec):
            layers = layer_inputs(plan.tensors)
            with Activations(spec.memory, out.parent) as hidden:
                matrix = gather_importance(
                    plan.checkpoint, plan.skeleton, data, layers, hidden, on_event, _device(plan)
                )
            data = None
        errors = _write_tensors(plan, output, matrix, data, out.parent, on_event)
        for name, content in modelfiles(source.path, prepared.vocabulary, models, on_event).items():
            output.add_text(name, content)
        files = [_file_result(plan, number, model) for number, model in enumerate(models)]
        output.figures["files"] = {
            file.file: {**asdict(file), "tensor_errors": [asdict(error) for error in lost]}
            for file, lost in zip(files, errors, strict=True)
        }
    smallest = min(range(len(files)), key=lambda number: files[number].size_bytes)
    types = plan.variants[smallest].types
    return QuantizeResult(
        path=out,
        method=spec.method,
        solver=spec.solver,
        format=spec.format,
        bits=spec.width,
        quantized_layers=sum(is_coded(kind) for kind in types.values()),
        layers_left=tuple(
            name
            for name, kind in types.items()
            if quantizable(name, plan.shapes[name]) and not is_coded(kind)
        ),
        size_bytes=sum(file.size_bytes for file in files),
        bits_per_weight=files[smallest].bits_per_weight,
        layer_bits_per_weight=_coded_bits(models[smallest].tensors),
        copies=1,
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
        tensors=tuple(errors[smallest]),
        files=tuple(files),
    )


def _planned_model(prepared: Prepared, variant: Variant, matrix: ImportanceMatrix | None) -> PlannedModel:
    plan = prepared.plan
    metadata = {
        **plan.metadata,
        "general.quantization_version": u32(_QUANTIZATION_VERSION),
        "general.file_type": u32(variant.mix.file_type),
    }
    if matrix is not None:  # as llama-quantize tells it
        metadata["quantize.imatrix.file"] = text(Path(str(getattr(plan.spec, "imatrix", ""))).name)
        names = [Path(name).name for name in matrix.datasets]
        metadata["quantize.imatrix.dataset"] = text(", ".join(names))
        metadata["quantize.imatrix.entries_count"] = u32(len(matrix.entries))
        metadata["quantize.imatrix.chunks_count"] = u32(matrix.chunk_count)
    split = plan.spec.max_shard_size if "max_shard_size" in plan.spec.model_fields_set else None
    return PlannedModel(f"{prepared.stem}-{variant.mix.name.upper()}", metadata, plan.planned(variant), split)


def _write_tensors(
    plan: GgufPlan,
    output: GgufOutput,
    matrix: ImportanceMatrix | None,
    data: CalibrationData | None,
    directory: Path,
    on_event: OnEvent,
) -> list[list[TensorError]]:
    """Writes all; what the matrices of each file lost."""
    for number, variant in enumerate(plan.variants):
        for name, value in plan.computed.items():
            output.write_bytes((number, name), 0, byte_view(variant.types[name].encode(value[None])))
    if data is None:
        types = {number: variant.types for number, variant in enumerate(plan.variants)}
        stream = TensorStream(plan.checkpoint, output, types, matrix, on_event, _device(plan))
        names = ", ".join(variant.mix.name for variant in plan.variants)
        on_event(Started(f"gguf {names}", stream_bytes(plan.tensors), "bytes"))
        stream.run(plan.tensors)
        on_event(Finished())
        return [stream.errors(number) for number in range(len(plan.variants))]
    return _write_calibrated(plan, output, data, directory, on_event)


def _device(plan: GgufPlan) -> torch.device:
    return device_of(plan.spec.device)


def _write_calibrated(
    plan: GgufPlan, output: GgufOutput, data: CalibrationData, directory: Path, on_event: OnEvent
) -> list[list[TensorError]]:
    """All files by a solver that sees activations; what lies outside the blocks, without them."""
    held = {part.name: (tensor, part) for tensor in plan.tensors for part in tensor.parts}

    def writing(number: int, variant: Variant, coded: Collection[str]) -> Write:
        def write(name: str, values: torch.Tensor) -> None:
            tensor, part = held[name]
            kind = variant.types[tensor.name]
            if name in coded:
                order = tensor.row_order()
                blocks = values if order is None else values[order]
            else:  # a norm that AWQ's scales went into
                blocks = kind.encode(_arranged(tensor, values).reshape(-1, tensor.shape[-1]))
            begin = (part.expert or 0) * blocks.numel()
            output.write_bytes((number, tensor.name), begin, byte_view(blocks.contiguous()))

        return write

    lanes = []
    for number, variant in enumerate(plan.variants):
        view = plan.in_blocks(variant)
        lanes.append(Lane(view, writing(number, variant, view.weights)))
    names = ", ".join(variant.mix.name for variant in plan.variants)
    on_event(Started(f"gguf {names}", sum(len(lane.plan.grids) for lane in lanes), "layers"))
    memory = plan.spec.memory if isinstance(plan.spec, CalibrationSpec) else 0
    BlockQuantizer(lanes, data, memory, directory, on_event, _device(plan)).run()
    on_event(Finished())
    return [_write_the_rest(plan, output, number, lane, held, on_event) for number, lane in enumerate(lanes)]


def _write_the_rest(
    plan: GgufPlan,
    output: GgufOutput,
    number: int,
    lane: Lane,
    held: Mapping[str, tuple[GgufTensor, Part]],
    on_event: OnEvent,
) -> list[TensorError]:
    """What no block holds; the errors of all tensors of the file."""
    done = set(lane.plan.weights) | lane.rewritten
    rest = [tensor for tensor in plan.tensors if not any(part.name in done for part in tensor.parts)]
    types = {number: plan.variants[number].types}
    stream = TensorStream(plan.checkpoint, output, types, None, on_event, _device(plan))
    on_event(Started("the rest", stream_bytes(rest), "bytes"))
    stream.run(rest)
    on_event(Finished())
    found = [replace(error, tensor=_called(*held[f"{error.tensor}.weight"])) for error in lane.errors]
    return [*found, *stream.errors(number)]


def _called(tensor: GgufTensor, part: Part) -> str:
    """A matrix by its name in the file, an expert's with its number."""
    return tensor.name if part.expert is None else f"{tensor.name}[{part.expert}]"


def _arranged(tensor: GgufTensor, values: torch.Tensor) -> torch.Tensor:
    """Values as they lie on disk, as the file has them, fp32."""
    order = tensor.row_order()
    rows = values.float().t() if tensor.transposed else values.float()
    rows = rows if order is None else rows[order]
    return rows + 1 if tensor.plus_one else rows


def _file_result(plan: GgufPlan, number: int, model: PlannedModel) -> GgufFileResult:
    parameters = sum(plan.checkpoint.info(name).numel for name in plan.checkpoint.names())
    kinds = Counter(tensor.type.name for tensor in model.tensors)
    return GgufFileResult(
        model.files[0].name,
        plan.variants[number].mix.name,
        model.size,
        round(8 * model.size / parameters, 4),
        dict(kinds.most_common()),
    )


def _coded_bits(tensors: Sequence[PlannedTensor]) -> float:
    coded = [tensor for tensor in tensors if is_coded(tensor.type)]
    weights = sum(tensor.numel for tensor in coded)
    return round(8 * sum(tensor.size for tensor in coded) / weights, 4) if weights else 0.0
