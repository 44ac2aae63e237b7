"""A GGUF file in llama.cpp itself, through cyllama, on the CPU."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cyllama.llama import llama_cpp

if TYPE_CHECKING:
    from qexport.verification.runtimes.drivers.driver import Job, Loaded

_F32 = 0  # ggml's number of the type
_WARNING = 3  # llama.cpp's log levels from here on are complaints
_MISSING = re.compile(r"missing tensor '([^']+)'")
_SHAPE = re.compile(r"tensor '([^']+)' has wrong shape")
_TYPES = re.compile(r"- type\s+(\w+):\s+(\d+) tensors")
_FLOATS = ("f32", "f16", "bf16")


class _Model(llama_cpp.LlamaModel):  # type: ignore[misc, unused-ignore]
    """cyllama's contexts ask the model for the vocabulary's size, which its class does not know."""

    n_vocab = 0


def load(job: Job) -> Loaded:
    """The model with its key-value cache in fp32; every tensor is checked by llama.cpp as it is read."""
    talk: list[tuple[int, str]] = []
    llama_cpp.set_log_callback(lambda level, text: talk.append((level, text)))
    options = llama_cpp.LlamaModelParams()
    options.check_tensors = True
    options.use_mmap = False
    options.use_extra_bufts = False  # no repacking: it takes time, and changes how sums are rounded
    missing: list[str] = []
    mismatched: list[str] = []
    model: Any = None
    try:
        model = _Model(path_model=str(gguf_file(Path(job["model"]))), params=options, verbose=False)
    except Exception as error:  # the reason stands in the log
        told = "".join(text for _, text in talk)
        missing, mismatched = _MISSING.findall(told), _SHAPE.findall(told)
        if not missing and not mismatched:
            raise RuntimeError(_reason(talk) or str(error)) from error
    layers: Counter[str] = Counter()
    for kind, count in _TYPES.findall("".join(text for _, text in talk)):
        if kind not in _FLOATS:
            layers[kind] += int(count)

    def forward(ids: list[list[int]]) -> Any:
        type(model).n_vocab = model.get_vocab().n_vocab
        return np.array([_logits(model, row) for row in ids], dtype=np.float32)

    return {
        "forward": None if model is None else forward,
        "dtype": "float32",
        "layers": dict(layers),
        "missing": sorted(set(missing)),
        "unexpected": [],  # llama.cpp does not load a file that has tensors too many
        "mismatched": sorted(set(mismatched)),
        "problems": [],
    }


def gguf_file(path: Path) -> Path:
    """The file itself, or the one GGUF of a directory (the first of its parts)."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    if not found:
        raise FileNotFoundError(f"{path} holds no .gguf file")
    return found[0]


def _logits(model: Any, row: list[int]) -> Any:
    options = llama_cpp.LlamaContextParams()
    options.n_ctx = options.n_batch = options.n_ubatch = max(len(row), 32)
    options.type_k = options.type_v = _F32
    options.flash_attn_type = 0
    options.swa_full = True
    context = llama_cpp.LlamaContext(model=model, params=options, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=len(row), embd=0, n_seq_max=1)
    for position, token in enumerate(row):
        batch.add(token, position, [0], True)
    if code := context.decode(batch):
        raise RuntimeError(f"llama_decode gave {code}")
    found = [context.get_logits_ith(position) for position in range(len(row))]
    context.close()
    return found


def _reason(talk: list[tuple[int, str]]) -> str:
    """What llama.cpp complained of, without its functions' names."""
    lines = [text.strip() for level, text in talk if level >= _WARNING and text.strip()]
    return "; ".join(re.sub(r"^\w+: ", "", line) for line in lines[-3:])
