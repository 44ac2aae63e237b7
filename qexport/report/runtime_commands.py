"""Which runtime reads what, and the command that runs this very file.

A runtime is named for what `verification/runtimes/support.py` says that it was seen to read, Ollama for a
GGUF whose Modelfile lies beside it, and with a word about that what the tests do not run: vLLM, EETQ on CUDA.
Every command is run in the directory of the files, so that a model is called `.`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qexport.report.card_facts import LORA, CardFacts, WeightsFile
from qexport.verification.runtimes.support import GGUF, PLAIN, SUPPORT, gap, model_types, readers

UNTESTED = "Not run by qexport's own tests."


@dataclass(frozen=True)
class Command:
    """How to run the files in one runtime: `install` a shell command or nothing, `code` in `language`."""

    runtime: str
    install: str
    language: str
    code: str
    note: str = ""


@dataclass(frozen=True)
class Reader:
    """A runtime that reads a form. `supported` is its name in support.py; None where no test runs it.

    `besides` are packages beside the runtime's own; `not_for` model types for which nothing is claimed.
    """

    runtime: str
    write: Callable[[CardFacts], str]
    supported: str | None = None
    install: str = ""
    besides: tuple[str, ...] = ()
    language: str = "python"
    not_for: tuple[str, ...] = ()


# The model's own chat template, or plain text for a model without one.
_CHAT = """\
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_TEXT = """\
inputs = tokenizer("Once upon a time", return_tensors="pt")"""
_ANSWER = """\
outputs = model.generate(**inputs.to(model.device), max_new_tokens=64)
answer = outputs[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def _asked(facts: CardFacts) -> str:
    return f"{_CHAT if facts.chat else _TEXT}\n{_ANSWER}"


def _transformers(facts: CardFacts, device: str = "auto") -> str:
    trust = ", trust_remote_code=True" if facts.own_code else ""
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto", device_map="{device}"{trust})

{_asked(facts)}"""


def _transformers_on_cuda(facts: CardFacts) -> str:
    return _transformers(facts, "cuda")


def _gptqmodel(facts: CardFacts) -> str:
    """By GPTQModel's own loader where transformers puts no codes into the layers, or ignores their bits."""
    if not own_loader(facts):
        return _transformers(facts)
    trust = ", trust_remote_code=True" if facts.own_code else ""
    return f"""\
from gptqmodel import GPTQModel
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = GPTQModel.load("."{trust})

{_asked(facts)}"""


def own_loader(facts: CardFacts) -> bool:
    """Whether only GPTQModel's own loader reads such a file; see its driver, `gptqmodel_loader.py`."""
    dynamic = facts.quantization.get("dynamic") or ()
    return facts.model_type in ("gpt2", "mixtral", "qwen3_moe") or any(
        name.startswith("+:") for name in dynamic
    )


def _hqq(facts: CardFacts) -> str:
    return f"""\
import torch
from hqq.models.hf.base import AutoHQQHFModel
from transformers import AutoTokenizer

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoHQQHFModel.from_quantized(".", compute_dtype=dtype, device=device)

{_asked(facts)}"""


def _vllm(facts: CardFacts) -> str:
    trust = " --trust-remote-code" if facts.own_code else ""
    return f"vllm serve . --served-model-name {plain_name(facts)}{trust}"


def _mlx(facts: CardFacts) -> str:
    asked = '"Hello!"' if facts.chat else '"Once upon a time" --ignore-chat-template'
    trust = " --trust-remote-code" if facts.own_code else ""
    return f"mlx_lm.generate --model .{trust} --max-tokens 64 --prompt {asked}"


def _transformers_reader(*besides: str, supported: str = "transformers") -> Reader:
    return Reader("Transformers", _transformers, supported, "pip install transformers accelerate", besides)


