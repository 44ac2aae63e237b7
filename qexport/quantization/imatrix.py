"""The verb `imatrix`: what each input of a model's layers weighs on a text, as one file for llama.cpp."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qexport.checkpoint.checkpoint import local_path
from qexport.checkpoint.finiteness import require_finite
from qexport.checkpoint.hub import resolve
from qexport.checkpoint.staging import check_target_file
from qexport.devices import device_of
from qexport.errors import InputError
from qexport.events import OnEvent, ignore
from qexport.formats.gguf.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from qexport.formats.gguf.tensors import gguf_tensors
from qexport.formats.opening import open_checkpoint
from qexport.modeling.activations import Activations
from qexport.modeling.calibration import calibration_data, check_calibration
from qexport.quantization.importance import gather_importance, layer_inputs
from qexport.quantization.source import Source, text_source
from qexport.specs import CalibrationSpec


def make_imatrix(
    source: str | Path,
    out: str | Path,
    spec: CalibrationSpec | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> ImportanceMatrix:
    """Gathers the importance matrix of `source` and writes it to `out`: llama.cpp's GGUF form, or for a name
    that ends with .dat its older one. One block of the model is in memory at a time.

    Raises InputError, NonFiniteError, OutputExistsError, StorageError.
    """
    spec, out = spec or CalibrationSpec(), Path(out)
    path = resolve(source)
    given = local_path(source)
    check_out = partial(
        check_target_file,
        out,
        "importance matrix",
        _is_imatrix,
        overwrite=overwrite,
        sources=[path] if given is None else [given, path],
    )
    check_out()
    device = device_of(spec.device)
    check_calibration(spec)
    opened, skeleton = text_source(
        Source(open_checkpoint(path), path, dict, [path]),
        spec,
        trust_remote_code=trust_remote_code,
        on_event=on_event,
    )
    checkpoint = opened.checkpoint
    layers = layer_inputs(gguf_tensors(checkpoint, skeleton))
    require_finite(checkpoint, on_event=on_event)
    data = calibration_data(path, spec, skeleton, trust_remote_code=trust_remote_code, on_event=on_event)
    with Activations(spec.memory, out.parent) as hidden:
        matrix = gather_importance(checkpoint, skeleton, data, layers, hidden, on_event, device)
    check_out()  # somebody may have put something there since
    write_imatrix(matrix, out)
    return matrix


def _is_imatrix(path: Path) -> bool:
    try:
        read_imatrix(path)
    except InputError:
        return False
    return True
