"""Where tensors are computed with: the user's word for a device, checked."""

from __future__ import annotations

import torch

from qexport.errors import SpecError

CPU = torch.device("cpu")
_TYPES = ("cpu", "cuda")


def device_of(name: str | None) -> torch.device:
    """The device of that name, the CPU for None. Raises SpecError when there is no such, or none here."""
    if name is None:
        return CPU
    try:
        device = torch.device(name)
        if device.type not in _TYPES:
            raise RuntimeError(f"no device {name}")
    except RuntimeError as error:
        raise SpecError(f"--device {name}", expected="cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpecError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices",
            remedy="leave it out",
        )
    return device
