"""Export files of LLaMA-Factory and SWIFT: each key is honoured or refused, the model lies in the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import qexport
from qexport.errors import AdapterError, OutputExistsError, RecipeError
from qexport.events import Event, Noted
from qexport.graph.build import build
from qexport.graph.foreign import ModelRecipe
from qexport.graph.llamafactory import LLAMA_FACTORY
from qexport.graph.recipe import ExportRecipe, parse_recipe
from qexport.graph.run import ExportResult
from qexport.graph.swift import SWIFT
from qexport.specs import GptqSpec, MergeSpec, spec_of
from tests.conftest import RunCli
from tests.tiny import in_transformers, logits, tiny_adapter, tokens

# examples/merge_lora/qwen3_lora_sft.yaml, with other paths
LORA = """\
### Note: DO NOT use quantized model or quantization_bit when merging lora adapters

### model
model_name_or_path: {model}
adapter_name_or_path: {adapter}
template: qwen3_nothink
trust_remote_code: true

### export
export_dir: {out}
export_size: 5
export_device: cpu  # choices: [cpu, auto]
export_legacy_format: false
"""
# examples/merge_lora/llama3_lora_sft.yaml of 2024
LORA_2024 = LORA.replace("trust_remote_code: true", "finetuning_type: lora").replace("size: 5", "size: 2")
# examples/merge_lora/qwen3_full_sft.yaml
FULL = LORA.replace("adapter_name_or_path: {adapter}\n", "")
# examples/merge_lora/qwen3_gptq.yaml
GPTQ = FULL.replace(
    "export_size", "export_quantization_bit: 4\nexport_quantization_dataset: {text}\nexport_size"
)
FEW = "export_quantization_nsamples: 4\nexport_quantization_maxlen: 32\n"

TEMPLATE_NOTE = (
    "template qwen3_nothink: not applied; the tokenizer's own chat template is kept if it has one, "
    "and no Ollama Modelfile is written"
)
CODE_NOTE = (
    "trust_remote_code in a file is no permission: a checkpoint's own code runs only with --trust-remote-code"
)


@pytest.fixture
def places(llama: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    """What the examples' paths become."""
    return {
        "model": llama,
        "adapter": tiny_adapter(tmp_path / "adapter", llama),
        "text": text,
        "out": tmp_path / "saves" / "out",
    }


def parsed(content: str | dict[str, Any]) -> ModelRecipe:
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    recipe = parse_recipe(text, "x.yaml")
    assert isinstance(recipe, ModelRecipe)
    return recipe


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as raised:
        parsed(content)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("x.yaml")
    return message


