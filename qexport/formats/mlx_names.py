"""What MLX calls a model's tensors, where it does not use Hugging Face's names.

mlx_lm's models have a `sanitize` that turns a Hugging Face checkpoint into theirs: it renames, turns GPT-2's
weights and stacks experts. On packed layers it would do wrong (GPT-2: turn the words) or half of it
(qwen3_moe: stack weights, but no scales), so packed layers go out under MLX's own names, as `mlx_lm.convert`
writes them, and `sanitize` leaves them alone. Source: `sanitize` in mlx_lm 0.32.2, `models/*.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from qexport.checkpoint.safetensors_file import StoredTensor
from qexport.errors import CorruptFileError

LEAVES = ("weight", "scales", "biases", "bias")
# Model types whose experts are stacked, and where they lie; Mixtral's have other names too.
_STACKED = {
    "mixtral": "block_sparse_moe",
    "olmoe": "mlp",
    "qwen2_moe": "mlp",
    "qwen3_moe": "mlp",
}
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"(?P<stem>.*\.(?P<home>mlp|block_sparse_moe))\.experts\.(?P<number>\d+)\.(?P<part>\w+)")
_STACK = re.compile(r"(?P<stem>.*\.(?P<home>mlp|block_sparse_moe))\.switch_mlp\.(?P<part>\w+)\.(?P<leaf>\w+)")
# Model types of Hugging Face's that mlx_lm 0.32.2 has no model for
UNKNOWN = frozenset({"bloom", "codegen", "falcon", "gpt_neo", "mpt", "opt"})
_MAX_EXPERTS = 4096  # far above any real number
# GPT-2's weights that lie transposed, and buffers that MLX does without
_CONV1D = re.compile(r"(^|\.)h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Place:
    """Where MLX has a module: its path there, and the number within a stack of experts."""

    path: str
    expert: int | None = None


def place_of(module: str, model_type: str) -> Place:
    """Where MLX has the module that is `module` in Hugging Face's checkpoint of a `model_type`."""
    if model_type == "gpt2":
        return Place("model." + module.removeprefix("transformer."))
    if model_type == "gpt_neox":
        inner = module.removeprefix("gpt_neox.")
        return Place("model." + re.sub(r"^layers\.", "h.", inner))
    home = _STACKED.get(model_type)
    expert = _EXPERT.fullmatch(module)
    if home and expert and expert["home"] == home:
        part = _MIXTRAL.get(expert["part"], expert["part"])
        return Place(f"{expert['stem']}.switch_mlp.{part}", int(expert["number"]))
    return Place(module)


def renames(model_type: str) -> bool:
    """Whether MLX has other names for a model of this type."""
    return model_type in ("gpt2", "gpt_neox", *_STACKED)


def plain_name(name: str, model_type: str) -> str | None:
    """The name in the file of a tensor that is not packed, not of an expert either; None to leave it out.

    A plain GPT-2 weight gets the name of OpenAI's own files: those `sanitize` turns and renames.
    """
    if model_type in ("gpt2", "gpt_neox") and _BUFFERS.search(name):
        return None
    if model_type == "gpt2" and _CONV1D.search(name):
        return name.removeprefix("transformer.")
    module, _, leaf = name.rpartition(".")
    return f"{place_of(module, model_type).path}.{leaf}" if module else name


@dataclass(frozen=True)
class Found:
    """A stored tensor under Hugging Face's name, `path` being its module's in MLX.

    `turned` tells of a plain GPT-2 weight [out, in], which Hugging Face has as [in, out].
    """

    tensor: StoredTensor
    path: str
    turned: bool = False


def hugging_face_names(stored: Mapping[str, StoredTensor]) -> dict[str, Found]:
    """The tensors of an MLX checkpoint by Hugging Face's names, stacks of experts taken apart.

    Raises CorruptFileError when two get one name.
    """
    rename = _inverse(stored)
    found: dict[str, Found] = {}
    for mlx_name, tensor in stored.items():
        path = mlx_name.rpartition(".")[0]
        for name, part in _unstacked(mlx_name, tensor):
            if (own := rename(name)) in found:
                raise CorruptFileError(f"two tensors are {own}: {mlx_name} and one beside it")
            turned = bool(own != name and f"{path}.scales" not in stored and _CONV1D.search(own))
            turned = turned and mlx_name.startswith("model.")
            found[own] = Found(replace(part, name=own), path, turned)
    return found


def _inverse(names: Iterable[str]) -> Callable[[str], str]:
    """From MLX's names to Hugging Face's, for the model that has these; both ways `model.h.` tells."""
    blocks = [name for name in names if name.startswith("model.h.")]
    if any(".attention.query_key_value." in name for name in blocks):
        return _neox
    if any(".attn.c_attn." in name for name in blocks):
        return lambda name: "transformer." + name.removeprefix("model.")
    return lambda name: name


def _neox(name: str) -> str:
    inner = name.removeprefix("model.")
    if inner.startswith("embed_out."):
        return inner
    return "gpt_neox." + re.sub(r"^h\.", "layers.", inner.removeprefix("gpt_neox."))


def _unstacked(name: str, tensor: StoredTensor) -> Iterable[tuple[str, StoredTensor]]:
    stack = _STACK.fullmatch(name)
    if not stack or stack["leaf"] not in LEAVES or len(tensor.shape) < 2:
        yield name, tensor
        return
    count = tensor.shape[0]
    if not tensor.numel or count > _MAX_EXPERTS:
        raise CorruptFileError(
            f"{name} is {list(tensor.shape)}", expected=f"a stack of 1 to {_MAX_EXPERTS} experts"
        )
    part = stack["part"]
    if stack["home"] == "block_sparse_moe":
        part = {mlx: own for own, mlx in _MIXTRAL.items()}.get(part, part)
    size = tensor.size // count
    for number in range(count):
        one = replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + number * size)
        yield f"{stack['stem']}.experts.{number}.{part}.{stack['leaf']}", one
