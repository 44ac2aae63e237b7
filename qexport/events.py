"""What long work tells whoever listens: typed events, so that the library never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """A stage of `total` steps begins; `total` is in `unit` ("bytes", "blocks", ...)."""

    stage: str
    total: int
    unit: str


@dataclass(frozen=True)
class Advanced:
    """The running stage went on by `steps`; `what` names the piece at hand."""

    steps: int
    what: str = ""


@dataclass(frozen=True)
class Finished:
    """The running stage is over."""


@dataclass(frozen=True)
class Noted:
    """Something the user should know, in one line; the work goes on."""

    text: str


Event = Started | Advanced | Finished | Noted
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of those who do not listen."""
