"""The content of report.json: typed, versioned, and told by a JSON schema (`qexport report --schema`).

Sizes are bytes, times seconds, losses and shares fractions, KL divergences nats a token; None was not
measured.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SCHEMA = 1  # counted up when a key changes its meaning or goes away
FULL = "full"  # the full-precision model's name; other rows without a method are candidates as all others
Z = 1.96  # standard errors to either side hold 95 % of a normal distribution

_MOST_BYTES = 1 << 63
_MOST_NESTED = 16  # levels of a recipe: writers and readers of JSON follow deeper ones not all the way


def _number(value: float) -> float:
    if math.isnan(value):
        raise ValueError("not a number")
    return value


def _known(error: float | None) -> float | None:
    """A standard error that is not finite tells nothing."""
    if error is not None and error < 0:
        raise ValueError("below 0")
    return error if error is None or math.isfinite(error) else None


Number = Annotated[float, AfterValidator(_number)]  # infinity included
Finite = Annotated[float, Field(allow_inf_nan=False)]
Error = Annotated[float | None, AfterValidator(_known)]
Bytes = Annotated[int, Field(gt=0, lt=_MOST_BYTES)]


class _Part(BaseModel):
    # JSON has no infinity, which a broken model's perplexity may be: it is written as "Infinity"
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Measure(_Part):
    """A mean with its standard error; None where a single unit leaves the error unknown."""

    value: Number
    standard_error: Error = None


# 0 to 100, and what sums of fp64 add to that
Score = Annotated[float, Field(ge=-0.01, le=100.01)]


class Interval(_Part):
    """A score with its 95 % bootstrap interval over the prompts."""

    value: Score
    low: Score
    high: Score


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
    bits: float = Field(ge=0, le=1e6, description="bits a code; of full precision, bits a weight")
    bits_per_weight: float = Field(gt=0, le=1e6, description="all bytes of the weights over all parameters")
    size_bytes: Bytes
    seconds: float | None = Field(None, ge=0, le=1e15, description="time to make it")
    peak_bytes: int | None = Field(None, ge=0, lt=_MOST_BYTES, description="peak memory of making it")
    perplexity: Measure
    loss: Measure | None = Field(None, description="relative rise of perplexity, paired with full precision")
    kl: Measure | None = Field(None, description="KL(full || variant), the mean over tokens")
    kl_p99: Number | None = Field(None, description="its 99th percentile over tokens")
    kl_at_least: bool = Field(
        False, description="the KL divergences are lower bounds: only the likeliest tokens were compared"
    )
    same_top: Measure | None = Field(None, description="share of tokens with the same most likely one")
    text: TextScores | None = Field(None, description="its answers against the references")
    text_full: TextScores | None = Field(None, description="its answers against the full model's")
    tokens_per_second: dict[str, Finite] = Field({}, description="runtime -> generated tokens a second")
    tasks: dict[str, Measure] = Field({}, description="'task/metric' of lm-evaluation-harness -> score")
    failures: tuple[str, ...] = Field((), description="the gates that it does not pass, in words")

    @property
    def is_full(self) -> bool:
        """Is this the full-precision model that all others are held against?"""
        return self.variant == FULL


class Comparison(_Part):
    """Two rows on the same data, paired: is the difference more than noise?"""

    first: str
    second: str
    measure: str = Field(description="'log perplexity' or 'kl'")
    difference: Number = Field(description="second minus first, nats a token")
    standard_error: Error
    more_than_noise: bool = Field(description=f"beyond {Z} standard errors")


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
    rows: tuple[Row, ...] = Field(description="full precision first, under names of their own")
    comparisons: tuple[Comparison, ...] = ()
    samples: tuple[Sample, ...] = ()
    layers: Layers = Layers()
    recipes: dict[str, dict[str, Any]] = Field(
        {}, description="measure -> what it was measured on and how: data hash, window, stride, versions"
    )
    recipe_lines: tuple[str, ...] = Field((), description="the same in words")

    @model_validator(mode="after")
    def _fits_together(self) -> Report:
        """What the types cannot say, so that whoever reads a report may rely on it."""
        names = [row.variant for row in self.rows]
        if not names or names[0] != FULL:
            raise ValueError(f"rows: the first is not {FULL!r}")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"rows: {_quoted(twice)} stands there twice")
        told = {
            "comparisons": {name for pair in self.comparisons for name in (pair.first, pair.second)},
            "samples": {name for sample in self.samples for name in sample.answers},
            "layers": set(self.layers.errors),
        }
        for place, known in told.items():
            if strangers := sorted(known.difference(names)):
                raise ValueError(f"{place}: {_quoted(strangers[0])} is none of the rows")
        for name, errors in self.layers.errors.items():
            if len(errors) != len(self.layers.names):
                found = f"{len(errors)} errors for {len(self.layers.names)} names"
                raise ValueError(f"layers: {_quoted(name)} has {found}")
        if _is_deeper(self.recipes, _MOST_NESTED):
            raise ValueError(f"recipes: more than {_MOST_NESTED} levels")
        return self


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:79]}…")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects within one another are more than so many."""
    if not isinstance(value, (dict, list, tuple)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(one, levels - 1) for one in inner)
