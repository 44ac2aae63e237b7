"""Opens a checkpoint in a real runtime and holds its logits against those of our decoded weights."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.gguf_files import gguf_files
from qexport.checkpoint.manifest import changed_files, read_manifest
from qexport.errors import (
    GateError,
    MachineError,
    MissingDependencyError,
    SpecError,
    UnsafeFileError,
    VerificationError,
    first_of,
)
from qexport.events import OnEvent, ignore
from qexport.formats import mlx
from qexport.formats.hqq import PICKLE
from qexport.formats.opening import open_checkpoint
from qexport.modeling.skeleton import Skeleton, build_skeleton
from qexport.modeling.whole import load_whole
from qexport.results import RuntimeCheck
from qexport.verification.runtimes.drivers.driver import Job, Outcome
from qexport.verification.runtimes.process import ABSENT, CRASHED, KILLED, require_python, run_jobs, runtimes
from qexport.verification.runtimes.support import GGUF, PLAIN, readers_by_method, why_unread

READERS = readers_by_method()
# The largest |theirs - ours| / |ours| that is the runtime's own rounding, on models of two random blocks
# times a few. A layer that is read wrongly gives 0.3 and more.
TOLERANCES = {
    PLAIN: 1e-3,
    "bitsandbytes": 1e-3,
    "compressed-tensors": 5e-3,  # experts are decoded to 16 bits
    "gptq": 5e-2,  # weights or all of it in 16 bits, as the kernel has it
    "awq": 5e-2,
    "hqq": 1e-3,
    "mlx": 1e-3,
    GGUF: 5e-3,  # without codes: activations in 16 bits
}
_TOLERANCE_GGUF_CODES = 0.2  # for products with codes llama.cpp rounds activations to 8 bits
_TOLERANCE_INT8 = 0.15  # LLM.int8 rounds activations to 8 bits
_ROWS, _LENGTH, _SEED = 2, 32, 20260101
_INSTALL = {
    "transformers": "pip install transformers accelerate",
    "gptqmodel": "it pins other versions: give it an environment of its own, with optimum",
    "hqq": "pip install hqq",
    "mlx": "pip install mlx-lm 'mlx[cpu]'",
    "llamacpp": "pip install cyllama",
}
_ABSENT = {ABSENT, "ImportError", "ModuleNotFoundError", "PackageNotFoundError"}


def check_runtime(
    candidate: str | Path,
    runtime: str,
    *,
    python: Path | None = None,
    tolerance: float | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> RuntimeCheck:
    """What `runtime` makes of `candidate` on a fixed batch of tokens; `require_agreement` judges it.

    `python` is the interpreter of another environment, by default our own. Raises SpecError for a runtime
    that does not read this format, MissingDependencyError where it is not installed, UnsafeFileError for
    a pickle that qexport did not write, VerificationError when the runtime cannot load the candidate.
    """
    python = require_python(python)
    if runtime not in runtimes():
        raise SpecError(f"no runtime {runtime!r}", expected=f"one of {', '.join(runtimes())}")
    checkpoint = open_checkpoint(candidate)
    method = method_of(checkpoint)
    if runtime not in READERS.get(method, ()):
        raise SpecError(
            f"{runtime} does not read {checkpoint.path} ({method})",
            expected=f"--runtime {' or '.join(READERS[method])}" if method in READERS else why_unread(method),
        )
    if runtime == "hqq" and not trust_remote_code:
        _require_own_pickle(checkpoint.path)
    skeleton = build_skeleton(checkpoint.path, trust_remote_code=trust_remote_code)
    ids = token_ids(skeleton)
    with tempfile.TemporaryDirectory(prefix="qexport-logits-") as work:
        job = job_for(checkpoint, ids, Path(work) / "logits.npy", trust_remote_code=trust_remote_code)
        outcome = run_jobs(runtime, [job], python=python, on_event=on_event)[0]
        return check_of(outcome, job, runtime, checkpoint, skeleton, python=python, tolerance=tolerance)


def job_for(
    checkpoint: Checkpoint, ids: torch.Tensor, logits: Path, *, trust_remote_code: bool = False
) -> Job:
    """What a runtime is told to do: run `checkpoint` on `ids` and leave its logits there."""
    return {
        "model": str(checkpoint.path.absolute()),
        "ids": ids.tolist(),
        "logits": str(logits),
        "trust_remote_code": trust_remote_code,
    }


def check_of(
    outcome: Outcome,
    job: Job,
    runtime: str,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    *,
    python: Path,
    tolerance: float | None = None,
) -> RuntimeCheck:
    """What came of a job, held against the weights that we decode; `skeleton` holds them from then on.

    Raises as `check_runtime` does where the runtime could not load the checkpoint.
    """
    _require_loaded(outcome, runtime, checkpoint.path, python)
    theirs = read_logits(job)
    ids = torch.tensor(job["ids"])
    difference = largest = same_top = None
    whole = not (outcome["missing"] or outcome["unexpected"] or outcome["mismatched"])
    if theirs is not None and whole:
        difference, largest, same_top = compare(theirs, our_logits(skeleton, checkpoint, ids))
    return RuntimeCheck(
        model=str(checkpoint.path),
        runtime=runtime,
        versions=outcome["versions"],
        dtype=outcome["dtype"],
        layers=outcome["layers"],
        stored_layers=stored_layers(checkpoint),
        decodes_at_load=method_of(checkpoint) == "compressed-tensors",
        missing=tuple(outcome["missing"]),
        unexpected=tuple(outcome["unexpected"]),
        mismatched=tuple(outcome["mismatched"]),
        problems=tuple(outcome["problems"]),
        tokens=ids.numel(),
        difference=difference,
        largest=largest,
        same_top=same_top,
        tolerance=tolerance_of(checkpoint) if tolerance is None else tolerance,
    )


def require_agreement(check: RuntimeCheck) -> None:
    """VerificationError for tensors that have no place or no content, GateError for other logits."""
    problems = []
    if check.unexpected:
        problems.append(f"left {_tensors(check.unexpected)} of the file unread")
    if check.missing:
        problems.append(f"started {_tensors(check.missing)} with random weights")
    if check.mismatched:
        problems.append(f"found {_tensors(check.mismatched)} of another shape than it expects")
    count = sum(check.layers.values())
    if (
        not problems
        and count != check.stored_layers
        and not (check.decodes_at_load and count < check.stored_layers)
    ):
        problems.append(f"made {count} quantized layers of {check.stored_layers} that the file holds")
    if not problems and (check.problems or check.difference is None):
        problems.append(f"failed: {first_of(check.problems)}")
    if problems:
        raise VerificationError(
            f"{check.runtime} {' and '.join(problems)} ({check.model})",
            remedy="do not use these files with it",
        )
    if not (check.difference is not None and check.difference <= check.tolerance):
        raise GateError(
            f"{check.runtime}'s logits for {check.model} differ by {check.difference:.2g} of their size from "
            "those of the decoded weights",
            expected=f"at most {check.tolerance:g}",
        )


def _tensors(names: tuple[str, ...]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({first_of(names)})"


def method_of(checkpoint: Checkpoint) -> str:
    """What quantized a checkpoint, as in READERS."""
    if gguf_files(checkpoint.path):
        return GGUF
    config = checkpoint.quantization
    if config is None:
        return PLAIN
    return mlx.METHOD if mlx.is_mlx(config) else str(config.get("quant_method"))


def tolerance_of(checkpoint: Checkpoint) -> float:
    """The difference of the logits up to which it is the runtime's own rounding."""
    config = checkpoint.quantization or {}
    if config and method_of(checkpoint) == GGUF:
        return _TOLERANCE_GGUF_CODES
    return _TOLERANCE_INT8 if config.get("load_in_8bit") else TOLERANCES[method_of(checkpoint)]