def factory(places: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """LLaMA-Factory's merge example with some keys changed, and taken out for None."""
    content = {**yaml.safe_load(LORA.format(**places)), **changes}
    return {key: value for key, value in content.items() if value is not None}


def swift(places: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """SWIFT's merge in full with some keys changed, and taken out for None."""
    content = {
        "model": str(places["model"]),
        "adapters": str(places["adapter"]),
        "merge_lora": True,
        "output_dir": str(places["out"]),
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None}


def notes_of(recipe: ModelRecipe) -> tuple[list[str], ExportResult]:
    heard: list[Event] = []
    result = qexport.export(recipe, on_event=heard.append)
    return [event.text for event in heard if isinstance(event, Noted)], result


# --- LLaMA-Factory ---


@pytest.mark.parametrize("example", [LORA, LORA_2024])
def test_a_merge_lies_in_export_dir(example: str, places: dict[str, Any]) -> None:
    recipe = parsed(example.format(**places))
    result = qexport.export(recipe)
    out: Path = places["out"]
    assert result.ran == ("merge",)
    assert result.report is None
    assert [(made.name, made.path) for made in result.models] == [("merge", out)]
    assert result.models[0].size_bytes == sum(
        file.stat().st_size for file in out.iterdir() if file.name not in ("qexport.json", "README.md")
    )
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert not list(out.glob("report.*"))
    # the very same as our own verb makes
    qexport.merge(places["model"], [places["adapter"]], out.parent / "ours")
    ours = load_file(out.parent / "ours" / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert tensor.equal(ours[name]), name
    seen = tokens()
    assert not logits(in_transformers(out), seen).allclose(logits(in_transformers(places["model"]), seen))
    # and it stands the next time
    again = qexport.export(recipe)
    assert (again.ran, again.skipped) == ((), ("merge",))


def test_without_adapters_the_model_is_copied(places: dict[str, Any]) -> None:
    result = qexport.export(parsed(FULL.format(**places)))
    assert result.ran == ("shard",)
    copied = load_file(places["out"] / "model.safetensors")
    for name, tensor in load_file(places["model"] / "model.safetensors").items():
        assert tensor.equal(copied[name]), name
    assert (places["out"] / "tokenizer.json").is_file()


def test_the_gptq_example(places: dict[str, Any]) -> None:
    recipe = parsed(GPTQ.format(**places))
    assert recipe.adapters == ()
    assert recipe.quantize == GptqSpec(
        bits=4, calibration=str(places["text"]), samples=128, sequence_length=1024, max_shard_size="5GB"
    )
    assert [task.name for task in build(recipe).tasks] == ["gptq-4bit"]
    assert [model.out for model in build(recipe).models] == [places["out"]]


def test_merge_and_quantize_at_once(places: dict[str, Any]) -> None:
    adapter = "template:", "adapter_name_or_path: {adapter}\ntemplate:"
    text = (GPTQ + FEW).replace(*adapter).format(**places)
    notes, result = notes_of(parsed(text))
    out, merged = places["out"], places["out"].with_name("out-merged")
    assert result.ran == ("merge", "gptq-4bit")
    assert [model.path for model in result.models] == [merged, out]
    assert notes[:2] == [TEMPLATE_NOTE, CODE_NOTE]
    assert notes[2] == f"the merged model goes to {merged}, it is quantized from there"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"]) == ("gptq", 4)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    options = json.loads((out / "qexport.json").read_text())["recipe"]["options"]
    assert (options["samples"], options["sequence_length"]) == (4, 32)
    # the very same as our own verbs make, one after the other
    spec = GptqSpec(bits=4, calibration=str(places["text"]), samples=4, sequence_length=32)
    qexport.quantize(merged, out.with_name("ours"), spec)
    ours = load_file(out.with_name("ours") / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert tensor.equal(ours[name]), name
    # only what changed is made anew
    again = qexport.export(parsed(text.replace("bit: 4", "bit: 8")))
    assert (again.ran, again.skipped) == (("gptq-8bit",), ("merge",))


def test_every_export_key_reaches_its_spec(places: dict[str, Any]) -> None:
    recipe = parsed(
        factory(
            places,
            adapter_name_or_path="a, b ,c",
            export_size=2,
            export_legacy_format=True,
            infer_dtype="bfloat16",
            rope_scaling="yarn",
        )
    )
    assert recipe.adapters == ("a", "b", "c")
    assert recipe.output == str(places["out"])
    assert recipe.replace
    assert recipe.quantize is None
    assert recipe.merge == MergeSpec(
        max_shard_size="2GB", dtype="bfloat16", legacy_format=True, rope_scaling="yarn", rope_factor=2.0
    )
    assert parsed(factory(places, adapter_name_or_path=["a", "b"])).adapters == ("a", "b")
    assert parsed(factory(places, export_device="auto")).merge.device in ("cpu", "cuda")
    assert recipe.notes[-1] == "rope_scaling yarn: by 2, as LLaMA-Factory's own export does"
    recipe = parsed(factory(places, infer_dtype="auto"))
    assert recipe.merge.dtype is None
    assert recipe.notes[-1] == "infer_dtype auto: each weight keeps its dtype"
    quantized = parsed(
        factory(
            places,
            export_quantization_bit=3,
            export_quantization_dataset=str(places["text"]),
            export_quantization_nsamples=7,
            export_quantization_maxlen=64,
            export_size=3,
            infer_dtype="float16",
        )
    )
    assert quantized.quantize == GptqSpec(
        bits=3, calibration=str(places["text"]), samples=7, sequence_length=64, max_shard_size="3GB"
    )
    assert quantized.merge.dtype == "float16"


def test_adapter_folder_is_within_each_adapter(places: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    places["adapter"].rename(tmp_path / "parent" / "sft")
    content = factory(places, adapter_name_or_path=str(tmp_path / "parent"), adapter_folder="sft")
    assert parsed(content).adapters == (str(tmp_path / "parent" / "sft"),)
    assert "adapter_folder: " in refusal({**content, "adapter_folder": "rm"})


def test_the_base_quantized_on_the_fly(places: dict[str, Any]) -> None:
    content = factory(places, adapter_name_or_path=None, quantization_bit=8, quantization_method="bnb")
    assert parsed(content).quantize == spec_of("bnb", bits=8)
    assert "quantization_bit: it quantizes the base" in refusal(factory(places, quantization_bit=4))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"quant_method": "awq", "quant_bits": 4}, ("awq", "awq", 4)),
        ({"quant_method": "gptq_v2", "quant_bits": 3}, ("gptq", "gptq_v2", 3)),
        ({"quant_method": "hqq", "quant_bits": 2}, ("hqq", "hqq", 2)),
        ({"quant_method": "eetq"}, ("eetq", "eetq", 8)),
        (
            {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "fp4"},
            ("bnb", "bitsandbytes", 4),
        ),
    ],
)
def test_each_method_of_swift_has_its_own_here(
    keys: dict[str, Any], expected: tuple[str, str, int], places: dict[str, Any]
) -> None:
    recipe = parsed(swift(places, **keys, dataset=str(places["text"])))
    spec = recipe.quantize
    assert isinstance(recipe, ModelRecipe)
    assert spec
    assert (spec.method, spec.format, spec.bits) == expected
    assert spec.quant_type == keys.get("bnb_4bit_quant_type", "nf4" if spec.method == "bnb" else None)


def test_keys_without_effect_are_told(places: dict[str, Any]) -> None:
    recipe = parsed(factory(places, flash_attn="fa2", low_cpu_mem_usage=True, trust_remote_code=None))
    assert recipe.notes == (
        TEMPLATE_NOTE,
        "no part of an export with qexport: flash_attn, low_cpu_mem_usage",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"export_dri": "x"}, "unknown key 'export_dri'; did you mean 'export_dir'?"),
        ({"zzz": 1}, "unknown key 'zzz'; known are model_name_or_path, adapter_name_or_path"),
        ({"export_dir": None}, "the key 'export_dir' is missing"),
        ({"model_name_or_path": None}, "the key 'model_name_or_path' is missing"),
        ({"export_size": "5GB"}, "export_size: input should be a valid integer"),
        ({"export_size": 0}, "export_size: input should be greater than or equal to 1, found 0"),
        ({"export_device": "cuda"}, "export_device: input should be 'cpu' or 'auto', found 'cuda'"),
        ({"infer_dtype": "fp16"}, "infer_dtype: input should be 'auto', 'float16'"),
        ({"rope_scaling": "ntk"}, "rope_scaling: input should be 'linear', 'dynamic', 'yarn' or 'llama3'"),
        ({"export_quantization_bit": 5}, "export_quantization_bit: input should be 2, 3, 4 or 8, found 5"),
        ({"export_quantization_bit": 4}, "the key 'export_quantization_dataset' is missing"),
        (
            {"export_quantization_bit": 4, "export_quantization_dataset": "allenai/c4"},
            "export_quantization_dataset: allenai/c4 is no file here, and qexport fetches no data sets",
        ),
        ({"finetuning_type": "full"}, "finetuning_type: full leaves no adapter to merge"),
        ({"stage": "rm"}, "stage: a reward model's value head would be lost"),
        ({"export_hub_model_id": "me/mine"}, "export_hub_model_id: qexport does not push yet"),
        ({"model_revision": "v2"}, "model_revision: qexport takes a model's main revision"),
        ({"cache_dir": "cache"}, "cache_dir: qexport looks where HF_HUB_CACHE says"),
        ({"add_tokens": "<a>,<b>"}, "add_tokens: qexport adds no tokens"),
        ({"quantization_method": "hqq"}, "quantization_method: input should be 'bnb'"),
        ({"cutoff_len": 4096}, "cutoff_len: a length for training"),
        ({"export_dir": "${HOME}/x"}, "export_dir: qexport fills in no ${...}"),
        (
            {"learning_rate": 1e-4, "lora_rank": 8},
            "learning_rate, lora_rank: of training only, take that out",
        ),
        (
            {"adapter_name_or_path": None, "infer_dtype": "float16"},
            "infer_dtype: honoured only when adapters",
        ),
        ({"base": "x"}, "mixes keys of several tools: LLaMA-Factory's (model_name_or_path"),
    ],
)
def test_what_llama_factory_asks_in_vain(
    change: dict[str, Any], message: str, places: dict[str, Any]
) -> None:
    assert message in refusal(factory(places, **change))


