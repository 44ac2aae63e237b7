"""What a format module has: how a checkpoint is read; and where qexport writes it too, which grids it
holds, and how a layer's tensors are named, written and told in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from qexport.checkpoint.checkpoint import Decoder
from qexport.checkpoint.safetensors_file import StoredTensor
from qexport.checkpoint.tensors import TensorInfo
from qexport.grids.grid import Grid


@dataclass(frozen=True)
class Wish:
    """The grid that a user asks a format for. None leaves it to the format.

    `group_size` is None where the user named none; `dtype` is the model's own.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool | None = None
    dtype: torch.dtype = torch.float16
    codebook: str | None = None  # bitsandbytes: nf4 or fp4
    double_quant: bool | None = None  # bitsandbytes


@dataclass(frozen=True)
class Facts:
    """What a quantized model's config tells beside the grids.

    `grids` has every converted layer by its full name; `left` the linear layers that stay as they were, the
    output head included where it stays; `head` is the name of the output head, `embeddings` those of the
    input embeddings. `in_memory` has the names of layers that are called otherwise once they are loaded.
    `common` is the grid of layers that no override names. `damp` and `desc_act` are GPTQ's.
    """

    grids: Mapping[str, Grid]
    left: Sequence[str]
    common: Grid
    dtype: torch.dtype
    model_type: str
    head: str = "lm_head"
    embeddings: Sequence[str] = ()
    in_memory: Mapping[str, str] = field(default_factory=dict)
    damp: float | None = None
    desc_act: bool = False
    static_groups: bool = False
    true_sequential: bool = True


class Reader(Protocol):
    """The functions of a format module that reads."""

    METHOD: str  # the `quant_method` of its checkpoints

    def decoder(
        self,
        config: Mapping[str, Any],
        stored: Mapping[str, StoredTensor],
        float_dtype: torch.dtype,
    ) -> Decoder:
        """The reader of a checkpoint with this `quantization_config`."""


class Format(Reader, Protocol):
    """Those of a module that writes as well. Grids and codes are those that `grid_for` gives."""

    NAME: str  # as `--format` has it
    HOLDS_HEAD: bool  # whether a quantized output head can be told and is read
    HOLDS_EMBEDDINGS: bool
    HOLDS_CONV1D: bool  # whether a runtime reads GPT-2's transposed layers in it
    HOLDS_GROUP_ORDER: bool  # whether groups may be no neighbours (g_idx)
    # a mixture's experts are read as codes; or only as they were; or a runtime loads no such model
    EXPERTS: str

    def grid_for(self, wish: Wish) -> Grid:
        """The grid that the format has for a wish; SpecError that names what it has where it has none."""

    def obstacle(self, shape: Sequence[int], grid: Any) -> str | None:
        """Why a matrix [out, in] cannot be stored, in a few words; None when it can."""

    def layout(self, module: str, shape: Sequence[int], grid: Any) -> list[TensorInfo]:
        """The tensors that a linear layer [out, in] becomes."""

    def encode(self, module: str, codes: Any, grid: Any) -> dict[str, torch.Tensor]:
        """The layer's tensors, named and shaped as `layout` says."""

    def config_entries(self, facts: Facts) -> dict[str, Any]:
        """What config.json gets: `quantization_config`, and what else runtimes look for there."""

    def extra_files(self, entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """Further JSON files that runtimes look for, made from those entries."""

    def finish(self, directory: Path) -> None:
        """Last work in the staged output, its weights being written: files made of other files."""