def stored_layers(checkpoint: Checkpoint) -> int:
    """How many matrices lie in the file as codes; a stack of experts counts as many as it holds.

    In GGUF, where experts are one tensor, how many tensors.
    """
    if gguf_files(checkpoint.path):
        return sum(tensor.dtype == torch.uint8 for tensor in checkpoint.stored.values())
    shapes = [checkpoint.info(n).shape for n in checkpoint.names() if checkpoint.is_quantized(n)]
    return sum(math.prod(shape[:-2]) for shape in shapes)


def token_ids(skeleton: Skeleton) -> torch.Tensor:
    """Rows of pseudo-random tokens, always the same for a vocabulary and a length."""
    vocabulary = int(skeleton.model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, vocabulary, (_ROWS, skeleton.length(_LENGTH)), generator=generator)


def our_logits(skeleton: Skeleton, checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the weights that qexport decodes, in fp32. The skeleton holds them from then on."""
    with torch.no_grad():
        logits: torch.Tensor = load_whole(skeleton, checkpoint, torch.float32)(ids).logits.float()
    return logits


def read_logits(job: Job) -> torch.Tensor | None:
    """The logits that a job left; None when it got no further than loading."""
    path = Path(job["logits"])
    return torch.from_numpy(np.load(path, allow_pickle=False)) if path.is_file() else None


def compare(theirs: torch.Tensor, ours: torch.Tensor) -> tuple[float, float, float]:
    """|theirs - ours| / |ours|, the largest absolute difference, the share of equal most likely tokens.

    NaN and infinity count as infinitely far; logits of padded vocabulary rows are left out.
    """
    width = min(theirs.shape[-1], ours.shape[-1])
    theirs, ours = theirs[..., :width].double(), ours[..., :width].double()
    gap = theirs - ours
    same = float((theirs.argmax(-1) == ours.argmax(-1)).double().mean())
    if not bool(gap.isfinite().all()):
        return math.inf, math.inf, same
    return float(gap.norm() / ours.norm().clamp_min(1e-30)), float(gap.abs().max()), same


def _require_own_pickle(path: Path) -> None:
    """hqq's loader evaluates what it finds in qmodel.pt: only what qexport wrote is handed to it."""
    files: Mapping[str, object] = read_manifest(path).get("files") or {}
    if PICKLE not in files or PICKLE in changed_files(path):
        found = "changed since qexport wrote it" if PICKLE in files else "was not written by qexport"
        raise UnsafeFileError(
            f"{path / PICKLE} {found}",
            expected="hqq's loader can run code from such a file",
            remedy="add --trust-remote-code if you know where it comes from",
        )


def _require_loaded(outcome: Outcome, runtime: str, path: Path, python: Path) -> None:
    if "error" not in outcome:
        return
    found, kind = outcome["error"], outcome.get("error_kind", CRASHED)
    if kind in _ABSENT:
        raise MissingDependencyError(
            f"{runtime} does not run in {python}: {found}",
            remedy=f"{_INSTALL[runtime]}; --runtime-python names the Python of another environment",
        )
    if kind == KILLED:
        raise MachineError(f"{runtime} did not finish loading {path}: {found}")
    raise VerificationError(
        f"{runtime} cannot run {path}: {found}", remedy="QEXPORT_DEBUG=1 shows all that it said"
    )
