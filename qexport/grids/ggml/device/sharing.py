"""What searches in torch share: weights in pieces, and constants kept for each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Tensors = TypeVar("Tensors", bound=tuple[torch.Tensor, ...])

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def kept_by_device(make: Callable[[torch.device], Tensors]) -> Callable[[torch.Tensor], Tensors]:
    """A function that gives what `make` makes for the device of a tensor, made once for each device.

    For tensors of torch's own subclasses (such as FakeTensor) it is made anew: they do not mix with others.
    """
    kept: dict[torch.device, Tensors] = {}

    def found(like: torch.Tensor) -> Tensors:
        if type(like) not in _PLAIN:
            return make(like.device)
        have = kept.get(like.device)
        if have is None:
            have = kept[like.device] = make(like.device)
        return have

    return found


def in_pieces(
    values: torch.Tensor, importance: torch.Tensor, most: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks [blocks, width], at most `most` at once, and each with its importance, likewise [some, width].

    `importance` [n, width] repeats for the blocks. There is one piece at least, if an empty one.
    """
    for begin in range(0, max(len(values), 1), most):
        piece = values[begin : begin + most]
        if len(importance) == 1:
            yield piece, importance.expand_as(piece)
        else:
            places = torch.arange(begin, begin + len(piece), device=values.device) % len(importance)
            yield piece, importance.index_select(0, places)
