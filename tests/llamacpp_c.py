"""llama.cpp's own C interface, out of the wheel of xllamacpp: logits, adapters, and what layers are fed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport.checkpoint.checkpoint import open_directory
from qexport.formats.gguf.container import PlannedTensor, read_header, text
from qexport.formats.gguf.settings import settings
from qexport.formats.gguf.slabs import read_tensor
from qexport.formats.gguf.tensors import gguf_tensors
from qexport.formats.gguf.whole_file import write_plain
from qexport.grids.ggml.types import TYPES
from qexport.modeling.skeleton import build_skeleton
from tests.adapters import tiny_gpt2, tiny_llama, tiny_moe, tiny_qwen2

BASES: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    "mixtral": partial(tiny_moe, model_type="mixtral"),
    "qwen3_moe": partial(tiny_moe, model_type="qwen3_moe", norm_topk_prob=True),
}
"""Makes a tiny model of each kind of block that llama.cpp runs its own way."""


def base_gguf(model: Path, out: Path) -> Path:
    """The model in F32 without a vocabulary: token ids are enough here."""
    checkpoint = open_directory(model)
    tensors = gguf_tensors(checkpoint, build_skeleton(checkpoint))
    found = settings(checkpoint.config)
    arch = next(iter(found)).partition(".")[0]
    metadata = {"general.architecture": text(arch), "tokenizer.ggml.model": text("none"), **found}
    planned = [PlannedTensor(tensor.name, TYPES["f32"], tensor.shape) for tensor in tensors]
    write_plain(out, metadata, planned, (read_tensor(tensor, checkpoint) for tensor in tensors))
    return out


class _Blob(ctypes.Structure):
    """A structure of llama.cpp's whose fields are left as they are; larger than any of them."""

    _fields_ = (("bytes", ctypes.c_uint64 * 128),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_void_p) for name in ("embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


@lru_cache
def _llamacpp() -> Any:
    """llama.cpp's C interface, out of xllamacpp's extension module."""
    package = pytest.importorskip("xllamacpp")
    library: Any = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("*.so"))))
    pointer, text_ = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("llama_model_default_params", _Blob, []),
        ("llama_context_default_params", _Blob, []),
        ("llama_model_load_from_file", pointer, [text_, _Blob]),
        ("llama_init_from_model", pointer, [pointer, _Blob]),
        ("llama_adapter_lora_init", pointer, [pointer, text_]),
        ("llama_set_adapters_lora", ctypes.c_int32, [pointer, pointer, ctypes.c_size_t, pointer]),
        ("llama_batch_get_one", _Batch, [pointer, ctypes.c_int32]),
        ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("llama_log_set", None, [pointer, pointer]),
        ("ggml_op_desc", text_, [pointer]),
        ("ggml_get_name", text_, [pointer]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, text_, pointer)(lambda *_: None)
    library.llama_log_set(library.quiet, None)
    library.llama_backend_init()
    _require_known_tensors(library)
    return library


