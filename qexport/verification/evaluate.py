"""One model's scores, from the bytes that were written: perplexity, divergence, answers."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qexport.calibrate.texts import read_documents
from qexport.calibrate.windows import ScoredWindow, opening_token, scored_windows
from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.disk import exists
from qexport.checkpoint.embedded import is_embedded
from qexport.checkpoint.hashing import file_hash
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import Recipe, fingerprint, installed_versions
from qexport.errors import CalibrationError, SpecError
from qexport.events import Noted, OnEvent, ignore
from qexport.formats.gguf.text_model import text_and_skeleton
from qexport.formats.opening import open_checkpoint
from qexport.modeling.activations import scratch_directory
from qexport.modeling.architectures import architecture_of
from qexport.modeling.blocks import BlockStream
from qexport.modeling.generation import end_tokens
from qexport.modeling.skeleton import Skeleton
from qexport.modeling.tokenizer import load_tokenizer, require_known_ids
from qexport.modeling.whole import load_whole
from qexport.packaged import heldout_pairs, heldout_text
from qexport.results import Answers, Divergence, Evaluation, Perplexity
from qexport.specs import VerifySpec
from qexport.verification.answers import greedy_answers
from qexport.verification.corpora import PREFIX, corpus_file
from qexport.verification.divergence import DivergenceSums
from qexport.verification.integrity import check_integrity
from qexport.verification.kept_logits import (
    KeptLogits,
    KeptLogitsWriter,
    hash_of_tokens,
    open_logits,
    plan_logits,
)
from qexport.verification.kinship import require_same_embeddings, require_same_shape
from qexport.verification.lm_tasks import TaskScores, run_tasks
from qexport.verification.perplexity import summarize
from qexport.verification.prompts import Prompt, read_prompts
from qexport.verification.scored_logits import scored_logits
from qexport.verification.speed import tokens_per_second
from qexport.verification.text_scores import score_texts
from qexport.verification.units import Units

FEW_TOKENS = 2000  # below it a loss of one per cent drowns in the spread of the text


def evaluate_recipe(model: Path, spec: VerifySpec) -> Recipe:
    """What determines a model's scores; texts count by their content, the gate not at all."""
    inputs = {"model": fingerprint(model)}
    text, pairs = evaluation_data(spec)
    inputs["text"] = file_hash(text)
    if pairs:
        inputs["pairs"] = file_hash(pairs)
    for name in spec.tasks:  # a file of the user's own counts by its content
        for file in [Path(name)] if Path(name).is_file() else sorted(Path(name).glob("**/*.yaml")):
            inputs[f"task {file.name}"] = file_hash(file)
    options = spec.model_dump(exclude={"text", "pairs", "batch_size", "memory", *VerifySpec.GATES})
    packages = ("torch", "transformers", "sacrebleu", *(("lm_eval", "datasets") if spec.tasks else ()))
    return Recipe("evaluate", options, inputs, packages)


def evaluation_data(spec: VerifySpec) -> tuple[Path, Path | None]:
    """Held-out text, and prompts: the packaged ones go with the packaged text only."""
    text = _text_file(spec.text) if spec.text else heldout_text()
    pairs = Path(spec.pairs) if spec.pairs else None if spec.text else heldout_pairs()
    for path in (text, pairs):
        if path and not path.is_file():
            what = "is no file" if exists(path) else "does not exist"
            raise CalibrationError(f"{path} {what}", expected="a file of text or prompts")
    return text, pairs


def evaluation_prompts(spec: VerifySpec) -> tuple[Prompt, ...]:
    """The prompts that are answered, none where there are none. Raises CalibrationError."""
    if len(spec.languages) not in (0, 2):
        raise SpecError(f"--languages {','.join(spec.languages)}", expected="two, source and target: de,en")
    _, pairs = evaluation_data(spec)
    if pairs is None:
        return ()
    languages = (spec.languages[0], spec.languages[1]) if spec.languages else None
    return read_prompts(pairs, languages=languages, wording=spec.wording)[: spec.max_pairs]


def _text_file(name: str) -> Path:
    return corpus_file(name) if name.startswith(PREFIX) else Path(name)


