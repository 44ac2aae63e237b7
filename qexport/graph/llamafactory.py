"""LLaMA-Factory's export files: `llamafactory-cli export x.yaml`, as `qexport export x.yaml`.

The keys are those of its `hparams` (0.9.5 of August 2026, and the older names that its examples had).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from qexport.errors import RecipeError
from qexport.graph.foreign import (
    GIGABYTE,
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
from qexport.specs import AnyQuantizeSpec, GptqSpec, MergeSpec, spec_of

_ROPE_FACTOR = 2.0  # what LLaMA-Factory itself stretches by when it does not train


class LlamaFactoryFile(ForeignFile):
    """The keys that are honoured."""

    model_name_or_path: str = Field(min_length=1)
    adapter_name_or_path: tuple[str, ...] = ()
    adapter_folder: str | None = None
    finetuning_type: Literal["lora", "oft", "freeze", "full"] = "lora"
    template: str | None = None
    trust_remote_code: bool = False
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = None
    quantization_bit: Literal[4, 8] | None = None
    quantization_method: Literal["bnb", "bitsandbytes"] = "bnb"  # it was written out before 2025
    quantization_type: Literal["nf4"] = "nf4"
    double_quantization: Literal[True] = True
    export_dir: str = Field(min_length=1)
    export_size: int = Field(5, ge=1, le=1_000_000)
    export_device: Literal["cpu", "auto"] = "cpu"
    export_quantization_bit: Literal[2, 3, 4, 8] | None = None
    export_quantization_dataset: str | None = None
    export_quantization_nsamples: int = Field(128, ge=1)
    export_quantization_maxlen: int = Field(1024, ge=8)
    export_legacy_format: bool = False

    @field_validator("adapter_name_or_path", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [part.strip() for part in value.split(",") if part.strip()]

    def recipe(self) -> ModelRecipe:
        """A merge when adapters are named, then the quantization that is asked for; else a copy."""
        if self.adapter_name_or_path and self.finetuning_type != "lora":
            raise RecipeError(
                f"finetuning_type: {self.finetuning_type} leaves no adapter to merge",
                remedy="take out adapter_name_or_path, or write finetuning_type: lora",
            )
        return ModelRecipe(
            base=self.model_name_or_path,
            adapters=self._adapters(),
            output=self.export_dir,
            merge=MergeSpec(
                max_shard_size=self.export_size * GIGABYTE,
                dtype=None if self.infer_dtype == "auto" else self.infer_dtype,
                legacy_format=self.export_legacy_format,
                rope_scaling=self.rope_scaling,
                rope_factor=_ROPE_FACTOR if self.rope_scaling else None,
                device=best_device() if self.export_device == "auto" else "cpu",
            ),
            quantize=self._quantize(),
            notes=self._notes(),
        )

    def _adapters(self) -> tuple[str, ...]:
        if not self.adapter_folder:
            return self.adapter_name_or_path
        folders = [Path(adapter) / self.adapter_folder for adapter in self.adapter_name_or_path]
        if missing := [str(folder) for folder in folders if not folder.is_dir()]:
            raise RecipeError(
                f"adapter_folder: {missing[0]} is no directory",
                expected="a folder within each adapter's directory",
            )
        return tuple(map(str, folders))

    def _quantize(self) -> AnyQuantizeSpec | None:
        size = self.export_size * GIGABYTE
        if self.quantization_bit and (self.adapter_name_or_path or self.export_quantization_bit):
            raise RecipeError(
                "quantization_bit: it quantizes the base before anything else is done with it",
                expected="neither adapters nor export_quantization_bit beside it",
                remedy="take it out; export_quantization_bit quantizes the result",
            )
        if self.quantization_bit:
            return spec_of("bnb", bits=self.quantization_bit, max_shard_size=size)
        if not self.export_quantization_bit:
            return None
        if not self.export_quantization_dataset:
            raise RecipeError(
                "the key 'export_quantization_dataset' is missing",
                expected="with export_quantization_bit, a calibration text",
            )
        return GptqSpec(
            bits=self.export_quantization_bit,
            max_shard_size=size,
            calibration=(calibration_file("export_quantization_dataset", self.export_quantization_dataset),),
            samples=self.export_quantization_nsamples,
            sequence_length=self.export_quantization_maxlen,
        )

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.template:
            notes.append(
                f"template {self.template}: not applied; the tokenizer's own chat template is kept if it has "
                "one, and no Ollama Modelfile is written"
            )
        if self.trust_remote_code:
            notes.append(
                "trust_remote_code in a file is no permission: a checkpoint's own code runs only with "
                "--trust-remote-code"
            )
        if self.rope_scaling:
            notes.append(
                f"rope_scaling {self.rope_scaling}: by {_ROPE_FACTOR:g}, as LLaMA-Factory's own export does"
            )
        if "infer_dtype" in self.model_fields_set and self.infer_dtype == "auto":
            notes.append("infer_dtype auto: each weight keeps its dtype")
        return tuple(notes)


_CACHE = "qexport looks where HF_HUB_CACHE says: set that instead"
_TOKEN_KEYS = ("hf_hub_token", "ms_hub_token", "om_hub_token")
_MODEL_CHANGES = (
    "mixture_of_depths",
    "moe_aux_loss_coef",
    "shift_attn",
    "split_special_tokens",
    "train_from_scratch",
    "use_kt",
    "use_llama_pro",
)
_IDLE = (
    "audio_sampling_rate crop_to_patches default_system disable_gradient_checkpointing do_sample "
    "enable_liger_kernel enable_thinking flash_attn image_do_pan_and_scan image_max_pixels "
    "image_min_pixels infer_backend init_special_tokens length_penalty low_cpu_mem_usage max_length "
    "max_new_tokens num_beams offload_folder preserve_thinking print_param_status "
    "quantization_device_map repetition_penalty resize_vocab skip_special_tokens temperature "
    "tool_format top_k top_p upcast_layernorm upcast_lmhead_output use_audio_in_video use_cache "
    "use_fast_tokenizer use_kv_cache use_reentrant_gc use_unsloth use_unsloth_gc use_v1_kernels "
    "video_fps video_max_pixels video_maxlen video_min_pixels visual_inputs"
)

LLAMA_FACTORY = Dialect(
    tool="LLaMA-Factory",
    file=LlamaFactoryFile,
    refused={
        "export_hub_model_id": Refusal(PUSH),
        **dict.fromkeys(_TOKEN_KEYS, Refusal(LOGIN)),
        "cache_dir": Refusal(_CACHE),
        "model_revision": Refusal(
            "qexport takes a model's main revision: download another, and name its directory",
            (*OFF, "main"),
        ),
        "add_tokens": Refusal(NO_NEW_TOKENS),
        "add_special_tokens": Refusal(NO_NEW_TOKENS),
        "new_special_tokens": Refusal(NO_NEW_TOKENS),  # the name of before 2025
        "new_special_tokens_config": Refusal(NO_NEW_TOKENS),
        "stage": Refusal(
            "a reward model's value head would be lost: merge the others' stages only",
            (*OFF, "pt", "sft", "ppo", "dpo", "kto"),
        ),
        "cutoff_len": Refusal(
            f"a length for training; rope_scaling stretches the context by {_ROPE_FACTOR:g}: take it out"
        ),
        **dict.fromkeys(_MODEL_CHANGES, Refusal(NOT_YET)),
    },
    idle=frozenset(_IDLE.split()),
    training=TRAINER_KEYS
    + r"|(apollo|asft|badam|dataset|dpo|eaft|fp8|freeze|galore|hyper_parallel|kt|kto|lora|loraplus|"
    r"megatron_bridge|oft|pissa|ppo|pref|profiler|ray|ref_model|reward_model|sglang|simpo|swanlab|vllm)_\w+|"
    r"additional_target|buffer_size|compute_accuracy|create_new_adapter|data_shared_file_system|dataset|"
    r"disable_shuffling|early_stopping_steps|enable_torch_profiler|fp8|"
    r"ignore_pad_token_for_loss|interleave_probs|ld_alpha|mask_history|master_\w+|max_samples|"
    r"media_dir|mix_strategy|module_dropout|neat_packing|overwrite_cache|packing|plot_loss|"
    r"predict_with_generate|preprocessing_\w+|profile_modules|pure_bf16|ref_model|reward_model|streaming|"
    r"tokenized_path|train_on_prompt|use_(adam_mini|apollo|badam|dft_loss|asft_loss|eaft_loss|dora|galore|"
    r"hyper_parallel|mca|megatron_bridge|muon|rslora|swanlab)|val_size",
    merge_keys={
        "dtype": "infer_dtype",
        "legacy_format": "export_legacy_format",
        "rope_scaling": "rope_scaling",
    },
)
