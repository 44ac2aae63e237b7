"""The outputs in a directory: itself one, or one a subdirectory, as compare and export leave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qexport.checkpoint.disk import is_file
from qexport.checkpoint.manifest import MANIFEST_FILE
from qexport.errors import NotACheckpointError
from qexport.report.card_facts import CardFacts, card_facts
from qexport.report.content import Report, Row


@dataclass(frozen=True)
class Output:
    """A model in a subdirectory, `name`; `rows` are a report's that tell of it."""

    name: str
    facts: CardFacts
    rows: tuple[Row, ...]


def is_output(directory: Path) -> bool:
    """Whether it is one output: with a manifest, or looking like a model, an adapter or GGUF files."""
    if is_file(directory / MANIFEST_FILE) or any(directory.glob("*.gguf")):
        return True
    configured = is_file(directory / "config.json") or is_file(directory / "adapter_config.json")
    return configured and any(directory.glob("*.safetensors"))


def output_names(directory: Path) -> list[str]:
    """The subdirectories that are outputs, sorted."""
    return sorted(
        child.name
        for child in directory.iterdir()
        if child.is_dir() and not child.name.startswith(".") and is_output(child)
    )


def read_outputs(directory: Path, report: Report | None, names: Sequence[str]) -> list[Output]:
    """The models among the subdirectories `names`, in the report's order; those it does not tell of are last.

    Raises what `card_facts` does, but for what is no model.
    """
    rows: dict[str, list[Row]] = {}
    for row in report.rows if report else ():
        rows.setdefault(PurePosixPath(row.path).parts[0] if row.path else "", []).append(row)
    found = []
    for name in sorted(names, key=lambda name: list(rows).index(name) if name in rows else len(rows)):
        try:
            facts = card_facts(directory / name)
        except NotACheckpointError:
            continue  # an adapter
        found.append(Output(name, facts, tuple(rows.get(name, ()))))
    return found
