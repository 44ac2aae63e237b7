"""What goes beside the .gguf files: Modelfiles for Ollama, and the licence's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qexport.checkpoint.checkpoint import read_json
from qexport.checkpoint.disk import is_file
from qexport.checkpoint.sidecars import sidecars_of
from qexport.events import Noted, OnEvent
from qexport.formats.gguf.output import PlannedModel
from qexport.formats.gguf.tokenizer.vocabulary import Vocabulary
from qexport.ollama.modelfile import ChatTokens, ModelfileResult, modelfile

_LICENCES = ("LICEN", "NOTICE", "COPYING", "USE_POLICY")


def licences(path: Path) -> Mapping[Path, Path]:
    """The files about the licence of the model in `path`: name -> where it lies."""
    return {name: file for name, file in sidecars_of(path).items() if name.name.startswith(_LICENCES)}


def modelfiles(
    path: Path, words: Vocabulary, models: Sequence[PlannedModel], on_event: OnEvent
) -> dict[str, str]:
    """A Modelfile for each model, by its name; notes are told once. The model's small files lie in `path`."""
    told: set[str] = set()
    texts: dict[str, str] = {}
    for model in models:
        name = "Modelfile" if len(models) == 1 else f"Modelfile.{model.stem}"
        made = _modelfile(path, words, model, name)
        texts[name] = made.text
        for note in made.notes:
            if note not in told:
                on_event(Noted(f"Modelfile: {note}"))
            told.add(note)
    return texts


def _modelfile(path: Path, words: Vocabulary, model: PlannedModel, name: str) -> ModelfileResult:
    special, metadata = words.special, model.metadata
    generation = path / "generation_config.json"
    config = read_json(generation) if is_file(generation) else {}
    eos = config.get("eos_token_id")
    ends = [special.turn_end, special.message_end, *(eos if isinstance(eos, list) else [eos])]

    def said(token: object) -> str:
        return words.tokens[token] if isinstance(token, int) and 0 <= token < len(words.tokens) else ""

    texts = [file for name, file in licences(path).items() if name.name.startswith(_LICENCES[0])]
    return modelfile(
        [file.name for file in model.files],
        words.chat_template,
        ChatTokens(
            bos=said(special.bos),
            eos=said(special.eos),
            ends=tuple(dict.fromkeys(said(token) for token in ends if token != special.eos and said(token))),
            adds_bos=special.adds_bos,
            others={"pad_token": said(special.padding), "unk_token": said(special.unknown)},
        ),
        config,
        context_length=int(metadata[f"{metadata['general.architecture'].value}.context_length"].value),
        license_text=texts[0].read_text(encoding="utf-8", errors="replace") if texts else None,
        name=name,
    )
