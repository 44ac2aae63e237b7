"""Architecture x method x runtime: what `support.py` says is read computes what our weights compute.

A cell is a model of the zoo, quantized one way. It is made of the tables of methods, solvers and formats,
so that a new row of those has its cells here. A runtime takes seconds to start: one test a runtime.

The table speaks of formats and architectures: each pair of those is a cell at least. What it does not tell
apart is not crossed with everything, but
- methods as they come, solvers and grids meet every structural kind, of which `UNLIKE` has one each: Llama's;
  Gemma's norms on both sides and sliding windows; GPT-2's transposed layers with biases; experts under
  Mixtral's names, and under Qwen's;
- solvers meet every format, and the architectures that are not in `UNLIKE`: see `_rest`;
- bits, orders and choices of layers meet Llama.
`test_the_cells_cover_what_they_should` holds the cells against this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import qexport
from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import GateError, QexportError, SpecError, UnsupportedModelError, VerificationError
from qexport.methods import FORMATS, grid_wish
from qexport.modeling.skeleton import build_skeleton
from qexport.specs import METHODS, SOLVERS, AnyQuantizeSpec, AwqGptqSpec, AwqSpec, CalibrationSpec, spec_of
from qexport.verification.runtimes import support
from qexport.verification.runtimes.check import (
    check_of,
    compare,
    job_for,
    our_logits,
    read_logits,
    require_agreement,
    stored_layers,
    token_ids,
)
from qexport.verification.runtimes.drivers.driver import RUNTIMES, Job
from qexport.verification.runtimes.process import require_python, run_jobs
from tests.runtimes import python_of
from tests.zoo import RUNNABLE, ZOO

README = Path(__file__).resolve().parents[1] / "README.md"
SANE = 1.2  # |quantized - full| / |full| of the logits; of logits that have nothing in common it is 1.4
FEW_BITS = 1.5  # with 1 or 2 bits little is left of random weights
Options = Mapping[str, Any]

UNLIKE = ("llama", "gemma2", "gpt2", "mixtral", "qwen3_moe")
AS_THEY_COME: dict[str, Options] = {
    **{method: {"method": method} for method in METHODS},
    "bnb-int8": {"method": "bnb", "bits": 8},
    "ct-gptq": {"method": "gptq", "format": "compressed-tensors"},
    "gptq_v2-hqq": {"method": "hqq", "format": "gptq_v2"},
    "hqq-safetensors": {"method": "hqq", "format": "hqq-safetensors"},
}
CROSSED: dict[str, Options] = {
    "bnb-fp4": {"method": "bnb", "quant_type": "fp4", "double_quant": False},
    "ct-gptq-asymmetric": {"method": "gptq", "format": "compressed-tensors", "symmetric": False},
    "ct-awq+gptq": {"method": "awq", "solver": "awq+gptq", "format": "compressed-tensors"},
    "mlx-importance": {"method": "mlx", "solver": "importance"},
}
# HQQ moves zeros, which some formats have not.
APART = {("hqq", "bitsandbytes"), ("hqq", "eetq")}
_MIXED: Options = {"override": ("*.1.*=8",), "skip": ("*.0.*o_proj",), "lm_head": True}
# Bits, orders and choices of layers, on Llama.
CHOICES: dict[str, Options] = {
    **{f"gptq-{bits}": {"method": "gptq", "bits": bits} for bits in (2, 3, 8)},
    **{f"hqq-{bits}": {"method": "hqq", "bits": bits} for bits in (1, 2, 3, 5, 6, 8)},
    **{f"mlx-{bits}": {"method": "mlx", "bits": bits} for bits in (2, 3, 5, 6, 8)},
    "ct-8": {"method": "rtn", "format": "compressed-tensors", "bits": 8},
    "gptq-row": {"method": "gptq", "group_size": -1},
    "gptq-asymmetric": {"method": "gptq", "symmetric": False, "group_size": 32},
    "gptq-desc_act": {"method": "gptq", "static_groups": False, "group_size": 32},
    "gptq-group-aware": {"method": "gptq", "act_order": "group-aware", "group_size": 32},
    "gptq-mixed": {"method": "gptq", **_MIXED},
    "hqq-mixed": {"method": "hqq", **_MIXED},
    "mlx-mixed": {"method": "mlx", **_MIXED, "embeddings": True},
    "ct-mixed": {"method": "rtn", "format": "compressed-tensors", **_MIXED},
    "bnb-left": {"method": "bnb", "skip": ("*.0.*o_proj",), "lm_head": True},
    "awq-left": {"method": "awq", "skip": ("*.0.*o_proj",)},
}


@dataclass(frozen=True)
class Cell:
    """A model of the zoo, quantized one way; no options: as it is."""

    model_type: str
    name: str
    options: Options

    @property
    def format(self) -> str:
        """The format's name, or PLAIN."""
        return self._spec({}).format if self.options else support.PLAIN

    @property
    def solver(self) -> str:
        """The solver's name; none for a model as it is."""
        return self._spec({}).solver if self.options else ""

    @property
    def symmetric(self) -> bool:
        """Whether its codes have no zeros of their own."""
        spec = self._spec({})
        if spec.format == "gguf":
            return True
        grid = FORMATS[spec.format].module.grid_for(grid_wish(spec, torch.float16))
        return bool(getattr(grid, "symmetric", True))

    @property
    def refused(self) -> bool:
        """Whether the table says that nothing is written."""
        if not self.options or (self.solver, self.format) in APART:
            return bool(self.options)
        return support.refusal(self.format, self.model_type, symmetric=self.symmetric) is not None

    def read_by(self, runtime: str) -> bool:
        """Whether the table says so."""
        symmetric = not self.options or self.symmetric
        return runtime in support.readers(self.format, self.model_type, symmetric=symmetric)

    def make(self, source: Path, out: Path, text: Path) -> Path:
        """The checkpoint, quantized where that is asked for."""
        if not self.options:
            return source
        result = qexport.quantize(source, out, self._spec({"calibration": (str(text),)}))
        assert result.quantized_layers == stored_layers(qexport.open_checkpoint(out))
        return out

    def _spec(self, calibration: Options) -> AnyQuantizeSpec:
        spec = spec_of(**self.options)
        if not isinstance(spec, CalibrationSpec):
            return spec
        little: Options = {"samples": 8, "sequence_length": 32, **calibration}
        if isinstance(spec, (AwqSpec, AwqGptqSpec)):
            little = {"grid_points": 4, **little}  # how good its scales are is not asked here
        return spec_of(**self.options, **little)


