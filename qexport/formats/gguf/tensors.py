"""A model's tensors in GGUF: under which name, in which shape, from which tensors on disk; and back.

llama.cpp wants the experts of a block in one tensor [experts, out, in], the rows of q and k in llama-type
models in the order of neighbouring rotary pairs, Gemma's norms plus one, and GPT-2's Conv1D as [out, in].
Source: llama.cpp's `conversion/*.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.errors import CorruptFileError, UnsupportedModelError, first_of
from qexport.formats.gguf.naming import gguf_names, is_plus_one, kind_of, order_of, row_order, whole_number
from qexport.formats.gguf.rope import FREQS, LONG, SHORT
from qexport.formats.gguf.rows import Row, row_of, row_of_file
from qexport.modeling.architectures import stored_transposed
from qexport.modeling.skeleton import Skeleton

# computed from the config, and made anew from the file's own metadata
COMPUTED = frozenset({FREQS, LONG, SHORT})
_MAX_EXPERTS = 4096  # llama.cpp's own limit is 512
_EXPERT = re.compile(r"^(?P<experts>.+\.mlp\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)\.weight$")


@dataclass(frozen=True)
class Part:
    """A tensor on disk, or some of it.

    `rows` are those that are taken, all for None; `source_expert` is the matrix taken of a 3-D tensor;
    `expert` the place in the GGUF tensor's first dimension.
    """

    name: str
    rows: slice | None = None
    expert: int | None = None
    source_expert: int | None = None


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file. `shape` is in torch's order, [experts,] out, in or a vector's length.

    `order` and `heads` tell in which order rows go (see `Row.orders`); "" is as they are.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    order: str = ""
    heads: int = 0
    plus_one: bool = False
    transposed: bool = False

    @property
    def kind(self) -> str:
        """What it is in any block: "attn_v", "ffn_down_exps", "token_embd"."""
        return kind_of(self.name)

    @property
    def experts(self) -> int | None:
        """How many matrices it stacks; None for one that is no stack."""
        return self.shape[0] if len(self.shape) == 3 else None

    def row_order(self) -> torch.Tensor | None:
        """Numbers int64 [rows] of the rows on disk in the file's order, the same for each expert; None when
        they go as they are.
        """
        return row_order(self.shape[-2] if len(self.shape) > 1 else self.shape[0], self.order, self.heads)


def gguf_tensors(checkpoint: Checkpoint, skeleton: Skeleton) -> list[GgufTensor]:
    """The tensors of the file, in its order, each tensor of the checkpoint in one of them.

    `skeleton` is bound to the checkpoint. Raises UnsupportedModelError for an unknown architecture or a
    tensor that has no name in it, and CorruptFileError for one that the model needs and does not find.
    """
    row = row_of(skeleton.model_type)
    name_of = gguf_names(row, int(skeleton.config.num_hidden_layers))
    transposed = skeleton.transposed
    heads = _heads(skeleton.config)
    shapes = skeleton.expected_shapes()
    ignored = [re.compile(pattern) for pattern in skeleton.ignored_patterns()]
    parts: dict[str, list[Part]] = {}
    used: set[str] = set()
    for key, value in skeleton.model.state_dict().items():
        place = skeleton.places[key]
        if place.name not in checkpoint:
            if any(pattern.search(place.name) for pattern in ignored):
                continue
            raise CorruptFileError(f"{checkpoint.path} lacks {place.name}, which its config.json asks for")
        _require_shape(checkpoint, place.name, shapes[place.name])
        expert = _EXPERT.match(key)
        whole = place.expert is None or value.shape[0] == shapes[place.name][-2]
        part = Part(
            place.name,
            None if whole else slice(place.begin, place.end),
            int(expert["number"]) if expert else None,
            place.expert,
        )
        tied = key == f"{skeleton.head_name}.weight" and place.name == skeleton.embedding_weight
        if tied and not row.own_head:
            continue  # llama.cpp takes the embedding
        name = name_of(f"{expert['experts']}.{expert['leaf']}.weight" if expert else key)
        if name is None:
            raise _nameless(row, place.name)
        used.add(place.name)
        parts.setdefault(name, []).append(part)
    left = [n for n in checkpoint.names() if n not in used and not any(p.search(n) for p in ignored)]
    if left:
        raise _nameless(row, first_of(left))
    return [_tensor(name, found, row, shapes, heads, transposed) for name, found in parts.items()]


def _tensor(
    name: str,
    parts: list[Part],
    row: Row,
    shapes: Mapping[str, tuple[int, ...]],
    heads: Mapping[str, int],
    transposed: frozenset[str],
) -> GgufTensor:
    first = parts[0]
    shape = shapes[first.name] if first.source_expert is None else shapes[first.name][1:]
    if first.rows is not None:
        shape = (first.rows.stop - first.rows.start, *shape[1:])
    turned = first.name.removesuffix(".weight") in transposed and first.name.endswith(".weight")
    shape = tuple(reversed(shape)) if turned else shape
    if first.expert is not None:
        shape = (len(parts), *shape)
    order, count = order_of(row, name, heads)
    return GgufTensor(name, shape, tuple(parts), order, count, is_plus_one(row, name), turned)


def _require_shape(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    found = checkpoint.info(name).shape
    if found != expected:
        raise CorruptFileError(f"{name} is {list(found)}, its config.json says {list(expected)}")


def _nameless(row: Row, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} has no name in a GGUF file of architecture {row.arch}",
        expected=f"the tensors of a {row.model_type} model as llama.cpp knows it",
    )


def _heads(config: Any) -> dict[str, int]:
    count = int(config.num_attention_heads)
    return {"attn_q": count, "attn_k": int(getattr(config, "num_key_value_heads", None) or count)}


@dataclass(frozen=True)
class Origin:
    """Where a tensor of transformers' lies in a GGUF file. `shape` is transformers'.

    `order` and `heads` are to be undone, `minus_one` and `transposed` to be done.
    """

    tensor: str
    shape: tuple[int, ...]
    expert: int | None = None
    order: str = ""
    heads: int = 0
    minus_one: bool = False
    transposed: bool = False

    @cached_property
    def row_order(self) -> torch.Tensor | None:
        """Numbers int64 [rows] of the file's rows in transformers' order; None when they are as they are."""
        rows = self.shape[-1] if self.transposed else self.shape[0]
        order = row_order(rows, self.order, self.heads)
        return None if order is None else torch.argsort(order)


def origins(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Origin]:
    """For every tensor in transformers' words its place in a file of these tensors (name to shape in torch's
    order), in transformers' order; experts one by one.

    Raises UnsupportedModelError for an unknown architecture or tensor, CorruptFileError for metadata that
    contradicts the tensors.
    """
    row = row_of_file(metadata)
    blocks = whole_number(metadata, f"{row.arch}.block_count")
    if not 0 < blocks <= len(shapes):
        raise CorruptFileError(f"the file claims {blocks} blocks and holds {len(shapes)} tensors")
    name_of = gguf_names(row, blocks)
    heads = _file_heads(metadata, row.arch)
    turned = stored_transposed({"model_type": row.model_type})
    found: dict[str, Origin] = {}
    for name, tensor in _named(row, blocks, name_of):
        if tensor not in shapes:
            continue
        shape = shapes[tensor]
        if not shape:
            raise CorruptFileError(f"{tensor} is a single number, expected a vector or a matrix")
        order, count = order_of(row, tensor, heads)
        flip = turned(name) and name.endswith(".weight") and len(shape) == 2
        if order and shape[0] % (count * (2 if order == "rotary" else 3)):
            raise CorruptFileError(f"{tensor} has {shape[0]} rows, the file claims {count} heads")
        shape = tuple(reversed(shape)) if flip else shape
        found[name] = Origin(tensor, shape, None, order, count, is_plus_one(row, tensor), flip)
    found |= _expert_origins(row, blocks, name_of, shapes)
    taken = {origin.tensor for origin in found.values()} | COMPUTED
    left = [name for name in shapes if name not in taken and not name.endswith(".attn_rot_embd.weight")]
    if left:
        raise UnsupportedModelError(
            f"a GGUF file of architecture {row.arch} holds {first_of(left)}",
            expected=f"the tensors of a {row.model_type} model",
        )
    return found


def _named(row: Row, blocks: int, name_of: Callable[[str], str | None]) -> Iterator[tuple[str, str]]:
    """Names of tensors outside the experts, in transformers' words and in GGUF's."""
    inside = [row.block(number, module) for number in range(blocks) for module in row.inside]
    for module in (row.outside[0], *inside, *row.outside[1:]):
        for suffix in ("weight", "bias"):
            tensor = name_of(f"{module}.{suffix}")
            if tensor is not None:
                yield f"{module}.{suffix}", tensor


def _expert_origins(
    row: Row, blocks: int, name_of: Callable[[str], str | None], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Origin]:
    found: dict[str, Origin] = {}
    if row.experts is None:
        return found
    for number in range(blocks):
        for memory, leaf in row.experts.leaves().items():
            tensor = name_of(f"{row.blocks}.{number}.mlp.experts.{memory}.weight") or ""
            shape = shapes.get(tensor)
            if shape is None:
                continue
            if len(shape) != 3 or not 0 < shape[0] <= _MAX_EXPERTS:
                raise CorruptFileError(f"{tensor} is {list(shape)}, expected [experts, out, in]")
            for expert in range(shape[0]):
                name = f"{row.block(number, row.experts.module)}.{expert}.{leaf}.weight"
                found[name] = Origin(tensor, shape[1:], expert)
    return found


def restore(values: torch.Tensor, origin: Origin) -> torch.Tensor:
    """Transformers' tensor of the file's one, `values` in torch's order (of all experts, or of its own)."""
    matrix = values[origin.expert] if origin.expert is not None and values.dim() == 3 else values
    if origin.row_order is not None:
        matrix = matrix[origin.row_order]
    if origin.transposed:
        matrix = matrix.t()
    return (matrix - 1 if origin.minus_one else matrix).contiguous()


def _file_heads(metadata: Mapping[str, Any], arch: str) -> dict[str, int]:
    count = whole_number(metadata, f"{arch}.attention.head_count")
    keys = metadata.get(f"{arch}.attention.head_count_kv", count)
    if count <= 0 or not isinstance(keys, int) or keys <= 0:
        raise CorruptFileError(f"the GGUF file claims {count} heads and {keys!r} of keys and values")
    return {"attn_q": count, "attn_k": keys}