class _Tensor(ctypes.Structure):
    """ggml.h, `struct ggml_tensor`, as far as it is looked at."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


class _Memory(ctypes.Structure):
    """ggml.h, `struct ggml_init_params`."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _require_known_tensors(library: Any) -> None:
    """Fails when ggml lays out its tensors otherwise than `_Tensor`: a product is made and looked at."""
    pointer, side = ctypes.c_void_p, ctypes.c_int64
    for name, arguments in (
        ("ggml_init", [_Memory]),
        ("ggml_new_tensor_2d", [pointer, ctypes.c_int, side, side]),
        ("ggml_mul_mat", [pointer, pointer, pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = pointer, arguments
    library.ggml_free.argtypes = [pointer]
    memory = library.ggml_init(_Memory(1 << 20, None, False))
    try:
        weight, x = (library.ggml_new_tensor_2d(memory, 0, 32, rows) for rows in (3, 5))
        made = library.ggml_mul_mat(memory, weight, x)
        tensor = _Tensor.from_address(made)
        found = (tensor.type, list(tensor.ne), list(tensor.nb), list(tensor.src))
        expected = (0, [3, 5, 1, 1], [4, 12, 60, 60], [weight, x] + [None] * 8)
    finally:
        library.ggml_free(memory)
    if found != expected:
        pytest.fail(f"xllamacpp's ggml_tensor is laid out otherwise than tests/llamacpp_c.py knows: {found}")


# llama.h, `struct llama_context_params`, by its defaults, in words of 32 bits: n_ctx, n_batch, n_ubatch and
# n_seq_max, which it begins with; and from rope_scaling_type to abort_callback_data
_FIRST = [512, 2048, 512, 1]
_MINUS_ONE = -0x40800000  # the float
_STRETCH = [-1] * 4 + [0, 0] + [_MINUS_ONE] * 4 + [0, _MINUS_ONE] + [0] * 4 + [1, 1] + [0] * 4
_FLASH_ATTENTION, _CALLBACK, _TYPE_K, _TYPE_V = 3, 12, 16, 17
_WORDS = 40


_OnNode = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(_Tensor), ctypes.c_bool, ctypes.c_void_p)


def _set(params: _Blob, on_node: Any = None) -> None:
    """fp32 for keys and values, no flash attention, and who looks at the nodes.

    No header comes with the wheel. The fields are found by a stretch of defaults, from the four "automatic"
    words, of which flash attention is the last, over the callback to the types of keys and values.
    """
    words = list(ctypes.cast(ctypes.pointer(params), ctypes.POINTER(ctypes.c_int32))[:_WORDS])
    starts = [n for n in range(_WORDS - len(_STRETCH)) if words[n : n + len(_STRETCH)] == _STRETCH]
    if words[:4] != _FIRST or len(starts) != 1 or starts[0] % 2:
        pytest.fail(
            "xllamacpp's llama_context_params are laid out otherwise, or have other defaults, than "
            f"tests/llamacpp_c.py knows (llama.h tells how): {words}"
        )
    (start,) = starts
    address = ctypes.addressof(params) + 4 * start
    for field in (_FLASH_ATTENTION, _TYPE_K, _TYPE_V):
        ctypes.c_int32.from_address(address + 4 * field).value = 0
    if on_node:
        pointer = ctypes.c_void_p.from_address(address + 4 * _CALLBACK)
        pointer.value = ctypes.cast(on_node, ctypes.c_void_p).value


@contextlib.contextmanager
def _context(base: Path, on_node: Any = None) -> Iterator[tuple[Any, int, int]]:
    """llama.cpp's library, the model and a context."""
    library = _llamacpp()
    model = library.llama_model_load_from_file(str(base).encode(), library.llama_model_default_params())
    assert model, base
    params = library.llama_context_default_params()
    _set(params, on_node)
    context = library.llama_init_from_model(model, params)
    try:
        assert context, base
        yield library, model, context
    finally:
        library.llama_free(context)
        library.llama_model_free(model)


def _decode(library: Any, context: int, ids: list[int]) -> None:
    held = (ctypes.c_int32 * len(ids))(*ids)
    batch = library.llama_batch_get_one(held, len(ids))
    own = ctypes.cast(batch.token, ctypes.c_void_p).value
    if (batch.n_tokens, own, batch.logits) != (len(ids), ctypes.addressof(held), None):
        pytest.fail("xllamacpp's llama_batch is laid out otherwise than tests/llamacpp_c.py knows")
    wanted = (ctypes.c_int8 * len(ids))(*[1] * len(ids))
    batch.logits = ctypes.cast(wanted, ctypes.c_void_p)
    assert library.llama_decode(context, batch) == 0


def llamacpp_logits(
    base: Path, ids: torch.Tensor, adapter: Path | None = None, scale: float = 1.0
) -> torch.Tensor:
    """Logits [tokens, vocabulary] by llama.cpp."""
    with _context(base) as (library, model, context):
        if adapter:
            loaded = library.llama_adapter_lora_init(model, str(adapter).encode())
            assert loaded, adapter
            adapters, scales = (ctypes.c_void_p * 1)(loaded), (ctypes.c_float * 1)(scale)
            assert library.llama_set_adapters_lora(context, adapters, 1, scales) == 0
        _decode(library, context, ids.tolist())
        width = read_header(base).tensors["token_embd.weight"].shape[0]
        return torch.tensor([library.llama_get_logits_ith(context, n)[:width] for n in range(len(ids))])


def llamacpp_squares(base: Path, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """Sums of squared inputs, fp64 [experts or 1, in], and counts, of every matrix that llama.cpp multiplies.

    As its llama-imatrix sums them: of MUL_MAT over all rows, of MUL_MAT_ID by the experts' numbers.
    """
    library = _llamacpp()
    found: dict[str, tuple[torch.Tensor, list[int]]] = {}

    def values(address: int, kind: Any) -> torch.Tensor:
        """[ne3, ne2, ne1, ne0] of a tensor, strides as they are."""
        tensor = _Tensor.from_address(address)
        size, width = library.ggml_nbytes(address), ctypes.sizeof(kind)
        raw = (kind * (size // width)).from_address(library.ggml_get_data(address))
        flat = torch.frombuffer(raw, dtype=torch.int32 if kind is ctypes.c_int32 else torch.float32)
        sides = tuple(reversed(tensor.ne))
        return flat.as_strided(sides, tuple(step // width for step in reversed(tensor.nb))).clone()

    def on_node(node: Any, ask: bool, _: Any) -> bool:
        operation = library.ggml_op_desc(node).decode()
        if operation not in ("MUL_MAT", "MUL_MAT_ID"):
            return not ask
        weight, x = node.contents.src[0], node.contents.src[1]
        name = library.ggml_get_name(weight).decode()
        if ask or not name.startswith(("blk.", "output.")):
            return True
        rows = values(x, ctypes.c_float)[0].double()  # [tokens, used or 1, in], or [1, tokens, in]
        experts, inputs = _Tensor.from_address(weight).ne[2], rows.shape[-1]
        sums, counts = found.setdefault(name, (torch.zeros(experts, inputs).double(), [0] * experts))
        if operation == "MUL_MAT":
            sums[0] += rows.reshape(-1, inputs).square().sum(dim=0)
            counts[0] += rows.numel() // inputs
            return True
        chosen = values(node.contents.src[2], ctypes.c_int32)[0, 0]  # [tokens, used]
        for token, numbers in enumerate(chosen.tolist()):
            for place, expert in enumerate(numbers):
                sums[expert] += rows[token, place % rows.shape[1]].square()
                counts[expert] += 1
        return True

    callback = _OnNode(on_node)
    with _context(base, callback) as (_, _, context):
        _decode(library, context, ids.tolist())
    return found


class _Opening(ctypes.Structure):
    """gguf.h, `struct gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def open_by_ggml(path: Path) -> set[str]:
    """Names of the tensors of a GGUF file, by ggml's own reader; it fails on what ggml refuses."""
    library = _llamacpp()
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Opening]
    library.gguf_get_n_tensors.restype = ctypes.c_int64
    library.gguf_get_n_tensors.argtypes = [ctypes.c_void_p]
    library.gguf_get_tensor_name.restype = ctypes.c_char_p
    library.gguf_get_tensor_name.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.gguf_free.argtypes = [ctypes.c_void_p]
    opened = library.gguf_init_from_file(str(path).encode(), _Opening(True, None))
    assert opened, path
    try:
        count = library.gguf_get_n_tensors(opened)
        return {library.gguf_get_tensor_name(opened, number).decode() for number in range(count)}
    finally:
        library.gguf_free(opened)