_GPTQMODEL = Reader(
    "GPTQModel",
    _gptqmodel,
    "gptqmodel",
    "pip install torch transformers accelerate optimum\npip install gptqmodel --no-build-isolation",
)
_VLLM = Reader("vLLM", _vllm, install="pip install vllm", language="sh")
_MLX = Reader("MLX", _mlx, "mlx", "pip install mlx-lm", language="sh")
# Form -> its readers, in the order of the card. GGUF's commands are of a file each: see `_gguf`.
READERS: dict[str, tuple[Reader, ...]] = {
    PLAIN: (_transformers_reader(), _VLLM, _MLX),
    "bitsandbytes": (
        _transformers_reader("bitsandbytes"),
        Reader(
            "vLLM",
            _vllm,
            install="pip install vllm bitsandbytes",
            language="sh",
            not_for=("gpt2", "mixtral", "qwen3_moe"),
        ),
    ),
    "compressed-tensors": (_transformers_reader("compressed-tensors"), _VLLM),
    "gptq": (_GPTQMODEL, _VLLM),
    "gptq_v2": (_GPTQMODEL, _VLLM),
    "awq": (_GPTQMODEL, _VLLM),
    "hqq": (Reader("HQQ", _hqq, "hqq", "pip install hqq"),),
    "mlx": (_MLX,),
    "eetq": (
        Reader(
            "Transformers, on a CUDA GPU",
            _transformers_on_cuda,
            install="pip install transformers accelerate eetq",
        ),
    ),
}


def commands(facts: CardFacts) -> tuple[Command, ...]:
    """What runs these files, the runtimes that the tests asked first. Empty where nothing is known to."""
    if facts.form in (GGUF, LORA):
        return tuple(_llamacpp_lora(facts) if facts.form == LORA else _gguf(facts))
    if facts.task != "text-generation":
        return ()
    return tuple(
        Command(
            reader.runtime,
            " ".join((reader.install, *reader.besides)),
            reader.language,
            reader.write(facts),
            "" if reader.supported else UNTESTED,
        )
        for reader in READERS.get(facts.form, ())
        if _reads(reader, facts)
    )


def _reads(reader: Reader, facts: CardFacts) -> bool:
    known = facts.model_type in model_types()
    if reader.supported == "mlx" and not any(file.name.endswith(".safetensors") for file in facts.files):
        return False
    if reader.supported:
        # an architecture without a row was tested in no runtime; transformers is where it comes from
        return reader.supported in readers(facts.form, facts.model_type) and (
            known or reader.supported == "transformers"
        )
    held_back = any(
        found and not found.written
        for runtime in SUPPORT.get(facts.form, {})
        if runtime != "mlx"
        for found in [gap(facts.form, runtime, facts.model_type)]
    )
    return known and not held_back and facts.model_type not in reader.not_for


def plain_name(facts: CardFacts) -> str:
    """The directory's name as runtimes take the names of models: small letters, digits and `._-`."""
    name = re.sub(r"[^a-z0-9._-]+", "-", facts.directory.resolve().name.lower()).strip("-._")
    return name or "model"


def shell_word(text: str) -> str:
    """`text` as one word of a shell that is no option, on one line whatever stands in it."""
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    plain = (char if char.isprintable() and char not in "'\\" else _escaped(char) for char in text)
    return f"$'{''.join(plain)}'"


def _escaped(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode())


def _gguf(facts: CardFacts) -> Iterator[Command]:
    """llama.cpp and Ollama on each model: all parts of a split one load with its first."""
    models = [file for file in facts.files if file.loaded]
    lines = []
    for file in models:
        name = shell_word(file.name)
        text = "'Once upon a time'"
        asked = (
            f"llama-cli -m {name}" if facts.chat else f"llama-completion -m {name} -no-cnv -n 64 -p {text}"
        )
        lines += [asked, f"llama-server -m {name} --port 8080"]
    yield Command("llama.cpp", "", "sh", "\n".join(lines))
    made = [file for file in models if file.modelfile]
    if made:
        yield Command("Ollama", "", "sh", "\n".join(_ollama(facts, file, len(made) > 1) for file in made))


def _ollama(facts: CardFacts, file: WeightsFile, several: bool) -> str:
    stem = file.name.removesuffix(".gguf") if several else facts.directory.resolve().name
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._") or "model"
    return f"ollama create {name} -f {shell_word(file.modelfile or 'Modelfile')}\nollama run {name}"


def _llamacpp_lora(facts: CardFacts) -> Iterator[Command]:
    lines = [f"llama-server -m BASE.gguf --lora {shell_word(file.name)} --port 8080" for file in facts.files]
    note = "`BASE.gguf` is a GGUF file of the base that the adapter was trained on, quantized or not."
    yield Command("llama.cpp", "", "sh", "\n".join(lines), note)
