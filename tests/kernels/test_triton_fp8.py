"""Rows of activations in e4m3, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from vserve.kernels import fp8

GPU = torch.cuda.is_available()
EPS = 1e-5


@pytest.mark.parametrize("kind", ["plain", "norm", "gated"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("width", [100, 576])
def test_rows_become_e4m3_with_the_largest_number_at_the_edge(
    kind: str, given: bool, width: int, device: torch.device, random: torch.Generator
) -> None:
    x = torch.randn(3, 2 * width if kind == "gated" else width, generator=random)
    x[1] *= 100
    norm = torch.randn(width, generator=random)
    fixed = torch.tensor([0.01]) if given else None
    q, scale = fp8.quantise_rows(
        x.to(device),
        norm=norm.to(device) if kind == "norm" else None,
        eps=EPS,
        gated=kind == "gated",
        scale=None if fixed is None else fixed.to(device),
    )
    v = x
    if kind == "norm":
        v = x * (x.square().mean(1, keepdim=True) + EPS).rsqrt() * norm
    elif kind == "gated":
        v = silu(x[:, :width]) * x[:, width:]
    expected = v.abs().amax(1, keepdim=True) / fp8.LARGEST if fixed is None else fixed.expand(3, 1)
    assert torch.allclose(scale.cpu(), expected, rtol=1e-5)
    numbers = q.cpu().float()
    assert numbers.isfinite().all()
    clipped = (v / scale.cpu()).clamp(-fp8.LARGEST, fp8.LARGEST)
    near = (numbers - clipped).abs() <= clipped.abs() * 2**-4 + (2**-10 if GPU else 2**-6)
    # The interpreter loses the carry of a number that is rounded up to a power of two, and has no subnormal ones.
    assert near.all() if GPU else near.float().mean() > 0.9


def test_a_row_of_zeros_stays_zeros(device: torch.device) -> None:
    q, scale = fp8.quantise_rows(torch.zeros(2, 64, device=device))
    assert not q.float().any()
    assert (scale > 0).all()


if GPU:

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("rows", [1, 17, 300])
    def test_a_product_of_e4m3_numbers_is_the_float64_one(
        rows: int, dtype: torch.dtype, device: torch.device, random: torch.Generator
    ) -> None:
        x = torch.randn(rows, 512, generator=random).to(device, dtype)
        data = torch.randn(48, 512, generator=random).to(device).to(torch.float8_e4m3fn)
        w_scale = torch.rand(1, 48, generator=random).to(device) + 0.1
        bias = torch.randn(48, generator=random).to(device, dtype)
        q, scale = fp8.quantise_rows(x)
        out = fp8.multiply(q, scale, data, w_scale, dtype, bias)
        expected = (q.double() * scale.double()) @ (data.double() * w_scale.double().T).T + bias.double()
        assert out.dtype == dtype
        assert (out.double() - expected).norm() / expected.norm() < 8e-3
