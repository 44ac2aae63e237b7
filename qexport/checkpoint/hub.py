"""Models by Hub id: downloaded through huggingface_hub, or taken from its cache without a network.

And GGUF files: unpacked into a directory that stands for them."""

from __future__ import annotations

from pathlib import Path

from qexport.checkpoint.checkpoint import local_path
from qexport.checkpoint.gguf_files import unpacked
from qexport.checkpoint.sidecars import PATTERNS
from qexport.errors import CheckpointNotFoundError

# Weights in one form only, configs, and what is carried along; of pickles an adapter's only, which is read
# by torch's weights-only loader.
MODEL_FILES = ["*.safetensors", "*.json", "adapter_model.bin", *PATTERNS]


def resolve(source: str | Path) -> Path:
    """The local directory of `source`: itself, the snapshot of a Hub id, or what a GGUF model is unpacked to.

    A network error falls back to what the cache holds. Raises CheckpointNotFoundError, and for a GGUF file
    that is no model, or one that cannot be read, as `unpack`.
    """
    path = local_path(source)
    return unpacked(_snapshot(str(source)) if path is None else path)


def _snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=MODEL_FILES, ignore_patterns=["*/*.safetensors", "consolidated*"]
            )
        )
    except HFValidationError as error:
        raise CheckpointNotFoundError(
            f"{repository} is no directory and no valid Hub id",
            expected="a model is a directory or an id such as Qwen/Qwen2.5-0.5B",
        ) from error
    except Exception as error:  # every network library below has its own exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointNotFoundError(
            f"{repository} is no directory, is not in the Hub cache and cannot be fetched "
            f"({type(error).__name__}: {reason.rstrip('.')})",
            expected="a model is a directory with config.json and safetensors, or a Hub id",
        ) from error
