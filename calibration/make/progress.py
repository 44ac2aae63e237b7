"""Progress of a training run: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, TaskID

_EVERY = 50


class Report:
    """Shows the steps of one stage."""

    def __init__(self, console: Console, stage: str) -> None:
        self._console = console
        self._stage = stage
        self._bar = Progress(console=console) if console.is_terminal else None
        self._task: TaskID | None = None

    def __enter__(self) -> Report:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, steps: int, loss: float, seconds: float) -> None:
        """Tell how far the stage is."""
        text = f"{self._stage} loss {loss:.3f}"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(text, total=steps)
            self._bar.update(self._task, completed=step, description=text)
        elif step % _EVERY == 0 or step == steps:
            self._console.print(f"{text} step {step}/{steps} {seconds:.0f} s", highlight=False)
