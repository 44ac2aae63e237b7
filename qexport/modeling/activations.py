"""Hidden states between two blocks: 16 bits a value, in memory up to a budget, the rest in a temporary file.

A value is kept as fp16, its token's hidden state having been multiplied by a power of two that brings the
largest of its values into [2^14, 2^15). Powers of two change no digit, so every value keeps fp16's 11
significant bits down to 2^-28 of the token's largest, and below that an error of at most 2^-39 of it. Plain
fp16 ends at 65504, which residual streams exceed: Sun et al., "Massive Activations in Large Language Models"
(2024, section 2), find single values of thousands beside medians below 1, and Gemma scales its embeddings up.
Plain bf16 has 8 significant bits. NaN and infinity stay what they are.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch

from qexport.errors import StorageError
from qexport.sizes import format_size

_PART = 1 << 21  # values that are converted at once: small beside a batch, and enough for several threads
_LARGEST = 15  # exponent of fp16's largest power of two


@dataclass
class _Kept:
    """A batch, its bytes in `content`, or from `offset` on in the file."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    size: int
    content: torch.Tensor | None
    offset: int


class Activations:
    """A list of batches [n, length, hidden] for which `budget` bytes of memory are enough.

    `with Activations(budget, directory) as hidden:` then as a list: `append`, `extend`, `len`, iteration,
    `hidden[i]`, `hidden[i] = batch`. Each batch comes back on the device, in the dtype and with the shape
    that it came in with. `dtype` is what is kept of a value: float16, with a factor a token (see the module's
    text), or float32, every bit. What comes back is a copy.

    The first batches stay in memory, each of the others is read and written as it is asked for; only the one
    at hand lies beside the budget. They lie in one file without a name (where the system has such) in
    `directory`, or the nearest above it that exists: nothing is left when the process dies. Its pages are
    read and written, not mapped, and so are no part of the process's resident memory; the system may keep
    them while memory is free.

    Raises StorageError when the file cannot be made, has no room, or cannot be read again.
    """

    def __init__(self, budget: int, directory: Path, dtype: torch.dtype = torch.float16) -> None:
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(f"activations are kept as float16 or float32, not {dtype}")
        self.in_memory = 0  # bytes
        self.on_disk = 0
        self._budget, self._directory, self._dtype = budget, directory.absolute(), dtype
        self._kept: list[_Kept] = []
        self._file: FileIO | None = None

    def __enter__(self) -> Activations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of all batches, and of the file."""
        self._kept.clear()
        self.in_memory = self.on_disk = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(len(self._kept)):
            yield self[index]

    def __getitem__(self, index: int) -> torch.Tensor:
        kept = self._kept[index]
        content = self._read(kept) if kept.content is None else kept.content
        found = _decode(content.to(kept.device), self._dtype, kept.shape, kept.dtype)
        return found.clone() if kept.content is not None and found.data_ptr() == content.data_ptr() else found

    def __setitem__(self, index: int, batch: torch.Tensor) -> None:
        """Replaces a batch by one of the same shape. Raises ValueError for another."""
        kept = self._kept[index]
        if batch.shape != kept.shape:
            raise ValueError(f"a batch {list(batch.shape)} in the place of one {list(kept.shape)}")
        kept.dtype, kept.device = batch.dtype, batch.device
        self._store(kept, batch)

    def append(self, batch: torch.Tensor) -> None:
        """Adds a copy of a batch."""
        width = batch.shape[-1]
        size = batch.numel() // width * (4 * width if self._dtype == torch.float32 else 2 * width + 1)
        kept = _Kept(batch.shape, batch.dtype, batch.device, size, None, self.on_disk)
        if self.in_memory + size <= self._budget:
            kept.content = torch.empty(size, dtype=torch.uint8)  # for good: what replaces it goes there too
        self._store(kept, batch)
        self._kept.append(kept)
        if kept.content is None:
            self.on_disk += size
        else:
            self.in_memory += size

    def put(self, index: int, batch: torch.Tensor) -> None:
        """Replaces a batch; where there is none yet, adds it."""
        if index < len(self._kept):
            self[index] = batch
        else:
            self.append(batch)

    def extend(self, batches: Iterable[torch.Tensor]) -> None:
        """Adds batches, one at a time."""
        for batch in batches:
            self.append(batch)

    def _store(self, kept: _Kept, batch: torch.Tensor) -> None:
        if kept.content is not None:
            _encode(batch, self._dtype, kept.content)
            return
        content = torch.empty(kept.size, dtype=torch.uint8)
        _encode(batch, self._dtype, content)
        with self._errors():
            file = self._opened()
            file.seek(kept.offset)
            left = content.numpy().data
            while left:
                left = left[file.write(left) :]

    def _read(self, kept: _Kept) -> torch.Tensor:
        content = torch.empty(kept.size, dtype=torch.uint8)
        with self._errors():
            file = self._opened()
            file.seek(kept.offset)
            left = content.numpy().data
            while left:
                count = file.readinto(left)
                if not count:
                    raise OSError("the temporary file was cut short")
                left = left[count:]
        return content

    def _opened(self) -> FileIO:
        if self._file is None:
            while not self._directory.is_dir():
                self._directory = self._directory.parent
            # unbuffered: a buffer would be one more copy
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 - see `close`
        return self._file

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            past = f" past {format_size(self._budget)}" if self._budget else ""
            more = ", or let more of them stay in memory with --memory" if self._budget else ""
            raise StorageError(
                f"hidden states{past} go to a temporary file in {self._directory}: {error.strerror or error}",
                remedy=f"free some space there{more}",
            ) from error


def scratch_directory() -> Path:
    """Where a large temporary file goes when no output says so: $TMPDIR, else /var/tmp, which is for such,
    while /tmp may be memory (file-hierarchy(7)); elsewhere the system's own."""
    large = Path("/var/tmp")  # noqa: S108 - files in it get random names
    if "TMPDIR" not in os.environ and large.is_dir() and os.access(large, os.W_OK | os.X_OK):
        return large
    return Path(tempfile.gettempdir())


