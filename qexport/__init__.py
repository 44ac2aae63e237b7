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
    from qexport.graph.compare import compare
    from qexport.graph.run import export
    from qexport.merging.gguf_adapter import convert_adapter
    from qexport.merging.merge import merge
    from qexport.publishing.push import push
    from qexport.quantization.imatrix import make_imatrix as imatrix
    from qexport.quantization.quantize import quantize
    from qexport.report.card import write_card
    from qexport.verification.evaluate import evaluate
    from qexport.verification.verify import verify

_VERBS = {  # where each is, and its name there
    "compare": ("qexport.graph.compare", "compare"),
    "convert": ("qexport.conversion", "convert"),
    "convert_adapter": ("qexport.merging.gguf_adapter", "convert_adapter"),
    "evaluate": ("qexport.verification.evaluate", "evaluate"),
    "export": ("qexport.graph.run", "export"),
    "imatrix": ("qexport.quantization.imatrix", "make_imatrix"),
    "merge": ("qexport.merging.merge", "merge"),
    "open_checkpoint": ("qexport.formats.opening", "open_checkpoint"),
    "push": ("qexport.publishing.push", "push"),
    "quantize": ("qexport.quantization.quantize", "quantize"),
    "shard": ("qexport.checkpoint.resharding", "shard"),
    "verify": ("qexport.verification.verify", "verify"),
    "write_card": ("qexport.report.card", "write_card"),
}

__all__ = [
    "__version__",
    "compare",
    "convert",
    "convert_adapter",
    "evaluate",
    "export",
    "imatrix",
    "merge",
    "open_checkpoint",
    "push",
    "quantize",
    "shard",
    "verify",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'qexport' has no attribute {name!r}")
    module, own_name = _VERBS[name]
    return getattr(importlib.import_module(module), own_name)
