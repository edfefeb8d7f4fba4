"""The products of experts, against float64, with NaN in the weights of every expert that nobody chose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vserve.kernels import experts, moe, reference_gpu
from vserve.kernels.moe import Rows
from vserve.kernels.moe_packed import Stack, new_stack
from vserve.kernels.packed import Form, Packed, dense, pack
from vserve.kernels.route import Routes

Check = Callable[[Tensor, Tensor], None]
GPU = torch.cuda.is_available()
# The interpreter multiplies no bf16 matrices.
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32]
SIZES = [(1, 8, 2, 64, 48), (5, 3, 3, 40, 33), (50, 4, 1, 33, 16), (11, 20, 6, 64, 32), (2, 1, 1, 16, 16)]
SIZES += [(8, 128, 8, 2048, 768), (600, 16, 2, 512, 256), (1100, 4, 2, 320, 200)] if GPU else []
EPS = 1e-5


class Case:
    """Random inputs and weights; experts without a token hold NaN."""

    def __init__(
        self, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, random: torch.Generator
    ) -> None:
        tokens, count, active, width, inner = sizes

        def drawn(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=random) * scale).to(dtype)

        chosen = torch.stack([torch.randperm(count, generator=random)[:active] for _ in range(tokens)])
        self.x, self.residual, self.norm = drawn(tokens, width), drawn(tokens, width), 1 + drawn(width, scale=0.3)
        self.gate_up = drawn(count, 2 * inner, width, scale=width**-0.5)
        self.down = drawn(count, width, inner, scale=inner**-0.5)
        self.weights = torch.rand(tokens, active, generator=random)
        self.wide = [t.double() for t in (self.x, self.weights, self.gate_up, self.down, self.residual, self.norm)]
        self.chosen = chosen
        for expert in set(range(count)) - set(chosen.flatten().tolist()):
            self.gate_up[expert] = self.down[expert] = torch.nan
        self.routes = Routes(chosen.to(device, torch.int32), self.weights.to(device))
        self.x, self.residual, self.norm = self.x.to(device), self.residual.to(device), self.norm.to(device)
        self.gate_up, self.down = self.gate_up.to(device), self.down.to(device)

    def many(self, *, added: bool) -> Tensor:
        return experts.many(self.x, self.routes, self.gate_up, self.down, self.residual if added else None)

    def few(self) -> Tensor:
        # Interpreted, a program costs milliseconds: fewer of them there.
        shapes = None if GPU else (Rows(8, 32, 1), Rows(16, 16, 1))
        return moe.few(self.x, self.norm, EPS, self.routes, self.gate_up, self.down, shapes=shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_experts_are_the_float64_ones(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
    close: Check,
) -> None:
    case = Case(sizes, dtype, device, random)
    x, weights, gate_up, down, residual, _ = case.wide
    wanted = reference_gpu.experts(x, case.chosen, weights, gate_up, down)
    close(case.many(added=False), wanted)
    close(case.many(added=True), wanted + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 8, 2, 40, 24), (2, 3, 3, 24, 17), (1, 20, 7, 24, 100), (1, 2, 1, 300, 9)])
def test_few_tokens_are_the_float64_ones_with_norm_and_sum(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
    close: Check,
) -> None:
    case = Case(sizes, dtype, device, random)
    x, weights, gate_up, down, _, norm = case.wide
    normed = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * norm
    close(case.few(), x + reference_gpu.experts(normed, case.chosen, weights, gate_up, down))


def test_all_tokens_may_take_the_same_expert(device: torch.device, random: torch.Generator, close: Check) -> None:
    case = Case((40, 9, 1, 32, 16), torch.float32, device, random)
    case.gate_up[:7] = torch.nan
    case.routes.chosen.fill_(7)
    x, weights, gate_up, down, residual, _ = case.wide
    case.gate_up[7], case.down[7] = gate_up[7].to(device), down[7].to(device)
    chosen = torch.full_like(case.chosen, 7)
    close(case.many(added=True), residual + reference_gpu.experts(x, chosen, weights, gate_up, down))


@pytest.mark.parametrize("tokens", [2, 18])
def test_rows_of_nan_touch_no_other(tokens: int, device: torch.device, random: torch.Generator) -> None:
    case = Case((tokens, 6, 2, 16, 8), torch.float32, device, random)
    kept = slice(1, None)
    before = case.many(added=True)[kept], case.few()[kept]
    case.x[0] = case.residual[0] = torch.nan
    assert torch.equal(case.many(added=True)[kept], before[0])
    assert torch.equal(case.few()[kept], before[1])


def test_a_token_among_others_is_the_same_as_among_fewer(device: torch.device, random: torch.Generator) -> None:
    case = Case((20, 6, 2, 32, 16), torch.float32, device, random)
    whole = case.many(added=True)
    part = Routes(case.routes.chosen[9:], case.routes.weights[9:])
    assert torch.equal(experts.many(case.x[9:], part, case.gate_up, case.down, case.residual[9:]), whole[9:])


def test_no_token_is_no_work(device: torch.device) -> None:
    routes = Routes(torch.empty(0, 2, dtype=torch.int32, device=device), torch.empty(0, 2, device=device))
    gate_up, down = torch.zeros(4, 32, 32, device=device), torch.zeros(4, 32, 16, device=device)
    assert experts.many(torch.empty(0, 32, device=device), routes, gate_up, down).shape == (0, 32)


FORMS = [(4, 32, Form.ZERO), (4, 64, Form.MINIMUM), (4, 32, Form.CENTRE), (8, 16, Form.ZERO), (8, 0, Form.FLOAT)]


def packed_stack(count: int, outputs: int, inputs: int, kind: tuple[int, int, Form], random: torch.Generator) -> Stack:
    """Random weights of so many experts."""
    bits, group, form = kind
    groups = inputs // (group or inputs)
    stack: Stack | None = None
    for expert in range(count):
        scale = (torch.rand(outputs, groups, generator=random) * 0.02 + 0.01) * 2.0 ** (4 - bits)  # or fp16 overflows
        offset = torch.randint(0, 2**bits, (outputs, groups), generator=random).to(torch.float16)
        q = torch.randint(0, 2**bits, (outputs, inputs), generator=random).to(torch.uint8)
        if form is Form.FLOAT:
            q = torch.randn(outputs, inputs, generator=random).to(torch.float8_e4m3fn).view(torch.uint8)
        if form is Form.MINIMUM:
            offset *= -0.01
        given = offset if form.has_offset else None
        scale = scale if form is Form.FLOAT else scale.to(torch.float16)
        weight = pack(q, scale, given, bits=bits, form=form, centre=2 ** (bits - 1) if form is Form.CENTRE else 0)
        stack = stack or new_stack(count, weight)
        assert stack.takes(weight)
        stack.put(expert, weight)
    assert stack is not None
    return stack


def written(stack: Stack) -> Tensor:
    """The weights of a stack, float64 [E, N, K]."""
    parts = zip(stack.data, stack.numbers, strict=True)
    about = (stack.bits, stack.group, stack.form, stack.centre)
    return torch.stack([dense(Packed(*part, *about, torch.empty(0)), torch.float64) for part in parts])


@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: f"{kind[2].name} {kind[0]}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_experts_are_the_float64_ones(
    kind: tuple[int, int, Form], dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    tokens, count, active, width, inner = (70, 12, 3, 256, 192) if GPU else (9, 5, 2, 64, 64)
    gate_up, down = (packed_stack(count, *size, kind, random) for size in ((2 * inner, width), (width, inner)))
    chosen = torch.stack([torch.randperm(count - 1, generator=random)[:active] for _ in range(tokens)])
    x, weights = torch.randn(tokens, width, generator=random).to(dtype), torch.rand(tokens, active, generator=random)
    residual = torch.randn(tokens, width, generator=random).to(dtype)
    wanted = residual.double() + reference_gpu.experts(
        x.double(), chosen, weights.double(), written(gate_up), written(down)
    )
    gate_up.numbers[count - 1] = down.numbers[count - 1] = torch.nan  # whom nobody chose
    stacks = [stack._replace(data=stack.data.to(device), numbers=stack.numbers.to(device)) for stack in (gate_up, down)]
    routes = Routes(chosen.to(device, torch.int32), weights.to(device))
    close(experts.many(x.to(device), routes, *stacks, residual.to(device)), wanted)


@pytest.mark.parametrize("kind", FORMS[:1] + FORMS[-1:], ids=lambda kind: kind[2].name)
def test_a_stack_of_several_experts_rows_splits_into_theirs(
    kind: tuple[int, int, Form], random: torch.Generator
) -> None:
    stack = packed_stack(2, 48, 64, kind, random)
    assert torch.equal(written(stack.split(3)), written(stack).view(6, 16, 64))
