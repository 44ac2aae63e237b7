"""A report as `qexport compare` writes it, of plain data: a model of 1.5 billion weights, 14 rows."""

from __future__ import annotations

import math
import random

from qexport.report.content import (
    Comparison,
    Interval,
    Layers,
    Measure,
    Report,
    Row,
    Sample,
    TextScores,
)
from qexport.report.verdict import verdict

PARAMETERS = 1_543_714_304
FULL_PERPLEXITY = 9.4213

# variant, method, solver, format, bits, bits a weight, rise of perplexity, its error, KL, same top, BLEU
# against full, seconds
ROWS = (
    ("full", "none", None, "safetensors", 16, 16.0, 0.0, 0.0, 0.0, 1.0, 100.0, None),
    ("q8_0", "gguf", "rtn", "gguf", 8, 8.50, 0.0004, 0.0006, 0.0009, 0.984, 97.1, 21.4),
    ("bnb-int8", "bnb", "rtn", "bitsandbytes", 8, 9.12, 0.0061, 0.0011, 0.0072, 0.957, 88.4, 9.8),
    ("q6_k", "gguf", "rtn", "gguf", 6, 6.57, 0.0011, 0.0009, 0.0031, 0.971, 94.0, 64.0),
    ("q5_k_m", "gguf", "rtn", "gguf", 5, 5.73, 0.0044, 0.0012, 0.0088, 0.951, 87.9, 71.3),
    ("q4_k_m", "gguf", "rtn", "gguf", 4, 4.91, 0.0134, 0.0017, 0.0244, 0.919, 77.2, 75.9),
    ("q4_0", "gguf", "rtn", "gguf", 4, 4.61, 0.0382, 0.0031, 0.0571, 0.878, 64.6, 30.2),
    ("gptq-4", "gptq", "gptq", "gptq", 4, 4.77, 0.0162, 0.0019, 0.0289, 0.911, 75.4, 611.0),
    ("awq-4", "awq", "awq", "awq", 4, 4.79, 0.0148, 0.0018, 0.0262, 0.915, 76.3, 702.0),
    ("bnb-nf4", "bnb", "rtn", "bitsandbytes", 4, 5.06, 0.0241, 0.0022, 0.0395, 0.899, 70.8, 14.1),
    ("hqq-3", "hqq", "hqq", "hqq", 3, 4.25, 0.0871, 0.0058, 0.1180, 0.821, 51.0, 48.5),
    ("q3_k_m", "gguf", "rtn", "gguf", 3, 3.99, 0.0614, 0.0047, 0.0863, 0.846, 56.7, 80.8),
    ("gptq-2", "gptq", "gptq", "gptq", 2, 2.91, 2.4110, 0.1210, 1.3400, 0.443, 8.2, 588.0),
    ("hqq-2", "hqq", "hqq", "hqq", 2, 3.05, 0.9230, 0.0410, 0.7120, 0.566, 15.1, 47.7),
)
GATE = 0.05
LEFT_OUT = {"hqq-2", "q4_0"}  # without answers and text scores
_ANSWER = (
    "Quantization stores each weight of a model with fewer bits. The model gets smaller and faster to load, "
    "and loses a little of what it knows: at four bits hardly anything, at two bits nearly everything."
)


def _scores(bleu: float) -> TextScores:
    def near(value: float) -> Interval:
        return Interval(value=value, low=max(value - 2.4, 0), high=min(value + 2.2, 100))

    whole = bleu == 100.0
    return TextScores(
        bleu=Interval(value=100, low=100, high=100) if whole else near(bleu),
        chrf=near(min(bleu + 6, 100)),
        rouge_l=near(min(bleu + 4, 100)),
        exact_match=near(max(bleu - 40, 0)),
    )


