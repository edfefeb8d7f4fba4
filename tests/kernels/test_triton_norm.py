"""RMS norm, SiLU and the rotary write, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vserve.kernels import reference_gpu
from vserve.kernels.activation import activate, gated, silu_mul
from vserve.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from vserve.kernels.rope import norm_rope_and_write, rope_and_write, split_qkv

Check = Callable[[Tensor, Tensor], None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (3, 65), (5, 2048), (0, 64)])
def test_rms_norm_is_the_float64_one(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    x = torch.randn(rows, width, generator=random).to(device, dtype)
    residual = torch.randn(rows, width, generator=random).to(device, dtype)
    weight = torch.rand(width, generator=random).to(device, dtype)

    def wide(x: Tensor) -> Tensor:
        x = x.double().cpu()
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * weight.double().cpu()

    close(rms_norm(x, weight, EPS), wide(x))
    expected = x.double().cpu() + residual.double().cpu()
    y, total = add_rms_norm(x, residual, weight, EPS)
    assert total is residual
    close(total, expected)
    close(y, wide(total))


def test_a_norm_reads_rows_that_lie_apart(device: torch.device, random: torch.Generator, close: Check) -> None:
    wide = torch.randn(4, 100, generator=random).to(device)
    weight = torch.rand(33, generator=random).to(device)
    close(rms_norm(wide[:, 10:43], weight, EPS), rms_norm(wide[:, 10:43].contiguous(), weight, EPS).double().cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (3, 1031), (2, 7)])
def test_silu_mul_is_the_float64_one(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    gate_up = torch.randn(rows, 2 * width, generator=random).mul(4).to(device, dtype)
    gate, up = gate_up.double().cpu().chunk(2, dim=1)
    close(silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_the_float64_ones(
    name: str, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    x = torch.randn(3, 2062, generator=random).mul(4).to(device, dtype)
    wide = x.double().cpu()
    close(activate(x, name), ACTIVATIONS[name](wide))
    close(gated(x, name), ACTIVATIONS[name](wide[:, :1031]) * wide[:, 1031:])
    assert activate(torch.full((1, 4), 80.0, device=device), name).tolist() == [[80.0] * 4]
    assert activate(torch.full((1, 4), -80.0, device=device), name).abs().max() < 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (3, 65), (0, 64)])
def test_layer_norm_is_the_float64_one(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    x, residual = (torch.randn(rows, width, generator=random).add(3).to(device, dtype) for _ in range(2))
    weight, bias = (torch.rand(width, generator=random).to(device, dtype) for _ in range(2))

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(
            x.double().cpu(), (width,), weight.double().cpu(), bias.double().cpu(), EPS
        )

    close(layer_norm(x, weight, bias, EPS), wide(x))
    expected = x.double().cpu() + residual.double().cpu()
    y, total = add_layer_norm(x, residual, weight, bias, EPS)
    assert total is residual
    close(total, expected)
    close(y, wide(total))


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "width", "size"),
    [(1, 9, 3, 64, 16), (5, 4, 4, 96, 8), (3, 20, 4, 128, 32), (2, 2, 1, 256, 16)],
)
def test_heads_are_turned_and_written_to_their_slots_and_nowhere_else(
    tokens: int,
    q_heads: int,
    kv_heads: int,
    width: int,
    size: int,
    dtype: torch.dtype,
    with_norm: bool,
    device: torch.device,
    random: torch.Generator,
    close: Check,
) -> None:
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * width, generator=random).to(device, dtype)
    angles = torch.rand(tokens, width // 2, generator=random) * 6.0
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    slots = torch.randperm(4 * size, generator=random)[:tokens].to(device)
    if tokens > 1:
        slots[1] = -1
    norms = [torch.rand(width, generator=random).to(device, dtype) if with_norm else None for _ in range(2)]
    caches = [torch.full((4, size, kv_heads, width), float("nan"), dtype=dtype, device=device) for _ in range(2)]
    q, k, v = split_qkv(qkv, q_heads, kv_heads, width)
    if with_norm:
        out = norm_rope_and_write(q, k, v, *norms, EPS, cos, sin, *caches, slots)
    else:
        out = rope_and_write(q, k, v, cos, sin, *caches, slots)

    expected = [torch.full(caches[0].shape, float("nan"), dtype=torch.float64) for _ in range(2)]
    wide = [None if x is None else x.double().cpu() for x in (q, k, v, *norms)]
    turned = reference_gpu.norm_rope_and_write(
        *wide, EPS, cos.cpu().double(), sin.cpu().double(), *expected, slots.cpu()
    )
    close(out, turned)
    for cache, reference in zip(caches, expected, strict=True):
        assert torch.equal(cache.isnan().cpu(), reference.isnan())
        close(cache.nan_to_num(), reference.nan_to_num())
