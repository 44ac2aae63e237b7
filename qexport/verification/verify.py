"""`qexport verify`: opens the written bytes again and measures what they lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qexport.calibrate.texts import read_documents, read_pairs
from qexport.calibrate.windows import ScoredWindow, opening_token, scored_windows
from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.embedded import is_embedded
from qexport.checkpoint.hashing import file_hash
from qexport.checkpoint.manifest import Recipe, fingerprint, installed_versions
from qexport.errors import CalibrationError, GateError
from qexport.events import Noted, OnEvent, ignore
from qexport.formats.opening import open_checkpoint
from qexport.modeling.architectures import architecture_of
from qexport.modeling.blocks import BlockStream
from qexport.modeling.generation import end_tokens
from qexport.modeling.skeleton import Skeleton, build_skeleton
from qexport.modeling.tokenizer import load_tokenizer, require_known_ids
from qexport.modeling.whole import load_whole
from qexport.packaged import heldout_pairs, heldout_text
from qexport.results import Bleu, Evaluation, VerifyResult
from qexport.specs import VerifySpec
from qexport.verification.bleu import bleu, greedy_answers
from qexport.verification.integrity import check_integrity
from qexport.verification.perplexity import perplexity, relative_difference


def evaluate_recipe(model: Path, spec: VerifySpec) -> Recipe:
    """What determines a model's scores; texts count by their content, the gate not at all."""
    inputs = {"model": fingerprint(model)}
    text, pairs = evaluation_data(spec)
    inputs["text"] = file_hash(text)
    if pairs:
        inputs["pairs"] = file_hash(pairs)
    options = spec.model_dump(exclude={"text", "pairs", "max_loss"})
    return Recipe("evaluate", options, inputs, ("torch", "transformers", "sacrebleu"))


def evaluation_data(spec: VerifySpec) -> tuple[Path, Path | None]:
    """Held-out text, and pairs: the packaged pairs go with the packaged text only."""
    text = Path(spec.text) if spec.text else heldout_text()
    pairs = Path(spec.pairs) if spec.pairs else None if spec.text else heldout_pairs()
    for path in (text, pairs):
        if path and not path.is_file():
            raise CalibrationError(f"{path} does not exist", expected="a file of text or pairs")
    return text, pairs


def evaluate(
    model: str | Path,
    spec: VerifySpec | None = None,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Checks a model's files and measures its perplexity and, where there are pairs, its BLEU.

    Weights are decoded from the written bytes by qexport itself, and computed with in fp32.
    Raises InputError for what cannot be read, VerificationError for a model that is not whole.
    """
    spec = spec or VerifySpec()
    return _score(_prepare(model, spec, trust_remote_code, on_event), on_event)


@dataclass(frozen=True)
class _Ready:
    """A model that was found whole, and the data that it will be scored on."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    tokenizer: Any
    tensors_checked: int
    windows: list[ScoredWindow]
    recipe: dict[str, Any]
    pairs_file: Path | None
    pairs: list[tuple[str, str]]
    spec: VerifySpec


def _prepare(model: str | Path, spec: VerifySpec, trust_remote_code: bool, on_event: OnEvent) -> _Ready:
    """Everything that can be refused, before anything is scored."""
    text, pairs_file = evaluation_data(spec)
    documents = read_documents(text)[: spec.max_documents]
    pairs = read_pairs(pairs_file)[: spec.max_pairs] if pairs_file else []
    checkpoint = open_checkpoint(model)
    path = checkpoint.path
    skeleton = build_skeleton(path, trust_remote_code=trust_remote_code)
    architecture_of(skeleton.model_type)
    if not spec.text and not is_embedded(path):
        on_event(Noted("scoring on the package's own little text; name one of your model's kind: --text"))
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    checked = check_integrity(checkpoint, skeleton, on_event)

    length = skeleton.length(spec.window)
    # a scored token needs one before it in its window
    stride = min(spec.stride or max(length // 2, 1), length - 1)
    windows = scored_windows(documents, tokenizer, length=length, stride=stride)
    require_known_ids(max(max(window.tokens) for window in windows), skeleton, path)
    recipe = {
        "data": file_hash(text),
        "documents": len(documents),
        "window": length,
        "stride": stride,
        "bos": opening_token(tokenizer) is not None,
        "dtype": "float32",
        "versions": installed_versions(),
    }
    return _Ready(checkpoint, skeleton, tokenizer, checked, windows, recipe, pairs_file, pairs, spec)


def _score(ready: _Ready, on_event: OnEvent) -> Evaluation:
    checkpoint = ready.checkpoint
    score = perplexity(BlockStream(ready.skeleton, checkpoint), ready.windows, ready.recipe, on_event)
    answered = _bleu(ready, ready.pairs_file, on_event) if ready.pairs_file else None
    parameters = sum(checkpoint.info(name).numel for name in checkpoint.names())
    size = checkpoint.weights_size
    bits = round(8 * size / parameters, 4)
    return Evaluation(str(checkpoint.path), size, bits, ready.tensors_checked, score, answered)


def _bleu(ready: _Ready, pairs_file: Path, on_event: OnEvent) -> Bleu:
    references = [reference for _, reference in ready.pairs]
    one_line = not any("\n" in reference.strip() for reference in references)
    answers = greedy_answers(
        load_whole(ready.skeleton, ready.checkpoint, torch.float32),
        ready.tokenizer,
        [prompt for prompt, _ in ready.pairs],
        max_new_tokens=ready.spec.max_new_tokens,
        batch_size=ready.spec.batch_size,
        one_line=one_line,
        ends=end_tokens(ready.checkpoint.path, ready.checkpoint.config, ready.tokenizer),
        on_event=on_event,
    )
    recipe = {
        "data": file_hash(pairs_file),
        "pairs": len(ready.pairs),
        "decoding": "greedy",
        "max_new_tokens": ready.spec.max_new_tokens,
        "chat_template": bool(ready.tokenizer.chat_template),
        "one_line": one_line,
        "dtype": "float32",
        "versions": installed_versions(),
    }
    return bleu(answers, references, recipe)


def verify(
    reference: str | Path | Evaluation,
    candidate: str | Path,
    spec: VerifySpec | None = None,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> VerifyResult:
    """Measures `candidate` against `reference` (a model, or scores that were taken before).

    Whether the loss is within `spec.max_loss` is for `require_within` to say. Raises as `evaluate`.
    """
    spec = spec or VerifySpec()
    ready = _prepare(candidate, spec, trust_remote_code, on_event)
    if not isinstance(reference, Evaluation):
        reference = evaluate(reference, spec, trust_remote_code=trust_remote_code, on_event=on_event)
    scores = _score(ready, on_event)
    if scores.perplexity.unit_tokens != reference.perplexity.unit_tokens:
        raise CalibrationError(
            f"{candidate} and its reference cut the text into different tokens "
            f"({scores.perplexity.tokens} and {reference.perplexity.tokens})",
            expected="the same tokenizer beside both",
        )
    loss = relative_difference(reference.perplexity, scores.perplexity)
    return VerifyResult(reference, scores, loss)


def require_within(result: VerifyResult, max_loss: float | None) -> None:
    """The gate: GateError when the perplexity rose by more than `max_loss` (a fraction)."""
    if max_loss is not None and not result.loss.loss <= max_loss:
        raise GateError(
            f"{result.candidate.model} loses {100 * result.loss.loss:.2f} % of perplexity",
            expected=f"at most {100 * max_loss:g} %",
        )