def _row(data: tuple) -> Row:  # type: ignore[type-arg]
    name, method, solver, form, bits, bpw, loss, error, kl, top, bleu, seconds = data
    full = method == "none"
    failures = (f"loss of perplexity {100 * loss:.1f} % is above {100 * GATE:.0f} %",) if loss > GATE else ()
    return Row(
        variant=name,
        path=f"out/{name}",
        method=method,
        solver=solver,
        format=form,
        bits=bits,
        bits_per_weight=bpw,
        size_bytes=round(PARAMETERS * bpw / 8),
        seconds=seconds,
        peak_bytes=None if full else 1_400_000_000 + round(90_000_000 * bpw),
        perplexity=Measure(value=FULL_PERPLEXITY * (1 + loss), standard_error=0.21),
        loss=None if full else Measure(value=loss, standard_error=error),
        kl=None if full else Measure(value=kl, standard_error=kl / 25),
        kl_p99=None if full else 9.3 * kl,
        same_top=None if full else Measure(value=top, standard_error=0.004),
        text=None if name in LEFT_OUT else _scores(34.0 * bleu / 100),
        text_full=None if full or name in LEFT_OUT else _scores(bleu),
        tokens_per_second={"llama.cpp": 160 / bpw} if form == "gguf" else {},
        tasks={"arc_easy/acc": Measure(value=0.71 - 0.2 * min(loss, 1), standard_error=0.009)},
        failures=failures,
    )


def _comparisons(rows: tuple[Row, ...]) -> tuple[Comparison, ...]:
    lossy = [row for row in rows if row.loss and row.kl]
    found = []
    for place, first in enumerate(lossy):
        for second in lossy[place + 1 :]:
            assert first.loss
            assert first.kl
            assert second.loss
            assert second.kl
            for measure, one, other, error in (
                ("log perplexity", math.log1p(first.loss.value), math.log1p(second.loss.value), 0.0016),
                ("kl", first.kl.value, second.kl.value, 0.0011),
            ):
                found.append(
                    Comparison(
                        first=first.variant,
                        second=second.variant,
                        measure=measure,
                        difference=other - one,
                        standard_error=error,
                        more_than_noise=abs(other - one) > 1.96 * error,
                    )
                )
    return tuple(found)


def _layers(rows: tuple[Row, ...]) -> Layers:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    names = tuple(f"model.layers.{block}.{part}.weight" for block in range(12) for part in parts)
    chance = random.Random(6)
    errors = {}
    for row in rows:
        if row.method != "none":
            base = 0.35 * 2.0 ** (3 - row.bits_per_weight)
            errors[row.variant] = tuple(
                None if row.method == "bnb" and "down" in name else base * chance.uniform(0.75, 1.3)
                for name in names
            )
    return Layers(names=names, errors=errors)


def _samples(rows: tuple[Row, ...]) -> tuple[Sample, ...]:
    garbled = {
        "q4_k_m": _ANSWER.replace("hardly anything", "next to nothing"),
        "gptq-4": _ANSWER.replace("hardly anything", "next to nothing"),
        "hqq-3": _ANSWER.replace("gets smaller and faster to load", "becomes small"),
        "gptq-2": "Quantization is the the the weights weights of of a model model model " * 3,
    }
    translated = {"hqq-3": "Der Zug fährt um acht Uhr.", "gptq-2": "Der der der Der Zug Zug"}
    names = [row.variant for row in rows if row.variant not in LEFT_OUT]
    return (
        Sample(
            prompt="What does quantization do to a language model?",
            reference=None,
            answers={name: garbled.get(name, _ANSWER) for name in names},
        ),
        Sample(
            prompt="Translate into German: The train leaves at eight o’clock.",
            reference="Der Zug fährt um acht Uhr ab.",
            answers={name: translated.get(name, "Der Zug fährt um acht Uhr ab.") for name in names},
        ),
    )


def realistic_report() -> Report:
    """14 rows with every part that a report can have."""
    rows = tuple(_row(data) for data in ROWS)
    comparisons = _comparisons(rows)
    return Report(
        qexport="1.0.0",
        title="Qwen2.5-1.5B-Instruct with the support-desk adapter",
        verdict=verdict(rows, comparisons),
        rows=rows,
        comparisons=comparisons,
        samples=_samples(rows),
        layers=_layers(rows),
        recipes={
            "perplexity": {"data": "9f2b6a1c44de", "documents": 120, "tokens": 61_440, "window": 1024,
                           "stride": 512, "dtype": "bfloat16",
                           "versions": {"torch": "2.13.0", "transformers": "5.23.0"}},
            "bleu": {"pairs": 64, "signature": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"},
        },
        recipe_lines=(
            "perplexity: 61440 tokens of 120 documents, window 1024, stride 512, bfloat16, data 9f2b6a1c44de",
            "BLEU: 64 pairs, greedy, at most 64 tokens, nrefs:1|case:mixed|tok:13a|smooth:exp|version:2.6.0",
        ),
    )  # fmt: skip