def _text_name(spec: VerifySpec, text: Path) -> str:
    """What the text is called; where a data set lies on somebody's disk is no part of it."""
    if not spec.text or not spec.text.startswith(PREFIX):
        return text.name
    name = spec.text.removeprefix(PREFIX)
    return f"{PREFIX}{Path(name).name}" if exists(Path(name.partition(":")[0])) else spec.text


@dataclass(frozen=True)
class Reference:
    """What a candidate is held against: the full model's scores, and its logits where they are kept."""

    scores: Evaluation
    logits: Path
    model: str | Path  # where it lies now
    trust_remote_code: bool = False  # for opening it again


def evaluate(
    model: str | Path,
    spec: VerifySpec | None = None,
    *,
    reference: Reference | None = None,
    keep_logits: Path | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Checks a model's files and measures its perplexity and, where there are prompts, its answers.

    Held against a `reference` it gets a divergence too, and its answers are compared with the reference's.
    With `keep_logits` the model's own logits are kept in that file, for others to be held against. Weights
    are decoded from the written bytes by qexport itself, and computed with in fp32: one pass.
    Raises InputError for what cannot be read, VerificationError for a model that is not whole,
    CalibrationError where reference and model cut the text into other tokens, StorageError.
    """
    ready = prepare(model, spec or VerifySpec(), trust_remote_code, on_event)
    if reference is None:
        note_little_text(ready, on_event)
    return score(ready, reference, keep_logits, on_event)


@dataclass(frozen=True)
class Ready:
    """A model that was found whole, `model` in the user's words, and the data that it will be scored on."""

    model: str | Path
    checkpoint: Checkpoint
    skeleton: Skeleton
    tokenizer: Any
    tensors_checked: int
    windows: list[ScoredWindow]
    recipe: dict[str, Any]
    prompts_file: Path | None
    prompts: tuple[Prompt, ...]
    spec: VerifySpec
    trust_remote_code: bool


def prepare(model: str | Path, spec: VerifySpec, trust_remote_code: bool, on_event: OnEvent) -> Ready:
    """Everything that can be refused, before anything is scored."""
    text, prompts_file = evaluation_data(spec)
    documents = read_documents(text)[: spec.max_documents]
    prompts = evaluation_prompts(spec)
    if spec.min_bleu is not None and all(prompt.reference is None for prompt in prompts):
        raise CalibrationError(
            f"--min-bleu, and {prompts_file or 'no prompts'} without references",
            expected="--pairs FILE with a reference for each prompt",
        )
    checkpoint, skeleton = text_and_skeleton(
        open_checkpoint(model), trust_remote_code=trust_remote_code, on_event=on_event
    )
    path = checkpoint.path
    architecture_of(skeleton.model_type)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    checked = check_integrity(checkpoint, skeleton, on_event)

    length = skeleton.length(spec.window)
    # a scored token needs one before it in its window
    stride = min(spec.stride or max(length // 2, 1), length - 1)
    windows = scored_windows(documents, tokenizer, length=length, stride=stride)
    require_known_ids(max(max(window.tokens) for window in windows), skeleton, path)
    recipe = {
        "text": _text_name(spec, text),
        "data": file_hash(text),
        "tokens": hash_of_tokens(windows)[:16],
        "documents": len(documents),
        "window": length,
        "stride": stride,
        "bos": opening_token(tokenizer) is not None,
        "dtype": "float32",
        "versions": installed_versions(),
    }
    return Ready(
        model,
        checkpoint,
        skeleton,
        tokenizer,
        checked,
        windows,
        recipe,
        prompts_file,
        prompts,
        spec,
        trust_remote_code,
    )


def note_little_text(ready: Ready, on_event: OnEvent) -> None:
    """Says what makes the scores tell little."""
    if not ready.spec.text and not is_embedded(ready.checkpoint.path):
        on_event(Noted("scoring on the package's own little text; name one of your model's kind: --text"))
    scored = sum(window.scored for window in ready.windows)
    if scored < FEW_TOKENS:
        told = f"only {scored} tokens are scored: a loss of some per cent does not show below {FEW_TOKENS}"
        on_event(Noted(told))


def score(
    ready: Ready, reference: Reference | None, keep_logits: Path | None, on_event: OnEvent
) -> Evaluation:
    """The scores of a model that is `Ready`. Raises as `evaluate`."""
    checkpoint = ready.checkpoint
    if reference:
        require_kin(ready, reference.model, reference.trust_remote_code)
        require_same_tokens(ready, reference.scores, reference.model, reference.trust_remote_code)
    found, divergence = _over_text(ready, reference, keep_logits, on_event)
    answers, tasks = _with_whole_model(ready, reference, on_event)
    speed = (
        tokens_per_second(ready.model, trust_remote_code=ready.trust_remote_code, on_event=on_event)
        if ready.spec.speed
        else None
    )
    parameters = sum(checkpoint.info(name).numel for name in checkpoint.names())
    size = checkpoint.weights_size
    bits = round(8 * size / parameters, 4)
    return Evaluation(
        model=str(checkpoint.path),
        size_bytes=size,
        bits_per_weight=bits,
        tensors_checked=ready.tensors_checked,
        perplexity=found,
        divergence=divergence,
        answers=answers,
        speeds={speed.runtime: speed.tokens_per_second} if speed else {},
        speed_recipe=asdict(speed) if speed else {},
        tasks=tasks.scores if tasks else {},
        task_recipe=tasks.recipe if tasks else {},
    )


def _with_whole_model(
    ready: Ready, reference: Reference | None, on_event: OnEvent
) -> tuple[Answers | None, TaskScores | None]:
    """What cannot be had block by block: answers, and lm-evaluation-harness's scores."""
    if not ready.prompts_file and not ready.spec.tasks:
        return None, None
    model = load_whole(ready.skeleton, ready.checkpoint, torch.float32)
    answers = _answers(ready, model, reference, on_event) if ready.prompts_file else None
    if not ready.spec.tasks:
        return answers, None
    tasks = run_tasks(
        model,
        ready.tokenizer,
        ready.spec.tasks,
        limit=ready.spec.task_limit,
        batch_size=ready.spec.batch_size,
        on_event=on_event,
    )
    return answers, tasks


def _over_text(
    ready: Ready, reference: Reference | None, keep_logits: Path | None, on_event: OnEvent
) -> tuple[Perplexity, Divergence | None]:
    """One pass over the windows."""
    windows = ready.windows
    units = Units(windows)
    nll = [0.0] * len(windows)
    sums = DivergenceSums(len(windows))
    against = _opened(ready, reference, on_event) if reference else None
    with contextlib.ExitStack() as stack:
        if against:
            stack.callback(against.close)
        writer: KeptLogitsWriter | None = None
        stream = BlockStream(ready.skeleton, ready.checkpoint)
        file = keep_logits or (reference.logits if reference else None)
        beside = file.parent if file else scratch_directory()
        for n, tokens, logits in scored_logits(stream, windows, ready.spec.memory, beside, on_event):
            losses = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
            nll[n] = float(losses.double().sum())
            if against:
                sums.add(n, *against.divergence(n, logits))
            if keep_logits:
                if writer is None:  # now the size of the vocabulary is known
                    key = evaluate_recipe(ready.checkpoint.path, ready.spec).key
                    layout = plan_logits(key, windows, logits.shape[1], ready.spec.max_logits_size)
                    if layout.kept < layout.vocabulary:
                        told = (
                            f"of {layout.vocabulary} logits a token the {layout.kept} likeliest are kept: "
                            "divergences are lower bounds (--max-logits-size)"
                        )
                        on_event(Noted(told))
                    writer = stack.enter_context(KeptLogitsWriter(keep_logits, layout))
                writer.add(n, logits)
    perplexity = summarize(units.sums(nll), units.tokens, ready.recipe)
    if against is None:
        return perplexity, None
    kept = against.layout
    recipe = {**ready.recipe, "kept_logits": kept.kept, "vocabulary": kept.vocabulary}
    return perplexity, sums.summarize(units, recipe)


def _opened(ready: Ready, reference: Reference, on_event: OnEvent) -> KeptLogits:
    """The reference's logits; computed anew where they are not there, or not those."""
    path = resolve(reference.model)
    key = evaluate_recipe(path, ready.spec).key
    found = open_logits(reference.logits, key)
    if found is None:
        on_event(Noted(f"the logits of {reference.model} are not there any more: computing them again"))
        spec = ready.spec.model_copy(update={"pairs": None, "text": str(evaluation_data(ready.spec)[0])})
        whole = replace(prepare(path, spec, reference.trust_remote_code, on_event), spec=ready.spec)
        _over_text(whole, None, reference.logits, on_event)
        found = open_logits(reference.logits, key)
    assert found is not None  # noqa: S101 - just written
    return found


def require_kin(ready: Ready, reference: str | Path, trust_remote_code: bool) -> None:
    """Raises CalibrationError for a candidate that was made from another model."""
    theirs = text_and_skeleton(open_checkpoint(reference), trust_remote_code=trust_remote_code)
    names = str(ready.model), str(reference)
    require_same_shape(ready.skeleton, theirs[1], names)
    require_same_embeddings((ready.checkpoint, ready.skeleton), theirs, names)


def require_same_tokens(
    ready: Ready, scores: Evaluation, reference: str | Path | None = None, trust_remote_code: bool = False
) -> None:
    """Raises CalibrationError, with the first difference, where a model cuts the text otherwise."""
    path, theirs = ready.model, scores.perplexity.recipe
    if theirs.get("tokens") == ready.recipe["tokens"]:
        return
    for key in ("text", "documents", "window", "stride"):
        if theirs.get(key) != ready.recipe[key]:
            raise CalibrationError(
                f"{path} is scored with {key} {ready.recipe[key]}, its reference with {theirs.get(key)}",
                expected="the same text and windows",
                remedy="a smaller --window, which both can take" if key in ("window", "stride") else "",
            )
    told = ""
    if reference is not None:
        text, _ = evaluation_data(ready.spec)
        documents = read_documents(text)[: ready.spec.max_documents]
        tokenizer = load_tokenizer(resolve(reference), trust_remote_code=trust_remote_code)
        told = _first_difference(documents, ready.tokenizer, tokenizer)
    raise CalibrationError(
        f"{path} and its reference {reference or scores.model} cut the text into different tokens{told}",
        expected="the same tokenizer beside both",
    )


def _first_difference(documents: list[str], ours: Any, theirs: Any) -> str:
    for document in documents:
        a, b = (list(tokenizer(document).input_ids) for tokenizer in (ours, theirs))
        if a != b:
            at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            here, there = (
                f"{ids[at]} ({tokenizer.decode(ids[at : at + 1])!r})" if at < len(ids) else "the end"
                for tokenizer, ids in ((ours, a), (theirs, b))
            )
            return f": after {at} tokens {here}, there {there}"
    return f" ({len(ours)} and {len(theirs)} of them are known)" if len(ours) != len(theirs) else ""


def _answers(ready: Ready, model: Any, reference: Reference | None, on_event: OnEvent) -> Answers:
    references = [prompt.reference for prompt in ready.prompts]
    known = [text for text in references if text is not None]
    one_line = bool(known) and not any("\n" in text.strip() for text in known)
    answered = greedy_answers(
        model,
        ready.tokenizer,
        ready.prompts,
        max_new_tokens=ready.spec.max_new_tokens,
        batch_size=ready.spec.batch_size,
        one_line=one_line,
        ends=end_tokens(ready.checkpoint.path, ready.checkpoint.config, ready.tokenizer),
        on_event=on_event,
    )
    recipe = {
        "text": ready.prompts_file.name if ready.prompts_file else "",
        "data": file_hash(ready.prompts_file) if ready.prompts_file else "",
        "pairs": len(ready.prompts),
        "with_reference": len(known),
        "decoding": "greedy",
        "max_new_tokens": ready.spec.max_new_tokens,
        "chat_template": bool(ready.tokenizer.chat_template),
        "one_line": one_line,
        "dtype": "float32",
        "bootstrap": "95 %, over the prompts",
        "versions": installed_versions(),
    }
    with_reference = [
        (answer, text) for answer, text in zip(answered.texts, references, strict=True) if text is not None
    ]
    full = reference.scores.answers if reference else None
    score = partial(score_texts, tokenize=ready.spec.bleu_tokenizer)
    return Answers(
        texts=tuple(answered.texts),
        tokens=sum(answered.tokens),
        seconds=answered.seconds,
        references=score([a for a, _ in with_reference], [r for _, r in with_reference])
        if with_reference
        else None,
        full=score(list(answered.texts), list(full.texts)) if full else None,
        recipe=recipe,
    )
