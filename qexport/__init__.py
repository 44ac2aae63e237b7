"""qexport: from "training is done" to "everyone can run it".

The verbs of the command line, as functions. They are imported on first use, so that
`import qexport` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qexport.version import __version__

if TYPE_CHECKING:
    from qexport.checkpoint.resharding import shard
    from qexport.conversion import convert
    from qexport.formats.opening import open_checkpoint
    from qexport.graph.run import export
    from qexport.merging.merge import merge
    from qexport.quantization.quantize import quantize
    from qexport.verification.verify import evaluate, verify

_VERBS = {
    "convert": "qexport.conversion",
    "evaluate": "qexport.verification.verify",
    "export": "qexport.graph.run",
    "merge": "qexport.merging.merge",
    "open_checkpoint": "qexport.formats.opening",
    "quantize": "qexport.quantization.quantize",
    "shard": "qexport.checkpoint.resharding",
    "verify": "qexport.verification.verify",
}

__all__ = [
    "__version__",
    "convert",
    "evaluate",
    "export",
    "merge",
    "open_checkpoint",
    "quantize",
    "shard",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'qexport' has no attribute {name!r}")
    return getattr(importlib.import_module(_VERBS[name]), name)
