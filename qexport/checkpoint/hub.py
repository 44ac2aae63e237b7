"""Models by Hub id: downloaded through huggingface_hub, or taken from its cache without a network.

And GGUF files: unpacked into a directory that stands for them."""

from __future__ import annotations

from pathlib import Path

from qexport.checkpoint.checkpoint import local_path
from qexport.checkpoint.disk import exists
from qexport.checkpoint.gguf_files import gguf_files, unpacked
from qexport.checkpoint.sidecars import PATTERNS
from qexport.errors import CheckpointNotFoundError, first_of

# Weights in one form only, configs, and what is carried along; of pickles an adapter's only, which is read
# by torch's weights-only loader.
MODEL_FILES = ["*.safetensors", "*.json", "adapter_model.bin", *PATTERNS]
_WEIGHTS = ("*.safetensors", "*.bin")
_GGUF_SUFFIX = ".gguf"
_GGUF_EXPECTED = "GGUF files are read from disk"


def resolve(source: str | Path) -> Path:
    """The local directory of `source`: itself, the snapshot of a Hub id, or what a GGUF model is unpacked to.

    A network error falls back to what the cache holds. Raises CheckpointNotFoundError, and for a GGUF file
    that is no model, or one that cannot be read, as `unpack`.
    """
    path = local_path(source)
    if str(source).lower().endswith(_GGUF_SUFFIX) and (path is None or not exists(path)):
        raise CheckpointNotFoundError(
            f"{source} does not exist",
            expected=_GGUF_EXPECTED,
            remedy="fetch one from the Hub with: hf download REPO FILE --local-dir .",
        )
    return unpacked(_snapshot(str(source)) if path is None else path)


def _snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = Path(
            snapshot_download(
                repository, allow_patterns=MODEL_FILES, ignore_patterns=["*/*.safetensors", "consolidated*"]
            )
        )
    except HFValidationError as error:
        raise CheckpointNotFoundError(
            f"{repository} is no directory and no valid Hub id",
            expected="a model is a directory, a GGUF file or an id such as Qwen/Qwen2.5-0.5B",
        ) from error
    except Exception as error:  # every network library below has its own exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointNotFoundError(
            f"{repository} is no directory, is not in the Hub cache and cannot be fetched "
            f"({type(error).__name__}: {reason.rstrip('.')})",
            expected="a model is a directory with config.json and safetensors, a GGUF file or a Hub id",
        ) from error
    if not gguf_files(found) and not any(any(found.glob(pattern)) for pattern in _WEIGHTS):
        _refuse_gguf_alone(repository)
    return found


def _refuse_gguf_alone(repository: str) -> None:
    """Of a repository without weights that can be fetched: an error where it has GGUF files."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repository)
    except Exception:  # what is missing is told when the directory is opened
        return
    if held := sorted(file for file in files if file.lower().endswith(_GGUF_SUFFIX)):
        raise CheckpointNotFoundError(
            f"{repository} on the Hub holds no safetensors, but GGUF files ({first_of(held)})",
            expected=_GGUF_EXPECTED,
            remedy=f"hf download {repository} FILE --local-dir . and name that file",
        )
