"""Other tools' export files: each key is honoured, told to be without effect, or refused by its name."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from qexport.checkpoint.disk import is_file
from qexport.errors import RecipeError, first_of
from qexport.graph.keys import unknown_key, validated
from qexport.specs import MergeSpec, QuantizeSpec, Spec

GIGABYTE = 10**9
OFF: tuple[object, ...] = (False, "", "false", "False", "None", [], {})
NOT_YET = "qexport cannot do that yet"
PUSH = "qexport does not push yet: run `hf upload` on the result"
LOGIN = "tokens do not belong in files: qexport takes HF_TOKEN from the environment"
NO_NEW_TOKENS = "qexport adds no tokens: export the model with the tokenizer that it was trained with"
# what transformers' Trainer takes, and so every tool on top of it
TRAINER_KEYS = (
    r"accelerator_config|activation_checkpointing\w*|adam_\w+|auto_find_batch_size|"
    r"average_tokens_across_devices|batch_eval_metrics|bf16\w*|data_seed|dataloader_\w+|ddp_\w+|debug|"
    r"deepspeed|disable_tqdm|do_\w+|enable_jit_checkpoint|eval_\w+|fp16\w*|fsdp\w*|full_determinism|"
    r"gradient_\w+|greater_is_better|group_by_length|hub_\w+|ignore_data_skip|include_\w+|label_\w+|"
    r"learning_rate|length_column_name|liger_kernel_config|load_best_model_at_end|local_rank|log_\w+|"
    r"logging_\w+|lr_\w+|max_grad_norm|max_steps|metric_for_best_model|neftune_\w+|num_train_epochs|"
    r"optim\w*|output_dir|overwrite_output_dir|parallelism_config|per_(device|gpu)_\w+|"
    r"prediction_loss_only|project|push_to_hub|remove_unused_columns|report_to|restore_callback_\w+|"
    r"resume_from_checkpoint|run_name|save_\w+|seed|skip_memory_metrics|tf32|torch_compile\w*|"
    r"torch_empty_cache_steps|trackio_\w+|train_sampling_strategy|use_cpu|use_liger_kernel|warmup_\w+|"
    r"weight_decay"
)
_DATA_SETS = (".json", ".jsonl", ".txt")


class ModelRecipe(Spec):
    """One model, made straight into `output`: what other tools' export files ask for."""

    base: str = Field(description="directory or Hub id of the base model")
    adapters: tuple[str, ...] = Field((), description="adapters to merge, one after the other")
    output: str = Field(description="the model's directory")
    merge: MergeSpec = Field(MergeSpec(), description="how to merge; a plain copy takes its shard size")
    quantize: QuantizeSpec | None = Field(None, description="how to quantize, if at all")
    replace: bool = Field(True, description="replace a model of qexport's that is there")
    notes: tuple[str, ...] = Field((), description="what the user should know of the file's keys")


class ForeignFile(Spec, ABC):
    """The keys of a tool's export file that are honoured, under the tool's own names."""

    # pydantic of before 2.10 keeps names such as model_type for itself
    model_config = ConfigDict(protected_namespaces=())

    @abstractmethod
    def recipe(self) -> ModelRecipe:
        """What the file asks for, in qexport's words. Raises RecipeError for what cannot be had."""


@dataclass(frozen=True)
class Refusal:
    """Why a key is refused and what to do instead, and the values that ask for nothing."""

    why: str
    harmless: tuple[object, ...] = OFF

    def of(self, value: object) -> bool:
        """Whether a key with this value is refused."""
        # True == 1 and False == 0 in Python, but not for whoever wrote the file
        return not any(type(value) is type(one) and value == one for one in self.harmless)


