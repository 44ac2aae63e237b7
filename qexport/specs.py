"""What a user may ask for: one small frozen spec a step, its fields' help beside them.

The command line's options are generated from these fields, so the two cannot drift apart. A method's
spec has that method's options and no others.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from qexport.sizes import parse_share, parse_size

Size = Annotated[int, BeforeValidator(parse_size)]
Share = Annotated[float, BeforeValidator(parse_share)]


class Spec(BaseModel):
    """Base of all specs: frozen, and a field that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardSpec(Spec):
    """How a checkpoint is cut into files."""

    max_shard_size: Size = Field(5_000_000_000, description="largest file, e.g. 5GB or 500MB")


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

    calibration: str | None = Field(
        None, description="text, JSON or JSON-lines file; default: the package's own"
    )
    samples: int = Field(128, ge=1, description="calibration samples")
    sequence_length: int = Field(512, ge=8, description="tokens a sample; at most what the model can take")
    seed: int = Field(0, ge=0, description="choice of the calibration samples")


class BnbSpec(ShardSpec):
    """bitsandbytes: NF4 with double quantization (4 bits) or LLM.int8 (8 bits). Needs no data."""

    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes",)  # whose arithmetic the result depends on
    method: Literal["bnb"] = "bnb"
    bits: Literal[4, 8] = Field(4, description="bits a weight")


class RtnSpec(ShardSpec):
    """Round to nearest on the symmetric integer grid, in GPTQ's layout. Needs no data."""

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    method: Literal["rtn"] = "rtn"
    bits: Literal[2, 3, 4, 8] = Field(4, description="bits a weight")
    group_size: int | None = Field(
        None,
        description="inputs that share a scale, -1 for a whole row; "
        "default: 128, or the largest of 64 and 32 that divides every layer",
    )


class GptqSpec(ShardSpec, CalibrationSpec):
    """GPTQ: error feedback through the inverse Hessian, on RTN's grid and in its layout."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    method: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = Field(4, description="bits a weight")
    group_size: int | None = Field(
        None,
        description="inputs that share a scale, -1 for a whole row; "
        "default: 128, or the largest of 64 and 32 that divides every layer",
    )
    damp: float = Field(0.01, gt=0, lt=1, description="damping, a share of the Hessian's mean diagonal")


METHODS: dict[str, type[BnbSpec | RtnSpec | GptqSpec]] = {
    "bnb": BnbSpec,
    "gptq": GptqSpec,
    "rtn": RtnSpec,
}
AnyQuantizeSpec = BnbSpec | GptqSpec | RtnSpec
QuantizeSpec = Annotated[AnyQuantizeSpec, Field(discriminator="method")]


class VerifySpec(Spec):
    """How a candidate is measured against its reference."""

    text: str | None = Field(None, description="held-out text for perplexity; default: the package's own")
    pairs: str | None = Field(
        None,
        description="JSON lines of prompt and reference for BLEU; default: the package's own, "
        "with its own text only",
    )
    window: int = Field(512, ge=2, description="tokens the model sees at once, at most")
    stride: int | None = Field(None, ge=1, description="new tokens scored a window; default: half the window")
    max_documents: int | None = Field(None, ge=1, description="use the first documents only")
    max_pairs: int | None = Field(None, ge=1, description="use the first pairs only")
    max_new_tokens: int = Field(96, ge=1, description="longest generated answer, in tokens")
    batch_size: int = Field(32, ge=1, description="prompts generated at once")
    max_loss: Share | None = Field(
        None, description="largest allowed rise of perplexity, e.g. 8%; more exits with 1"
    )
