"""The pretended accelerator computes what the CPU does, bit for bit, and is as strict as CUDA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tests.pretend_device import DEVICE, register

register()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attention(x: torch.Tensor, **options: Any) -> torch.Tensor:
    heads = x[:, :, None].transpose(1, 2).expand(-1, 4, -1, -1)
    return functional.scaled_dot_product_attention(heads, heads, heads, **options)


def in_place(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, :, 2:5] -= x[:, :, :3]
    x[0] = x[1]
    x[1].addmm_(x[0], x[0, :6].T @ x[0, :6])
    x[1].mul_(2).add_(1)
    return x


def positive(x: torch.Tensor) -> torch.Tensor:
    square = x[0].float()
    return square @ square.T + 9 * torch.eye(len(square), device=x.device)


SAME: dict[str, Callable[[torch.Tensor], Any]] = {
    "matmul": lambda x: x @ x.transpose(1, 2),
    "linear": lambda x: functional.linear(x, x[0], x[0, :, 0]),
    "layer_norm": lambda x: functional.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: functional.rms_norm(x, x.shape[-1:], x[0, 0]),
    "softmax": lambda x: functional.softmax(x, -1, dtype=torch.float32),
    "causal": lambda x: attention(x, is_causal=True),
    "masked": lambda x: attention(x, attn_mask=torch.ones(6, 6, dtype=torch.bool, device=x.device).tril()),
    "embedding": lambda x: functional.embedding(torch.arange(3, device=x.device), x[0]),
    "split": lambda x: torch.split(x, [2, 6], dim=2),
    "cholesky": lambda x: torch.linalg.cholesky(positive(x)),
    "in_place": in_place,
    "numbers": lambda x: (x * 2.5 + 1) / 3 - torch.tensor(0.5),
    "indices": lambda x: (x[:, torch.tensor([2, 0])], x[x > 0], x.topk(2)),
    "bits": lambda x: x.view(torch.uint8).view(torch.int16)[:, 1:, 2:5],
    "complex": lambda x: torch.fft.fft(x.float()).conj() * 2,
    "convolution": lambda x: functional.conv1d(x, x[:, :1, :3].repeat(3, 1, 1), groups=6),
}


def leaves(result: Any) -> list[torch.Tensor]:
    return (
        [result] if isinstance(result, torch.Tensor) else [leaf for part in result for leaf in leaves(part)]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SAME)
def test_results_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    x = random(2, 6, 8, dtype=dtype)
    expected, found = leaves(SAME[name](x)), leaves(SAME[name](x.to(DEVICE)))
    for cpu, device in zip(expected, found, strict=True):
        assert device.device.type == DEVICE
        assert torch.equal(cpu, device.cpu())
        assert (cpu.dtype, cpu.stride()) == (device.dtype, device.stride())


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "add": lambda cpu, device: device + cpu,
    "in place": lambda cpu, device: cpu.add_(device),
    "scalar in place": lambda cpu, device: cpu[0, 0].clone().add_(device[0, 0]),
    "out": lambda cpu, device: torch.add(device, 1, out=cpu),
    "matmul": lambda cpu, device: cpu @ device,
    "linear": lambda cpu, device: functional.linear(cpu, device),
    "cat": lambda cpu, device: torch.cat([device, cpu]),
    "where": lambda cpu, device: torch.where(device > 0, device, cpu),
    "mask": lambda cpu, device: device.masked_fill(cpu > 0, 0.0),
    "equal": lambda cpu, device: torch.equal(device, cpu),
    "embedding": lambda cpu, device: functional.embedding(cpu[0].long().abs() % 2, device),
    "index": lambda cpu, device: cpu[torch.zeros(1, dtype=torch.long, device=device.device)],
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_the_cpu_among_the_arguments_raise(name: str) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        MIXED[name](random(4, 4), random(4, 4).to(DEVICE))


def test_what_else_cuda_refuses() -> None:
    x = random(3).to(DEVICE)
    with pytest.raises(TypeError, match="can't convert"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator(), device=DEVICE)


def test_values_cross_by_copies() -> None:
    x = random(2, 3)
    y = torch.zeros(2, 3, device=DEVICE)
    y.copy_(x)
    y[0] = x[1]
    assert y.tolist() == [x[1].tolist(), x[1].tolist()]
    assert torch.zeros(2, 3).copy_(y).equal(x[[1, 1]])
    assert y.to("cpu", torch.float16, non_blocking=True).equal(x[[1, 1]].half())
    assert float(y[0, 0]) == y[0, 0].item() == x[1, 0]
    assert bool((y != 1).any())
    assert bool(torch.isfinite(y).all())


def test_views_share_memory_and_outlive_their_base() -> None:
    x = torch.zeros(4, 4, device=DEVICE)
    view = x[1:, 2:]
    view += 1
    assert x.sum() == 6
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert view.data_ptr() == x.data_ptr() + 6 * x.itemsize
    assert x.clone().data_ptr() != x.data_ptr()
    del x
    assert view.sum() == 6
    out = torch.empty(0, device=DEVICE)
    torch.add(view, 1, out=out)
    assert out.tolist() == [[2, 2]] * 3
    parameter = nn.Parameter(torch.ones(2, device=DEVICE))
    parameter.data = out.half()
    assert parameter.sum() == 12


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    layers.register_buffer("buffer", torch.ones(2))
    return layers


@pytest.mark.parametrize("foreach", [None, False, True])
def test_training_steps_are_those_of_the_cpu(foreach: bool | None) -> None:
    x, trained = random(5, 4), []
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(network().to(device))
        optimizer = torch.optim.Adam(model.parameters(), foreach=foreach)
        for _ in range(3):
            optimizer.zero_grad()
            model(x.to(device)).square().mean().backward()
            optimizer.step()
        assert {value.device.type for value in model.state_dict().values()} == {device}
        trained.append([parameter.cpu() for parameter in model.parameters()])
    assert all(map(torch.equal, *trained))


def test_functional_calls() -> None:
    model, x = network(), random(5, 4)
    halves = {name: value / 2 for name, value in model.state_dict().items()}
    on_device = {name: value.to(DEVICE) for name, value in halves.items()}
    with torch.no_grad():
        expected = torch.func.functional_call(model, halves, (x,))
        found = torch.func.functional_call(model.to(DEVICE), on_device, (x.to(DEVICE),))
    assert torch.equal(expected, found.cpu())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_llama_gives_the_logits_of_the_cpu(dtype: torch.dtype, implementation: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation(implementation)
    model = model.to(dtype).eval()
    tokens = torch.arange(22).reshape(2, 11)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for extra in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            expected = model.to("cpu")(tokens, **extra).logits
            moved = {name: value.to(DEVICE) for name, value in extra.items()}
            found = model.to(DEVICE)(tokens.to(DEVICE), **moved).logits
        assert found.device.type == DEVICE
        assert torch.equal(expected, found.cpu())
    with pytest.raises(RuntimeError, match="same device"):
        model(tokens)


def test_nobody_is_offered_the_device() -> None:
    register()
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.empty(1).device.type == "cpu"
    assert copy.deepcopy(torch.ones(2)).untyped_storage().device.type == "cpu"
