"""What a user may ask for: one small frozen spec a step, its fields' help beside them.

The command line's options are generated from these fields, so the two cannot drift apart. A solver's
spec has that solver's options and no others; a method is a preset of solver, grid and format.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qexport.errors import SpecError
from qexport.sizes import parse_share, parse_size

Size = Annotated[int, BeforeValidator(parse_size)]
Share = Annotated[float, BeforeValidator(parse_share)]
_Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


def split_list(value: Any) -> Any:
    """'a,b' and ('a,b', 'c') as ('a', 'b') and ('a', 'b', 'c')."""
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(one, str) for one in values):
        return value
    return tuple(part.strip() for one in values for part in one.split(",") if part.strip())


_List = Annotated[tuple[str, ...], BeforeValidator(split_list)]


class Spec(BaseModel):
    """Base of all specs: frozen, and a field that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardSpec(Spec):
    """How a checkpoint is cut into files."""

    max_shard_size: Size = Field(5_000_000_000, description="largest file, e.g. 5GB or 500MB")


class ConvertSpec(ShardSpec):
    """How a model is written in another form."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="dtype of all weights; default: the model's own (gguf-lora: float32)"
    )


Combination = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]


class MergeSpec(ShardSpec):
    """How adapters are merged into their base."""

    combine: Combination | None = Field(
        None, description="make one LoRA of several, as PEFT's add_weighted_adapter does; default: add them"
    )
    density: float | None = Field(
        None, gt=0, le=1, description="share of values that ties, dare_* and magnitude_prune keep"
    )
    majority_sign: Literal["total", "frequency"] = Field(
        "total", description="how ties and dare_ties elect a sign"
    )
    svd_rank: int | None = Field(
        None, ge=1, description="rank that svd and *_svd keep; default: the largest adapter's"
    )
    seed: int = Field(0, ge=0, description="which values dare_* drops")
    tokenizer: Literal["base", "adapter"] | None = Field(
        None, description="whose tokenizer and chat template to take; default: the adapter's if it has one"
    )
    base_precision: Literal["full", "dequantize"] | None = Field(
        None,
        description="for a quantized base: merge into the full-precision model that the adapter names, or "
        "into the decoded base; default: full if it can be had",
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="dtype of all weights; default: each as it is"
    )
    legacy_format: bool = Field(False, description="write pytorch_model.bin for old readers")
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = Field(
        None, description="rotary scaling to write into the config, with its factor"
    )
    rope_factor: float | None = Field(
        None, gt=1, description="by how much --rope-scaling stretches the context"
    )
    device: str = Field("cpu", description="where the products are computed: cpu, cuda or cuda:N")


class CalibrationSpec(Spec):
    """The text whose activations a calibrated method sees."""

    TEXT: ClassVar[tuple[str, ...]] = ("calibration", "samples", "sequence_length", "seed")  # what they are

    calibration: _Names = Field(
        (),
        description="text, JSON or JSON-lines file, 'self' (the model's own words) or 'default' (the "
        "package's text), or any with :WEIGHT; default: the package's text",
    )
    samples: int = Field(128, ge=1, description="calibration samples")
    sequence_length: int = Field(512, ge=8, description="tokens a sample; at most what the model can take")
    seed: int = Field(0, ge=0, description="choice of the calibration samples")
    memory: Size = Field(
        4_000_000_000,
        description="memory for hidden states; the rest of them goes to a temporary file beside the output; "
        "default: 4GB",
    )
    device: str | None = Field(None, description="where the model runs: cpu, cuda or cuda:N; default: cpu")


FormatName = Literal[
    "gptq",
    "gptq_v2",
    "awq",
    "hqq",
    "hqq-safetensors",
    "bitsandbytes",
    "compressed-tensors",
    "mlx",
    "eetq",
    "gguf",
]
MethodName = Literal["rtn", "bnb", "eetq", "hqq", "mlx", "gguf", "gptq", "awq"]
Bits = Literal[1, 2, 3, 4, 5, 6, 8]


def parse_bits(text: str) -> int | float:
    """'4' as 4, and '3.5' or '4.0', an average over the layers, as a float.

    Raises ValueError for what is neither a width nor an average of widths.
    """
    widths: tuple[int, ...] = get_args(Bits)
    if text in map(str, widths):
        return int(text)
    if re.fullmatch(r"\d\.\d+", text) and widths[0] <= float(text) <= widths[-1]:
        return float(text)
    raise ValueError(f"{text!r} is not one of {', '.join(map(str, widths))} nor an average such as 3.5")


class WeightsSpec(ShardSpec):
    """What every solver's spec has: the grid and the format, and which layers take part.

    A format refuses a grid that it has not; None leaves the choice to it. `bits` given as a float is
    `average_bits`, and `bits` then the next width above: that of layers that no plan names.
    """

    BUDGETS: ClassVar[tuple[str, ...]] = ("average_bits", "target_size", "max_loss")

    format: FormatName = Field("gptq", description="layout of the files; default: the method's own")
    max_shard_size: Size = Field(
        5_000_000_000, description="largest file, e.g. 5GB or 500MB; default: 5GB, gguf one file"
    )
    bits: Bits = Field(
        4, description="bits a weight; with a point, as 3.5, the average of a plan; default: 4, eetq 8"
    )
    average_bits: float | None = Field(None, ge=1, le=8)  # no description, no option: it is given as `bits`
    target_size: Size | None = Field(
        None,
        description="largest size of all weights, e.g. 4GB: each layer gets the bits and the group size that "
        "cost the model least",
    )
    max_loss: Share | None = Field(
        None, description="the smallest file that is to raise the perplexity by no more, e.g. 3%"
    )
    plan: str | None = Field(
        None, description="bits and group sizes from a bits_plan.json, edited or as --plan-only made it"
    )
    group_size: int | None = Field(
        None,
        description="inputs that share a scale, -1 for a whole row; "
        "default: the format's (128, or 64 for hqq and mlx), or the largest smaller one that divides every "
        "layer",
    )
    symmetric: bool | None = Field(
        None, description="with 0 in the middle of the codes; default: the format's own"
    )
    quant_type: Literal["nf4", "fp4"] | None = Field(
        None, description="bitsandbytes' 4-bit values; default: nf4"
    )
    double_quant: bool | None = Field(
        None, description="quantize bitsandbytes' 4-bit scales too; default: yes"
    )
    type: _List = Field(
        (),
        description="gguf: types or mixes, a file each, e.g. q4_k_m or q4_k_m,q6_k,q8_0; default: that of "
        "--bits, q4_k_m for 4",
    )
    pre_tokenizer: str | None = Field(
        None, description="gguf: llama.cpp's name of the pre-tokenizer, where it cannot be told by itself"
    )
    device: str | None = Field(
        None,
        description="where the model runs for a calibration (codes are chosen on the CPU), and where gguf's "
        "blocks are encoded: cpu, cuda or cuda:N; default: cpu",
    )
    override: _Names = Field(
        (),
        description="other bits for layers whose names match, 'PATTERN=BITS' or 'PATTERN=BITS:GROUP_SIZE', "
        "e.g. 'model.layers.0.*=8'; gguf: other types for tensors, 'blk.*.ffn_down=q6_k'; the last that "
        "matches counts",
    )
    skip: _Names = Field(
        (), description="layers that stay as they are, a pattern such as '*.down_proj'; before any override"
    )
    lm_head: bool = Field(False, description="quantize the output head too")
    embeddings: bool = Field(False, description="quantize the input embeddings too")

    @model_validator(mode="before")
    @classmethod
    def _averaged(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(bits := values.get("bits"), float):
            above = [width for width in get_args(Bits) if width >= bits]
            # what is out of range is told as such of `average_bits`
            return {**values, "bits": above[0] if above else 8, "average_bits": bits}
        return values

    @property
    def budget(self) -> str | None:
        """Which of BUDGETS is set; the rest is None."""
        return next((name for name in self.BUDGETS if getattr(self, name) is not None), None)

    @property
    def width(self) -> int | float:
        """Bits a code: those that the first of GGUF's types has in its name, where there is one."""
        told = re.search(r"\d+", self.type[0]) if self.type else None
        return int(told[0]) if told else self.average_bits or self.bits


