"""What is quantized: a model, or a base with adapters that are merged into it as it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.manifest import fingerprint
from qexport.errors import SpecError
from qexport.events import OnEvent
from qexport.formats.gguf.text_model import is_multimodal, text_and_skeleton
from qexport.formats.opening import open_checkpoint
from qexport.merging.adapter import split_weight
from qexport.merging.view import merged_view
from qexport.modeling.skeleton import Skeleton
from qexport.specs import AnyQuantizeSpec, CalibrationSpec


@dataclass(frozen=True)
class Source:
    """An opened model. Config and tokenizer lie in `path`.

    `inputs` gives the hashes of what it was made of; `directories` are the user's own, `name` what the model
    may be called by, `base` what it was tuned from where adapters tell.
    """

    checkpoint: Checkpoint
    path: Path
    inputs: Callable[[], Mapping[str, str]]
    directories: Sequence[Path]
    name: str | None = None
    base: str | None = None


@contextlib.contextmanager
def opened_source(
    model: str | Path,
    adapters: Sequence[str | Path],
    spec: AnyQuantizeSpec,
    *,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> Iterator[Source]:
    """The model, within the block. Raises InputError."""
    if not adapters:
        path = resolve(model)
        yield Source(open_checkpoint(path), path, lambda: {"model": fingerprint(path)}, [path])
        return
    if _samples(spec):
        raise SpecError(
            "--calibration self with adapters: a model that is merged as it is read cannot be sampled",
            remedy="merge first, or calibrate on a text",
        )
    with merged_view(model, adapters, trust_remote_code=trust_remote_code, on_event=on_event) as view:
        own = [view.plan.base.checkpoint.path, *(adapter.path for adapter in view.plan.adapters)]
        yield Source(
            view.checkpoint,
            view.checkpoint.path,
            lambda: view.recipe().inputs,
            own,
            name=Path(split_weight(str(adapters[-1]))[0]).name,
            base=str(model),
        )


def text_source(
    source: Source,
    spec: AnyQuantizeSpec | CalibrationSpec,
    *,
    trust_remote_code: bool = False,
    on_event: OnEvent,
) -> tuple[Source, Skeleton]:
    """What of a source becomes a GGUF file, the text model alone of a multimodal one, and its skeleton.

    Raises InputError.
    """
    if _samples(spec) and is_multimodal(source.checkpoint):
        raise SpecError(
            "--calibration self with a multimodal model, of which the text model alone becomes the file",
            remedy="calibrate on a text: --calibration FILE",
        )
    text, skeleton = text_and_skeleton(
        source.checkpoint, trust_remote_code=trust_remote_code, on_event=on_event
    )
    return replace(source, checkpoint=text), skeleton


def _samples(spec: AnyQuantizeSpec | CalibrationSpec) -> bool:
    """Whether the model is to be sampled for its calibration."""
    return isinstance(spec, CalibrationSpec) and any(text.startswith("self") for text in spec.calibration)