def _crossed(model_type: str, format_name: str, solver: str) -> Cell:
    bits = {"bits": 8} if format_name == "eetq" else {}
    options = {"method": "rtn", "solver": solver, "format": format_name, **bits}
    return Cell(model_type, f"{format_name}-x-{solver}", options)


def _rest(kinds: Sequence[Cell]) -> Iterator[Cell]:
    """For each architecture that is not in UNLIKE, a cell a format.

    A solver that `kinds` do not bring to a format has there the architecture that has met it least; where
    no solver is left, it is rounding. gemma3_text comes last: it has six blocks here.
    """
    others = sorted(ZOO.keys() - {*UNLIKE}, key=lambda name: (name == "gemma3_text", name))
    met: Counter[tuple[str, str]] = Counter()
    for name in FORMATS:
        refused = [model_type for model_type in others if support.refusal(name, model_type)]
        free = [model_type for model_type in others if model_type not in refused]
        brought = {cell.solver for cell in kinds if cell.format == name and not cell.refused}
        for solver in SOLVERS:
            if solver not in {"rtn", *brought} and (solver, name) not in APART:
                model_type = min(free, key=lambda one: (one == "gemma3_text", met[solver, one]))
                free.remove(model_type)
                met[solver, model_type] += 1
                yield _crossed(model_type, name, solver)
        yield from (_crossed(model_type, name, "rtn") for model_type in (*free, *refused))


