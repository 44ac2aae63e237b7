"""Writes the README's generated parts anew: each command's help, which runtime reads what, and the
demo's table as it came out.

    make demo && .venv/bin/python -m benchmarks.readme --demo qexport-demo
    .venv/bin/python -m benchmarks.memory --json memory.json
    .venv/bin/python -m benchmarks.readme --memory memory.json
    .venv/bin/python -m benchmarks.merge --json > merge.json
    .venv/bin/python -m benchmarks.readme --merge merge.json
    .venv/bin/python -m benchmarks.gguf encoders --json encoders.json
    .venv/bin/python -m benchmarks.readme --gguf encoders.json
    .venv/bin/python -m benchmarks.compare > compare.md
    .venv/bin/python -m benchmarks.readme --compare compare.md
    .venv/bin/python -m benchmarks.quality --markdown benchmarks/results/quality.md
    .venv/bin/python -m benchmarks.readme --quality benchmarks/results/quality.json
    .venv/bin/python -m benchmarks.quantize
    .venv/bin/python -m benchmarks.readme --speed benchmarks/results/quantize.md

Each option writes one part: the demo's table from its report.json, and the picture of its page; those of
benchmarks/memory.py, merge.py, gguf.py, compare.py, quality.py and quantize.py from what they wrote. The
commands' help and the table of runtimes are always written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gguf import TABLES as GGUF_TABLES
from benchmarks.memory import tables as memory_tables
from benchmarks.merge import Agreement, Results, remarks, table
from benchmarks.merge import Row as MergeRow
from benchmarks.quality import read_rows
from benchmarks.quality_methods import METHODS
from benchmarks.quality_models import MODELS
from benchmarks.quality_table import Row, markdown, summary
from qexport.cli.main import COMMANDS
from qexport.report.files import read_report
from qexport.report.tables import table_markdown
from qexport.verification.runtimes.support import support_table
from tests.browser import chromium, resized

PICTURE = Path(__file__).with_name("report.png")
PICTURE_SIZE = (1160, 1000)
README = Path(__file__).resolve().parents[1] / "README.md"


def replaced(text: str, part: str, content: str) -> str:
    """`text` with what stands between the part's two markers replaced."""
    pattern = re.compile(rf"<!-- {part} -->.*<!-- /{part} -->", re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"README.md has no part {part!r}")
    return pattern.sub(lambda _: f"<!-- {part} -->\n{content.strip()}\n<!-- /{part} -->", text)


def help_blocks() -> str:
    """Every command with its help, as it prints it to a terminal of 80 columns."""
    wide = {**os.environ, "COLUMNS": "80"}
    blocks = []
    for command in COMMANDS:
        run = [sys.executable, "-m", "qexport", command, "--help"]
        shown = subprocess.run(run, capture_output=True, text=True, check=True, env=wide).stdout
        blocks.append(f"```text\n$ qexport {command} --help\n{shown}```")
    return "\n\n".join(blocks)


def demo_table(directory: Path) -> str:
    """The rows of the demo's report.json, in the columns that a terminal shows."""
    return table_markdown(read_report(directory).rows, short=True)


def take_picture(page: Path, picture: Path) -> None:
    """The top of a report's page as PNG, as Chromium shows it."""
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        browser.get(page.resolve().as_uri())
        resized(browser, *PICTURE_SIZE)
        browser.find_element("css selector", "svg")  # the charts are drawn
        time.sleep(1)  # their texts are placed
        browser.save_screenshot(str(picture))


def merge_part(file: Path) -> str:
    """Table and remarks of what benchmarks/merge.py --json wrote."""
    found = json.loads(file.read_text(encoding="utf-8"))
    results = Results(
        found["machine"],
        [MergeRow(**row) for row in found["rows"]],
        [Agreement(**agreement) for agreement in found["agreements"]],
        found["notes"],
    )
    return f"{table(results)}\n\n{remarks(results)}"


def _place(row: Row) -> int:
    return list(MODELS).index(row["model"])


def quality_part(file: Path) -> str:
    """The first model's table in full, and of all models how we stand beside the best peer."""
    rows = read_rows(file)
    first = [row for row in rows if row["model"] == next(iter(MODELS))]
    ours = ("q-gptq-fast", "q-gptq", "q-gptq-best", "q-allotted")
    others = summary(sorted(rows, key=_place), ours)
    return f"{markdown(first, [*METHODS])}\nKL divergence on all models:\n\n{others}"


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--demo", type=Path, metavar="DIR")
    parser.add_argument("--memory", type=Path, metavar="JSON")
    parser.add_argument("--merge", type=Path, metavar="JSON")
    parser.add_argument("--compare", type=Path, metavar="MARKDOWN")
    parser.add_argument("--quality", type=Path, metavar="JSON")
    parser.add_argument("--speed", type=Path, metavar="MARKDOWN")
    parser.add_argument("--gguf", type=Path, metavar="JSON", action="append", default=[])
    options = parser.parse_args()
    text = replaced(README.read_text(encoding="utf-8"), "commands", help_blocks())
    text = replaced(text, "support", support_table())
    if options.demo:
        text = replaced(text, "demo", demo_table(options.demo))
        take_picture(options.demo / "report.html", PICTURE)
    if options.memory:
        found = json.loads(options.memory.read_text(encoding="utf-8"))
        text = replaced(text, "memory", memory_tables(found))
    if options.compare:
        text = replaced(text, "compare", options.compare.read_text(encoding="utf-8"))
    if options.quality:
        text = replaced(text, "quality", quality_part(options.quality))
    if options.speed:
        text = replaced(text, "speed", options.speed.read_text(encoding="utf-8"))
    if options.merge:
        text = replaced(text, "merge", merge_part(options.merge))
    for file in options.gguf:
        found = json.loads(file.read_text(encoding="utf-8"))
        text = replaced(text, f"gguf-{found['part']}", GGUF_TABLES[found["part"]](found["records"]))
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