def test_values_that_ask_for_nothing_are_no_reason_to_refuse(places: dict[str, Any]) -> None:
    content = factory(places, stage="sft", model_revision="main", hf_hub_token="")
    assert parsed({**content, "export_hub_model_id": None}).notes == (TEMPLATE_NOTE, CODE_NOTE)


def test_a_resized_vocabulary_is_the_adapters_to_tell(places: dict[str, Any]) -> None:
    notes = parsed(factory(places, resize_vocab=True)).notes
    assert notes[-1] == "no part of an export with qexport: resize_vocab"


def test_a_token_is_not_repeated(places: dict[str, Any]) -> None:
    message = refusal(factory(places, hf_hub_token="hf_secret", hf_hub_tokn="hf_secret"))
    assert "hf_hub_token: tokens do not belong in files" in message
    assert "did you mean 'hf_hub_token'?" in message
    assert "secret" not in message


def test_a_training_file_is_told_as_such(places: dict[str, Any]) -> None:
    message = refusal(
        {
            "model_name_or_path": str(places["model"]),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "dataset": "identity",
            "template": "qwen3_nothink",
            "output_dir": "saves/x",
            "per_device_train_batch_size": 1,
            "bf16": True,
        }
    )
    assert "read as LLaMA-Factory's: do_train, lora_target, dataset, output_dir, " in message
    assert message.endswith("and 1 more: of training only, take that out of the export file")


