"""NaN and infinity are found and named before any long work starts."""

from __future__ import annotations

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.checkpoint.safetensors_file import iter_values
from qexport.errors import NonFiniteError, first_of
from qexport.events import Advanced, Finished, OnEvent, Started, ignore

# dtype -> (whole numbers of its width, all bits but the sign, the bits of infinity): as bits, what is not
# finite is what is not below infinity. Ten times as fast as isfinite, which widens 16 bits first.
_BITS = {
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; whole-number dtypes always are."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.dtype in _BITS and values.is_contiguous():
        whole, magnitude, infinity = _BITS[values.dtype]
        return int(values.view(whole).bitwise_and(magnitude).amax()) < infinity
    if values.dtype.itemsize == 1:
        values = values.float()  # isfinite is not there for 8-bit floats
    return bool(values.isfinite().all())


def require_finite(checkpoint: Checkpoint, *, on_event: OnEvent = ignore) -> None:
    """Reads the stored tensors once, a piece at a time; NonFiniteError names those that are not finite."""
    on_event(Started("check weights", checkpoint.weights_size, "bytes"))
    broken = []
    for tensor in checkpoint.stored.values():
        if not all(is_finite(part) for part in iter_values(tensor)):
            broken.append(tensor.name)
        on_event(Advanced(tensor.size, tensor.name))
    on_event(Finished())
    if broken:
        raise non_finite_error(str(checkpoint.path), broken)


def non_finite_error(where: str, names: list[str]) -> NonFiniteError:
    """The error that names the broken tensors, the first three of them."""
    return NonFiniteError(
        f"{where} has NaN or infinity in {first_of(names)}",
        expected="finite weights",
        remedy="the training diverged or the file is damaged: export an earlier state",
    )
