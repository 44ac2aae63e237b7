"""bitsandbytes' 4-bit grids: 16 values, times the absolute maximum of a block.

The 16 values are NF4's or FP4's. The maxima are floats, or quantized again (double quantization):
w = codebook[q] * absmax(block), where then absmax = nested_codebook[a] * nested_absmax(256 blocks) + offset.
Dettmers et al. 2023 (QLoRA), section 3 and appendix E. A block is 64 values of the flattened tensor, and so a
group of inputs where rows are whole blocks.

The arithmetic is that of bitsandbytes 0.50.2 on a CPU, to the bit, with one difference: bitsandbytes chooses
the codes before it quantizes the maxima, and here they are chosen against what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Generic, Literal, TypeVar

import torch

from qexport.errors import SpecError
from qexport.grids.grid import Lines, encode, grouped

BLOCK = 64
NESTED_BLOCK = 256
Kind = Literal["nf4", "fp4"]

# By code. NF4: quantiles of a normal distribution, in order. FP4: a sign and three bits, which are not in
# order. Source: bitsandbytes.functional.get_4bit_type
_CODEBOOKS: dict[Kind, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(
        # + 0.0: no zero of theirs has a sign
        sign * level / 12 + 0.0
        for sign in (1, -1)
        for level in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}
_TINY = 1e-38  # bitsandbytes' own guard of a division by a block's maximum
_BINS = 1024  # of [-1, 1]; the nearest two borders between codes are FP4's, 1.3 bins apart
_PIECE = 1 << 16  # values that are rounded at once: what stays in a core's cache


@dataclass(frozen=True)
class NestedAbsmax:
    """Maxima of blocks, quantized to 8 bits themselves.

    `codes` uint8, [out, groups] or [blocks]; `codebook` fp32 [256]; `absmax` fp32 [ceil(blocks/block)].
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    absmax: torch.Tensor
    offset: float
    block: int = NESTED_BLOCK

    def decoded(self) -> torch.Tensor:
        """The maxima fp32, in the shape of the codes."""
        flat = self.codes.reshape(-1)
        nested = self.codebook.float().index_select(0, flat.int())
        decoded = nested * _spread(self.absmax, self.block, len(flat)) + self.offset
        return decoded.reshape(self.codes.shape)


Absmax = TypeVar("Absmax", bound=torch.Tensor | NestedAbsmax, covariant=True)


@dataclass(frozen=True)
class Bnb4Codes(Generic[Absmax]):
    """A tensor on the grid, in bitsandbytes' terms.

    `packed` uint8 [ceil(n/2)], the first value of a pair in the high bits; `absmax` [blocks], floats or
    nested; `codebook` fp32 [16].
    """

    packed: torch.Tensor
    absmax: Absmax
    codebook: torch.Tensor
    shape: tuple[int, ...]
    block: int = BLOCK


