"""llama.cpp's own C interface, out of the wheel of xllamacpp: logits, adapters, and what layers are fed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport.checkpoint.checkpoint import open_directory
from qexport.formats.gguf.container import PlannedTensor, read_header, text
from qexport.formats.gguf.settings import settings
from qexport.formats.gguf.tensors import gguf_tensors
from qexport.formats.gguf.whole_file import write_plain
from qexport.grids.ggml.types import TYPES
from qexport.modeling.skeleton import build_skeleton


def base_gguf(model: Path, out: Path) -> Path:
    """The model in F32 without a vocabulary: token ids are enough here."""
    checkpoint = open_directory(model)
    tensors = gguf_tensors(checkpoint, build_skeleton(checkpoint))
    found = settings(checkpoint.config)
    arch = next(iter(found)).partition(".")[0]
    metadata = {"general.architecture": text(arch), "tokenizer.ggml.model": text("none"), **found}
    planned = [PlannedTensor(tensor.name, TYPES["f32"], tensor.shape) for tensor in tensors]
    write_plain(out, metadata, planned, (tensor.read(checkpoint) for tensor in tensors))
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


_OnNode = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(_Tensor), ctypes.c_bool, ctypes.c_void_p)


def _set(params: _Blob, on_node: Any = None) -> None:
    """fp32 for keys and values, no flash attention, and who looks at the nodes.

    Fields are found by their defaults: type_k and type_v are fp16 (1, 1), before them are two null pointers,
    the callback and its data, after them two more; flash attention is the last of four "automatic" words.
    """
    words = ctypes.cast(ctypes.pointer(params), ctypes.POINTER(ctypes.c_int32))
    (types,) = [
        n
        for n in range(18, 40)
        if words[n] == words[n + 1] == 1 and not any(words[n - 4 : n] + words[n + 2 : n + 6])
    ]
    words[types] = words[types + 1] = 0
    (automatic,) = [n for n in range(5, 18) if all(words[n - m] == -1 for m in range(4))]
    words[automatic] = 0
    if on_node:
        address = ctypes.addressof(params) + 4 * (types - 4)
        ctypes.c_void_p.from_address(address).value = ctypes.cast(on_node, ctypes.c_void_p).value


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
