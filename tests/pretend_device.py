"""An accelerator that is none: device "pretend" computes on the CPU and is as strict as CUDA about devices.

A machine without a GPU cannot show that code forgets a `.to(device)`: on the CPU nothing ever mixes, and on
`device="meta"` there are no values. Here tensors are ordinary `torch.Tensor`s of torch's PrivateUse1 backend
whose storage is memory of the host. torch itself keeps shapes, views, versions and autograd; a kernel for
all ops looks at the same memory as CPU tensors, runs the CPU's op, and hands the results back as tensors of
the device. So results equal the CPU's bit for bit, while a CPU tensor among the arguments raises as on CUDA.

torch offers no way to unregister a backend: after `register()` the device exists until the process ends.
What that changes for others is told there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.library import Library
from torch.utils.backend_registration import rename_privateuse1_backend

DEVICE = "pretend"

# ops that CUDA lets take indices from the CPU
_CPU_INDICES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}

_EXTENSION_DEVICE = 12  # kDLExtDev of DLPack, which torch takes for PrivateUse1

_FLASH_ATTENTION = 1  # of torch's enum SDPBackend

_kept: list[object] = []  # what was registered; a Library that is collected takes its kernels along


class _Module:
    """What `torch.pretend` is: torch asks it when it seeds, forks, or looks for accelerators.

    It says that there is no device, so that code which picks an accelerator by itself keeps to the CPU.
    """

    def is_available(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 0

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: object = None) -> None:
        """Nothing is ever under way."""

    def empty_cache(self) -> None:
        """There is no cache."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers come from the CPU's generator, which torch seeds itself."""


