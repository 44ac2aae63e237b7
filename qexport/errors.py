"""The exceptions that qexport raises on purpose: one class a cause.

Each message is one line: what was found, what was expected, what to do. The command line prints
just that line and exits with the class's `exit_code`; anything else that escapes is a defect.
"""

from __future__ import annotations

from collections.abc import Sequence


class QexportError(Exception):
    """Base of all; `found`, `expected` and `remedy` become one line."""

    exit_code = 2

    def __init__(self, found: str, *, expected: str = "", remedy: str = "") -> None:
        self.found, self.expected, self.remedy = found, expected, remedy
        super().__init__("; ".join(part for part in (found, expected, remedy) if part))


class InputError(QexportError):
    """Something that the user handed in is not what it should be."""


class CheckpointNotFoundError(InputError):
    """No such directory, and no such model on the Hub or in its cache."""


class NotACheckpointError(InputError):
    """A directory without config.json or without weights."""


class CorruptFileError(InputError):
    """A file whose bytes contradict its own header, index or format."""


class UnsafeFileError(InputError):
    """A file that could run code or reach outside its directory: a pickle, `../x` in an index."""


class AdapterError(InputError):
    """An adapter that cannot be merged: unknown kind, incomplete, or made for another base."""


class NonFiniteError(InputError):
    """NaN or infinity in weights, activations or scores."""


class CalibrationError(InputError):
    """Calibration or evaluation data that cannot be used."""


class SpecError(InputError):
    """Options that do not fit the method or the model: bits, group size, a foreign option."""


class RecipeError(InputError):
    """A recipe file with an unknown key or a value of the wrong kind."""


class UnsupportedModelError(InputError):
    """An architecture, or a quantized form, for which there is no row or no reader yet."""


class OutputExistsError(InputError):
    """The output is already there, or is a place that must not be replaced."""


class MachineError(QexportError):
    """The input is fine; the machine is not."""


class MissingDependencyError(MachineError):
    """An optional package is not installed."""


class StorageError(MachineError):
    """No space, no permission, or a disk that fails."""


class VerificationError(QexportError):
    """The candidate is not whole: missing, unexpected, misshapen or non-finite tensors."""

    exit_code = 1


class GateError(QexportError):
    """The candidate is whole, but loses more than the user allows."""

    exit_code = 1


def first_of(names: Sequence[str], count: int = 3) -> str:
    """The first `count` names, and how many more there are."""
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
