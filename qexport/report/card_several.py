"""The card of a directory of several outputs, or of the repository that they become: which one is which.

Each output has a card of its own. This one the Hub shows first, and reads base, licence and numbers from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qexport.checkpoint.disk import is_file
from qexport.checkpoint.staging import write_file_atomically
from qexport.report.card_body import (
    called,
    form_of,
    link,
    listed,
    rendered,
    shown_commands,
    subject_of,
    title_of,
)
from qexport.report.card_facts import PLOT_FILE, CardFacts
from qexport.report.card_file import CARD_FILE, EMPTY, Card, merged, read_card
from qexport.report.card_index import model_index, numbers
from qexport.report.card_loss import legend, loss_table, warnings
from qexport.report.card_metadata import card_metadata, metadata_of_several
from qexport.report.card_outputs import Output, output_names, read_outputs
from qexport.report.content import Report
from qexport.report.local_paths import cleaned_report
from qexport.report.markdown import code, code_block, plain
from qexport.report.runtime_commands import commands, shell_word
from qexport.sizes import format_size
from qexport.verification.runtimes.support import GGUF


def write_card_of_several(directory: Path, report: Report) -> None:
    """Writes README.md into the directory of a report, beside the outputs that it tells of; none without any.

    What a user wrote in a README.md that is there stays: see `card_file`. Raises what `card_facts` and
    `read_card` do, before anything is written.
    """
    path = directory / CARD_FILE
    card = read_card(path) if is_file(path) else EMPTY
    text = card_of_several(directory, report, output_names(directory), card=card)
    if text is not None and text != card.text:
        write_file_atomically(path, text)


def card_of_several(
    directory: Path,
    report: Report | None,
    names: Sequence[str],
    *,
    card: Card = EMPTY,
    paths: Mapping[tuple[str, str], str] | None = None,
    branches: bool = False,
) -> str | None:
    """The text of the card, `card` with our part in it; None where none of the outputs `names` is a model.

    `paths` tells where a file of an output, by both their names, lies in the repository, if it is not
    `OUTPUT/FILE`; with `branches` each output has a branch of its own. Raises what `card_facts` does.
    """
    report = cleaned_report(report) if report else None
    outputs = read_outputs(directory, report, names)
    if not outputs:
        return None
    shown = _Shown(directory, report, outputs, paths or {}, branches)
    title = shown.title()
    return merged(card, shown.metadata(title), shown.body("" if card.titled else plain(title)))


class _Shown:
    """The outputs as they are to be shown."""

    def __init__(
        self,
        directory: Path,
        report: Report | None,
        outputs: Sequence[Output],
        paths: Mapping[tuple[str, str], str],
        branches: bool,
    ) -> None:
        self.directory, self.report, self.outputs = directory, report, outputs
        self.paths, self.branches = paths, branches
        self.rows = [row for output in outputs for row in output.rows]

    def path(self, output: Output, file: str) -> str:
        """Where a file of an output is."""
        return self.paths.get((output.name, file), f"{output.name}/{file}")

    def title(self) -> str:
        first = self.outputs[0].facts
        if len(self.outputs) == 1:
            return title_of(first)
        return f"{called(first) or self.directory.resolve().name}, {len(self.outputs)} variants"

    def metadata(self, title: str) -> dict[str, object]:
        """The YAML of all outputs; a licence's text lies in the output that it came with."""
        cards = []
        for output in self.outputs:
            told = card_metadata(output.facts, title, None, ())
            text = told.get("license_link", "")
            if text and not text.startswith("https://"):
                told.pop("license_link")  # of another branch, nothing can be linked without the repository
                if not self.branches:
                    told["license_link"] = self.path(output, text)
            cards.append(told)
        found = [
            number
            for output in self.outputs
            for number in numbers(output.facts.figures, self.report, output.rows, output.name)
        ]
        return metadata_of_several(cards, model_index(self.outputs[0].facts.task, title, found))

    def body(self, title: str) -> str:
        """Our part of the card."""
        first, report, gguf = self.outputs[0].facts, self.report, self._gguf()
        return rendered(
            "card_several.md.jinja",
            title=title,
            subject=subject_of(first, self.directory),
            forms=listed(list(dict.fromkeys(plain(form_of(output.facts)) for output in self.outputs))),
            count=len(self.outputs),
            verdict=plain(report.verdict) if report else "",
            warnings=list(warnings(self.rows, named=True)),
            branches=self.branches,
            outputs=[self._cells(output) for output in self.outputs],
            fetch=code_block(self._fetch(), "sh"),
            commands=shown_commands(gguf) if gguf else [],
            table=loss_table(report, self.rows) if report else "",
            legend=legend(report) if report else "",
            plot=PLOT_FILE if is_file(self.directory / PLOT_FILE) else "",
            recipe_lines=[plain(line) for line in report.recipe_lines] if report else [],
            origins=list(dict.fromkeys(self._origins())),
        )

    def _cells(self, output: Output) -> dict[str, str]:
        facts = output.facts
        own = [file.name for file in facts.files if file.loaded] if facts.form == GGUF else []
        aside = [self.path(output, name) for name in own if "/" not in self.path(output, name)]
        where = output.name if self.branches else f"{output.name}/"
        home = self.path(output, CARD_FILE)
        return {
            "name": plain(", ".join(row.variant for row in output.rows) or output.name),
            "form": plain(form_of(facts)),
            "where": ", ".join(code(name, cell=True) for name in (aside or [where])),
            "size": format_size(sum(file.size for file in facts.files)),
            "readers": ", ".join(command.runtime for command in commands(facts)),
            "card": "" if self.branches or not is_file(facts.directory / CARD_FILE) else _target(home),
        }

    def _fetch(self) -> str:
        """How to get one of them, the smallest for an example."""
        example = min(self.outputs, key=lambda output: sum(file.size for file in output.facts.files))
        place = f"--revision {shell_word(example.name)}" if self.branches else ""
        if not self.branches:
            files = [self.path(example, file.name) for file in example.facts.files]
            aside = [file for file in files if "/" not in file]
            place = " ".join(map(shell_word, aside)) or f"--include {shell_word(f'{example.name}/*')}"
        return f"hf download REPOSITORY {place} --local-dir ."

    def _gguf(self) -> CardFacts | None:
        """The GGUF models as if they were one output's files; none in branches, where they are apart."""
        ggufs = [output for output in self.outputs if output.facts.form == GGUF]
        if not ggufs or self.branches:
            return None
        files = tuple(
            replace(
                file,
                name=self.path(output, file.name),
                modelfile=self.path(output, file.modelfile) if file.modelfile else None,
            )
            for output in ggufs
            for file in output.facts.files
        )
        return replace(ggufs[0].facts, files=files)

    def _origins(self) -> list[tuple[str, str]]:
        return [
            ("Adapter" if origin.adapter else "Base" if not origin.origins else "Model", link(origin))
            for output in self.outputs
            for origin in (*output.facts.models, *output.facts.adapters)
        ]


def _target(path: str) -> str:
    """A path as the target of a link."""
    from urllib.parse import quote

    return quote(path)
