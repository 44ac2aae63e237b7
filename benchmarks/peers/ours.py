"""qexport itself, as `qexport quantize` would: options are those of `spec_of`, `method` among them.

The seconds are those of the whole call, with reading, tokenizing and writing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers import Job, Outcome
from benchmarks.peers.common import Clock


def quantize(job: Job) -> Outcome:
    """Every linear layer but the head."""
    import qexport
    from qexport.modeling.calibration import calibration_data
    from qexport.modeling.skeleton import build_skeleton
    from qexport.specs import CalibrationSpec, spec_of

    model = Path(job["model"])
    options: dict[str, Any] = {"group_size": job["group_size"], **job["options"]}
    if "target_size" not in options:
        options["bits"] = job["bits"]
    spec = spec_of(**options)
    # with it transformers is imported, as the peers' are before their clocks
    skeleton = build_skeleton(model)
    if isinstance(spec, CalibrationSpec):
        samples: dict[str, Any] = {
            "calibration": (job["calibration"],),
            "samples": len(job["ids"]),
            "sequence_length": len(job["ids"][0]),
            "seed": job["seed"],
        }
        spec = spec_of(**options, **samples)
        assert isinstance(spec, CalibrationSpec)  # noqa: S101 - it was
        seen = calibration_data(model, spec, skeleton)
        if seen.windows.tolist() != job["ids"]:
            raise AssertionError("qexport would calibrate on other windows than the peers")
    with Clock() as clock:
        result = qexport.quantize(model, job["out"], spec)
    if result.layers_left:
        raise AssertionError(f"{len(result.layers_left)} layers are left in full precision")
    return clock.outcome("qexport")
