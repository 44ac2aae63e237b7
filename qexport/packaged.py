"""The files that ship inside the package: calibration text, held-out text and pairs, the embedded model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def _packaged(package: str, name: str) -> Path:
    # the package is always installed as files, never imported from a zip: torch could not be either
    return Path(str(files(package) / name))


def calibration_text() -> Path:
    """Text to calibrate on."""
    return _packaged("qexport.calibration", "calibration.jsonl")


def heldout_text() -> Path:
    """Text to measure perplexity on; none of it is calibration text."""
    return _packaged("qexport.calibration", "heldout.jsonl")


def heldout_pairs() -> Path:
    """Prompts and references to measure BLEU on."""
    return _packaged("qexport.calibration", "pairs.jsonl")


def embedded_base() -> Path:
    """The embedded base model."""
    return _packaged("qexport.embedded", "base")


def embedded_adapter() -> Path:
    """The adapter that teaches the embedded base to translate."""
    return _packaged("qexport.embedded", "adapter")


def demo_recipe() -> Path:
    """The recipe of `qexport demo`."""
    return _packaged("qexport.embedded", "demo.yaml")
