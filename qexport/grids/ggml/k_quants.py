"""K-quants: q2_k to q6_k, super-blocks of 256 weights whose sub-blocks' scales are quantized too.

Layouts and decoding are ggml's (`k_layout`); the search for scales is our own (`k_search`, and in torch
`device.k_search`). It looks for the least squared error, weighted by the importance of inputs where that is
given, and chooses scales as they are stored: with quantized levels and fp16 steps.

Large weights may count for more. ggml's own weights of errors are |x| (q2_k), x^2 (q3_k, q6_k) or rms + |x|
(q4_k, q5_k), or with importance h, h sqrt(rms^2 + x^2); ours are h (1 + bend x^2 / rms^2). `bend` is chosen
such that plain and ggml's kind of errors both come out below ggml's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from qexport.errors import SpecError
from qexport.grids.ggml import blocks as shared
from qexport.grids.ggml import k_layout
from qexport.grids.ggml.device import k_search
from qexport.grids.ggml.k_layout import SUPER, KScales

if TYPE_CHECKING:
    from qexport.grids.ggml.types import Affine, Decoder, Encoder

_PIECE = 1 << 19  # weights that are encoded at once: their codes stay in a core's cache
# Importances further apart in a sub-block than this say no more, and float32 sums would lose the small.
_APART = 1e-4
_UNIMPORTANT = 1e-6  # of the mean: what an importance of zero is taken for

# Where the search starts: what gives a sub-block its first codes. Chosen greedily from a fine lattice, each
# as the one that lowers the error most after those before it, summed over normal, heavy-tailed and trained
# weights, with and without importance. For types with minima: how many steps more than its codes have a
# sub-block's range is taken for, and how far its middle lies off the codes' middle; for others, the code of
# the weight of largest size.
_Starts = tuple[tuple[float, ...], ...]
_STARTS_2: _Starts = (
    *((0.8, 0.0), (1.0, 0.4), (0.8, -0.3), (0.8, 0.2), (1.2, -0.5), (0.0, -0.1), (2.6, 0.5)),
    *((-0.6, 0.5), (2.4, -0.2), (-0.2, 0.2), (0.8, 0.5), (3.0, -0.5), (0.8, -0.1), (0.6, -0.5)),
    *((3.2, 0.1), (0.2, 0.1), (1.4, 0.5), (0.2, -0.3), (2.0, -0.5), (1.6, 0.1), (0.4, 0.5)),
    *((3.6, -0.5), (0.6, 0.3), (3.6, 0.5)),
)
_STARTS_4: _Starts = (
    *((0.4, 0.0), (0.4, 0.4), (0.4, -0.3), (-0.8, 0.5), (0.4, 0.2), (1.6, -0.5), (-1.8, 0.0)),
    *((2.0, 0.0), (-0.2, -0.1), (2.0, 0.5), (-1.0, 0.3), (-0.8, -0.3), (0.8, -0.1), (-3.0, -0.5)),
    *((-0.2, 0.1), (3.0, -0.5), (0.6, -0.5), (1.2, 0.5), (1.4, 0.2), (0.4, -0.2), (3.0, 0.1)),
    *((-0.2, 0.3), (2.0, -0.2), (-2.0, -0.2), (-2.0, 0.2), (3.0, 0.5), (0.4, 0.1), (-1.4, -0.5)),
    *((-0.2, -0.3), (1.0, -0.3), (0.4, 0.3), (3.0, -0.2)),
)
_STARTS_5: _Starts = (
    *((0.2, 0.0), (-0.6, 0.5), (0.4, 0.3), (0.4, -0.3), (-1.8, 0.0), (-2.8, -0.5), (-1.0, 0.3)),
    *((-1.0, -0.3), (1.4, -0.5), (1.0, 0.0), (-2.2, -0.2), (-0.2, -0.1), (-2.0, 0.2), (1.2, 0.5)),
    *((0.0, 0.1), (-3.0, 0.3), (2.4, 0.1), (-1.2, -0.5), (-3.0, -0.3), (2.6, 0.5), (0.2, -0.2)),
    *((1.6, -0.2), (0.0, 0.2), (0.4, -0.5), (1.2, 0.2), (3.0, -0.1), (-3.0, 0.1), (3.0, -0.5)),
    *((0.2, 0.4), (-1.8, -0.1), (-0.8, -0.4), (-0.6, 0.0)),
)
_STARTS_3: _Starts = ((-4.2,), (-5.4,), (-3.2,), (5.0,), (-6.5,), (-3.8,), (-4.6,), (4.3,))
_STARTS_6: _Starts = ((-32.0,), (-30.0,), (-31.0,), (-33.1,), (-34.5,), (29.5,), (-32.4,), (-31.7,))
# Levels tried, from the nearest ones: (of the scale, of the minimum).
_CROSS = ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
_LINE = ((0.0,), (1.0,), (-1.0,))


@dataclass(frozen=True)
class KQuant:
    """A K-quant as a set of lines (`Affine`): blocks of `size` bytes, sub-blocks of `width` weights.

    Codes are 0 and more where there are `minima`, else signed. Levels go to `top` (signed ones from -top to
    top - 1). `tries` are the multiples of d that the largest scale of a super-block may become.
    """

    name: str
    size: int
    width: int
    bits: int
    minima: bool
    top: int
    starts: _Starts
    tried: tuple[int, int]  # starts tried: without importance, with it
    tries: tuple[float, ...]
    rounds: tuple[int, int]
    bends: tuple[float, float]
    packer: Callable[[torch.Tensor, KScales], torch.Tensor]
    unpacker: Callable[[torch.Tensor], tuple[torch.Tensor, KScales]]

    @property
    def zero(self) -> int:
        """Half of all codes: what is taken off codes from 0 on to make them signed."""
        return int(2 ** (self.bits - 1))

    @property
    def lowest(self) -> int:
        """The least code, as `round` gives them."""
        return 0 if self.minima else -self.zero

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None) -> KScales:
        """The scales that `encode` chooses for fp32 [rows, in], with importance [in].

        Raises SpecError for rows that are no whole super-blocks, or an importance that does not fit.
        """
        errors = self._errors(importance, _checked(weight)[1])
        return self._search(weight, errors, importance is not None, torch.empty(0, self.width).byte())

    def lines(self, scales: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and origin, fp32 [rows, sub-blocks], as they decode.

        Steps may be 0, and without minima negative.
        """
        scales = _scales(scales)
        step = _times(scales.d, scales.levels)
        if scales.dmin is None or scales.minlevels is None:
            return step, torch.zeros_like(step)
        return step, -_times(scales.dmin, scales.minlevels)

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes, int8, and what they stand for, fp32; elementwise."""
        codes = (values - origin).mul_(shared.reciprocal(step)).round_()
        codes.clamp_(self.lowest, self.lowest + 2**self.bits - 1)
        return codes.to(torch.int8), codes.mul_(step).add_(origin)

    def pack(self, codes: torch.Tensor, scales: object) -> torch.Tensor:
        """Blocks uint8 [rows, bytes] of codes [rows, in], whole numbers as `round` gives them."""
        return self._assemble(self._from_zero(codes.to(torch.int8)), _scales(scales))

    def encode(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Blocks uint8 [rows, bytes] of fp32 [rows, in]: `fit`, `round`, `pack`.

        Raises SpecError for rows that are no whole super-blocks, or an importance that does not fit.
        """
        rows, inputs = _checked(weight)
        errors = self._errors(importance, inputs)
        packed = weight.new_empty(rows, inputs // SUPER * self.size, dtype=torch.uint8)
        piece = max(1, (k_search.PIECE if shared.in_torch(weight) else _PIECE) // inputs)
        codes = weight.new_empty(min(rows, piece), inputs, dtype=torch.uint8)
        for first in range(0, rows, piece):
            part = weight[first : first + piece]
            raw = codes[: len(part)]
            scales = self._search(part, errors, importance is not None, raw)
            packed[first : first + piece] = self._assemble(raw, scales)
        return packed

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, in] of blocks uint8 [rows, bytes], to the bit as ggml and gguf-py decode them."""
        rows = len(blocks)
        raw, scales = self.unpacker(blocks.reshape(-1, self.size))
        values = raw.view(torch.int8).float() if self.minima else (raw.view(torch.int8) - self.zero).float()
        step, origin = self.lines(scales)
        values = values.view(len(raw), -1, self.width).mul_(step[..., None])
        if self.minima:
            values.add_(origin[..., None])
        return values.view(rows, -1)

    def _search(
        self, weight: torch.Tensor, errors: torch.Tensor, weighed: bool, codes: torch.Tensor
    ) -> KScales:
        """The scales of a weight; its codes from 0 on go into `codes`, uint8 [rows, in] or empty."""
        if shared.in_torch(weight):
            return self._search_in_torch(weight, errors, weighed, codes)
        rows, inputs = weight.shape
        found = shared.kernels("k_search")
        plain = weight.detach().float().contiguous()
        steps = torch.zeros(2, rows * (inputs // SUPER))
        levels = torch.zeros(2, rows * (inputs // self.width))
        single = np.float32
        search = found.affine if self.minima else found.symmetric
        search(
            plain.view(-1, self.width).numpy(),
            errors.numpy(),
            single(self.bends[weighed]),
            found.LANES * self.width // SUPER,
            single(self.zero),
            single(self.top),
            self._starts(weighed),
            np.array(self.tries, single),
            np.array(_CROSS if self.minima else _LINE, single),
            self.rounds[weighed],
            steps.numpy(),
            levels.numpy(),
            codes.view(-1, self.width).numpy(),
        )
        return self._found(rows, *steps, *levels)

    def _search_in_torch(
        self, weight: torch.Tensor, errors: torch.Tensor, weighed: bool, codes: torch.Tensor
    ) -> KScales:
        """As `_search`, on the weight's own device."""
        rows, inputs = weight.shape
        settings = k_search.Search(
            count=SUPER // self.width,
            width=self.width,
            zero=self.zero,
            top=self.top,
            bend=self.bends[weighed],
            starts=self._starts(weighed).tolist(),
            tries=self.tries,
            neighbours=_CROSS if self.minima else _LINE,
            rounds=self.rounds[weighed],
        )
        search = k_search.affine if self.minima else k_search.symmetric
        plain, errors = weight.detach().float().contiguous(), errors.to(weight.device)
        parts = torch.split(plain, max(1, k_search.PIECE // inputs))
        found = zip(*(search(part, errors, settings) for part in parts), strict=True)
        _, d, dmin, levels, minlevels = map(torch.cat, found)
        scales = self._found(rows, d, dmin, levels, minlevels)
        if len(codes):
            step, origin = self.lines(scales)
            values = plain.view(rows, -1, self.width)
            raw = self._from_zero(self.round(values, step[..., None], origin[..., None])[0])
            codes.copy_(raw.view(rows, inputs))
        return scales

    def _starts(self, weighed: bool) -> npt.NDArray[np.float32]:
        """Where the search starts, as it takes them."""
        starts = np.array(self.starts[: self.tried[weighed]], np.float32)
        if self.minima:
            starts += np.array((2 * self.zero - 1, -0.5), np.float32)
        return starts

    def _found(
        self,
        rows: int,
        d: torch.Tensor,
        dmin: torch.Tensor,
        levels: torch.Tensor,
        minlevels: torch.Tensor,
    ) -> KScales:
        """Scales of what a search found, fp32 of any shape."""
        step, level = d.half().view(rows, -1), levels.to(torch.int8).view(rows, -1)
        if not self.minima:
            return KScales(step, level)
        return KScales(step, level, dmin.half().view(rows, -1), minlevels.to(torch.int8).view(rows, -1))

    def _from_zero(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes from 0 on, uint8, of codes int8."""
        return (codes if self.minima else codes + self.zero).contiguous().view(torch.uint8)

    def _assemble(self, codes: torch.Tensor, scales: KScales) -> torch.Tensor:
        """Blocks uint8 [rows, bytes] of codes from 0 on, uint8 [rows, in], on the codes' device."""
        rows, blocks = scales.d.shape

        def flat(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(codes.device).reshape(rows * blocks, -1)

        levels = scales.levels.to(codes.device).reshape(rows * blocks, -1)
        d = scales.d.to(codes.device).reshape(rows * blocks, 1)
        flat_scales = KScales(d, levels, flat(scales.dmin), flat(scales.minlevels))
        return self.packer(codes.view(-1, SUPER), flat_scales).view(rows, -1)

    def _errors(self, importance: torch.Tensor | None, inputs: int) -> torch.Tensor:
        """Weights of errors for the search: [width, sub-blocks of a row], above zero, or [width, 0].

        They are made on a CPU: a look at whether they are numbers waits for the device in any case.
        """
        if importance is None:
            return torch.ones(self.width, 0)
        if importance.shape != (inputs,):
            raise SpecError(
                f"an importance of {tuple(importance.shape)}", expected=f"one for each of {inputs} inputs"
            )
        each = importance.detach().to("cpu", torch.float64)
        _refuse_bad(each)
        mean = each.mean()
        columns = torch.where(mean > 0, each / mean, 1.0).view(-1, self.width).T
        least = (columns.amax(0, keepdim=True) * _APART).clamp(min=_UNIMPORTANT)
        return torch.maximum(columns, least).to(torch.float32).contiguous()


def _refuse_bad(importance: torch.Tensor) -> None:
    if not (importance.isfinite() & (importance >= 0)).all():
        raise SpecError("an importance that is negative or not finite", expected="mean squares of inputs")


def _checked(weight: torch.Tensor) -> tuple[int, int]:
    if weight.ndim != 2 or weight.shape[1] % SUPER or not weight.numel():
        raise SpecError(
            f"a weight of {tuple(weight.shape)} for a K-quant",
            expected=f"rows of a multiple of {SUPER}",
            remedy="take a type of blocks of 32, such as q8_0, q5_1, q5_0 or iq4_nl",
        )
    return weight.shape[0], weight.shape[1]


def _scales(scales: object) -> KScales:
    if not isinstance(scales, KScales):
        raise SpecError(f"scales of {type(scales).__name__}", expected="those that fit() of a K-quant gave")
    return scales


def _times(step: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Levels [rows, sub-blocks] times their super-block's step [rows, super-blocks]."""
    rows, blocks = step.shape
    return (step.float()[..., None] * levels.view(rows, blocks, -1).float()).view(rows, -1)


_Q2_K = KQuant(
    *("q2_k", 84, 16, 2, True, 15, _STARTS_2, (16, 24), (15.0,), (2, 2), (0.25, 0.3)),
    *(k_layout.pack_q2_k, k_layout.unpack_q2_k),
)
_Q3_K = KQuant(
    *("q3_k", 110, 16, 3, False, 32, _STARTS_3, (7, 8), (-32.0,), (1, 2), (0.3, 0.1)),
    *(k_layout.pack_q3_k, k_layout.unpack_q3_k),
)
_Q4_K = KQuant(
    *("q4_k", 144, 32, 4, True, 63, _STARTS_4, (20, 32), (63.0,), (2, 2), (0.05, 0.05)),
    *(k_layout.pack_q4_k, k_layout.unpack_q4_k),
)
_Q5_K = KQuant(
    *("q5_k", 176, 32, 5, True, 63, _STARTS_5, (20, 32), (63.0,), (2, 2), (0.05, 0.05)),
    *(k_layout.pack_q5_k, k_layout.unpack_q5_k),
)
_Q6_K = KQuant(
    *("q6_k", 210, 16, 6, False, 128, _STARTS_6, (8, 8), (-128.0, -127.5, -127.0), (2, 2), (0.2, 0.05)),
    *(k_layout.pack_q6_k, k_layout.unpack_q6_k),
)
_ALL = (_Q2_K, _Q3_K, _Q4_K, _Q5_K, _Q6_K)
ENCODERS: Mapping[str, Encoder] = {row.name: row.encode for row in _ALL}
DECODERS: Mapping[str, Decoder] = {row.name: row.decode for row in _ALL}
AFFINE: Mapping[str, Affine] = {row.name: row for row in _ALL}
