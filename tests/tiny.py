"""Makers of tiny models, tokenizers and adapters, all random and all offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qexport.calibrate.windows import opening_token, packed, shuffled, text_tokens

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer of at most 300 tokens, BOS in front, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a small model reads many words and learns to write them"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    kind: Any = PreTrainedTokenizerFast
    fast = kind(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def tiny_model(
    directory: Path,
    *,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float16,
    tied: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """A random model of 2 blocks that transformers itself saved, with tokenizer and small files."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    config = CONFIG_MAPPING[model_type](**{**values, **overrides})
    kind: Any = AutoModelForCausalLM
    model = kind.from_config(config, dtype=dtype)
    model.save_pretrained(directory)
    tiny_tokenizer(directory)
    (directory / "LICENSE").write_text("Apache-2.0\n")
    return directory


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Rewrites model.safetensors with tensors added, replaced or, for None, taken out."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            tensors.pop(name)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None takes a key out."""
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tiny_adapter(
    directory: Path,
    base: Path,
    *,
    seed: int = 1,
    modules: tuple[str, ...] = ("q_proj", "down_proj"),
    **options: Any,
) -> Path:
    """A LoRA adapter with random A and B, saved by PEFT itself."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = in_transformers(base, dtype=torch.float32)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": list(modules), "task_type": "CAUSAL_LM", **options}
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(directory))
    return directory


def in_transformers(path: Path, **options: Any) -> Any:
    """transformers' own model; every tensor of it must have come from the files, and none be left over."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    model, loading = loaded
    assert not any(loading.values()), loading
    return model.eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The model's logits in fp32."""
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits.float()
    return result


def tokens(rows: int = 2, length: int = 24, vocabulary: int = 300) -> torch.Tensor:
    """Token ids, always the same."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))


def calibration_windows(
    documents: Sequence[str], tokenizer: Any, *, samples: int, length: int, seed: int
) -> torch.Tensor:
    """At most `samples` windows [samples, length] of plain texts, packed as calibration packs them."""
    order = (text_tokens(document, tokenizer) for document in shuffled(documents, seed))
    return packed(order, samples=samples, length=length, opening=opening_token(tokenizer)).windows
