"""K-quants: q2_k to q6_k, super-blocks of 256 weights whose sub-blocks' scales are quantized too.

Layouts and decoding are ggml's (`k_layout`); the search for scales is our own (`k_search`). It looks for the least
squared error, weighted by the importance of inputs where that is given, among far more scales than ggml tries, and
chooses them as they are stored: with quantized levels and fp16 steps.

Large weights may count for more. ggml's own weights of errors are |x| (q2_k), x^2 (q3_k, q6_k) or rms + |x|
(q4_k, q5_k), times the importance sqrt(rms^2 + x^2); ours are 1 + bend x^2 / rms^2. `bend` is chosen such that
plain and ggml's kind of errors both come out below ggml's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qexport.errors import MissingDependencyError, SpecError
from qexport.grids.ggml import k_layout
from qexport.grids.ggml.k_layout import SUPER, KScales

if TYPE_CHECKING:
    from types import ModuleType

    from qexport.grids.ggml.types import Affine, Decoder, Encoder

_PIECE = 1 << 19  # weights that are encoded at once: little more than a core's cache holds
# Importances that are further apart in a sub-block than this say no more, and float32 sums would lose the small.
_APART = 1e-4
_UNIMPORTANT = 1e-6  # of the mean: what an importance of zero is taken for

# Where the search starts: which scale and offset give a sub-block its first codes. The tables were chosen greedily
# from a fine lattice, each row as the one that lowers the error most after those above it (summed over normal,
# heavy-tailed and trained weights, with and without importance). For types with minima: steps in the range of a
# sub-block, and the code of its middle, from half of all codes on; for others, the code that the weight of
# largest size would have.
_Starts = tuple[tuple[float, ...], ...]
_STARTS_2: _Starts = (
    *((3.8, -0.5), (3.8, -0.2), (3.8, -0.8), (4.0, 0.0), (4.2, -1.0), (3.2, -0.5), (5.0, -0.4), (2.4, 0.0)),
    *((3.2, -0.7), (5.0, 0.0), (3.2, -0.3), (5.0, -0.7), (5.0, -1.0), (3.4, -1.0), (3.4, 0.0), (3.8, -0.4)),
)
_STARTS_4: _Starts = (
    *((15.4, -0.5), (15.4, -0.9), (15.4, -0.2), (14.2, 0.0), (15.4, -0.7), (16.6, 0.0), (13.2, -0.5)),
    *((17.0, -0.5), (14.8, -0.4), (17.0, -1.0), (14.0, -0.8), (14.0, -0.2), (15.6, -0.4), (14.8, -0.6)),
    *((16.8, -0.2), (17.0, -0.7)),
)
_STARTS_5: _Starts = (
    *((31.2, -0.5), (30.4, 0.0), (31.4, -0.8), (31.4, -0.2), (29.0, -0.5), (30.0, -0.2), (30.0, -0.8)),
    *((32.4, -1.0), (32.0, -0.5), (29.0, 0.0), (30.8, -0.7), (31.0, -0.4), (32.2, 0.0), (29.0, -0.3)),
    *((29.0, -0.7), (33.0, -0.3)),
)
_STARTS_3: _Starts = ((-4.2,), (-5.4,), (-3.2,), (5.0,), (-6.5,), (-3.8,), (-4.6,), (4.3,))
_STARTS_6: _Starts = ((-32.0,), (-30.0,), (-31.0,), (-33.1,), (-34.5,), (29.5,), (-32.4,), (-31.7,))
# Levels tried, from the nearest ones: (of the scale, of the minimum).
_CROSS = ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
_LINE = ((0.0,), (1.0,), (-1.0,))


@dataclass(frozen=True)
class KQuant:
    """A K-quant as a set of lines (`Affine`): blocks of `size` bytes, `width` weights a sub-block, codes of `bits`.

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
    tries: tuple[float, ...]
    rounds: tuple[int, int]  # without importance, with it
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
        rows, inputs = _checked(weight)
        search = _search()
        plain = weight.detach().to("cpu", torch.float32).contiguous()
        errors = self._errors(importance, inputs).numpy()
        steps = torch.zeros(2, rows * (inputs // SUPER))
        levels = torch.zeros(2, rows * (inputs // self.width))
        kernel = search.affine if self.minima else search.symmetric
        single = np.float32
        kernel(
            plain.view(-1, self.width).numpy(),
            errors,
            single(self.bends[importance is not None]),
            search.LANES * self.width // SUPER,
            single(self.zero),
            single(self.top),
            np.array(self.starts, single),
            np.array(self.tries, single),
            np.array(_CROSS if self.minima else _LINE, single),
            self.rounds[importance is not None],
            steps.numpy(),
            levels.numpy(),
        )
        d, dmin = steps.half().view(2, rows, -1).to(weight.device)
        level, minlevel = levels.to(torch.int8).view(2, rows, -1).to(weight.device)
        return KScales(d, level, dmin, minlevel) if self.minima else KScales(d, level)

    def lines(self, scales: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and origin, fp32 [rows, sub-blocks], as they decode. Steps may be 0, or negative without minima."""
        scales = _scales(scales)
        step = _times(scales.d, scales.levels)
        if scales.dmin is None or scales.minlevels is None:
            return step, torch.zeros_like(step)
        return step, -_times(scales.dmin, scales.minlevels)

    def round(
        self, values: torch.Tensor, step: torch.Tensor, origin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes, int8, and what they stand for, fp32; elementwise."""
        codes = (values - origin).mul_(_inverse(step)).round_()
        codes.clamp_(self.lowest, self.lowest + 2**self.bits - 1)
        return codes.to(torch.int8), codes.mul_(step).add_(origin)

    def pack(self, codes: torch.Tensor, scales: object) -> torch.Tensor:
        """Blocks uint8 [rows, bytes] of codes [rows, in], whole numbers as `round` gives them."""
        scales = _scales(scales)
        rows = len(codes)
        raw = codes.to(torch.int8).reshape(-1, SUPER)
        if not self.minima:
            raw = raw + self.zero
        blocks = KScales(
            *(
                None if part is None else part.reshape(len(raw), -1)
                for part in (scales.d, scales.levels, scales.dmin, scales.minlevels)
            )  # type: ignore[arg-type]
        )
        return self.packer(raw.contiguous().view(torch.uint8), blocks).view(rows, -1)

    def encode(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Blocks uint8 [rows, bytes] of fp32 [rows, in]: `fit`, `round`, `pack`.

        Raises SpecError for rows that are no whole super-blocks, or an importance that does not fit.
        """
        rows, inputs = _checked(weight)
        search = _search()
        piece = max(1, _PIECE // inputs)
        packed = torch.empty(rows, inputs // SUPER * self.size, dtype=torch.uint8)
        for first in range(0, rows, piece):
            part = weight[first : first + piece].detach().to("cpu", torch.float32).contiguous()
            scales = self.fit(part, importance)
            step, origin = (line.reshape(-1) for line in self.lines(scales))
            codes = torch.empty(part.shape, dtype=torch.int8)
            search.codes(
                part.view(-1, self.width).numpy(),
                _inverse(step).numpy(),
                origin.numpy(),
                np.float32(self.lowest),
                np.float32(self.lowest + 2**self.bits - 1),
                codes.view(-1, self.width).numpy(),
            )
            packed[first : first + piece] = self.pack(codes, scales)
        return packed.to(weight.device)

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

    def _errors(self, importance: torch.Tensor | None, inputs: int) -> torch.Tensor:
        """Weights of errors as the search takes them: [width, sub-blocks of a row], all above zero, or none."""
        if importance is None:
            return torch.ones(self.width, 0)
        if importance.shape != (inputs,):
            raise SpecError(
                f"an importance of {tuple(importance.shape)}", expected=f"one for each of {inputs} inputs"
            )
        each = importance.detach().to("cpu", torch.float64)
        if not (each.isfinite() & (each >= 0)).all():
            raise SpecError("an importance that is negative or not finite", expected="mean squares of inputs")
        mean = each.mean()
        if mean == 0:
            return torch.ones(self.width, 0)
        columns = (each / mean).view(-1, self.width).T
        least = (columns.amax(0, keepdim=True) * _APART).clamp(min=_UNIMPORTANT)
        return torch.maximum(columns, least).to(torch.float32).contiguous()


def _checked(weight: torch.Tensor) -> tuple[int, int]:
    if weight.ndim != 2 or weight.shape[1] % SUPER or not weight.numel():
        raise SpecError(
            f"a weight of {tuple(weight.shape)} for a K-quant",
            expected=f"rows of a multiple of {SUPER}",
            remedy="take a type of blocks of 32, such as q8_0, q5_1, q5_0 or iq4_nl",
        )
    return weight.shape[0], weight.shape[1]


def _search() -> ModuleType:
    """The compiled search, which needs numba; reading does not."""
    try:
        from qexport.grids.ggml import k_search
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"encoding K-quants needs {error.name}, which is not installed",
            remedy="pip install 'qexport[gguf]'",
        ) from error
    return k_search


def _scales(scales: object) -> KScales:
    if not isinstance(scales, KScales):
        raise SpecError(f"scales of {type(scales).__name__}", expected="those that fit() of a K-quant gave")
    return scales


def _times(step: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Levels [rows, sub-blocks] times their super-block's step [rows, super-blocks]."""
    rows, blocks = step.shape
    return (step.float()[..., None] * levels.view(rows, blocks, -1).float()).view(rows, -1)


def _inverse(step: torch.Tensor) -> torch.Tensor:
    """1 / step; 0 for 0, so that a line of one point has the code 0."""
    return torch.where(step == 0, torch.zeros_like(step), step.reciprocal())


_Q2_K = KQuant(
    "q2_k",
    84,
    16,
    2,
    True,
    15,
    _STARTS_2,
    (15.0,),
    (2, 2),
    (0.2, 0.02),
    k_layout.pack_q2_k,
    k_layout.unpack_q2_k,
)
_Q3_K = KQuant(
    *("q3_k", 110, 16, 3, False, 32, _STARTS_3, (-32.0,), (1, 2), (0.3, 0.05)),
    *(k_layout.pack_q3_k, k_layout.unpack_q3_k),
)
_Q4_K = KQuant(
    "q4_k",
    144,
    32,
    4,
    True,
    63,
    _STARTS_4,
    (63.0,),
    (2, 2),
    (0.02, 0.02),
    k_layout.pack_q4_k,
    k_layout.unpack_q4_k,
)
_Q5_K = KQuant(
    "q5_k",
    176,
    32,
    5,
    True,
    63,
    _STARTS_5,
    (63.0,),
    (2, 2),
    (0.02, 0.02),
    k_layout.pack_q5_k,
    k_layout.unpack_q5_k,
)
_Q6_K = KQuant(
    *("q6_k", 210, 16, 6, False, 128, _STARTS_6, (-128.0, -127.5, -127.0), (2, 2), (0.2, 0.02)),
    *(k_layout.pack_q6_k, k_layout.unpack_q6_k),
)
_ALL = (_Q2_K, _Q3_K, _Q4_K, _Q5_K, _Q6_K)
ENCODERS: Mapping[str, Encoder] = {row.name: row.encode for row in _ALL}
DECODERS: Mapping[str, Decoder] = {row.name: row.decode for row in _ALL}
AFFINE: Mapping[str, Affine] = {row.name: row for row in _ALL}