class RtnSpec(WeightsSpec):
    """Round to nearest. Needs no data."""

    packages: ClassVar[tuple[str, ...]] = ("torch",)  # whose arithmetic the result depends on
    method: MethodName = "rtn"
    solver: Literal["rtn"] = "rtn"


class SearchSpec(WeightsSpec):
    """Scales that make the squared error of rounding smallest. Needs no data."""

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    method: MethodName = "mlx"
    solver: Literal["search"] = "search"
    format: FormatName = Field("mlx", description="layout of the files")


class HqqSpec(WeightsSpec):
    """HQQ: zeros by half-quadratic optimization. Needs no data."""

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    method: MethodName = "hqq"
    solver: Literal["hqq"] = "hqq"
    format: FormatName = Field("hqq", description="layout of the files")


class GptqSpec(WeightsSpec, CalibrationSpec):
    """GPTQ: error feedback through the inverse Hessian."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    method: MethodName = "gptq"
    solver: Literal["gptq"] = "gptq"
    damp: float = Field(0.01, gt=0, lt=1, description="damping, a share of the Hessian's mean diagonal")
    act_order: Literal["none", "full", "group-aware"] = Field(
        "full",
        description="order of the inputs: as they are, the busiest first, or the busiest first without "
        "leaving their groups",
    )
    static_groups: bool = Field(
        True,
        description="fit all scales before the first error is fed back; without it, a full order goes into "
        "the file (desc_act), which runtimes read more slowly",
    )
    search_scales: bool = Field(
        True, description="fit scales to the error that the Hessian's diagonal weighs, not to the range"
    )
    effort: Literal["fast", "balanced", "best"] = Field(
        "balanced",
        description="fast: GPTQ, every layer by the full-precision model's inputs; balanced: each layer "
        "makes up for those before it, codes and scales refined; best: errors weighed by what they do to the "
        "model's output too, and blocks tuned",
    )


class ImportanceSpec(WeightsSpec, CalibrationSpec):
    """Scales searched for the error that matters: each input weighs what its activations do."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    method: MethodName = "gguf"
    solver: Literal["importance"] = "importance"
    format: FormatName = Field("gguf", description="layout of the files")
    imatrix: str | None = Field(
        None,
        description="gguf: an importance matrix that is there, llama.cpp's .gguf or .dat, in place of a "
        "calibration",
    )


