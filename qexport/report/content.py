"""The content of report.json: typed, versioned, and told by a JSON schema (`qexport report --schema`).

Sizes are bytes, times seconds, losses and shares fractions, KL divergences nats a token; None was not
measured.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1  # counted up when a key changes its meaning or goes away


class _Part(BaseModel):
    # JSON has no infinity, which a broken model's perplexity may be: it is written as "Infinity"
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Measure(_Part):
    """A mean with its standard error; None where a single unit leaves the error unknown."""

    value: float
    standard_error: float | None = None


class Interval(_Part):
    """A score with its 95 % bootstrap interval over the prompts."""

    value: float
    low: float
    high: float


class TextScores(_Part):
    """How near answers come to texts: 0 to 100, by sacrebleu and as `rouge_l` and `exact_match` say."""

    bleu: Interval
    chrf: Interval
    rouge_l: Interval
    exact_match: Interval


class Row(_Part):
    """What a variant costs and what it lost."""

    variant: str = Field(description="its name, the full-precision model's is 'full'")
    path: str = Field(description="its directory or file, from the report's directory where it lies below")
    method: str = Field(description="method, or 'none' for full precision")
    solver: str | None = None
    format: str | None = None
    bits: float = Field(description="bits a code; of full precision, bits a weight")
    bits_per_weight: float = Field(description="all bytes of the weights over all parameters")
    size_bytes: int
    seconds: float | None = Field(None, description="time to make it")
    peak_bytes: int | None = Field(None, description="peak memory of making it")
    perplexity: Measure
    loss: Measure | None = Field(None, description="relative rise of perplexity, paired with full precision")
    kl: Measure | None = Field(None, description="KL(full || variant), the mean over tokens")
    kl_p99: float | None = Field(None, description="its 99th percentile over tokens")
    same_top: Measure | None = Field(None, description="share of tokens with the same most likely one")
    text: TextScores | None = Field(None, description="its answers against the references")
    text_full: TextScores | None = Field(None, description="its answers against the full model's")
    tokens_per_second: dict[str, float] = Field({}, description="runtime -> generated tokens a second")
    tasks: dict[str, Measure] = Field({}, description="'task/metric' of lm-evaluation-harness -> score")
    failures: tuple[str, ...] = Field((), description="the gates that it does not pass, in words")


class Comparison(_Part):
    """Two rows on the same data, paired: is the difference more than noise?"""

    first: str
    second: str
    measure: str = Field(description="'log perplexity' or 'kl'")
    difference: float = Field(description="second minus first, nats a token")
    standard_error: float | None
    more_than_noise: bool = Field(description="beyond 1.96 standard errors")


class Sample(_Part):
    """A prompt, its reference if there is one, and what each variant answered."""

    prompt: str
    reference: str | None
    answers: dict[str, str]


class Layers(_Part):
    """|W' - W| / |W| of every matrix that some variant changed."""

    names: tuple[str, ...] = ()
    errors: dict[str, tuple[float | None, ...]] = Field({}, description="variant -> one a name")


class Report(_Part):
    """A run of `qexport compare` or `qexport export`; or several, merged."""

    qexport: str = Field(description="the version that wrote it")
    schema_version: int = SCHEMA
    title: str
    verdict: str = Field(description="what the numbers come to, in words")
    rows: tuple[Row, ...] = Field(description="full precision first")
    comparisons: tuple[Comparison, ...] = ()
    samples: tuple[Sample, ...] = ()
    layers: Layers = Layers()
    recipes: dict[str, dict[str, Any]] = Field(
        {}, description="measure -> what it was measured on and how: data hash, window, stride, versions"
    )
    recipe_lines: tuple[str, ...] = Field((), description="the same in words")
