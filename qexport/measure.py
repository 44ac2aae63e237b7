"""How long a piece of work takes and how much memory it holds at its peak."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType


def _reset_peak() -> None:
    """Makes the kernel's peak count start anew; only Linux can (proc(5), clear_refs, 5)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_resident_bytes() -> int:
    """The largest resident set of this process since the last reset (Linux) or its start."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource  # POSIX only, and only needed where there is no /proc

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(peaks[0]) * 1024 if peaks else 0


class Measured:
    """`with Measured() as cost:` then `cost.seconds` and `cost.peak_bytes` of the body."""

    seconds: float = 0.0
    peak_bytes: int = 0

    def __enter__(self) -> Measured:
        _reset_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = peak_resident_bytes()
