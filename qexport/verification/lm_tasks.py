"""Tasks of lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness) by name.

The model is the one that qexport decoded, in the memory of this process, so the scores are those of the
weights that were written, in fp32. Nothing but lm_eval's own tasks and those that the user names run: no
code of a dataset, a metric or a model is fetched and run.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import io
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint.manifest import installed_versions
from qexport.errors import MissingDependencyError, QexportError, SpecError, first_of
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.results import TaskScore
from qexport.verification.corpora import dataset_error, without_bars

_BOOTSTRAPS = 1000  # resamples for the error of a metric that is no mean; lm_eval's 100,000 take minutes


@dataclass(frozen=True)
class TaskScores:
    """Scores by 'task/metric', 'task/metric,filter' where lm_eval filters the answers, and their recipe.

    The recipe tells for each task its version, shots and number of documents.
    """

    scores: Mapping[str, TaskScore]
    recipe: Mapping[str, Any]


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    on_event: OnEvent = ignore,
) -> TaskScores:
    """Scores of `model` (transformers' class, weights loaded, fp32) on lm_eval's tasks, groups or tags.

    A task is a name that lm_eval knows, the .yaml file of one's own, or a directory of such files; a group of
    one's own is not summed up. A `!function` in one's own file is run, as any script is that one names.
    `limit` takes the first documents of each task. Without a chat template and with the task's own number of
    shots, as published scores mostly are; a prompt that is too long for the model loses its beginning. Model
    and tokenizer are left as they were.

    Raises MissingDependencyError without lm_eval; SpecError for an unknown task, with the nearest name, and
    for one that runs what the model or the Hub wrote; CalibrationError for a dataset that is not there and
    MachineError for one that cannot be fetched.
    """
    require_harness()
    with _quiet(), without_bars(), _seeds_kept(), _no_fetched_code() as fetched:
        from lm_eval import simple_evaluate

        manager, names = _tasks(tasks)
        try:
            with _left_as_it_is(model):
                found = simple_evaluate(
                    model=_harness_model(model, tokenizer, batch_size, on_event),
                    tasks=names,
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=_BOOTSTRAPS,
                    log_samples=False,
                )
        except Exception as error:
            raise _one_line(error, names, fetched) from error
    return TaskScores(_scores(found["results"]), _recipe(found, limit))


def require_harness() -> None:
    """Raises MissingDependencyError where lm-evaluation-harness is not installed."""
    try:
        import lm_eval.models.huggingface  # noqa: F401 - it needs more than lm_eval alone
    except ImportError as error:
        raise MissingDependencyError(
            f"--tasks needs lm-evaluation-harness: {error}", remedy="pip install 'qexport[tasks]'"
        ) from error


def _tasks(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """lm_eval's manager, which knows the tasks, and what to ask it for: names and files."""
    directories: list[Path] = []
    own: list[str] = []
    names: list[str] = []
    for task in tasks:
        path = Path(task).expanduser().absolute()
        if path.is_dir():
            directories.append(path)
            found = _manager((path,), False, _state((path,))).all_subtasks
            if not found:
                raise SpecError(f"{path} holds no task of lm_eval", expected="YAML files with a key task")
            own += found
        elif path.suffix == ".yaml":
            if not path.is_file():
                raise SpecError(f"{path} does not exist", expected="the YAML file of a task of lm_eval")
            own.append(str(path))
        else:
            names.append(task)
    places = tuple(dict.fromkeys(directories))
    manager = _manager(places, bool(names), _state(places))
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise SpecError(
                f"lm_eval has no task {name!r}",
                expected=f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists them",
            )
    return manager, list(dict.fromkeys([*names, *own]))


def _state(directories: Sequence[Path]) -> tuple[tuple[Path, int], ...]:
    files = (path for directory in directories for path in sorted(directory.rglob("*.yaml")))
    return tuple((path, path.stat().st_mtime_ns) for path in files)


@functools.lru_cache(maxsize=4)
def _manager(directories: tuple[Path, ...], defaults: bool, state: tuple[tuple[Path, int], ...]) -> Any:
    """lm_eval's own tasks are 14,000 files, which take it 15 s to read: only where one is asked for.

    `state` is for remembering it as long as the files stay as they are.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(directories), include_defaults=defaults)


def _harness_model(model: Any, tokenizer: Any, batch_size: int, on_event: OnEvent) -> Any:
    """lm_eval's HFLM around the model; every request that is done is told."""
    from lm_eval.api.model import CacheHook
    from lm_eval.models.huggingface import HFLM

    class Told(CacheHook):  # type: ignore[misc, unused-ignore]
        """lm_eval hands each answer to its cache; here it is counted instead."""

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            on_event(Advanced(1))

    class Model(HFLM):  # type: ignore[misc, unused-ignore]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._told("log-likelihoods", super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._told("log-likelihoods of texts", super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._told("answers to tasks", super().generate_until, requests)

        def _told(self, stage: str, run: Any, requests: Any) -> Any:
            on_event(Started(stage, len(requests), "requests"))
            answers = run(requests, disable_tqdm=True)
            on_event(Finished())
            return answers

        def get_model_info(self) -> dict[str, Any]:
            return {}  # it would ask the Hub for a model of that name

    # a copy: it is given a token for padding where it has none
    held = Model(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        backend="causal",
        batch_size=batch_size,
        truncation=True,
        trust_remote_code=False,
    )
    held.set_cache_hook(Told(None))
    return held


@contextlib.contextmanager
def _left_as_it_is(model: Any) -> Iterator[None]:
    """Within it, `tie_weights` does nothing: HFLM calls it, over a head that was decoded on its own."""
    model.tie_weights = lambda *args, **options: None
    try:
        with torch.no_grad():
            yield
    finally:
        del model.tie_weights


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it, what lm_eval prints and warns of is not seen: standard output is for data."""
    logger = logging.getLogger("lm_eval")
    level, processes = logger.level, os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap would fork this process with all its threads
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if processes is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = processes


@contextlib.contextmanager
def _seeds_kept() -> Iterator[None]:
    """lm_eval seeds all random numbers before it loads a task; the caller's go on where they were."""
    import numpy as np

    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _no_fetched_code() -> Iterator[list[str]]:
    """Within it, `evaluate.load` fails: it runs a script from the Hub. Gives the names asked for."""
    import evaluate

    original, asked = evaluate.load, []

    def refuse(path: str, *args: Any, **options: Any) -> Any:
        asked.append(str(path))
        raise SpecError(f"the metric {path} is code from the Hub, which is not run")

    evaluate.load = refuse
    try:
        yield asked
    finally:
        evaluate.load = original


def _one_line(error: Exception, names: Sequence[str], fetched: Sequence[str]) -> Exception:
    """What went wrong, in a line; errors of ours and of the machine as they are."""
    what = f"the task {names[0]}" if len(names) == 1 else f"one of the tasks {first_of(names)}"
    if fetched:
        return SpecError(f"{what} needs the metric {fetched[0]}, code from the Hub, which is not run")
    if isinstance(error, (QexportError, MemoryError, torch.OutOfMemoryError)):
        return error
    if "unsafe" in str(error):
        return SpecError(f"{what} runs code that the model writes", expected="another task")
    if isinstance(error, OSError) or type(error).__module__.startswith("datasets"):
        return dataset_error(f"the data of {what}", error)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return SpecError(f"lm_eval cannot run {what}: {reason}", remedy="QEXPORT_DEBUG=1 shows where")


def _scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskScore]:
    """lm_eval's keys are 'metric,filter' and 'metric_stderr,filter'."""
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = values.get(f"{metric}_stderr,{filtered}", math.nan)
            name = f"{task}/{metric}" + ("" if filtered == "none" else f",{filtered}")
            found[name] = TaskScore(float(value), float(error if _is_number(error) else math.nan))
    return found


def _is_number(value: Any) -> bool:
    import numpy as np

    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _recipe(found: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    samples, shots = found.get("n-samples", {}), found.get("n-shot", {})
    return {
        "tasks": {
            name: {
                "version": number,
                "shots": shots.get(name),
                "documents": samples[name]["effective"] if name in samples else None,
            }
            for name, number in found["versions"].items()
        },
        "limit": limit,
        "chat_template": False,
        "dtype": "float32",
        "bootstrap": _BOOTSTRAPS,
        "versions": installed_versions(("lm_eval", "datasets")),
    }