def register() -> None:
    """Makes the device known to torch; a second call does nothing.

    It lasts until the process ends. The default device, random numbers and results on the CPU stay as they
    were, and `torch.accelerator.is_available()` stays false. But `torch.accelerator.current_accelerator()`
    answers "pretend" unless it is asked for an available one: torch's autograd wants hooks of the backend,
    and with them counts it as built in. It would also take the place of a real accelerator, so the test is
    skipped where there is one, as it is where torch is too old to have backends in Python.
    """
    if _kept:
        return
    if not hasattr(getattr(torch._C, "_acc", None), "register_python_privateuseone_device_guard"):
        pytest.skip("this torch has no backends in Python", allow_module_level=True)
    if torch.accelerator.is_available():
        pytest.skip("there is a real accelerator", allow_module_level=True)

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        """Autograd's engine asks for them, on the CPU too, once there is a device of this kind."""

        def is_available(self) -> bool:
            return False

        def is_built(self) -> bool:
            return True

        def has_primary_context(self, index: int) -> bool:
            return True

    class Guard(torch._C._acc.DeviceGuard):
        """Tells autograd's engine that there is one device; the base class makes "switching" to it free."""

        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    hooks, guard = Hooks(), Guard()
    rename_privateuse1_backend(DEVICE)
    torch_untyped: Any = torch
    torch_untyped._register_device_module(DEVICE, _Module())
    torch._C._acc.register_python_privateuseone_hook(hooks)
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    library: Any = Library  # untyped, all of it
    fallback, kernels = library("_", "IMPL"), library("aten", "IMPL")
    _kept.extend((hooks, guard, fallback, kernels))
    fallback.fallback(_run, "PrivateUse1")
    for op in _ops_with_substitutes():
        kernels.impl(op, partial(_run, op), "PrivateUse1")
    kernels.impl("copy_", _copy, "PrivateUse1")
    kernels.impl("_to_copy", _to_copy, "PrivateUse1")
    kernels.impl("convolution_overrideable", partial(_run, torch.ops.aten.convolution.default), "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        kernels.impl("scaled_dot_product_attention", _attention, key)
    torch_untyped.UntypedStorage.__new__ = _new_storage


def _ops_with_substitutes() -> list[Any]:
    """The ops with a kernel for the CPU and another for any backend, which would win over the fallback.

    The substitute may round otherwise (the one of native_layer_norm does).
    """
    has, ops = torch._C._dispatch_has_kernel_for_dispatch_key, []
    general = (
        "CompositeExplicitAutograd",
        "CompositeExplicitAutogradNonFunctional",
        "CompositeImplicitAutograd",
    )
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and has(name, "CPU") and any(has(name, key) for key in general):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            ops.append(getattr(getattr(torch.ops.aten, packet), overload or "default"))
    return ops


def _on_device(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the same memory. It only borrows: it must not outlive the device's tensor."""
    memory = tensor.untyped_storage()
    borrowed = torch._C._construct_storage_from_data_pointer(
        memory.data_ptr(), torch.device("cpu"), memory.nbytes()
    )
    empty = torch.empty(0, dtype=tensor.dtype)
    return _read_as(tensor, empty.set_(borrowed, tensor.storage_offset(), tensor.shape, tensor.stride()))


def _read_as(model: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the marks of another that its values are to be read negated or conjugated."""
    tensor = torch._neg_view(tensor) if model.is_neg() else tensor
    return tensor.conj() if model.is_conj() else tensor


def _host_storage(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    """A storage of the CPU on the device's memory, which it keeps alive."""
    if not memory.nbytes():
        return torch.empty(0).untyped_storage()
    buffer = (ctypes.c_char * memory.nbytes()).from_address(memory.data_ptr())
    buffer.owner = memory  # type: ignore[attr-defined]
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def _wrap(host: torch.Tensor) -> torch.Tensor:
    """A tensor of the device that owns the memory of a CPU tensor.

    DLPack is the way in that needs no compiler: the memory is exported as bytes of the CPU, the export is
    relabelled, and torch takes it for memory of the device.
    """
    memory = torch.empty(0, dtype=torch.uint8).set_(host.untyped_storage())
    capsule = torch._C._to_dlpack(memory)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    # struct DLTensor { void *data; struct DLDevice { int32_t device_type, device_id; } device; ... }
    device = pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(device).value = _EXTENSION_DEVICE
    return _view(torch._C._from_dlpack(capsule), host)


def _view(base: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """A tensor of the device in the memory of `base`, laid out as a CPU tensor on that memory is."""
    view = base.detach()
    if base.dtype != host.dtype:
        size = base.untyped_storage().nbytes() // host.itemsize * host.itemsize
        view = view.as_strided_((base.untyped_storage().nbytes() // base.itemsize,), (1,), 0)
        view = view.view(torch.uint8).as_strided_((size,), (1,), 0).view(host.dtype)
    return _read_as(host, view.as_strided_(host.shape, host.stride(), host.storage_offset()))


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to a value, or to all of a list's or tuple's."""
    if isinstance(value, (list, tuple)):
        return type(value)(function(part) for part in value)
    return function(value)


def _mixed(op: Any, what: str = "") -> RuntimeError:
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{DEVICE}:0 and cpu! (when running {op}{what})"
    )


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
    )


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an op of the device on the CPU."""
    schema = {argument.name: argument for argument in op._schema.arguments}
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by the CPU tensor's id: it, the device's

    def lower(name: str, value: Any) -> Any:
        info = schema[name].alias_info
        written = info is not None and info.is_write
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"Expected a '{DEVICE}' device type for generator but found 'cpu'")
        if isinstance(value, torch.UntypedStorage):
            return _host_storage(value)
        if isinstance(value, torch.device) and value.type == DEVICE:
            return torch.device("cpu")
        if not isinstance(value, torch.Tensor):
            return value
        if _on_device(value):
            # what is empty may be an output yet to be sized, and borrowed memory cannot be
            sizeable = written and value.numel() == 0
            host = torch.empty_like(value, device="cpu") if sizeable else _host(value)
            pairs[id(host)] = host, value
            return host
        if written or (value.dim() and not (name == "indices" and op._schema.name in _CPU_INDICES)):
            raise _mixed(op, f", argument {name}")
        return value

    lowered = [_each(partial(lower, name), value) for name, value in zip(schema, args, strict=False)]
    named = {name: _each(partial(lower, name), value) for name, value in kwargs.items()}
    before = {key: _layout(host) for key, (host, _) in pairs.items()}
    result = op(*lowered, **named)

    def lift(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in pairs:
            return pairs[id(value)][1]
        return place(value)

    def place(value: torch.Tensor) -> torch.Tensor:
        for key, (_, tensor) in pairs.items():
            if value.untyped_storage().data_ptr() == before[key][0]:
                return _view(tensor, value)
        return _wrap(value)

    for key, (host, tensor) in pairs.items():
        if _layout(host) != before[key]:
            tensor.data = place(host)
    return _each(lift, result)


def _copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`copy_`, which alone moves values between the CPU and the device."""
    hosts = [_host(tensor) if _on_device(tensor) else tensor for tensor in (to, source)]
    hosts[0].copy_(hosts[1])
    return to


def _to_copy(source: torch.Tensor, **options: Any) -> torch.Tensor:
    """`_to_copy` without pinned memory, which torch would take for copies that need not be waited for."""
    device = torch.device(options.pop("device", None) or DEVICE)
    options.pop("non_blocking", None)
    host: torch.Tensor = torch.ops.aten._to_copy(_host(source), **options)
    return host if device.type == "cpu" else _wrap(host)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the CPU's choice of algorithm, where torch knows only one."""
    aten: Any = torch.ops.aten
    arguments = query, key, value, mask, dropout, causal
    result: torch.Tensor
    if aten._fused_sdp_choice(*arguments, **options) != _FLASH_ATTENTION:
        result = aten.scaled_dot_product_attention.default.decompose(*arguments, **options)
        return result
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    result, _ = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, causal, attn_mask=mask, scale=options.get("scale")
    )
    return result


_plain_new_storage = torch.UntypedStorage.__new__


def _new_storage(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Memory of the device; torch, which has no allocator for it, would crash (copy.deepcopy asks for it)."""
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == DEVICE:
        return _wrap(torch.empty(*args, dtype=torch.uint8)).untyped_storage()
    return _plain_new_storage(cls, *args, **kwargs)
