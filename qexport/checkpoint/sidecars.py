"""The small files that belong to a model and must not get lost: tokenizer, template, code, licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qexport.checkpoint.disk import read_errors, write_errors

# What is not listed stays behind: other weights, optimizer states, the base's model card.
PATTERNS = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "generation_config.json",
    "quantize_config.json",  # GPTQ's second config; a new quantization writes its own
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
    "LICEN[SC]E*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


# what else a model directory of ours or of transformers holds
_MODEL_FILES = (
    "*.safetensors",
    "*.gguf",
    "Modelfile*",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "qmodel.pt",  # HQQ's
    "config.json",
    "qexport.json",
    "quant_config.json",  # AWQ's second config
    "bits_plan.json",
    "README.md",
    "loss_vs_bits.png",  # the model card's
)


def strangers(directory: Path) -> list[Path]:
    """What lies in a directory that is no part of a model, relative to it and sorted."""
    known = {directory / file for file in sidecar_files(directory)}
    known |= {file for pattern in _MODEL_FILES for file in directory.glob(pattern)}
    found = (file for file in directory.rglob("*") if not file.is_dir() and file not in known)
    return sorted(file.relative_to(directory) for file in found)


def sidecar_files(directory: Path) -> list[Path]:
    """The sidecar files of a model, relative to its directory, sorted."""
    found = {file for pattern in PATTERNS for file in directory.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(directory) for file in found)


def copy_sidecars(sidecars: Mapping[Path, Path], directory: Path, target: Path) -> None:
    """Copies them to their names in `directory`, which is to be `target`. Raises StorageError."""
    for name, source in sidecars.items():
        with read_errors(source):
            content = source.read_bytes()
        with write_errors(target):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)


def sidecars_of(directory: Path) -> dict[Path, Path]:
    """Name in an output -> where it lies, for every sidecar file of a model."""
    return {file: directory / file for file in sidecar_files(directory)}
