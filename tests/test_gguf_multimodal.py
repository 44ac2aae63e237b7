"""Multimodal Gemma 3 to GGUF: its text model alone, against transformers and the real llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3ForConditionalGeneration

import qexport
from qexport.checkpoint.checkpoint import Checkpoint, PlainDecoder, open_directory
from qexport.errors import CorruptFileError, NotACheckpointError, SpecError, UnsupportedModelError
from qexport.events import Event, Noted
from qexport.formats.gguf.container import read_header
from qexport.formats.gguf.settings import settings
from qexport.formats.gguf.text_model import text_model
from qexport.formats.opening import open_checkpoint
from qexport.merging.gguf_adapter import convert_adapter
from qexport.modeling.skeleton import build_skeleton
from qexport.quantization.imatrix import make_imatrix
from qexport.quantization.quantize import planned_size
from qexport.results import QuantizeResult
from qexport.specs import CalibrationSpec, VerifySpec, spec_of
from tests.test_gguf_architectures import GELU, IDS, read, run_llamacpp
from tests.tiny import edit_json, edit_weights, logits, tiny_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("numba")

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IMAGES: dict[str, Any] = {
    "image_token_index": 310,
    "boi_token_index": 311,
    "eoi_token_index": 312,
    "mm_tokens_per_image": 4,
}
# what published files say, and no more: heads, their size and all else are transformers' defaults
SPARSE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "model_type": "gemma3_text",
    "num_hidden_layers": 2,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 8,
}
# google/gemma-3-4b-it's own (config.json of March 2025)
PUBLISHED = {**SPARSE, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
PUBLISHED["sliding_window"] = 1024
TEXT: dict[str, Any] = {
    **SPARSE,
    "vocab_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "max_position_embeddings": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}
del TEXT["rope_scaling"]
OLDER, NEWER = "language_model.model.", "model.language_model."


def gemma3(directory: Path, text: Mapping[str, Any]) -> Path:
    """A random multimodal model that transformers itself saved, as the published ones lie."""
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**text, "initializer_range": 0.08},
        vision_config=VISION,
        initializer_range=0.08,
        **IMAGES,
    )
    model = Gemma3ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.normal_(std=0.2)
    model.save_pretrained(directory)
    tiny_tokenizer(directory)
    return directory


def renamed(path: Path, out: Path, old: str, new: str) -> Path:
    """A copy with tensors renamed; those that do not begin with `old` go below `model.`, as in memory."""
    shutil.copytree(path, out)
    tensors = load_file(path / "model.safetensors")
    names = {
        name: new + name.removeprefix(old) if name.startswith(old) else f"model.{name}" for name in tensors
    }
    save_file({names[n]: t for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def text_alone(path: Path, out: Path) -> Path:
    """The text model as a directory of its own, made by hand."""
    shutil.copytree(path, out)
    tensors = load_file(path / "model.safetensors")
    kept = {f"model.{n.removeprefix(OLDER)}": t for n, t in tensors.items() if n.startswith(OLDER)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())["text_config"]
    (out / "config.json").write_text(json.dumps({**config, "architectures": ["Gemma3ForCausalLM"]}))
    return out


@dataclass(frozen=True)
class Models:
    """The same text model thrice: as published, as in transformers' memory, and alone."""

    older: Path
    newer: Path
    alone: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    home = tmp_path_factory.mktemp("gemma3")
    older = gemma3(home / "older", TEXT)
    assert any(name.startswith(OLDER) for name in load_file(older / "model.safetensors"))
    newer = renamed(older, home / "newer", OLDER, NEWER)
    return Models(older, newer, text_alone(older, home / "alone"))


def whole(path: Path) -> Any:
    """transformers' multimodal model."""
    kind: Any = AutoModelForImageTextToText
    model, loading = kind.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not any(loading.values()), loading
    return model.eval()


def make(source: Path, out: Path, *, adapters: tuple[Path, ...] = (), **options: Any) -> QuantizeResult:
    return qexport.quantize(source, out, spec_of("gguf", **options), adapters=adapters)


def file_of(result: QuantizeResult, number: int = 0) -> Path:
    return result.path / result.files[number].file


def same_tensors(one: QuantizeResult, other: QuantizeResult) -> bool:
    """Whether all files of two exports hold the same bytes in the same order."""
    pairs = [(file_of(one, number), file_of(other, number)) for number in range(len(one.files))]
    return len(one.files) == len(other.files) and all(contents(a) == contents(b) for a, b in pairs)


def contents(file: Path) -> list[tuple[str, str, bytes]]:
    tensors = gguf.GGUFReader(file).tensors
    return [(tensor.name, tensor.tensor_type.name, tensor.data.tobytes()) for tensor in tensors]


