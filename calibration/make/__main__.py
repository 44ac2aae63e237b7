"""Command line of the maker."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import click
from rich.console import Console

from . import figures, sources, texts, train, vocabulary
from .progress import Report

_ROOT = Path(__file__).resolve().parents[2]
_README = (
    "The embedded {part} of qexport: trained on generated text by `python -m calibration.make`; "
    "Apache-2.0, the project's own work.\n"
)


@click.command()
@click.option("--seed", default=7, show_default=True, help="Seed of texts and training.")
@click.option(
    "--only",
    type=click.Choice(["texts", "base", "adapter", "figures"]),
    help="Make one part; the base includes the tokenizer.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=_ROOT,
    help="Root to write below.  [default: in place]",
)
@click.option("--base-steps", default=train.BASE_SCHEDULE.steps, show_default=True)
@click.option("--adapter-steps", default=train.ADAPTER_SCHEDULE.steps, show_default=True)
def main(seed: int, only: str | None, out: Path, base_steps: int, adapter_steps: int) -> None:
    """Make the calibration data and the embedded model from a seed, and print the figures."""
    console = Console()
    data, base = out / "calibration", out / "qexport" / "embedded" / "base"
    adapter = out / "qexport" / "embedded" / "adapter"
    made = texts.make_texts(seed)
    if only in (None, "texts"):
        texts.write_texts(made, data)
        if (base / "tokenizer.json").exists():
            sources.write_sources(data, seed, vocabulary.load_tokenizer(base))
    if only in (None, "base"):
        start = time.monotonic()
        tokenizer = vocabulary.train_tokenizer(seed, made.heldout_sentences)
        tokenizer.save_pretrained(str(base))
        sources.write_sources(data, seed, tokenizer)
        schedule = dataclasses.replace(train.BASE_SCHEDULE, steps=base_steps)
        with Report(console, "base") as report:
            loss = train.train_base(tokenizer, seed, made.heldout_sentences, base, report, schedule)
        _write_readme(base, "base model")
        _say(console, f"base: loss {loss:.4f}, {(time.monotonic() - start) / 60:.1f} min")
    if only in (None, "adapter"):
        start = time.monotonic()
        tokenizer = vocabulary.load_tokenizer(base)
        schedule = dataclasses.replace(train.ADAPTER_SCHEDULE, steps=adapter_steps)
        with Report(console, "adapter") as report:
            loss = train.train_adapter(
                tokenizer, seed, made.heldout_sentences, base, adapter, report, schedule
            )
        _write_readme(adapter, "adapter")
        _say(console, f"adapter: loss {loss:.4f}, {(time.monotonic() - start) / 60:.1f} min")
    if only in (None, "figures", "adapter"):
        _figures(console, data, base, adapter)


def _figures(console: Console, data: Path, base: Path, adapter: Path) -> None:
    for name, with_adapter in (("base", None), ("merged", adapter)):
        found = figures.scores(base, with_adapter, data)
        against = found.answers.references if found.answers else None
        bleu = against.bleu.value if against else float("nan")
        _say(console, f"{name}: BLEU {bleu:.2f}, held-out perplexity {found.perplexity.value:.3f}")


def _write_readme(folder: Path, part: str) -> None:
    (folder / "README.md").write_text(_README.format(part=part), encoding="utf-8")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False)


if __name__ == "__main__":
    main()