# --- SWIFT ---


def test_swift_merges_into_output_dir_in_shards(places: dict[str, Any]) -> None:
    result = qexport.export(parsed(swift(places, max_shard_size="200KB", template="qwen3")))
    assert result.ran == ("merge",)
    assert len(list(places["out"].glob("model-*.safetensors"))) > 1
    seen = tokens()
    assert not logits(in_transformers(places["out"]), seen).allclose(
        logits(in_transformers(places["model"]), seen)
    )


def test_swift_takes_model_and_output_from_the_checkpoint(places: dict[str, Any]) -> None:
    adapter = places["adapter"]
    # examples/export/merge_lora.sh: nothing but adapters and merge_lora; PEFT names the base
    content = swift(places, model=None, output_dir=None, adapters=[str(adapter)])
    recipe = parsed(content)
    assert recipe.base == str(places["model"])
    assert recipe.notes[0] == (
        f"model {places['model']}: named by {adapter / 'adapter_config.json'}, of which no more is read"
    )
    assert recipe.output == "model-merged"
    # SWIFT's own record comes first, and makes the checkpoint the place that the output is named after
    (adapter / "args.json").write_text(json.dumps({"model": "org/name", "quant_method": "bnb"}))
    recipe = parsed(content)
    assert (recipe.base, recipe.quantize) == ("org/name", None)
    assert recipe.output == f"{adapter}-merged"
    assert (
        recipe.notes[1] == "model org/name: qexport looks it up on the Hugging Face Hub, never on ModelScope"
    )
    assert len(parsed({**content, "use_hf": True}).notes) == 1
    assert "the key 'model' is missing" in refusal({**content, "load_args": False})
    assert "the key 'model' is missing" in refusal({**content, "adapters": "org/adapter"})


def test_every_swift_key_reaches_its_spec(places: dict[str, Any]) -> None:
    # examples/export/quantize/gptq.sh, with a local file as its data set
    content = {
        "model": str(places["model"]),
        "dataset": [str(places["text"])],
        "quant_n_samples": 9,
        "quant_batch_size": 1,
        "max_length": 2048,
        "quant_method": "gptq",
        "quant_bits": 4,
        "output_dir": "Qwen2.5-1.5B-Instruct-GPTQ-Int4",
    }
    recipe = parsed(content)
    expected = {"calibration": str(places["text"]), "samples": 9, "sequence_length": 2048, "bits": 4}
    assert recipe.quantize == GptqSpec.model_validate({**expected, "seed": 42})
    assert recipe.output == "Qwen2.5-1.5B-Instruct-GPTQ-Int4"
    assert recipe.notes == ("no part of an export with qexport: quant_batch_size",)
    assert not recipe.replace
    recipe = parsed({**content, "group_size": 64, "seed": 1, "data_seed": 2, "max_shard_size": "2GB"})
    assert recipe.quantize == GptqSpec.model_validate(
        {**expected, "group_size": 64, "seed": 2, "max_shard_size": "2GB"}
    )
    del content["output_dir"]
    assert parsed(content).output == f"{places['model'].name}-gptq-int4"
    # examples/export/quantize/bnb.sh
    content = {
        "model": "Qwen/Qwen2.5-1.5B-Instruct",
        "use_hf": True,
        "quant_method": "bnb",
        "quant_bits": 4,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "output_dir": "Qwen2.5-1.5B-Instruct-BNB-NF4",
    }
    assert parsed(content).quantize == spec_of("bnb", bits=4, quant_type="nf4", double_quant=True)
    rope = {"rope_scaling": '{"type": "yarn", "factor": 4}'}
    recipe = parsed(
        swift(
            places,
            torch_dtype="float16",
            safe_serialization=False,
            device_map="cuda:1",
            exist_ok=True,
            **rope,
        )
    )
    assert recipe.merge == MergeSpec(
        dtype="float16", legacy_format=True, device="cuda:1", rope_scaling="yarn", rope_factor=4.0
    )
    assert recipe.replace


