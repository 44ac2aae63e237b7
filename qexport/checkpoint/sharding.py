"""Which tensor goes into which file: computed from sizes alone, before a byte moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qexport.checkpoint.tensors import TensorInfo


@dataclass(frozen=True)
class Naming:
    """The Hub's names of a checkpoint's weights in one form."""

    stem: str
    suffix: str

    @property
    def single(self) -> str:
        """The one file, when one is enough."""
        return f"{self.stem}.{self.suffix}"

    @property
    def index(self) -> str:
        """The file that tells which tensor lies where."""
        return f"{self.single}.index.json"

    def shard(self, number: int, count: int) -> str:
        """The file `number`, from 1, of `count`."""
        return f"{self.stem}-{number:05d}-of-{count:05d}.{self.suffix}"


SAFETENSORS = Naming("model", "safetensors")
PYTORCH = Naming("pytorch_model", "bin")
SINGLE_FILE, INDEX_FILE = SAFETENSORS.single, SAFETENSORS.index


@dataclass(frozen=True)
class Shard:
    """One file and the tensors in it, in order."""

    file: str
    tensors: tuple[TensorInfo, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensors; the header comes on top."""
        return sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True)
class ShardPlan:
    """All files of a checkpoint's weights, and the tensors too large for the wanted size."""

    shards: tuple[Shard, ...]
    oversized: tuple[TensorInfo, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.size for shard in self.shards)

    def index(self) -> dict[str, object]:
        """The content of the index file, in the Hub's form."""
        return {
            "metadata": {
                "total_parameters": sum(t.numel for shard in self.shards for t in shard.tensors),
                "total_size": self.size,
            },
            "weight_map": {t.name: shard.file for shard in self.shards for t in shard.tensors},
        }


def plan_shards(
    tensors: Sequence[TensorInfo], max_shard_size: int, naming: Naming = SAFETENSORS
) -> ShardPlan:
    """Fills files in order, none with more than `max_shard_size` bytes of tensors.

    A tensor larger than that gets a file of its own. The names are the Hub's:
    model-00001-of-00003.safetensors, or model.safetensors when one file is enough.
    """
    groups: list[list[TensorInfo]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.size > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(tensor)
        room -= tensor.size
    count = len(groups)
    shards = tuple(
        Shard(naming.single if count == 1 else naming.shard(number, count), tuple(group))
        for number, group in enumerate(groups, start=1)
    )
    return ShardPlan(shards, tuple(t for t in tensors if t.size > max_shard_size))
