"""Which base an adapter is merged into: the one given or, when that is quantized, a better one.

A 4-bit base was only a means to train on one card. The full-precision model that it was made from usually
scores better with the adapter than the decoded 4-bit one (huggingface/peft issue 2105), though the adapter
was trained against the latter: hence the choice, and a line about what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qexport.checkpoint.checkpoint import Checkpoint, open_directory
from qexport.checkpoint.hub import resolve
from qexport.errors import AdapterError, QexportError, SpecError
from qexport.formats.opening import open_checkpoint
from qexport.merging.adapter import Adapter

_SAMPLED_LAYERS = 4
_SAMPLED_VALUES = 1 << 26  # of a layer: a few of 256 MB in fp32 are held


@dataclass(frozen=True)
class ChosenBase:
    """The checkpoint that is merged into; `given` is what the user named, when that is quantized."""

    checkpoint: Checkpoint
    given: Checkpoint | None = None
    refusals: tuple[str, ...] = ()

    @property
    def precision(self) -> str | None:
        """ "full" or "dequantize"; None where there was nothing to choose."""
        if self.given is None:
            return None
        return "dequantize" if self.given is self.checkpoint else "full"

    def told(self) -> str:
        """Which base was taken, and what the difference costs."""
        assert self.given is not None  # noqa: S101 - there is nothing to tell otherwise
        method = (self.given.quantization or {}).get("quant_method")
        if self.precision == "full":
            return (
                f"base precision full: {self.given.path} is quantized ({method}); merging into "
                f"{self.checkpoint.path}, which the adapter names. {_cost(self.given, self.checkpoint)}"
            )
        why = f" ({'; '.join(self.refusals)})" if self.refusals else ""
        return (
            f"base precision dequantize{why}: {self.given.path} is decoded from {method} and keeps the "
            "rounding of its quantization. How much that costs only the full-precision base could tell; "
            "merging into that one usually scores better"
        )


def choose_base(base: str, adapters: Sequence[Adapter], wanted: str | None) -> ChosenBase:
    """The checkpoint to merge into. `wanted` is "full", "dequantize" or None: full if it can be had.

    Raises SpecError when a choice is made about a base that is not quantized, AdapterError when "full" is
    wanted and cannot be had, UnsupportedModelError for a quantization without a reader.
    """
    given = open_checkpoint(base)
    if given.quantization is None:
        if wanted == "dequantize":
            raise SpecError(f"--base-precision dequantize, but {given.path} is not quantized")
        return ChosenBase(given)
    refusals = []
    for adapter in adapters if wanted != "dequantize" else ():
        try:
            return ChosenBase(_full_precision(adapter, given), given)
        except QexportError as error:
            refusals.append(f"{adapter.path}: {error.found}")
    if wanted == "full":
        raise AdapterError(
            f"--base-precision full, but no full-precision base can be had: {'; '.join(refusals)}",
            expected="an adapter whose base_model_name_or_path is a 16-bit model",
            remedy="give that model as the base, or choose --base-precision dequantize",
        )
    return ChosenBase(given, given, tuple(refusals))


def _full_precision(adapter: Adapter, quantized: Checkpoint) -> Checkpoint:
    """The base that the adapter names, if it is this model in full precision. Raises QexportError."""
    if adapter.base_name is None:
        raise AdapterError("it names no base")
    full = open_directory(resolve(adapter.base_name))
    if full.quantization is not None:
        raise AdapterError(f"the base it names, {adapter.base_name}, is quantized too")
    for name in quantized.names():
        if name not in full or full.info(name).shape != quantized.info(name).shape:
            raise AdapterError(f"the base it names, {adapter.base_name}, is another model: {name} differs")
    own = set(quantized.names())
    for name in full.names():  # buffers come and go with transformers' versions, weights do not
        if name.endswith(".weight") and name not in own:
            raise AdapterError(f"the base it names, {adapter.base_name}, is another model: it has {name} too")
    return full


def _cost(quantized: Checkpoint, full: Checkpoint) -> str:
    """How far the two bases are apart, measured on a few layers."""
    coded = [name for name in quantized.names() if quantized.is_quantized(name)]
    small = [name for name in coded if full.info(name).numel <= _SAMPLED_VALUES] or coded[:1]
    # one place further each time: a stride alone may meet the same kind of layer in every block
    step = max(len(small) // _SAMPLED_LAYERS, 1)
    places = sorted({min(n * step + n, len(small) - 1) for n in range(_SAMPLED_LAYERS)}) if small else []
    sampled = [small[place] for place in places]
    apart = total = 0.0
    for name in sampled:
        weight = full.read(name).float()
        apart += float(torch.linalg.vector_norm(quantized.read(name).float() - weight)) ** 2
        total += float(torch.linalg.vector_norm(weight)) ** 2
    if not total:
        return "Its layers are not quantized"
    return (
        f"Its weights differ from the quantized ones by {100 * (apart / total) ** 0.5:.1f} % (relative norm, "
        f"{len(sampled)} of {len(coded)} layers): that rounding is gone, and what the adapter learned to "
        "make up for it stays"
    )
