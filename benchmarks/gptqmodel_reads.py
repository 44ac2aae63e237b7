"""Does GPTQModel, auto-gptq's living successor, read our GPTQ files? And does it compute what we decode?

    python benchmarks/gptqmodel_reads.py [MODEL] [--venv DIR]

Makes a virtual environment of its own for GPTQModel 7.7 (with torch's CPU build where one is found; the
first load compiles a kernel, which needs g++), quantizes MODEL (default: the embedded model with its
adapter) by gptq to 2, 3, 4 and 8 bits, loads each through transformers on the CPU, and compares the logits
with those of the weights that qexport decodes. Prints one line a width; exits with 1 when any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import qexport
from qexport.packaged import embedded_adapter, embedded_base
from qexport.specs import GptqSpec

INSTALLS: tuple[tuple[list[str], list[str]], ...] = (
    (["torch==2.13.0"], []),
    (
        [
            "transformers==5.23.0",
            "accelerate",
            "optimum==2.3.0",
            "setuptools",
            "wheel",
            "ninja",
            "numpy",
            "pillow",
            "requests",
            "datasets",
        ],
        [],
    ),
    (["gptqmodel==7.7.0"], ["--no-deps", "--no-build-isolation"]),
    (
        [
            "tokenicer",
            "logbar",
            "device-smi",
            "defuser",
            "pypcre",
            "threadpoolctl",
            "dill",
            "torchao==0.18.0",
        ],
        ["--no-deps"],
    ),
)

# Runs inside GPTQModel's environment: no qexport there. argv: model, file of token ids, file for logits.
LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], device_map="cpu", dtype=torch.float32, output_loading_info=True
)
kinds = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "qweight")})
with torch.no_grad():
    logits = model(torch.tensor(json.load(open(sys.argv[2])))).logits.float()
torch.save(logits, sys.argv[3])
print(json.dumps({"layers": kinds, "keys": {k: len(v) for k, v in info.items()}}))
"""


def environment(directory: Path) -> Path:
    """The Python of an environment with GPTQModel, made when it is not there yet."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        for packages, options in INSTALLS:
            command = [str(python), "-m", "pip", "install", "--quiet", *options, *packages]
            subprocess.run(command, check=True, env={**os.environ, "BUILD_CUDA_EXT": "0"})
    return python


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache" / "qexport" / "gptqmodel-7.7")
    options = parser.parse_args()
    python = environment(options.venv)

    import torch

    from qexport.modeling.skeleton import build_skeleton
    from qexport.modeling.whole import load_whole

    failed = False
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = options.model
        if model is None:
            model = work / "merged"
            qexport.merge(embedded_base(), [embedded_adapter()], model)
        ids = torch.randint(3, 90, (2, 32), generator=torch.Generator().manual_seed(0))
        (work / "ids.json").write_text(json.dumps(ids.tolist()))
        for bits in (2, 3, 4, 8):
            out = work / f"gptq-{bits}"
            spec = GptqSpec.model_validate({"bits": bits, "samples": 16, "sequence_length": 128})
            qexport.quantize(model, out, spec)
            logits = work / f"{bits}.pt"
            ran = subprocess.run(
                [str(python), "-c", LOAD, str(out), str(work / "ids.json"), str(logits)],
                capture_output=True,
                text=True,
                env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": ""},
            )
            if ran.returncode:
                print(f"{bits} bits: GPTQModel does not load it:\n{ran.stderr[-2000:]}")
                failed = True
                continue
            theirs = torch.load(logits, weights_only=True)
            with torch.no_grad():
                ours = load_whole(build_skeleton(out), qexport.open_checkpoint(out))(ids).logits
            error = float((theirs - ours).norm() / ours.norm())
            top = float((theirs.argmax(-1) == ours.argmax(-1)).float().mean())
            failed |= not error < 0.01
            print(
                f"{bits} bits: relative difference of the logits {error:.2e}, same top token "
                f"{100 * top:.1f} %, {ran.stdout.strip().splitlines()[-1]}"
            )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
