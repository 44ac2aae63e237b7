"""What it costs to hold a variant against full precision: one pass, whose logits are compared with kept ones.

    python -m benchmarks.compare [MODEL [TEXT]]

MODEL is a directory, by default the embedded base. Quantizes it to 4 bits (rtn), then times, each the median
of three: scoring the variant's perplexity alone; its perplexity and its divergence from logits that are
kept; both models' passes, as it would be without keeping any. Prints a Markdown table, and the size of the
kept logits, whole and of the likeliest tokens only, with the divergence that each finds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import qexport
from qexport.packaged import embedded_base, heldout_text
from qexport.results import Evaluation
from qexport.sizes import format_size
from qexport.specs import RtnSpec, VerifySpec
from qexport.verification.evaluate import Reference

_RUNS = 3
_DOCUMENTS = 100


def timed(call: Callable[[], Evaluation]) -> tuple[float, Evaluation]:
    """Median seconds of some calls, and what the last one gave."""
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


def main() -> None:
    """See the module's text."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else embedded_base()
    text = sys.argv[2] if len(sys.argv) > 2 else str(heldout_text())
    spec = VerifySpec(text=text, max_documents=_DOCUMENTS)
    with tempfile.TemporaryDirectory() as name:
        variant, kept = Path(name) / "rtn", Path(name) / "logits"
        qexport.quantize(model, variant, RtnSpec())
        whole, full = timed(lambda: qexport.evaluate(model, spec, keep_logits=kept))
        reference = Reference(full, kept, model)
        alone, _ = timed(lambda: qexport.evaluate(variant, spec))
        held, found = timed(lambda: qexport.evaluate(variant, spec, reference=reference))
        size = kept.stat().st_size
        if found.divergence is None:
            sys.exit("no divergence was measured")
        sizes = [(f"all of {found.divergence.recipe['vocabulary']}", size, found.divergence.mean)]
        few = spec.model_copy(update={"max_logits_size": size // 10})
        scores = qexport.evaluate(model, few, keep_logits=kept)
        part = qexport.evaluate(variant, few, reference=Reference(scores, kept, model)).divergence
        if part:
            sizes.append((f"the likeliest {part.recipe['kept_logits']}", kept.stat().st_size, part.mean))
    print(f"{model.name}, {full.perplexity.tokens} tokens of {_DOCUMENTS} documents, variant rtn 4 bits\n")
    print("| what | seconds | times perplexity alone |\n| --- | ---: | ---: |")
    for what, seconds in (
        ("perplexity alone", alone),
        ("perplexity and divergence from kept logits", held),
        ("both models' passes, nothing kept", alone + whole),
    ):
        print(f"| {what} | {seconds:.2f} | {seconds / alone:.2f} |")
    print("\n| kept logits of a token | size | KL divergence |\n| --- | ---: | ---: |")
    for what, bytes_kept, kl in sizes:
        print(f"| {what} | {format_size(bytes_kept)} | {kl:.5f} |")


if __name__ == "__main__":
    main()
