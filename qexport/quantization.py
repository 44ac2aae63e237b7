"""`qexport quantize`: calibrate -> solve -> encode -> write, one tensor or one block in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qexport.calibrate.hessian import HessianSum
from qexport.calibrate.texts import read_documents
from qexport.calibrate.windows import calibration_windows
from qexport.checkpoint.checkpoint import Checkpoint, open_directory
from qexport.checkpoint.embedded import is_embedded
from qexport.checkpoint.finiteness import require_finite
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import Recipe, fingerprint
from qexport.checkpoint.sidecars import sidecars_of
from qexport.checkpoint.tensors import TensorInfo
from qexport.checkpoint.writer import CheckpointWriter
from qexport.errors import CalibrationError, SpecError, UnsupportedModelError
from qexport.events import Advanced, Finished, Noted, OnEvent, Started, ignore
from qexport.formats.format import Facts
from qexport.formats.opening import float_dtype
from qexport.measure import Measured
from qexport.methods import Method, method_of
from qexport.modeling.architectures import architecture_of
from qexport.modeling.blocks import BlockStream
from qexport.modeling.skeleton import Skeleton, build_skeleton
from qexport.modeling.structure import structure_problems
from qexport.modeling.tokenizer import load_tokenizer, require_known_ids
from qexport.packaged import calibration_text
from qexport.results import QuantizeResult
from qexport.specs import AnyQuantizeSpec, CalibrationSpec

_OWN_TEXT = "text of your model's kind gives better codes: --calibration"
_QUANTIZABLE = (torch.float16, torch.bfloat16, torch.float32)
_BATCH_TOKENS = 4096  # tokens that go through a block at once


def quantize_recipe(source: Path, spec: AnyQuantizeSpec) -> Recipe:
    """What determines the output of `quantize`; the calibration text counts by its content."""
    inputs = {"model": fingerprint(source)}
    if isinstance(spec, CalibrationSpec):
        inputs["calibration"] = fingerprint(_calibration_path(spec))
    return Recipe("quantize", spec.model_dump(exclude={"calibration"}), inputs, spec.packages)


def _calibration_path(spec: CalibrationSpec) -> Path:
    path = Path(spec.calibration) if spec.calibration else calibration_text()
    if not path.is_file():
        raise CalibrationError(
            f"the calibration text {path} is no file",
            expected="a text, JSON or JSON-lines file",
        )
    return path


def quantize(
    source: str | Path,
    out: str | Path,
    spec: AnyQuantizeSpec,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> QuantizeResult:
    """Writes `source` to `out` with its linear layers quantized as `spec` says.

    Embeddings, norms and the output head stay as they are, and so does a layer that the format cannot
    hold; the result names those. Methods without data stream tensor by tensor; calibrated ones hold one
    block and the calibration activations. The input is not changed.

    Raises InputError for what cannot be read or does not fit, NonFiniteError before the long work,
    MissingDependencyError, OutputExistsError, StorageError.
    """
    path, out = resolve(source), Path(out)
    checkpoint = open_directory(path)
    skeleton = build_skeleton(path, trust_remote_code=trust_remote_code)
    job = _plan(checkpoint, skeleton, spec, on_event)
    samples = None
    if job.method.prepare and isinstance(spec, CalibrationSpec):
        samples = _samples(path, spec, job.skeleton, trust_remote_code, on_event)
    with (
        Measured() as cost,
        CheckpointWriter(
            out,
            job.infos,
            config={**checkpoint.config, "quantization_config": job.quantization_config},
            recipe=lambda: quantize_recipe(path, spec),
            max_shard_size=spec.max_shard_size,
            sidecars=sidecars_of(path),
            sources=[path],
            overwrite=overwrite,
            on_event=on_event,
        ) as writer,
    ):
        for name, content in job.method.format.extra_files(job.quantization_config).items():
            writer.add_json(name, content)
        require_finite(checkpoint, on_event=on_event)
        on_event(Started(f"{spec.method} {spec.bits} bits", len(job.converted), "layers"))
        if samples is None or job.method.prepare is None:
            _quantize_alone(checkpoint, job, writer, on_event)
        else:
            _quantize_by_blocks(checkpoint, job, job.method.prepare, samples, writer, on_event)
        on_event(Finished())
        for name in checkpoint.names():
            if name not in job.weights:
                writer.write(name, checkpoint.read(name))
        figures = _figures(job, checkpoint, writer.plan.size)
        writer.figures.update(figures)
    return QuantizeResult(
        path=out,
        method=spec.method,
        bits=spec.bits,
        quantized_layers=len(job.converted),
        layers_left=tuple(job.left),
        size_bytes=writer.plan.size,
        bits_per_weight=figures["bits_per_weight"],
        layer_bits_per_weight=figures["layer_bits_per_weight"],
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
    )


def planned_size(
    checkpoint: Checkpoint, skeleton: Skeleton, spec: AnyQuantizeSpec, *, on_event: OnEvent = ignore
) -> int:
    """Bytes of the weights that `quantize` would write: all is checked, no tensor is read.

    Raises the InputError that `quantize` would.
    """
    job = _plan(checkpoint, skeleton, spec, on_event)
    if isinstance(spec, CalibrationSpec):
        read_documents(_calibration_path(spec))
    return sum(info.size for info in job.infos)


@dataclass(frozen=True)
class _Job:
    """Everything that is known before the first tensor is read."""

    skeleton: Skeleton
    method: Method
    converted: Sequence[str]
    left: Sequence[str]
    infos: Sequence[TensorInfo]
    quantization_config: dict[str, object]

    @cached_property
    def weights(self) -> set[str]:
        """Names of the weights that become codes."""
        return {f"{module}.weight" for module in self.converted}


def _plan(checkpoint: Checkpoint, skeleton: Skeleton, spec: AnyQuantizeSpec, on_event: OnEvent) -> _Job:
    if checkpoint.quantization:
        raise UnsupportedModelError(
            f"{checkpoint.path} is quantized already ({checkpoint.quantization.get('quant_method')})",
            expected="a 16- or 32-bit model",
        )
    linears = skeleton.linears()
    if problems := structure_problems(checkpoint, skeleton):
        raise UnsupportedModelError(
            f"{checkpoint.path} does not hold the model of its config.json: {', '.join(problems)}"
        )
    for name in linears:
        if (dtype := checkpoint.info(f"{name}.weight").dtype) not in _QUANTIZABLE:
            raise UnsupportedModelError(f"{name}.weight is {dtype}", expected="weights in fp16, bf16 or fp32")
    method = method_of(spec, linears)
    obstacles = {
        name: reason
        for name, shape in linears.items()
        if (reason := method.format.obstacle(shape, method.grid))
    }
    if method.prepare:
        row = architecture_of(skeleton.model_type)
        known = {inner for group in row.linears for inner in group}
        for name in linears:
            if re.sub(rf"^{re.escape(row.blocks)}\.\d+\.", "", name) not in known:
                obstacles.setdefault(name, f"no place in the architecture row of {skeleton.model_type}")
    converted = [name for name in linears if name not in obstacles]
    left = list(obstacles)
    if not converted:
        raise SpecError(
            f"no linear layer of {checkpoint.path} can be stored in the {method.format.METHOD} layout: "
            f"they have {next(iter(obstacles.values()), 'no weights')}",
            remedy="try another method, such as bnb with 8 bits",
        )
    for reason in sorted(set(obstacles.values())):
        names = [name for name in left if obstacles[name] == reason]
        shape = "x".join(map(str, linears[names[0]]))
        on_event(
            Noted(
                f"{len(names)} of {len(linears)} linear layers stay in full precision, they have "
                f"{reason}: {_short(names)} ({shape})"
            )
        )
    facts = Facts(converted, left, skeleton.head_name or "lm_head", float_dtype(checkpoint), method.damp)
    infos: list[TensorInfo] = []
    for name in checkpoint.names():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in linears and module not in obstacles:
            infos += method.format.layout(module, linears[module], method.grid)
        else:
            infos.append(checkpoint.info(name))
    config = method.format.quantization_config(method.grid, facts)
    return _Job(skeleton, method, converted, left, infos, config)


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _samples(
    path: Path,
    spec: CalibrationSpec,
    skeleton: Skeleton,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> torch.Tensor:
    documents = read_documents(_calibration_path(spec))
    if spec.calibration is None and not is_embedded(path):
        on_event(Noted(f"calibrating on the package's own little text; {_OWN_TEXT}"))
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    length = skeleton.length(spec.sequence_length)
    windows = calibration_windows(documents, tokenizer, samples=spec.samples, length=length, seed=spec.seed)
    if len(windows) < spec.samples:
        on_event(
            Noted(
                f"the calibration text fills {len(windows)} of {spec.samples} samples "
                f"of {length} tokens; more text gives better codes"
            )
        )
    require_known_ids(int(windows.max()), skeleton, path)
    return windows


def _quantize_alone(checkpoint: Checkpoint, job: _Job, writer: CheckpointWriter, on_event: OnEvent) -> None:
    for module in job.converted:
        codes = job.method.solve(checkpoint.read(f"{module}.weight"), None)
        for name, tensor in job.method.format.encode(module, codes, job.method.grid).items():
            writer.write(name, tensor)
        on_event(Advanced(1, module))


def _quantize_by_blocks(
    checkpoint: Checkpoint,
    job: _Job,
    prepare: Callable[[torch.Tensor], Any],
    samples: torch.Tensor,
    writer: CheckpointWriter,
    on_event: OnEvent,
) -> None:
    """GPTQ's order: within a block, layers that share an input; each sees what those before it became."""
    stream = BlockStream(job.skeleton, checkpoint)
    batches = list(torch.split(samples, max(_BATCH_TOKENS // samples.shape[1], 1)))
    hidden = stream.embed(batches)
    converted = set(job.converted)
    for index in range(len(stream)):
        with stream.block(index) as block:
            for group in stream.architecture.linears:
                names = [f"{stream.block_name(index)}.{inner}" for inner in group]
                chosen = [n for n in zip(group, names, strict=True) if n[1] in converted]
                if not chosen:
                    continue
                prepared = prepare(_hessian(stream, index, hidden, *chosen[0]))
                for inner, name in chosen:
                    weight = block.get_parameter(f"{inner}.weight")
                    codes = job.method.solve(weight.data, prepared)
                    weight.data = job.method.grid.decode(codes)
                    tensors = job.method.format.encode(name, codes, job.method.grid)
                    for part, tensor in tensors.items():
                        writer.write(part, tensor)
                    on_event(Advanced(1, name))
            hidden = [stream.run(index, batch) for batch in hidden]


def _hessian(
    stream: BlockStream, index: int, hidden: Sequence[torch.Tensor], inner: str, name: str
) -> torch.Tensor:
    total: HessianSum | None = None
    for batch in hidden:
        x = stream.run_until(index, batch, inner)
        total = total or HessianSum(x.shape[-1])
        total.add(x)
    if total is None:
        raise CalibrationError("the calibration text has no tokens")
    return total.mean(name)


def _figures(job: _Job, checkpoint: Checkpoint, size: int) -> dict[str, float]:
    parameters = sum(checkpoint.info(name).numel for name in checkpoint.names())
    kept = sum(checkpoint.info(n).size for n in checkpoint.names() if n not in job.weights)
    coded = sum(info.size for info in job.infos) - kept
    weights = sum(checkpoint.info(name).numel for name in job.weights)
    return {
        "size_bytes": size,
        "bits_per_weight": round(8 * size / parameters, 4),
        "layer_bits_per_weight": round(8 * coded / weights, 4),
        "quantized_layers": len(job.converted),
        "layers_left": len(job.left),
    }
