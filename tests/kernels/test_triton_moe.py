"""The grouped product of experts, against float64, with NaN in the weights of every expert that nobody chose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vserve.kernels import moe, reference_gpu

Check = Callable[[Tensor, Tensor], None]
# The interpreter multiplies no bf16 matrices.
DTYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "count", "active", "width", "inner"),
    [(1, 8, 2, 64, 48), (5, 3, 3, 40, 33), (70, 4, 1, 33, 16), (23, 60, 8, 64, 32), (2, 1, 1, 16, 16)],
)
def test_experts_are_the_float64_ones(
    tokens: int,
    count: int,
    active: int,
    width: int,
    inner: int,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
    close: Check,
) -> None:
    x = torch.randn(tokens, width, generator=random).to(device, dtype)
    chosen = torch.stack([torch.randperm(count, generator=random)[:active] for _ in range(tokens)]).to(device)
    weights = torch.rand(tokens, active, generator=random).to(device)
    gate_up = (torch.randn(count, 2 * inner, width, generator=random) * 0.2).to(device, dtype)
    down = (torch.randn(count, width, inner, generator=random) * 0.2).to(device, dtype)
    wide = [t.cpu().double() if t.is_floating_point() else t.cpu() for t in (x, chosen, weights, gate_up, down)]
    for expert in set(range(count)) - set(chosen.flatten().tolist()):
        gate_up[expert] = down[expert] = torch.nan
    close(moe.experts(x, chosen, weights, gate_up, down), reference_gpu.experts(*wide))


def test_all_tokens_may_take_the_same_expert(device: torch.device, random: torch.Generator, close: Check) -> None:
    x, gate_up, down = torch.randn(40, 32), torch.randn(9, 32, 32) * 0.2, torch.randn(9, 32, 16) * 0.2
    chosen, weights = torch.full((40, 1), 7), torch.ones(40, 1)
    found = moe.experts(*(t.to(device) for t in (x, chosen, weights, gate_up, down)))
    close(found, reference_gpu.experts(x.double(), chosen, weights.double(), gate_up.double(), down.double()))


def test_no_token_is_no_work(device: torch.device) -> None:
    found = moe.experts(
        torch.empty(0, 32, device=device),
        torch.empty(0, 2, dtype=torch.int64, device=device),
        torch.empty(0, 2, device=device),
        torch.zeros(4, 32, 32, device=device),
        torch.zeros(4, 32, 16, device=device),
    )
    assert found.shape == (0, 32)