class AwqSearch(Spec):
    """How AWQ looks for its scales."""

    grid_points: int = Field(20, ge=1, description="scales and clips that AWQ tries")
    clip: bool = Field(True, description="let AWQ search how far to clip each group")


class AwqSpec(WeightsSpec, CalibrationSpec, AwqSearch):
    """AWQ: channels that the activations make important are scaled up before rounding."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    method: MethodName = "awq"
    solver: Literal["awq"] = "awq"
    format: FormatName = Field("awq", description="layout of the files")


class AwqGptqSpec(GptqSpec, AwqSearch):
    """AWQ's scaling, then GPTQ on the scaled weights."""

    method: MethodName = "awq"
    solver: Literal["awq+gptq"] = "awq+gptq"  # type: ignore[assignment]
    format: FormatName = Field("awq", description="layout of the files")


AnyQuantizeSpec = RtnSpec | SearchSpec | HqqSpec | ImportanceSpec | GptqSpec | AwqSpec | AwqGptqSpec
QuantizeSpec = Annotated[AnyQuantizeSpec, Field(discriminator="solver")]
SOLVERS: dict[str, type[AnyQuantizeSpec]] = {
    "rtn": RtnSpec,
    "search": SearchSpec,
    "hqq": HqqSpec,
    "importance": ImportanceSpec,
    "gptq": GptqSpec,
    "awq": AwqSpec,
    "awq+gptq": AwqGptqSpec,
}


class Preset(NamedTuple):
    """What a method's name stands for on the three axes."""

    solver: str
    format: FormatName
    bits: Bits = 4


# A new method is a row. Options that the user gives go before it.
METHODS: dict[MethodName, Preset] = {
    "rtn": Preset("rtn", "gptq"),
    "bnb": Preset("rtn", "bitsandbytes"),
    "eetq": Preset("rtn", "eetq", bits=8),
    "hqq": Preset("hqq", "hqq"),
    "mlx": Preset("search", "mlx"),
    "gguf": Preset("search", "gguf"),
    "gptq": Preset("gptq", "gptq"),
    "awq": Preset("awq", "awq"),
}
# who gives one of these for GGUF wants the search to heed it
_MEANS_IMPORTANCE = {"imatrix", *CalibrationSpec.TEXT}


