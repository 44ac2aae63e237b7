"""Times greedy generation in a runtime, token by token with its key-value cache, batch 1.

    python speed_driver.py RUNTIME JOB REPORT

Runs inside the runtime's own Python, so it does not import qexport. JOB is a JSON file of one `SpeedJob`,
REPORT becomes one of a `SpeedOutcome`. The model is loaded as the runtime's users load it: its own dtype,
its repacked layouts, its mapped files; `driver.py` takes all of that off, as it compares numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol, TypedDict

_WARM_UP = 8  # tokens that are generated before the clock runs: caches, lazy allocation, page faults
_SLOW_S = 60.0  # a model that would take longer for all its runs generates fewer tokens


class SpeedJob(TypedDict):
    """A model, and how often `tokens` are generated after a prompt of `prompt` tokens, on `threads`."""

    model: str
    prompt: int
    tokens: int
    runs: int
    threads: int
    trust_remote_code: bool


class SpeedOutcome(TypedDict, total=False):
    """Seconds a token of each run, and what the last of them generated, which may be less than was asked."""

    seconds_per_token: list[float]
    generated: list[int]
    prompt: list[int]
    dtype: str
    device: str
    versions: dict[str, str]
    error: str
    error_kind: str


class Engine(Protocol):
    """A loaded model that generates. `vocabulary` in ids, `context` in tokens (0 where it tells none)."""

    vocabulary: int
    context: int
    dtype: str
    device: str

    def start(self, prompt: list[int]) -> int:
        """Empties the cache and reads the prompt; the most likely token after it."""

    def step(self, token: int) -> int:
        """Reads one token; the most likely one after it."""


class Torch:
    """transformers on the CPU, in the dtype of the file."""

    device = "cpu"

    def __init__(self, job: SpeedJob, room: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
        torch.set_num_threads(job["threads"])
        kind: Any = AutoModelForCausalLM
        model, info = kind.from_pretrained(
            job["model"],
            device_map="cpu",
            dtype="auto",
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=job["trust_remote_code"],
        )
        if lost := [*info["missing_keys"], *info["mismatched_keys"]]:  # another model would be timed
            raise ValueError(f"{len(lost)} tensors of the model are not in its files")
        self._torch, self._model, self._cache = torch, model.eval(), None
        config = model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.context = int(getattr(config, "max_position_embeddings", 0) or 0)
        self.dtype = str(model.dtype).removeprefix("torch.")

    def start(self, prompt: list[int]) -> int:
        self._cache = None
        return self._next(prompt)

    def step(self, token: int) -> int:
        return self._next([token])

    def _next(self, ids: list[int]) -> int:
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor([ids]), past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class LlamaCpp:
    """llama.cpp through cyllama, on the CPU."""

    dtype, device = "gguf", "cpu"

    def __init__(self, job: SpeedJob, room: int) -> None:
        from cyllama.llama import llama_cpp

        loader = importlib.import_module("llamacpp_loader")  # a script's own folder is on its path
        llama_cpp.disable_logging()
        options = llama_cpp.LlamaModelParams()
        options.n_gpu_layers = 0
        file = str(loader.gguf_file(Path(job["model"])))
        self._model = llama_cpp.LlamaModel(path_model=file, params=options, verbose=False)
        self.vocabulary = int(self._model.get_vocab().n_vocab)
        self.context = int(self._model.n_ctx_train)
        options = llama_cpp.LlamaContextParams()
        options.n_ctx = room
        options.n_threads = options.n_threads_batch = job["threads"]
        self._context = llama_cpp.LlamaContext(model=self._model, params=options, verbose=False)
        self._greedy = llama_cpp.LlamaSampler()
        self._greedy.add_greedy()
        self._batch = llama_cpp.LlamaBatch(n_tokens=room, embd=0, n_seq_max=1)
        self._position = 0

    def start(self, prompt: list[int]) -> int:
        self._context.kv_cache_clear()
        self._position = 0
        return self._next(prompt)

    def step(self, token: int) -> int:
        return self._next([token])

    def _next(self, ids: list[int]) -> int:
        self._batch.reset()
        for number, token in enumerate(ids, start=1):
            self._batch.add(token, self._position, [0], number == len(ids))
            self._position += 1
        if code := self._context.decode(self._batch):
            raise RuntimeError(f"llama_decode gave {code}")
        return int(self._greedy.sample(self._context, -1))


class Mlx:
    """mlx-lm, on whatever device MLX finds."""

    def __init__(self, job: SpeedJob, room: int) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self._mx, self._make_cache = mx, make_prompt_cache
        self._model, config = load_model(
            Path(job["model"]), strict=True, trust_remote_code=job["trust_remote_code"]
        )
        config = {**config, **(config.get("text_config") or {})}
        self.vocabulary: int = config["vocab_size"]
        self.context: int = config.get("max_position_embeddings") or 0
        self.dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
        self.device = str(mx.default_device().type).rpartition(".")[2]

    def start(self, prompt: list[int]) -> int:
        self._cache = self._make_cache(self._model)
        return self._next(prompt)

    def step(self, token: int) -> int:
        return self._next([token])

    def _next(self, ids: list[int]) -> int:
        logits = self._model(self._mx.array([ids]), cache=self._cache)
        token: Any = self._mx.argmax(logits[0, -1]).item()
        return int(token)


ENGINES: dict[str, Any] = {"transformers": Torch, "gptqmodel": Torch, "llamacpp": LlamaCpp, "mlx": Mlx}


def timed(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Seconds a token, and the tokens.

    The first one comes of reading the prompt, which is not counted; each of the others of a step that reads
    one token and finds the next.
    """
    generated = [engine.start(prompt)]
    begun = time.perf_counter()
    while len(generated) < tokens:
        generated.append(engine.step(generated[-1]))
    return (time.perf_counter() - begun) / (tokens - 1), generated


