"""`--calibration`: which texts a calibrated method sees, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qexport.calibrate.texts import read_training_documents, refuse_tables
from qexport.checkpoint.disk import is_file
from qexport.checkpoint.weighted import split_weighted
from qexport.errors import CalibrationError
from qexport.packaged import calibration_text

SELF = "self"
DEFAULT = "default"
_FORMS = f"PATH, {SELF} or {DEFAULT}, each with or without :WEIGHT"


@dataclass(frozen=True)
class CalibrationSource:
    """A file, `self` (the model's own words) or `default` (the package's text), and its weight."""

    name: str
    weight: float = 1.0

    @property
    def path(self) -> Path | None:
        """The file to read; None for what the model is to say itself."""
        if self.name == SELF:
            return None
        return calibration_text() if self.name == DEFAULT else Path(self.name)


def calibration_sources(values: Sequence[str]) -> tuple[CalibrationSource, ...]:
    """The sources that `--calibration` names; the package's own text when it names none.

    A file that is called self or default is meant by ./self. Raises CalibrationError for a weight that is
    not positive, and for a file that is not there or of a kind that is not read.
    """
    sources = tuple(_source(value) for value in values) or (CalibrationSource(DEFAULT),)
    for source in sources:
        if source.path is not None:
            refuse_tables(source.path)
            if not is_file(source.path):
                raise CalibrationError(
                    f"the calibration text {source.name} is no file",
                    expected=f"a text, JSON or JSON-lines file; or {SELF}, or {DEFAULT}",
                )
    return sources


def _source(value: str) -> CalibrationSource:
    name, weight = split_weighted(value, CalibrationError, words=(SELF, DEFAULT))
    if not name.strip():
        raise CalibrationError("a calibration source has no name", expected=_FORMS)
    if weight is not None and weight <= 0:
        raise CalibrationError(f"the weight of {name} is {weight:g}", expected="a positive number")
    return CalibrationSource(name, 1.0 if weight is None else weight)


def shares(sources: Sequence[CalibrationSource], samples: int) -> list[int]:
    """How many of `samples` each source gives: in proportion to the weights, by largest remainders.

    Raises CalibrationError when one would give none.
    """
    total = sum(source.weight for source in sources)
    exact = [samples * source.weight / total for source in sources]
    counts = [int(value) for value in exact]
    order = sorted(range(len(sources)), key=lambda n: counts[n] - exact[n])
    for n in order[: samples - sum(counts)]:
        counts[n] += 1
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise CalibrationError(
                f"with {samples} samples the weight {source.weight:g} gives {source.name} none",
                expected="at least one sample of every source",
                remedy="raise --samples, or take the source out",
            )
    return counts


def check_sources(values: Sequence[str], samples: int) -> None:
    """Reads all files. Raises CalibrationError for what can be refused without a model, StorageError."""
    sources = calibration_sources(values)
    shares(sources, samples)
    for source in sources:
        if source.path is not None:
            read_training_documents(source.path)
