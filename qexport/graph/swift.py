"""SWIFT's export arguments as a file: `swift export x.yaml`, as `qexport export x.yaml`.

The keys are those of ms-swift 4's `ExportArguments`, and the names that version 3 had for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from qexport.checkpoint.checkpoint import local_path, read_json
from qexport.checkpoint.disk import exists, is_file
from qexport.errors import RecipeError
from qexport.graph.foreign import (
    LOGIN,
    NO_NEW_TOKENS,
    NOT_YET,
    OFF,
    PUSH,
    TRAINER_KEYS,
    Dialect,
    ForeignFile,
    ModelRecipe,
    Refusal,
    best_device,
    calibration_file,
)
from qexport.specs import AnyQuantizeSpec, CalibrationSpec, MergeSpec, Size, Spec, spec_of

_SEQUENCE_LENGTH: int = CalibrationSpec.model_fields["sequence_length"].default
# where a checkpoint tells its base: SWIFT's own record of the training, and PEFT's
_BASE_KEYS = (("args.json", "model"), ("adapter_config.json", "base_model_name_or_path"))


class Rope(Spec):
    """A rotary scaling with its factor."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float = Field(gt=1)


class SwiftFile(ForeignFile):
    """The keys that are honoured."""

    model: str | None = Field(None, min_length=1)
    adapters: tuple[str, ...] = ()
    load_args: bool = True
    merge_lora: bool = False
    use_hf: bool = False
    template: str | None = None
    torch_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    rope_scaling: Rope | None = None
    device_map: str | None = Field(None, pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    output_dir: str | None = Field(None, min_length=1)
    exist_ok: bool = False
    max_shard_size: Size = 5_000_000_000
    safe_serialization: bool = True
    quant_method: Literal["awq", "bnb", "eetq", "fp8", "gptq", "gptq_v2", "hqq", "quanto"] | None = None
    quant_bits: Literal[1, 2, 3, 4, 8, "float8"] | None = None
    quant_n_samples: int = Field(256, ge=1)
    group_size: int = 128
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    dataset: tuple[str, ...] = ()
    max_length: int = Field(_SEQUENCE_LENGTH, ge=8)
    seed: int = Field(42, ge=0)
    data_seed: int | None = Field(None, ge=0)

    @field_validator("adapters", "dataset", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _rope(cls, value: Any) -> Any:
        """As a mapping, as JSON text of one, or as the type's name alone."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = {"rope_type": value}
        if isinstance(value, Mapping) and "type" in value:
            value = {"rope_type": value["type"], **{k: v for k, v in value.items() if k != "type"}}
        if not isinstance(value, Mapping) or set(value) != set(Rope.model_fields):
            raise ValueError('write it as {"rope_type": "yarn", "factor": 2.0}')
        return value

    def recipe(self) -> ModelRecipe:
        """A merge for `merge_lora`, then the quantization that is asked for; else a copy."""
        if self.adapters and not self.merge_lora:
            raise RecipeError(
                "adapters are named, but merge_lora is not true",
                remedy="write merge_lora: true to merge them",
            )
        if self.merge_lora and not self.adapters:
            raise RecipeError("merge_lora: there are no adapters to merge", remedy="name them under adapters")
        base, notes = self._base()
        if self.template:
            notes.append(f"template {self.template}: the tokenizer keeps its own chat template")
        if self.exist_ok:
            notes.append("exist_ok: only a model that qexport made is replaced")
        if not self.use_hf and local_path(base) is None:
            notes.append(f"model {base}: qexport looks it up on the Hugging Face Hub, never on ModelScope")
        return ModelRecipe(
            base=base,
            adapters=self.adapters,
            output=self._output(base),
            merge=MergeSpec(
                max_shard_size=self.max_shard_size,
                dtype=self.torch_dtype,
                legacy_format=not self.safe_serialization,
                rope_scaling=self.rope_scaling.rope_type if self.rope_scaling else None,
                rope_factor=self.rope_scaling.factor if self.rope_scaling else None,
                device=best_device() if self.device_map == "auto" else self.device_map or "cpu",
            ),
            quantize=self._quantize(),
            replace=self.exist_ok,
            notes=tuple(notes),
        )

    def _base(self) -> tuple[str, list[str]]:
        """The base model, and a note where the file leaves it to the adapter to name it."""
        if self.model:
            return self.model, []
        if self.adapters and self.load_args:
            for name, key in _BASE_KEYS:
                path = Path(self.adapters[0]) / name
                found = read_json(path).get(key) if is_file(path) else None
                if isinstance(found, str) and found:
                    return found, [f"model {found}: named by {path}, of which no more is read"]
        raise RecipeError("the key 'model' is missing", expected="a directory or Hub id of the base model")

    def _output(self, base: str) -> str:
        """`output_dir`, or the name that SWIFT itself would give."""
        if self.output_dir:
            return self.output_dir
        if not self.quant_method and not self.merge_lora:
            raise RecipeError("the key 'output_dir' is missing", expected="the directory to make")
        suffix = f"{self.quant_method}-int{self.quant_bits}" if self.quant_method else "merged"
        trained = [place for place in (*self.adapters, base) if exists(Path(place) / "args.json")]
        origin = trained[0] if trained else Path(base).name
        return f"{os.path.normpath(origin)}-{suffix}"

    def _quantize(self) -> AnyQuantizeSpec | None:
        method, bits = self.quant_method, self.quant_bits
        if method is None:
            if bits is not None:
                raise RecipeError(
                    "the key 'quant_method' is missing", expected=f"with quant_bits, {', '.join(_WIDTHS)}"
                )
            return None
        if method not in _WIDTHS:
            raise RecipeError(f"quant_method: {method} is not there yet", expected=", ".join(_WIDTHS))
        widths = _WIDTHS[method]
        if bits not in widths and not (bits is None and len(widths) == 1):
            raise RecipeError(f"quant_bits: {method} has {_either(widths)}, found {bits}")
        preset, formats = ("gptq", "gptq_v2") if method == "gptq_v2" else (method, None)
        calibration: dict[str, Any] = self._calibration(method) if method in _CALIBRATED else {}
        return spec_of(
            preset,
            format=formats,
            bits=bits or widths[0],
            group_size=self.group_size
            if "group_size" in self.model_fields_set and method in _GROUPED
            else None,
            max_shard_size=self.max_shard_size,
            quant_type=self.bnb_4bit_quant_type if method == "bnb" and bits == _FOUR else None,
            double_quant=self.bnb_4bit_use_double_quant if method == "bnb" and bits == _FOUR else None,
            **calibration,
        )

    def _calibration(self, method: str) -> dict[str, Any]:
        if not self.dataset:
            raise RecipeError(
                f"dataset: {method} calibrates on files, found none",
                remedy="name a .json, .jsonl or .txt file",
            )
        for dataset in self.dataset:
            if "#" in dataset and not is_file(Path(dataset)):
                raise RecipeError(
                    f"dataset: {dataset}: qexport takes no count after the name",
                    remedy="take '#' and the number away; quant_n_samples says how many samples are taken",
                )
        return {
            "calibration": tuple(calibration_file("dataset", dataset) for dataset in self.dataset),
            "samples": self.quant_n_samples,
            "sequence_length": self.max_length,
            "seed": self.seed if self.data_seed is None else self.data_seed,
        }


_WIDTHS: dict[str, tuple[int, ...]] = {
    "gptq": (2, 3, 4, 8),
    "gptq_v2": (2, 3, 4, 8),
    "awq": (4,),
    "bnb": (4, 8),
    "hqq": (1, 2, 3, 4, 8),
    "eetq": (8,),
}
_FOUR = 4  # bits from which bitsandbytes has kinds
_CALIBRATED = ("gptq", "gptq_v2", "awq")
_GROUPED = (*_CALIBRATED, "hqq")


def _either(widths: tuple[int, ...]) -> str:
    """4; 4 or 8; 2, 3 or 4."""
    *most, last = map(str, widths)
    return f"{', '.join(most)} or {last}" if most else last


_OLD = "that is its name of SWIFT 2: write {} instead"
_UNDONE = (
    "hqq_axis to_cached_dataset to_hf to_mcore to_ollama to_peft_format mcore_adapter mcore_adapters "
    "mcore_model num_labels problem_type init_strategy max_model_len model_kwargs save_missing_weights "
    "test_convert_precision thread_count use_ray device_groups load_data_args use_swift_lora"
)
_OTHER_DATA = (
    "cached_dataset cached_val_dataset columns custom_dataset_info interleave_prob model_author model_name "
    "streaming val_dataset"
)
_CODE = "qexport runs no code of other tools: take it out"
_DATA = "qexport calibrates on one local file: put the texts there and name it under dataset"
_IDLE = (
    "add_non_thinking_prefix agent_template attn_impl commit_message dataset_num_proc ddp_backend "
    "ddp_timeout disable_auto_column_mapping disable_ignore_empty_think download_mode "
    "enable_npu_model_patch enable_thinking experts_impl hub_model_id hub_private_repo ignore_args_error "
    "is_binary_loss_scale lazy_tokenize load_from_cache_file logprobs loss_scale max_memory "
    "max_new_tokens max_pixels model_type norm_bbox num_beams packing packing_length packing_num_proc "
    "packing_strategy padding_free padding_side preserve_thinking quant_batch_size ray_exp_name "
    "remove_unused_columns repetition_penalty response_prefix sequence_parallel_size shuffle_buffer_size "
    "split_dataset_ratio stop_words stopping_strategy stream strict structured_outputs_regex system "
    "temperature template_backend template_mode test_convert_dtype top_k top_logprobs top_p train_type "
    "truncation_strategy tuner_backend tuner_type use_chat_template val_dataset_shuffle"
)

SWIFT = Dialect(
    tool="SWIFT",
    file=SwiftFile,
    refused={
        "push_to_hub": Refusal(PUSH),
        "hub_token": Refusal(LOGIN),
        "new_special_tokens": Refusal(NO_NEW_TOKENS),
        "model_revision": Refusal(
            "qexport takes a model's main revision: download another, and name its directory",
            (*OFF, "main", "master"),
        ),
        "task_type": Refusal("qexport exports language models only", (*OFF, "causal_lm")),
        "bnb_4bit_compute_dtype": Refusal("qexport writes the weights' own dtype there: take it out"),
        "bnb_4bit_quant_storage": Refusal("qexport stores the codes as uint8: take it out", (*OFF, "uint8")),
        "dataset_shuffle": Refusal("samples are chosen by seed: take it out", (True,)),
        "ENV": Refusal("set the environment's variables in the shell"),
        **dict.fromkeys(("external_plugins", "custom_register_path", "local_repo_path"), Refusal(_CODE)),
        **dict.fromkeys(_OTHER_DATA.split(), Refusal(_DATA)),
        **dict.fromkeys(_UNDONE.split(), Refusal(NOT_YET)),
        "ckpt_dir": Refusal(_OLD.format("adapters")),
        "model_id_or_path": Refusal(_OLD.format("model")),
        "dtype": Refusal(_OLD.format("torch_dtype")),
        "quant_seqlen": Refusal(_OLD.format("max_length")),
        "quant_output_dir": Refusal(_OLD.format("output_dir")),
        "quant_device_map": Refusal(_OLD.format("device_map")),
    },
    idle=frozenset(_IDLE.split()),
    training=TRAINER_KEYS
    + r"|(freeze|galore|lora|lisa|llamapro|reft|vera|boft|fourierft|rlhf|vllm|sglang|lmdeploy|trainable)_\w+|"
    r"add_version|create_checkpoint_symlink|init_weights|target_(modules|regex|parameters)|modules_to_save|"
    r"use_(dora|galore|rslora|swanlab|liger_kernel)|zero_hpz_partition_size|loss_type|num_generations|beta",
    merge_keys={
        "dtype": "torch_dtype",
        "legacy_format": "safe_serialization",
        "rope_scaling": "rope_scaling",
    },
)