def _encode(batch: torch.Tensor, dtype: torch.dtype, into: torch.Tensor) -> None:
    """Writes a batch `into` uint8 [bytes] on the CPU: the values, and for fp16 an int8 a token after them,
    the exponent of the factor that it was multiplied by."""
    rows = batch.detach().reshape(-1, batch.shape[-1])
    count, width = rows.shape
    if dtype == torch.float32:
        into.view(torch.float32).view(count, width).copy_(rows)
        return
    content = into if batch.device == into.device else torch.empty_like(into, device=batch.device)
    values, exponents = _parts(content, count, width)
    for part in _chunks(count, width):
        x = rows[part].float()
        largest = x.abs().amax(dim=-1, keepdim=True)  # ten times as fast as aminmax
        if not bool(largest.isfinite().all()):
            largest = torch.where(x.isfinite(), x, 0).abs().amax(dim=-1, keepdim=True)
        # largest = m 2^e with m in [1/2, 1); fp32 has powers of two up to 2^127 only
        exponent = (_LARGEST - torch.frexp(largest).exponent).clamp(max=126)
        exponent.masked_fill_(largest == 0, 0)
        values[part], exponents[part] = x * _power(exponent), exponent
    if content is not into:
        into.copy_(content)


def _decode(
    content: torch.Tensor, dtype: torch.dtype, shape: torch.Size, wanted: torch.dtype
) -> torch.Tensor:
    """What `_encode` kept, as `wanted`; of fp32 the same memory."""
    if dtype == torch.float32:
        return content.view(torch.float32).view(shape).to(wanted)
    width = shape[-1]
    count = shape.numel() // width
    values, exponents = _parts(content, count, width)
    rows = torch.empty(count, width, dtype=wanted, device=content.device)
    for part in _chunks(count, width):
        rows[part] = values[part].float() * _power(-exponents[part].to(torch.int32))
    return rows.view(shape)


def _parts(content: torch.Tensor, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views: values fp16 [count, width], exponents int8 [count, 1]."""
    cut = 2 * count * width
    return content[:cut].view(torch.float16).view(count, width), content[cut:].view(torch.int8).view(-1, 1)


def _chunks(count: int, width: int) -> Iterator[slice]:
    step = max(_PART // width, 1)
    for start in range(0, count, step):
        yield slice(start, start + step)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, exactly: int32 from -126 to 127 -> fp32. `torch.ldexp` goes through a rounded `pow`."""
    return ((exponent + 127) << 23).view(torch.float32)