def test_swift_replaces_with_exist_ok_only(places: dict[str, Any]) -> None:
    content = swift(places)
    qexport.export(parsed(content))
    assert qexport.export(parsed(content)).skipped == ("merge",)
    content["max_shard_size"] = "200KB"
    with pytest.raises(OutputExistsError, match=r"made of other inputs or options; .*exist_ok: true"):
        qexport.export(parsed(content))
    assert (places["out"] / "model.safetensors").is_file()
    notes, result = notes_of(parsed({**content, "exist_ok": True}))
    assert result.ran == ("merge",)
    assert notes[0] == "exist_ok: only a model that qexport made is replaced"
    assert not (places["out"] / "model.safetensors").exists()


def test_swift_quantizes_what_it_merged(places: dict[str, Any]) -> None:
    result = qexport.export(parsed(swift(places, quant_method="bnb", quant_bits=8)))
    assert result.ran == ("merge", "bnb-8bit")
    config = json.loads((places["out"] / "config.json").read_text())
    assert config["quantization_config"]["load_in_8bit"] is True
    recipe = parsed(swift(places, quant_method="bnb", quant_bits=8, device_map="cuda"))
    assert recipe.notes[0] == "only the merge runs on cuda: qexport quantizes on the CPU"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_lroa": True}, "unknown key 'merge_lroa'; did you mean 'merge_lora'?"),
        ({"merge_lora": False}, "adapters are named, but merge_lora is not true; write merge_lora: true"),
        ({"adapters": None}, "merge_lora: there are no adapters to merge"),
        ({"adapters": None, "merge_lora": None, "output_dir": None}, "the key 'output_dir' is missing"),
        ({"quant_bits": 4}, "the key 'quant_method' is missing"),
        ({"quant_method": "quanto", "quant_bits": 4}, "quant_method: quanto is not there yet; gptq"),
        ({"quant_method": "fp8"}, "quant_method: fp8 is not there yet"),
        ({"quant_method": "gtpq"}, "quant_method: input should be 'awq'"),
        ({"quant_method": "bnb", "quant_bits": 3}, "quant_bits: bnb has 4 or 8, found 3"),
        ({"quant_method": "gptq"}, "quant_bits: gptq has 2, 3, 4 or 8, found None"),
        ({"quant_method": "gptq", "quant_bits": 4}, "dataset: gptq calibrates on files, found none"),
        (
            {"quant_method": "gptq", "quant_bits": 4, "dataset": "AI-ModelScope/alpaca-gpt4-data-en#500"},
            "take '#' and the number away; quant_n_samples",
        ),
        ({"bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type: input should be 'nf4' or 'fp4'"),
        ({"rope_scaling": "yarn"}, 'rope_scaling: write it as {"rope_type": "yarn", "factor": 2.0}'),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
            "rope_scaling.factor: input should be greater",
        ),
        ({"device_map": "meta"}, "device_map: string should match pattern"),
        ({"max_shard_size": "5 elephants"}, "max_shard_size: '5 elephants' is not a size"),
        ({"push_to_hub": True}, "push_to_hub: qexport does not push yet"),
        ({"hub_token": "secret"}, "hub_token: tokens do not belong in files"),
        ({"to_ollama": True}, "to_ollama: qexport cannot do that yet"),
        ({"ckpt_dir": "x"}, "ckpt_dir: that is its name of SWIFT 2: write adapters instead"),
        ({"num_train_epochs": 3}, "num_train_epochs: of training only"),
        ({"external_plugins": ["x.py"]}, "external_plugins: qexport runs no code of other tools"),
        (
            {"adapters": None, "merge_lora": None, "safe_serialization": False},
            "safe_serialization: honoured only when adapters are merged",
        ),
        (
            {"quant_method": "bnb", "quant_bits": 4, "safe_serialization": False},
            "safe_serialization: a quantized model is written as safetensors only",
        ),
        ({"export_dir": "x"}, "mixes keys of several tools: SWIFT's (model, merge_lora) and LLaMA-Factory's"),
    ],
)
def test_what_swift_asks_in_vain(change: dict[str, Any], message: str, places: dict[str, Any]) -> None:
    assert message in refusal(swift(places, **change))