def with_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of a spec, `method` among them, with what the method's preset adds to them.

    Raises SpecError for a name of a method or of a solver that is none, with the nearest right one, and for
    bits beside GGUF's types.
    """
    method, solver = options.get("method"), options.get("solver")
    for what, found, known in (("method", method, METHODS), ("solver", solver, SOLVERS)):
        if found not in known and (found is not None or what == "method"):
            near = difflib.get_close_matches(str(found), known, n=1)
            raise SpecError(
                f"there is no {what} {found!r}",
                expected=", ".join(known),
                remedy=f"did you mean {near[0]}?" if near else "",
            )
    preset = METHODS[method]  # type: ignore[index]
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "bits" in given and "type" in given:
        types = ",".join(split_list(given["type"]))
        raise SpecError(f"--bits {given['bits']} beside --type {types}", expected="one of the two")
    budgets = [name for name in ("bits", "target_size", "max_loss", "plan") if name in given]
    if len(budgets) > 1:
        flags = [f"--{name.replace('_', '-')} {given[name]}" for name in budgets]
        raise SpecError(" beside ".join(flags), expected="one of them")
    if preset.format == "gguf" and solver is None and given.keys() & _MEANS_IMPORTANCE:
        preset = preset._replace(solver="importance")
    return {**preset._asdict(), **given}


def spec_of(method: str, **options: Any) -> AnyQuantizeSpec:
    """The spec of a method with some options, `solver` and `format` among them.

    Raises SpecError for a name that is none, pydantic's ValidationError for a value that does not fit.
    """
    values = with_preset({"method": method, **options})
    return SOLVERS[values["solver"]].model_validate(values)


class VerifySpec(Spec):
    """How a candidate is measured against its reference."""

    GATES: ClassVar[tuple[str, ...]] = ("max_loss", "max_kl", "min_bleu")

    text: str | None = Field(
        None,
        description="held-out text for perplexity, a file or hf:OWNER/NAME[/CONFIG][:SPLIT] of the Hub's "
        "datasets; default: the package's own",
    )
    pairs: str | None = Field(
        None,
        description="prompts with references, to compare answers: JSON lines of prompt and reference, "
        "Alpaca, ShareGPT or translation pairs; default: the package's own, with its own text only",
    )
    languages: _List = Field(
        (), description="source and target of translation pairs, e.g. de,en; default: in their own order"
    )
    wording: str = Field(
        "{source}", description="how a translation is asked for, e.g. 'Into English: {source}'"
    )
    bleu_tokenizer: Literal["13a", "zh", "char", "intl", "none"] = Field(
        "13a", description="how BLEU cuts words, zh for Chinese, char for Japanese"
    )
    window: int = Field(512, ge=2, description="tokens the model sees at once, at most")
    stride: int | None = Field(None, ge=1, description="new tokens scored a window; default: half the window")
    max_documents: int | None = Field(None, ge=1, description="use the first documents only")
    max_pairs: int | None = Field(None, ge=1, description="use the first pairs only")
    max_new_tokens: int = Field(96, ge=1, description="longest generated answer, in tokens")
    batch_size: int = Field(32, ge=1, description="prompts generated at once")
    memory: Size = Field(
        4_000_000_000,
        description="memory for hidden states; the rest of them goes to a temporary file; default: 4GB",
    )
    tasks: _List = Field(
        (),
        description="lm-evaluation-harness tasks too, by name, or YAML files of your own; needs "
        "pip install 'qexport[tasks]'",
    )
    task_limit: int | None = Field(None, ge=1, description="use the first documents of each task only")
    speed: bool = Field(
        False, description="measure generated tokens a second in the runtime that reads the file, on the CPU"
    )
    max_logits_size: Size = Field(
        2_000_000_000,
        description="disk for the full-precision model's logits; past it, a token's likeliest only are kept",
    )
    max_loss: Share | None = Field(
        None, description="largest allowed rise of perplexity, e.g. 8%; more exits with 1"
    )
    max_kl: float | None = Field(
        None, ge=0, description="largest allowed KL divergence to full precision, nats a token"
    )
    min_bleu: float | None = Field(
        None, ge=0, le=100, description="least allowed BLEU against the references"
    )
