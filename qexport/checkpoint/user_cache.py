"""Where what is costly to make again is kept for the user, between calls."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(kind: str) -> Path:
    """The directory for things of a kind: $XDG_CACHE_HOME/qexport/KIND, ~/.cache by default. It need not be
    there yet."""
    home = os.environ.get("XDG_CACHE_HOME")  # the XDG specification: relative ones are passed over
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return base / "qexport" / kind
