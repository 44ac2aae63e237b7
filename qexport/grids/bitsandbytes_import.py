"""bitsandbytes is optional and heavy: it is imported when a grid of its own is used, and not before."""

from __future__ import annotations

import logging
from typing import Any

from qexport.errors import MissingDependencyError


def bitsandbytes_functional() -> Any:
    """The module bitsandbytes.functional. Raises MissingDependencyError when it is not installed."""
    # it tells at import of an optional kernel for inference, which nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MissingDependencyError(
            "bitsandbytes is not installed", remedy="pip install 'qexport[bnb]'"
        ) from error
    return bitsandbytes.functional
