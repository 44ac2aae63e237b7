"""What a model card can say of an output, gathered from its directory and from what it was made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.checkpoint.checkpoint import CONFIG_FILE, read_json
from qexport.checkpoint.disk import is_file
from qexport.checkpoint.gguf_files import gguf_files
from qexport.checkpoint.manifest import read_manifest
from qexport.errors import NotACheckpointError
from qexport.report.card_origins import Origin, mapping, origins_of, walk
from qexport.report.licences import licence_file, licence_of
from qexport.report.local_paths import without_local_paths
from qexport.verification.runtimes.support import GGUF, PLAIN

LORA = "gguf-lora"  # a LoRA adapter as a GGUF file
PLOT_FILE = "loss_vs_bits.png"
_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "qmodel.pt")
_TASKS = (  # the end of a class's name -> the Hub's task
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForImageTextToText", "image-text-to-text"),
)


@dataclass(frozen=True)
class WeightsFile:
    """A file of the weights: bytes, hash where qexport.json has it; of GGUF the type and the Modelfile.

    Parts of a GGUF model but the first are not `loaded` by name.
    """

    name: str
    size: int
    blake3: str | None = None
    type: str | None = None
    bits_per_weight: float | None = None
    modelfile: str | None = None
    loaded: bool = True


@dataclass(frozen=True)
class CardFacts:
    """What is known of an output.

    `form` is a format's name, PLAIN, GGUF or LORA, or what else the config calls its quantization; `bits`
    those of a code, None where there are none or several; `task` the Hub's pipeline_tag; `chat` whether there
    is a chat template; `own_code` whether the model brings Python code; `manifest` is qexport.json. Neither
    this nor a GGUF's `header` tells where anything lay on a disk; `config` may.
    """

    directory: Path
    form: str
    model_type: str
    config: Mapping[str, Any]
    bits: float | None
    task: str | None
    chat: bool
    own_code: bool
    files: tuple[WeightsFile, ...]
    origins: tuple[Origin, ...]
    licence: str | None
    licence_file: str | None
    header: Mapping[str, Any]
    manifest: Mapping[str, Any]
    plot: bool

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The config's settings of its quantization; empty where it is not quantized."""
        return quantization_of(self.config)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe in qexport.json."""
        return mapping(self.manifest.get("recipe"))

    @property
    def figures(self) -> Mapping[str, Any]:
        """The figures in qexport.json."""
        return mapping(self.manifest.get("figures"))

    @property
    def adapters(self) -> tuple[Origin, ...]:
        """The adapters in the weights, those of a model that this one was made of first."""
        return tuple(origin for origin in walk(self.origins) if origin.adapter)

    @property
    def models(self) -> tuple[Origin, ...]:
        """The models behind the weights, the nearest first."""
        return tuple(origin for origin in walk(self.origins) if not origin.adapter)


def card_facts(directory: Path) -> CardFacts:
    """Reads what lies in an output: config.json or the headers of GGUF files, qexport.json, licence, sources.

    A source that is gone counts by its name alone. Raises NotACheckpointError for a directory without a
    model or GGUF adapter, CorruptFileError for JSON or GGUF files that are none, StorageError.
    """
    manifest = read_manifest(directory)
    config = read_json(directory / CONFIG_FILE) if is_file(directory / CONFIG_FILE) else {}
    ggufs = gguf_files(directory) if not config else []
    if not config and not ggufs:
        raise NotACheckpointError(
            f"{directory} holds no model", expected="config.json beside weights, or .gguf files"
        )
    headers = {file: _header(file) for file in ggufs}
    models = [file for file in ggufs if headers[file].get("general.type") != "adapter"]
    ggufs = models or ggufs  # an adapter beside its model is not what the card is about
    header = headers[ggufs[0]] if ggufs else {}
    form = _form(directory, config) if config else LORA if header.get("general.type") == "adapter" else GGUF
    records, figures = mapping(manifest.get("files")), mapping(manifest.get("figures"))
    return CardFacts(
        directory=directory,
        form=form,
        model_type=str(config.get("model_type") or header.get("general.architecture") or ""),
        config=config,
        bits=_mean_bits(figures) or _bits(quantization_of(config)) if quantization_of(config) else None,
        task=_task(config) if config else "text-generation",
        chat=_has_chat_template(directory, header),
        own_code="auto_map" in config,
        files=tuple(_weights_files(directory, ggufs, records, mapping(figures.get("files")))),
        origins=origins_of(directory, figures, header),
        licence=licence_of(directory),
        licence_file=licence_file(directory),
        header=without_local_paths(header),
        manifest=without_local_paths(manifest),
        plot=is_file(directory / PLOT_FILE),
    )


def _header(file: Path) -> dict[str, Any]:
    """The settings of a GGUF file without its vocabulary."""
    from qexport.formats.gguf.container import read_header

    found = read_header(file).plain()
    return {key: value for key, value in found.items() if not isinstance(value, list) or len(value) < 1000}


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's settings of the quantization; empty where there are none."""
    return mapping(config.get("quantization_config", config.get("quantization")))


