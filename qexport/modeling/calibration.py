"""What a calibrated method sees: windows of all the sources that were asked for, and where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from qexport.calibrate.chat import document_tokens
from qexport.calibrate.records import Conversation
from qexport.calibrate.sources import (
    DEFAULT,
    SELF,
    CalibrationSource,
    calibration_sources,
    check_sources,
    shares,
)
from qexport.calibrate.texts import read_training_documents
from qexport.calibrate.windows import Packed, opening_token, packed, shuffled
from qexport.checkpoint.embedded import is_embedded
from qexport.checkpoint.hashing import ALGORITHM, file_hash
from qexport.events import Noted, OnEvent, ignore
from qexport.modeling.sampling import sampled_windows
from qexport.modeling.skeleton import Skeleton
from qexport.modeling.tokenizer import load_tokenizer, require_known_ids
from qexport.specs import CalibrationSpec

_OWN_TEXT = "text of your model's kind gives better codes: --calibration"


@dataclass(frozen=True)
class UsedSource:
    """What one source gave: `documents` were read for `samples` windows of it.

    `hash` is that of the file, or for `self` of the sampled ids (int64, little-endian).
    """

    name: str
    weight: float
    hash: str
    documents: int
    samples: int


@dataclass(frozen=True)
class CalibrationData:
    """Windows int64 [samples, length], and what an output tells of them."""

    windows: torch.Tensor = field(compare=False, repr=False)
    sources: tuple[UsedSource, ...]
    seed: int
    repeated: int = 0

    @property
    def samples(self) -> int:
        """How many windows there are; fewer than asked for when the texts are short."""
        return int(self.windows.shape[0])

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return int(self.windows.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens of all windows, without those that were repeated to fill the last one of a source."""
        return self.windows.numel() - self.repeated

    def figures(self) -> dict[str, Any]:
        """For qexport.json."""
        return {
            "sources": [
                {
                    "source": source.name,
                    "weight": source.weight,
                    ALGORITHM: source.hash,
                    "documents": source.documents,
                    "samples": source.samples,
                }
                for source in self.sources
            ],
            "samples": self.samples,
            "length": self.length,
            "tokens": self.tokens,
            "seed": self.seed,
        }


def check_calibration(spec: CalibrationSpec) -> None:
    """Reads the sources' files. Raises CalibrationError for all that can be refused without a model."""
    check_sources(spec.calibration, spec.samples)


def calibration_fingerprints(spec: CalibrationSpec) -> dict[str, str]:
    """What the calibration adds to the inputs of a recipe: files by their content, `self` as the word.

    What the model says is determined by the model, which is an input itself. Of several sources the
    shares and the order count too. Raises CalibrationError for a file that is not there.
    """
    sources = calibration_sources(spec.calibration)
    hashes = [SELF if source.path is None else file_hash(source.path) for source in sources]
    if len(sources) == 1:
        return {"calibration": hashes[0]}
    total = sum(source.weight for source in sources)
    return {
        f"calibration {number}": f"{source.weight / total:.6g} of {content}"
        for number, (source, content) in enumerate(zip(sources, hashes, strict=True), start=1)
    }


def calibration_data(
    model_path: Path,
    spec: CalibrationSpec,
    skeleton: Skeleton,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> CalibrationData:
    """The windows that `spec` asks for, by the tokenizer and chat template of the model in `model_path`.

    Every source gives windows of its own, as many as its weight tells; those of several are mixed in an
    order set by the seed. A source that is too small gives what it has, and a note says so. `skeleton` is
    not changed.

    Raises CalibrationError for records, files, weights and tokenizers that cannot be used, NonFiniteError
    when a model to be sampled gives no numbers, StorageError.
    """
    sources = calibration_sources(spec.calibration)
    counts = shares(sources, spec.samples)
    if not spec.calibration and not is_embedded(model_path):
        on_event(Noted(f"calibrating on the package's own little text; {_OWN_TEXT}"))
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    length = skeleton.length(spec.sequence_length)
    windows, used, plain, repeated = [], [], False, 0
    for source, count in zip(sources, counts, strict=True):
        if source.path is None:
            found = sampled_windows(
                model_path,
                tokenizer,
                samples=count,
                length=length,
                seed=spec.seed,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
            content = blake3(found.windows.numpy().astype("<i8").tobytes()).hexdigest()
        else:
            found, talks = _read(source.path, tokenizer, count, length, spec.seed)
            content, plain = file_hash(source.path), plain or (talks and not tokenizer.chat_template)
        given = len(found.windows)
        if given < count:
            on_event(Noted(_too_small(source, sources, found, count, length)))
        require_known_ids(int(found.windows.max()), skeleton, model_path)
        windows.append(found.windows)
        repeated += found.repeated
        used.append(UsedSource(source.name, source.weight, content, found.documents, given))
    if plain:
        on_event(
            Noted(
                f"the tokenizer of {model_path} has no chat template: conversations were joined line by "
                "line; if the model is one for chats, put its chat_template.jinja beside it"
            )
        )
    together = torch.cat(windows)
    if len(sources) > 1:
        together = together[shuffled(range(len(together)), spec.seed)]
    return CalibrationData(together, tuple(used), spec.seed, repeated)


def _read(path: Path, tokenizer: Any, samples: int, length: int, seed: int) -> tuple[Packed, bool]:
    """Windows of a file's documents in an order set by the seed, and whether conversations are among them."""
    documents = shuffled(read_training_documents(path), seed)
    # lazily: a template is run only for the documents that are needed
    tokens = (document_tokens(document, tokenizer) for document in documents)
    found = packed(tokens, samples=samples, length=length, opening=opening_token(tokenizer))
    return found, any(isinstance(document, Conversation) for document in documents[: found.documents])


def _too_small(
    source: CalibrationSource, sources: Sequence[CalibrationSource], found: Packed, count: int, length: int
) -> str:
    name = "the calibration text" if len(sources) == 1 else source.name
    if source.name == DEFAULT and len(sources) > 1:
        name = "the package's own text"
    given = len(found.windows)
    if given == 1 and found.repeated:
        tokens = f"{length - found.repeated} tokens, repeated to make one sample"
        return (
            f"{name} has {tokens} of {length}, where {count} samples are wanted; more text gives better codes"
        )
    return f"{name} fills {given} of {count} samples of {length} tokens; more text gives better codes"