_KINDS = [
    Cell(model_type, name, options)
    for model_type in UNLIKE
    for name, options in {**AS_THEY_COME, **CROSSED}.items()
]
CELLS = [
    *(Cell(model_type, "plain", {}) for model_type in ZOO),
    *_KINDS,
    *_rest(_KINDS),
    *(Cell(model_type, "gguf", {"method": "gguf"}) for model_type in ZOO if model_type not in UNLIKE),
    *(_crossed("llama", format_name, solver) for solver, format_name in sorted(APART)),
    # the formats that AWQ has above refuse GPT-2's layers
    *(_crossed("gpt2", "mlx", solver) for solver in ("awq", "awq+gptq")),
    *(Cell("llama", name, options) for name, options in CHOICES.items()),
]
Models = Callable[[str], tuple[Path, torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A model of the zoo by its name, made on first use, with tokens and its own logits for them."""
    home = tmp_path_factory.mktemp("zoo")
    made: dict[str, tuple[Path, torch.Tensor, torch.Tensor]] = {}

    def get(model_type: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
        if model_type not in made:
            path = RUNNABLE[model_type](home / model_type)
            skeleton = build_skeleton(path)
            ids = token_ids(skeleton)
            made[model_type] = (path, ids, our_logits(skeleton, qexport.open_checkpoint(path), ids))
        return made[model_type]

    return get


def sane(cell: Cell, logits: torch.Tensor, full: torch.Tensor) -> str:
    """What is wrong with quantized logits, as seen from the full-precision ones; nothing is ""."""
    distance = compare(logits, full)[0]
    most = FEW_BITS if cell.options.get("bits", 4) < 3 else SANE
    return "" if 0 < distance < most else f"{distance:.2f} away from full precision"


def told(cells: int, failures: list[str]) -> str:
    """A failed test's message."""
    return "\n".join([f"{len(failures)} of {cells} cells:", *failures])


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_computes_what_the_table_says_it_reads(
    runtime: str, models: Models, text: Path, tmp_path: Path
) -> None:
    """All layers with codes, no tensor too many or too few, our logits; and otherwise the check fails."""
    python = require_python(python_of(runtime))
    failures: list[str] = []
    written: list[tuple[Cell, Checkpoint, Job]] = []
    cells = [cell for cell in CELLS if runtime in support.SUPPORT.get(cell.format, {}) and not cell.refused]
    for cell in cells:
        source, ids, _ = models(cell.model_type)
        try:
            made = cell.make(source, tmp_path / f"{cell.model_type}-{cell.name}", text)
        except (QexportError, AssertionError) as error:
            failures.append(f"{cell.model_type} {cell.name} is not written: {error}")
            continue
        checkpoint = qexport.open_checkpoint(made)
        logits = tmp_path / f"{cell.model_type}-{cell.name}.npy"
        written.append((cell, checkpoint, job_for(checkpoint, ids, logits)))
    outcomes = run_jobs(runtime, [job for _, _, job in written], python=python)
    for (cell, checkpoint, job), outcome in zip(written, outcomes, strict=True):
        problem = ""
        try:
            skeleton = build_skeleton(checkpoint.path)
            require_agreement(check_of(outcome, job, runtime, checkpoint, skeleton, python=python))
            theirs = read_logits(job)
            assert theirs is not None
            if not cell.read_by(runtime):
                problem = "is read, which the table denies"
            elif cell.options:
                problem = sane(cell, theirs, models(cell.model_type)[2])
        except (VerificationError, GateError) as error:
            problem = str(error) if cell.read_by(runtime) else ""
        if problem:
            failures.append(f"{cell.model_type} {cell.name}: {problem}")
    assert not failures, told(len(cells), failures)


@pytest.mark.slow
def test_what_the_table_says_is_not_written_is_refused(models: Models, text: Path, tmp_path: Path) -> None:
    failures = []
    cells = [cell for cell in CELLS if cell.refused]
    for cell in cells:
        out = tmp_path / f"{cell.model_type}-{cell.name}"
        try:
            cell.make(models(cell.model_type)[0], out, text)
        except (SpecError, UnsupportedModelError):
            continue
        failures.append(f"{cell.model_type} {cell.name} is written")
    assert not failures, told(len(cells), failures)


@pytest.mark.slow
def test_formats_that_no_runtime_here_reads_decode_to_the_model(
    models: Models, text: Path, tmp_path: Path
) -> None:
    failures = []
    cells = [cell for cell in CELLS if cell.format in support.UNREAD and not cell.refused]
    for cell in cells:
        source, ids, full = models(cell.model_type)
        made = cell.make(source, tmp_path / f"{cell.model_type}-{cell.name}", text)
        ours = our_logits(build_skeleton(made), qexport.open_checkpoint(made), ids)
        if problem := sane(cell, ours, full):
            failures.append(f"{cell.model_type} {cell.name}: {problem}")
    assert not failures, told(len(cells), failures)


def test_the_cells_cover_what_they_should() -> None:
    """Every claim of the table has a cell; solvers, grids and methods meet what the module's text says."""
    written = [cell for cell in CELLS if not cell.refused]
    run = {
        (runtime, cell.format, cell.model_type)
        for cell in written
        for runtime in support.SUPPORT.get(cell.format, ())
        if cell.read_by(runtime)
    }
    assert run == {
        (runtime, name, model_type)
        for name in support.SUPPORT
        for model_type in ZOO
        for runtime in support.readers(name, model_type)
    }
    formats = {support.PLAIN, "gguf", *FORMATS}
    assert {(cell.format, cell.model_type) for cell in CELLS} == set(product(formats, ZOO))
    for name, model_type in product(FORMATS, ZOO):  # what is refused for its zeros only
        if (gap := support.refusal(name, model_type, symmetric=False)) and gap.asymmetric_only:
            cells = [cell for cell in CELLS if (cell.format, cell.model_type) == (name, model_type)]
            assert {cell.refused for cell in cells} == {False, True}

    solved = {(cell.solver, cell.format) for cell in written}
    assert set(product(SOLVERS, FORMATS)) - solved == APART
    assert {(cell.solver, cell.format) for cell in CELLS} >= APART
    assert {(cell.solver, cell.model_type) for cell in written} >= set(product(SOLVERS, UNLIKE))
    for model_type in UNLIKE:
        names = {cell.name for cell in CELLS if cell.model_type == model_type}
        assert names >= {"plain", *METHODS, *AS_THEY_COME, *CROSSED}
    assert len({(cell.model_type, cell.name) for cell in CELLS}) == len(CELLS), "their directories' names"


def test_the_table_knows_all_formats_and_architectures() -> None:
    assert {*support.SUPPORT, *support.UNREAD} == {support.PLAIN, "gguf", *FORMATS}
    assert set(support.model_types()) == set(ZOO)
    assert {runtime for runtimes in support.SUPPORT.values() for runtime in runtimes} == set(RUNTIMES)
    tables = [gaps for runtimes in support.SUPPORT.values() for gaps in runtimes.values()]
    tables += [gaps for _, gaps in support.UNREAD.values()]
    assert {name for gaps in tables for name in gaps} <= set(ZOO)


def test_what_is_said_of_a_cell() -> None:
    assert support.readers(support.PLAIN, "opt") == ("transformers",)
    assert support.readers("compressed-tensors", "mixtral") == ("transformers",)
    assert support.readers("compressed-tensors", "mixtral", symmetric=False) == ()
    assert support.readers("gptq", "mixtral") == support.readers("eetq", "llama") == ()
    assert support.refusal("gptq", "mixtral") is None
    assert support.refusal("eetq", "gpt2") is not None


def test_the_readme_shows_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert f"<!-- support -->\n{support.support_table()}\n<!-- /support -->" in text
