"""Products with weights of 4 and 8 bits, against the float64 product with the same weights written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from vserve.kernels import grouped, packed
from vserve.kernels.grouped import Shape
from vserve.kernels.packed import Form, Packed

Check = Callable[[Tensor, Tensor], None]
GPU = torch.cuda.is_available()
# The interpreter multiplies no bf16 matrices.
DTYPES = [torch.bfloat16, torch.float16] if GPU else [torch.float32]
EPS = 1e-5
WEIGHTS = {
    # outputs, inputs, bits, group, form
    "awq": (40, 256, 4, 128, Form.ZERO),
    "awq group 32, odd outputs": (37, 160, 4, 32, Form.ZERO),
    "group 64, tail": (70, 192, 4, 64, Form.CENTRE),
    "one group an output": (20, 384, 4, 384, Form.ZERO),
    "q4_1": (36, 160, 4, 32, Form.MINIMUM),
    "q8_0": (33, 96, 8, 32, Form.CENTRE),
    "q6_k": (34, 256, 8, 16, Form.CENTRE),
    "gptq 8": (20, 384, 8, 128, Form.ZERO),
    "fp8": (20, 160, 8, 160, Form.FLOAT),
}
if GPU:
    WEIGHTS["large"] = (1000, 4096, 4, 128, Form.ZERO)
    WEIGHTS["large fp8"] = (6144, 1024, 8, 1024, Form.FLOAT)


def draw(name: str, random: torch.Generator, device: torch.device) -> tuple[Packed, Tensor]:
    """A weight, and the same in float64 on the CPU."""
    outputs, inputs, bits, group, form = WEIGHTS[name]
    if form is Form.FLOAT:
        q = torch.randn(outputs, inputs, generator=random).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        q = torch.randint(0, 2**bits, (outputs, inputs), generator=random, dtype=torch.uint8)
    groups = (outputs, inputs // group)
    scale = (torch.rand(groups, generator=random) * 0.01 + 0.001).to(torch.float16)
    offset = None
    if form is Form.ZERO:
        offset = torch.randint(0, 2**bits + 1, groups, generator=random).to(torch.float16)
    elif form is Form.MINIMUM:
        offset = -scale * 15 * torch.rand(groups, generator=random).to(torch.float16)
    centre = 2 ** (bits - 1) if form is Form.CENTRE else 0
    on_device = [None if part is None else part.to(device) for part in (q, scale, offset)]
    assert on_device[0] is not None
    assert on_device[1] is not None
    weight = packed.pack(on_device[0], on_device[1], on_device[2], bits=bits, form=form, centre=centre)
    assert torch.equal(packed.integers(weight).cpu(), q)
    return weight, packed.dense(weight, torch.float64).cpu()


def wide(x: Tensor) -> Tensor:
    return x.double().cpu()


def normed(x: Tensor, norm: Tensor) -> Tensor:
    return wide(x) * (wide(x).square().mean(1, keepdim=True) + EPS).rsqrt() * wide(norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_one_row_with_norm_bias_and_residual_is_the_float64_product(
    name: str, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    weight, numbers = draw(name, random, device)
    x, norm = (torch.randn(1, weight.inputs, generator=random).to(device, dtype) for _ in range(2))
    bias, residual = (torch.randn(1, weight.outputs, generator=random).to(device, dtype) for _ in range(2))
    out = grouped.linear(x, weight, norm=norm[0], eps=EPS, bias=bias[0], residual=residual)
    close(out, normed(x, norm[0]) @ numbers.T + wide(bias) + wide(residual))
    close(grouped.linear(x, weight), wide(x) @ numbers.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, about in WEIGHTS.items() if about[0] % 2 == 0])
@pytest.mark.parametrize("with_norm", [False, True])
def test_a_gated_row_is_the_float64_one(
    name: str, with_norm: bool, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    weight, numbers = draw(name, random, device)
    x, norm = (torch.randn(1, weight.inputs, generator=random).to(device, dtype) for _ in range(2))
    bias = torch.randn(weight.outputs, generator=random).to(device, dtype)
    out = grouped.gated_row(x, weight, norm=norm[0] if with_norm else None, eps=EPS, bias=bias)
    gate, up = ((normed(x, norm[0]) if with_norm else wide(x)) @ numbers.T + wide(bias)).chunk(2, 1)
    close(out, silu(gate) * up)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows", [2, 5, *([16, 40, 128, 200] if GPU else [])])
@pytest.mark.parametrize(("splits", "dtype"), [(1, DTYPES[0]), (3, DTYPES[-1])])  # each pair is compiled anew
def test_rows_are_the_float64_product_however_many_programs_share_it(
    name: str, rows: int, splits: int, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    weight, numbers = draw(name, random, device)
    x = torch.randn(rows, weight.inputs, generator=random).to(device, dtype)
    bias = torch.randn(weight.outputs, generator=random).to(device, dtype)
    residual = torch.randn(rows, weight.outputs, generator=random).to(device, dtype)
    shape = Shape(64, 64, 4, 2, splits)
    expected = wide(x) @ numbers.T
    for _ in range(2):  # the counters are as they were
        out = grouped.linear(x, weight, bias=bias, residual=residual, shape=shape)
        close(out, expected + wide(bias) + wide(residual))
        assert not weight.counters.any()
    if GPU:
        close(grouped.linear(x, weight), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_written_out_are_those_of_the_formula(
    name: str, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    weight, numbers = draw(name, random, device)
    close(grouped.write_out(weight, dtype), numbers)


def test_a_row_that_is_not_even_reads_nothing_behind_it(device: torch.device, random: torch.Generator) -> None:
    weight, _ = draw("awq group 32, odd outputs", random, device)
    held = torch.full((2, 2 * weight.inputs), float("nan"), device=device, dtype=DTYPES[0])
    held[:, : weight.inputs] = torch.randn(2, weight.inputs, generator=random)
    x = held[:, : weight.inputs]
    assert grouped.linear(x, weight).isfinite().all()
    assert grouped.linear(x[:1], weight).isfinite().all()