@pytest.mark.slow
def test_llama_cpp_computes_what_the_multimodal_model_does_on_text(models: Models, tmp_path: Path) -> None:
    pytest.importorskip("cyllama")
    given = {**SPARSE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 320}
    sparse = gemma3(tmp_path / "sparse", given)
    edit_json(sparse / "config.json", text_config=given)
    expected: dict[str, torch.Tensor] = {}
    files: dict[tuple[str, str], Path] = {}
    for name, path in (("older", models.older), ("newer", models.newer), ("sparse", sparse)):
        types = "f32,q8_0,q4_k_m" if name == "older" else "f32"
        result = make(path, tmp_path / f"{name}-out", type=types)
        files |= {(name, made.type): file_of(result, number) for number, made in enumerate(result.files)}
        expected[name] = logits(whole(path), IDS)[0]
    found = run_llamacpp(list(files.values()))
    limits = {"f32": GELU, "q8_0": 0.03, "q4_k_m": 0.2}
    off = {
        key: float((found[file] - expected[key[0]]).norm() / expected[key[0]].norm())
        for key, file in files.items()
    }
    assert {key: value for key, value in off.items() if not value < limits[key[1]]} == {}
    assert off["older", "q8_0"] > GELU  # codes, not floats


def test_both_layouts_give_the_files_of_the_text_model_alone(models: Models, tmp_path: Path) -> None:
    told: list[Event] = []
    made = qexport.quantize(
        models.older, tmp_path / "older", spec_of("gguf", type="f32,q4_k_m"), on_event=told.append
    )
    alone = make(models.alone, tmp_path / "alone", type="f32,q4_k_m")
    newer = make(models.newer, tmp_path / "newer", type="f32,q4_k_m")
    assert same_tensors(made, alone)
    assert same_tensors(newer, alone)
    assert {"q4_k", "q6_k"} <= made.files[1].types.keys()
    (note,) = (event.text for event in told if isinstance(event, Noted) and "multimodal" in event.text)
    assert f"{models.older} is a multimodal model (gemma3)" in note
    images = len([n for n in load_file(models.older / "model.safetensors") if not n.startswith(OLDER)])
    assert f"{images} tensors for images" in note
    assert "no mmproj file is made" in note
    metadata, tensors = read(file_of(made))
    ours, theirs = (read(file_of(result))[0] for result in (made, alone))
    names = {"general.name", "general.basename", "general.finetune"}  # they are the directories'
    assert {k: v for k, v in ours.items() if k not in names} == {
        k: v for k, v in theirs.items() if k not in names
    }
    assert metadata["general.architecture"] == "gemma3"
    # a token for every row of the embedding, unused ones at the end, as llama.cpp's converter has it
    assert len(metadata["tokenizer.ggml.tokens"]) == len(tensors["token_embd.weight"]) == 320
    assert metadata["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert "output.weight" not in tensors


def test_calibrated_files_are_those_of_the_text_model_alone(
    models: Models, text: Path, tmp_path: Path
) -> None:
    little: dict[str, Any] = {"calibration": (str(text),), "samples": 4, "sequence_length": 32}
    made, alone = (
        make(path, tmp_path / f"{path.name}-gptq", type="q4_k_m", solver="gptq", **little)
        for path in (models.older, models.alone)
    )
    assert same_tensors(made, alone)
    spec = CalibrationSpec(**little)
    matrix = make_imatrix(models.older, tmp_path / "matrix.gguf", spec)
    assert len(matrix.entries) == 14
    seen = make(models.alone, tmp_path / "seen", type="q4_k_m", solver="importance", **little)
    options: dict[str, Any] = {"type": "q4_k_m", "imatrix": str(tmp_path / "matrix.gguf")}
    assert same_tensors(make(models.newer, tmp_path / "given", **options), seen)


def test_a_model_is_not_sampled_for_its_calibration(models: Models, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"self with a multimodal model"):
        make(models.older, tmp_path / "out", type="q4_k_m", solver="importance", calibration=("self",))
    with pytest.raises(SpecError, match=r"self with a multimodal model"):
        make_imatrix(models.older, tmp_path / "m.gguf", CalibrationSpec(calibration=("self",)))


def test_an_adapter_of_the_text_part_is_merged_in(models: Models, tmp_path: Path) -> None:
    torch.manual_seed(1)
    adapted: Any = get_peft_model(
        whole(models.older), LoraConfig(target_modules=r".*language_model.*(q_proj|down_proj)", lora_alpha=16)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    merged = adapted.merge_and_unload()
    expected = {
        f"blk.{number}.{kind}.weight": block.get_submodule(inner).weight
        for number, block in enumerate(merged.model.language_model.layers)
        for kind, inner in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj"))
    }
    base = read(file_of(make(models.older, tmp_path / "base", type="f32")))[1]
    for path in (models.older, models.newer):
        result = make(path, tmp_path / f"{path.name}-out", adapters=(tmp_path / "adapter",), type="f32")
        held = read(file_of(result))[1]
        assert {name for name, value in held.items() if not torch.equal(value, base[name])} == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(held[name], value.detach(), rtol=1e-5, atol=1e-6)
        # and as an adapter of llama.cpp's own
        lora = tmp_path / f"{path.name}.gguf"
        convert_adapter(tmp_path / "adapter", path, lora)
        pairs, alpha = read(lora)[1], read_header(lora).plain()["adapter.lora.alpha"]
        for name, value in expected.items():
            a, b = pairs[f"{name}.lora_a"], pairs[f"{name}.lora_b"]
            torch.testing.assert_close(
                base[name] + alpha / len(a) * b @ a, value.detach(), rtol=1e-4, atol=1e-5
            )


def test_the_published_config_gets_transformers_defaults(tmp_path: Path) -> None:
    """google/gemma-3-4b-it: the numbers are those of llama.cpp's own file of it."""
    config = {"model_type": "gemma3", "text_config": PUBLISHED, "vision_config": VISION}
    view = text_model(Checkpoint(tmp_path, config, {}, decoder=PlainDecoder({})))
    found = {key.removeprefix("gemma3."): typed.value for key, typed in settings(view.config).items()}
    assert view.config["tie_word_embeddings"] is True
    assert found == {
        "context_length": 131072,
        "embedding_length": 2560,
        "block_count": 34,
        "feed_forward_length": 10240,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.sliding_window": 1024,
        "vocab_size": 262208,
        "rope.dimension_count": 256,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }


def test_the_planned_size_is_that_of_the_text_model(models: Models) -> None:
    sizes = set()
    for path in (models.older, models.newer, models.alone):
        checkpoint = open_directory(path)
        sizes.add(planned_size(checkpoint, build_skeleton(path), spec_of("gguf", type="q4_k_m")))
    assert len(sizes) == 1


def test_an_untied_head_and_other_models(models: Models, tmp_path: Path) -> None:
    path = shutil.copytree(models.older, tmp_path / "untied")
    edit_json(path / "config.json", tie_word_embeddings=False)
    edit_weights(path, **{"language_model.lm_head.weight": torch.ones(320, 256)})
    _, tensors = read(file_of(make(path, tmp_path / "out", type="f32")))
    assert torch.equal(tensors["output.weight"], torch.ones(320, 256))
    checkpoint = open_checkpoint(models.alone)
    assert text_model(checkpoint) is checkpoint


def test_what_is_no_such_model_is_refused(models: Models, tmp_path: Path) -> None:
    path = shutil.copytree(models.older, tmp_path / "model")
    edit_weights(path, **{"audio_tower.conv.weight": torch.zeros(4)})
    with pytest.raises(UnsupportedModelError, match=r"audio_tower\.conv\.weight"):
        make(path, tmp_path / "out", type="f32")
    edit_weights(path, **{"audio_tower.conv.weight": None, f"{NEWER}norm.weight": torch.zeros(256)})
    with pytest.raises(CorruptFileError, match=rf"model\.norm\.weight .* twice: {OLDER}norm.weight, "):
        make(path, tmp_path / "out", type="f32")
    edit_weights(path, **{f"{NEWER}norm.weight": None, f"{OLDER}norm.weight": None})
    with pytest.raises(UnsupportedModelError, match=r"missing \(model\.norm\.weight\)"):
        make(path, tmp_path / "out", type="f32")
    edit_json(path / "config.json", text_config=["gemma3_text"])
    with pytest.raises(NotACheckpointError, match=r"text_config that is list"):
        make(path, tmp_path / "out", type="f32")


def test_its_files_are_measured_against_it(models: Models, text: Path, tmp_path: Path) -> None:
    made = qexport.quantize(models.older, tmp_path / "out", spec_of("gguf", type="q8_0"))
    spec = VerifySpec(text=str(text), window=32, max_documents=12)
    found = qexport.verify(models.older, made.path / made.files[0].file, spec).candidate.divergence
    assert found is not None
    assert 0 < found.mean < 0.05
    assert qexport.evaluate(models.older, spec).perplexity == qexport.evaluate(models.newer, spec).perplexity
