"""Writes checkpoints of a format's own tensors, without the command that will write them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qexport.checkpoint.checkpoint import Checkpoint
from qexport.formats.format import Facts, Format
from qexport.formats.opening import open_checkpoint
from qexport.grids.grid import encode
from qexport.grids.integer import IntegerGrid
from qexport.modeling.architectures import stored_transposed

LINEAR = r".*(_proj|c_attn|c_fc|query_key_value|dense|dense_h_to_4h|dense_4h_to_h|\.w[123])"


@dataclass(frozen=True)
class Written:
    """A checkpoint and the weights on the grid, as the model has them, in fp32."""

    path: Path
    weights: dict[str, torch.Tensor]

    def open(self) -> Checkpoint:
        return open_checkpoint(self.path)


def write_encoded(
    source: Path,
    out: Path,
    module: Format,
    grid: IntegerGrid,
    *,
    others: Mapping[str, IntegerGrid] | None = None,
    left: Collection[str] = (),
    more: Collection[str] = (),
    split: Callable[[str], bool] | None = None,
) -> Written:
    """`source` with its linear layers on `grid`, those matching a pattern of `others` on that, those of
    `left` kept, and the layers of `more` too. `split` puts the tensors it names in a second file."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    transposed = stored_transposed(config)
    dtype = getattr(torch, config["dtype"])
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    grids: dict[str, IntegerGrid] = {}
    stayed: list[str] = []
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        linear = tensor.dim() == 2 and re.fullmatch(LINEAR, layer)
        if not (linear or layer in more) or layer in left:
            tensors[name] = tensor
            if linear:
                stayed.append(layer)
            continue
        own = next((g for pattern, g in (others or {}).items() if re.search(pattern, layer)), grid)
        weight = tensor.t() if transposed(name) else tensor
        assert module.obstacle(weight.shape, own) is None
        codes = encode(own, weight, own.fit(weight))
        made = module.encode(layer, codes, own)
        planned = {info.name: (info.dtype, info.shape) for info in module.layout(layer, weight.shape, own)}
        assert {key: (value.dtype, tuple(value.shape)) for key, value in made.items()} == planned
        tensors |= {key: value.contiguous() for key, value in made.items()}
        decoded = own.decode(codes)
        weights[name] = decoded.t().contiguous() if transposed(name) else decoded
        grids[layer] = own
    if "lm_head.weight" in tensors:
        stayed.append("lm_head")
    facts = Facts(
        grids=grids, left=stayed, common=grid, dtype=dtype, model_type=config["model_type"], damp=None
    )
    entries = module.config_entries(facts)
    (out / "config.json").write_text(json.dumps({**config, **entries}))
    for file, content in module.extra_files(entries).items():
        (out / file).write_text(json.dumps(content))
    _save(out, tensors, split)
    module.finish(out)
    return Written(out, weights)


def _save(out: Path, tensors: dict[str, torch.Tensor], split: Callable[[str], bool] | None) -> None:
    if split is None:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return
    (out / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, second in enumerate((False, True), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        held = {name: tensor for name, tensor in tensors.items() if split(name) == second}
        save_file(held, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(held, file)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(content))


def require_decoded(source: Path, written: Written) -> None:
    """What is opened has the names, shapes and values of the model, the quantized ones on the grid."""
    full, ours = open_checkpoint(source), written.open()
    assert set(ours.names()) == set(full.names())
    for name in full.names():
        assert (ours.info(name).dtype, ours.info(name).shape) == (
            full.info(name).dtype,
            full.info(name).shape,
        )
        assert ours.is_quantized(name) == (name in written.weights)
        assert torch.equal(ours.read(name), written.weights.get(name, full.read(name))), name