@dataclass(frozen=True)
class Bnb4Grid:
    """Fits and rounds to `kind`; decodes all kinds, for the codes carry their codebook.

    `dtype` is told beside the codes: what bitsandbytes decodes them to.
    """

    kind: Kind = "nf4"
    double_quant: bool = True
    block: int = BLOCK
    dtype: torch.dtype = torch.float16
    bits: int = 4

    @property
    def groups_alone(self) -> bool:
        """Whether a group's scales follow from its weights alone; nested ones share an offset and maxima."""
        return not self.double_quant

    def group_width(self, inputs: int) -> int:
        """Inputs a group of a row of `inputs`: a block, or the row where that is shorter."""
        return min(self.block, inputs)

    def fit(self, weight: torch.Tensor, shrink: torch.Tensor | float = 1.0) -> torch.Tensor | NestedAbsmax:
        """The absolute maxima of the blocks of [out, in], times `shrink`: fp32 [out, groups], or nested.

        Raises SpecError for several rows that are no whole number of blocks: blocks run on into the next
        row there, and `quantize` takes them.
        """
        out, inputs = weight.shape
        if out > 1 and inputs % self.block:
            raise SpecError(f"rows of {inputs} inputs", expected=f"a multiple of {self.block}")
        absmax = grouped(weight, self.group_width(inputs)).abs().amax(dim=2) * shrink
        return _nested(absmax) if self.double_quant else absmax

    def lines(self, scales: torch.Tensor | NestedAbsmax) -> Lines:
        """Step and origin of all groups; the origin is 0. Nested steps may be 0, or barely negative."""
        step = scales.decoded() if isinstance(scales, NestedAbsmax) else scales
        return Lines(step, torch.zeros_like(step))

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes, uint8, and what they stand for; elementwise. The origin is 0 on this grid.

        A value halfway between two has the lower one's code, as bitsandbytes has it.
        """
        borders = _borders(self.kind, values.device)
        values = torch.broadcast_tensors(values, step)[0]  # type: ignore[no-untyped-call]
        shape = values.shape
        step = step.expand((1,) * (len(shape) - step.ndim) + step.shape)
        codes = torch.empty(shape, dtype=torch.uint8, device=values.device)
        rounded = torch.empty(shape, device=values.device)
        for piece in _pieces(values):
            steps = step if len(step) == 1 else step[piece]
            inverse = torch.where(steps.abs() < _TINY, _TINY, steps).reciprocal_()
            # a NaN must not become an index
            scaled = (values[piece] * inverse).clamp_(-1.0, 1.0).nan_to_num_().reshape(-1)
            bins = _bins(scaled)
            over = scaled > borders.inside.index_select(0, bins)
            ranks = borders.below.index_select(0, bins).add_(over)
            torch.index_select(borders.codes, 0, ranks, out=codes[piece].view(-1))
            found = rounded[piece]
            torch.index_select(borders.levels, 0, ranks, out=found.view(-1))
            found.mul_(steps)
        return codes, rounded

    def assemble(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor | NestedAbsmax,
        group_of: torch.Tensor | None = None,
    ) -> Bnb4Codes[torch.Tensor | NestedAbsmax]:
        """Codes [out, in] packed, with their scales. Raises SpecError for a `group_of`."""
        if group_of is not None:
            raise SpecError("groups of inputs that are no neighbours", expected="blocks, as bitsandbytes has")
        flat = codes.to(torch.uint8).reshape(-1)
        if len(flat) % 2:
            flat = torch.nn.functional.pad(flat, (0, 1), value=_CODEBOOKS[self.kind].index(0.0))
        absmax = (
            replace(scales, codes=scales.codes.reshape(-1))
            if isinstance(scales, NestedAbsmax)
            else scales.reshape(-1)
        )
        return Bnb4Codes(
            (flat[::2] << 4) | flat[1::2],
            absmax,
            torch.tensor(_CODEBOOKS[self.kind], device=codes.device),
            tuple(codes.shape),
            self.block,
        )

    def quantize(self, weight: torch.Tensor) -> Bnb4Codes[torch.Tensor | NestedAbsmax]:
        """The nearest codes of a tensor of any shape, in blocks of its flattened values."""
        whole = weight.numel() % self.block == 0
        flat = weight.reshape(-1, self.block) if whole else weight.reshape(1, -1)
        codes: Bnb4Codes[torch.Tensor | NestedAbsmax] = encode(self, flat, self.fit(flat))
        return replace(codes, shape=tuple(weight.shape))

    def decode(self, codes: Bnb4Codes[torch.Tensor | NestedAbsmax]) -> torch.Tensor:
        """The weights fp32, in `codes.shape`, that the codes stand for."""
        count = math.prod(codes.shape)
        absmax = codes.absmax
        if isinstance(absmax, NestedAbsmax):
            absmax = absmax.decoded()
        # both values of every byte at once
        levels = codes.codebook.float()
        pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)
        values = pairs.index_select(0, codes.packed.int()).reshape(-1)[:count]
        if count % codes.block:
            values *= _spread(absmax, codes.block, count)
        else:
            values.view(-1, codes.block).mul_(absmax.float()[:, None])
        return values.reshape(codes.shape)


@dataclass(frozen=True)
class _Borders:
    """Where one level of a codebook ends and the next begins, for a look-up.

    Levels have ranks, in rising order: `levels` fp32 [16] and `codes` uint8 [16]. [-1, 1] is cut into bins,
    with one border in a bin at most: `below` int32 [bins] counts the borders in the bins before, and `inside`
    fp32 [bins] is the border in a bin, or infinity.
    """

    levels: torch.Tensor
    codes: torch.Tensor
    below: torch.Tensor
    inside: torch.Tensor


@cache
def _borders(kind: Kind, device: torch.device) -> _Borders:
    levels, codes = torch.tensor(_CODEBOOKS[kind]).sort(stable=True)
    middles = (levels[:-1] + levels[1:]) / 2
    bins = _bins(middles)
    inside = torch.full((_BINS + 1,), math.inf)
    inside[bins.long()] = middles
    # a border's bin and its rounding rise with it, so bins tell the order of all that do not share one
    below = torch.bucketize(torch.arange(_BINS + 1, dtype=torch.int32), bins, out_int32=True)
    parts = levels, codes.to(torch.uint8), below, inside
    return _Borders(*(part.to(device) for part in parts))


def _bins(scaled: torch.Tensor) -> torch.Tensor:
    """The bins int32 of values in [-1, 1]."""
    return (scaled + 1.0).mul_(_BINS / 2).int()


def _pieces(values: torch.Tensor) -> Iterator[slice]:
    """Slices of the first dimension that hold about `_PIECE` values."""
    rows = max(1, _PIECE // max(1, values[:1].numel()))
    return (slice(start, start + rows) for start in range(0, len(values), rows))


def _nested(absmax: torch.Tensor) -> NestedAbsmax:
    """Maxima quantized to 8 bits, in blocks of the flattened ones; bitsandbytes' quantize_blockwise."""
    offset = absmax.reshape(-1).mean()
    flat = absmax.reshape(-1) - offset
    codebook = dynamic_codebook().clone().to(absmax.device)  # safetensors writes no tensor under two names
    nested = grouped(flat[None], min(NESTED_BLOCK, len(flat)))[0].abs().amax(dim=1)
    scaled = flat * _spread(nested.clamp(min=_TINY).reciprocal(), NESTED_BLOCK, len(flat))
    # csrc/cpu_ops.cpp looks codes up by the nearest of 65536 values from -1 to 1
    places = ((scaled.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).floor()
    lattice = 2 * places / 65535 - 1
    codes = torch.bucketize(lattice, (codebook[:-1] + codebook[1:]) * 0.5, out_int32=True)
    # a block of equal maxima has nothing to quantize: code 0, as there
    codes *= _spread(nested, NESTED_BLOCK, len(flat)) > 0
    return NestedAbsmax(codes.to(torch.uint8).reshape(absmax.shape), codebook, nested, float(offset))


@cache
def dynamic_codebook() -> torch.Tensor:
    """The 8-bit dynamic data type fp32 [256]: signed, 2^i linear steps in the i-th of seven decades.

    Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning"; bitsandbytes' create_dynamic_map.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        levels += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(levels))


def _spread(scales: torch.Tensor, block: int, count: int) -> torch.Tensor:
    """Each scale repeated for its block of values; the last block may be short, and so the only one."""
    return scales.float().repeat_interleave(min(block, count))[:count]