def measure(runtime: str, job: SpeedJob) -> SpeedOutcome:
    """Loads, warms up and times."""
    room = job["prompt"] + job["tokens"]
    engine: Engine = ENGINES[runtime](job, room)
    # always the same ids for a vocabulary; a tokenizer is not needed, and speed does not depend on words
    prompt = [(7919 * place + 17) % engine.vocabulary for place in range(job["prompt"])]
    tokens = min(room, engine.context or room) - job["prompt"]
    if tokens < 2:
        raise ValueError(f"its context of {engine.context} tokens leaves no room to generate")
    pace, _ = timed(engine, prompt, min(tokens, _WARM_UP))
    tokens = max(2, min(tokens, int(_SLOW_S / max(pace, 1e-9) / job["runs"])))
    runs = [timed(engine, prompt, tokens) for _ in range(job["runs"])]
    return {
        "seconds_per_token": [seconds for seconds, _ in runs],
        "generated": runs[-1][1],
        "prompt": prompt,
        "dtype": engine.dtype,
        "device": engine.device,
    }


def main(arguments: list[str]) -> None:
    """See the module's text."""
    runtime, job_file, report = arguments
    sys.stdout = sys.stderr  # libraries print
    driver = importlib.import_module("driver")
    _, needs, told = driver.RUNTIMES[runtime]
    absent = [package for package in needs if importlib.util.find_spec(package) is None]
    outcome: SpeedOutcome
    if absent:
        outcome = {"error": f"No module named {absent[0]}", "error_kind": "absent"}
    else:
        try:
            outcome = measure(runtime, json.loads(Path(job_file).read_text(encoding="utf-8")))
        except (Exception, SystemExit) as error:  # whatever a runtime raises
            traceback.print_exc()
            outcome = {"error": driver.one_line(error), "error_kind": type(error).__name__}
    outcome["versions"] = driver.installed(told)
    Path(report).write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