@dataclass(frozen=True)
class Dialect:
    """How a tool's export file is read."""

    tool: str
    file: type[ForeignFile]
    refused: Mapping[str, Refusal]
    idle: frozenset[str]  # how the tool itself loads and computes: no byte of the result depends on it
    training: str  # a pattern of the keys that belong to training
    merge_keys: Mapping[str, str] = field(default_factory=dict)  # MergeSpec's fields -> the tool's keys

    def knows(self, key: str) -> bool:
        """Whether the tool has such a key."""
        return self._names(key) or self.trains(key)

    def trains(self, key: str) -> bool:
        """Whether the key belongs to training, and to nothing else."""
        return not self._names(key) and re.fullmatch(self.training, key) is not None

    def _names(self, key: str) -> bool:
        return key in self.file.model_fields or key in self.refused or key in self.idle

    def problem(self, key: str, value: object) -> str:
        """Why a key is refused; empty when it is not. The value is not repeated: it may be a token."""
        if key in self.refused:
            refusal = self.refused[key]
            return f"{key}: {refusal.why}" if refusal.of(value) else ""
        if isinstance(value, str) and "${" in value:
            return f"{key}: qexport fills in no ${{...}}: write the value out"
        if self.knows(key):
            return ""
        return unknown_key(key, self.file.model_fields, [*self.refused, *sorted(self.idle)])


def read_foreign(dialect: Dialect, content: Mapping[Any, Any], name: str) -> ModelRecipe:
    """A tool's export file as a recipe. Raises RecipeError that names each key that cannot be honoured."""
    given = {str(key): value for key, value in content.items() if value is not None}
    problems = [problem for key, value in given.items() if (problem := dialect.problem(key, value))]
    if training := [key for key in given if dialect.trains(key)]:
        problems.append(f"{first_of(training, 5)}: of training only, take that out of the export file")
    if problems:
        raise RecipeError(f"{name} is read as {dialect.tool}'s: " + "; ".join(problems))
    honoured = {key: value for key, value in given.items() if key in dialect.file.model_fields}
    file = validated(dialect.file, honoured, name)
    try:
        recipe = file.recipe()
        _require_merge(dialect, recipe)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error.found}", expected=error.expected, remedy=error.remedy) from error
    notes = list(recipe.notes)
    if idle := [key for key in given if key in dialect.idle]:
        notes.append(f"no part of an export with qexport: {', '.join(idle)}")
    if recipe.quantize and recipe.merge.device != "cpu":
        notes.append(f"only the merge runs on {recipe.merge.device}: qexport quantizes on the CPU")
    if recipe.quantize and recipe.adapters:
        notes.append(f"the merged model goes to {merged_beside(recipe.output)}, it is quantized from there")
    return recipe.model_copy(update={"notes": tuple(notes)})


def merged_beside(output: str) -> Path:
    """Where the merged model lies when the output is quantized."""
    return Path(f"{Path(output)}-merged")


def _require_merge(dialect: Dialect, recipe: ModelRecipe) -> None:
    """Refuses what only merging can do, where nothing is merged, or where its result is not the output."""
    changed = [key for key in dialect.merge_keys if getattr(recipe.merge, key) not in (None, False)]
    if recipe.quantize and "legacy_format" in changed:
        raise RecipeError(
            f"{dialect.merge_keys['legacy_format']}: a quantized model is written as safetensors only",
            remedy="take it out",
        )
    if changed and not recipe.adapters:
        keys = ", ".join(dialect.merge_keys[key] for key in changed)
        raise RecipeError(
            f"{keys}: honoured only when adapters are merged, and the file names none",
            remedy="take it out: the weights are copied or quantized as they are",
        )


def calibration_file(key: str, value: str) -> str:
    """`value` as a local calibration text. Raises RecipeError for the name of a data set, or another kind."""
    path = Path(value)
    if not is_file(path):
        raise RecipeError(
            f"{key}: {value} is no file here, and qexport fetches no data sets",
            expected="a .json, .jsonl or .txt file",
        )
    if path.suffix not in _DATA_SETS:
        raise RecipeError(
            f"{key}: {value} is a {path.suffix or 'file without suffix'}",
            expected=".json or .jsonl of texts, conversations or Alpaca records, or .txt",
        )
    return value


def best_device() -> str:
    """cuda where there is one, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
