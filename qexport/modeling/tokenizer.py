"""The tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qexport.errors import CalibrationError
from qexport.modeling.skeleton import Skeleton, quiet_transformers


def require_known_ids(largest: int, skeleton: Skeleton, path: Path) -> None:
    """Raises CalibrationError when the tokenizer of `path` gave an id that its model does not know."""
    if largest >= skeleton.config.vocab_size:
        raise CalibrationError(
            f"the tokenizer of {path} gives id {largest}, the model knows {skeleton.config.vocab_size} ids"
        )


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of the model in `path`. Raises CalibrationError when there is none."""
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever a missing or broken file leads it to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"{path} has no tokenizer that can be loaded: {reason}",
            remedy="put the model's tokenizer files beside it",
        ) from error