# --- all of them ---


def test_a_key_is_handled_in_one_way() -> None:
    for dialect in (LLAMA_FACTORY, SWIFT):
        honoured, refused = set(dialect.file.model_fields), set(dialect.refused)
        assert not honoured & refused
        assert not (honoured | refused) & dialect.idle
        assert set(dialect.merge_keys) <= set(MergeSpec.model_fields)
        assert set(dialect.merge_keys.values()) <= honoured


def test_our_own_files_stay_ours() -> None:
    assert isinstance(parse_recipe("{base: a, adapters: b, output: c}", "x.yaml"), ExportRecipe)
    for text in ("{adapters: b}", "{zzz: 1}"):
        with pytest.raises(RecipeError, match="the key 'base' is missing"):
            parse_recipe(text, "x.yaml")


def test_bad_inputs_are_found_before_anything_is_written(places: dict[str, Any]) -> None:
    with pytest.raises(AdapterError):
        qexport.export(parsed(factory(places, adapter_name_or_path=str(places["model"]))))
    with pytest.raises(OutputExistsError, match="is or holds the input"):
        qexport.export(parsed(factory(places, export_dir=str(places["model"]))))
    places["out"].mkdir(parents=True)
    (places["out"] / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="is there already and was not made by qexport"):
        qexport.export(parsed(factory(places)))
    assert [path.name for path in places["out"].parent.rglob("*")] == ["out", "notes.txt"]


def test_paths_are_relative_to_where_qexport_is_called(
    places: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = factory(places, adapter_name_or_path="./adapter", export_dir="saves/here/")
    qexport.export(parsed(content))
    assert (tmp_path / "saves" / "here" / "config.json").is_file()


def test_cli(places: dict[str, Any], tmp_path: Path, cli: RunCli) -> None:
    recipe = tmp_path / "x.yaml"
    recipe.write_text(LORA.format(**places))
    code, stdout, stderr = cli("export", recipe, "--dry-run")
    assert code == 0
    size = qexport.open_checkpoint(places["model"]).weights_size
    assert stdout == f"task\tstate\tsize\toutput\nmerge\truns\t{size / 1000:.0f} KB\t{places['out']}\n"
    assert stderr.startswith(f"note: {TEMPLATE_NOTE}\nnote: {CODE_NOTE}\n")
    assert stderr.endswith("would be written\n")
    assert not places["out"].parent.exists()
    code, stdout, stderr = cli("export", recipe, "--dry-run", "--json")
    assert json.loads(stdout)["tasks"] == [
        {"task": "merge", "needs": [], "runs": True, "size_bytes": size, "output": str(places["out"])}
    ]
    code, stdout, stderr = cli("export", recipe)
    assert code == 0
    assert stdout.splitlines()[0] == "model\tsize\toutput"
    assert stdout.splitlines()[1].startswith("merge\t")
    assert stdout.splitlines()[1].endswith(f"\t{places['out']}")
    assert "1/1 merge\n" in stderr
    code, stdout, stderr = cli("export", recipe, "--json")
    result = json.loads(stdout)
    assert (result["ran"], result["skipped"], result["report"]) == ([], ["merge"], None)
    assert [model["path"] for model in result["models"]] == [str(places["out"])]
    assert "1/1 merge: stands\n" in stderr
    recipe.write_text(LORA.format(**places) + "export_hub_model_id: me/mine\n")
    code, stdout, stderr = cli("export", recipe)
    assert (code, stdout) == (2, "")
    assert stderr == (
        f"error: {recipe} is read as LLaMA-Factory's: export_hub_model_id: "
        "qexport does not push yet: run `hf upload` on the result\n"
    )