def _form(directory: Path, config: Mapping[str, Any]) -> str:
    settings = quantization_of(config)
    if not settings:
        return PLAIN
    method = str(settings.get("quant_method") or ("mlx" if "group_size" in settings else "unknown"))
    if method == "gptq" and settings.get("checkpoint_format") == "gptq_v2":
        return "gptq_v2"
    if method == "hqq" and not is_file(directory / "qmodel.pt"):
        return "hqq-safetensors"
    return method


def _mean_bits(figures: Mapping[str, Any]) -> float | None:
    """Of layers that differ the mean, as the output's own figures tell it."""
    bits = figures.get("bits")
    return round(bits, 2) if isinstance(bits, (int, float)) and 0 < bits <= 8 else None


def _bits(settings: Mapping[str, Any]) -> int | None:
    """The bits of a code, wherever the format tells them; of several groups of layers the first's."""
    for name, value in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if settings.get(name) is True:
            return value
    if settings.get("weights") == "int8":
        return 8
    for key in ("bits", "w_bit", "nbits", "num_bits"):
        if isinstance(bits := settings.get(key), int) and not isinstance(bits, bool):
            return bits
    inner = (_bits(value) for value in settings.values() if isinstance(value, dict))
    return next((bits for bits in inner if bits is not None), None)


def _task(config: Mapping[str, Any]) -> str | None:
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    return next((task for end, task in _TASKS if name.endswith(end)), None)


def _has_chat_template(directory: Path, header: Mapping[str, Any]) -> bool:
    if header:
        return bool(header.get("tokenizer.chat_template"))
    if any(is_file(directory / name) for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = directory / "tokenizer_config.json"
    return is_file(settings) and bool(read_json(settings).get("chat_template"))


def _weights_files(
    directory: Path, ggufs: Sequence[Path], records: Mapping[str, Any], told: Mapping[str, Any]
) -> Iterator[WeightsFile]:
    if not ggufs:
        for file in sorted(file for pattern in _WEIGHTS for file in directory.glob(pattern)):
            yield WeightsFile(file.name, file.stat().st_size, mapping(records.get(file.name)).get("blake3"))
        return
    homes = {
        line.removeprefix("FROM ").strip().strip('"').removeprefix("./"): file.name
        for file in sorted(directory.glob("Modelfile*"))
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith("FROM ")
    }
    for file in ggufs:
        part = _PART.search(file.name)
        figures = mapping(told.get(file.name))
        yield WeightsFile(
            file.name,
            file.stat().st_size,
            mapping(records.get(file.name)).get("blake3"),
            type=figures.get("type"),
            bits_per_weight=figures.get("bits_per_weight"),
            modelfile=homes.get(file.name),
            loaded=part is None or int(part[1]) == 1,
        )
