"""Linear layers that stay quantised on a GPU, against the float64 product with their numbers written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from vserve.kernels import fp8
from vserve.model.gpu_linear import FloatGpuLinear, GroupedGpuLinear, StackedGpuLinear
from vserve.model.grouped_weights import FloatTensor
from vserve.model.kinds import LAYOUTS, Kind
from vserve.model.linear import PlainLinear
from vserve.model.quantised_linear import Place, online_fp8, quantised_linear
from vserve.model.weights import StoredTensor

Check = Callable[[Tensor, Tensor], None]
GPU = torch.cuda.is_available()
DTYPE = torch.float16 if GPU else torch.float32
BLOCKS = [kind for kind, layout in LAYOUTS.items() if layout.block_size > 1]
HALVES = {Kind.Q4_1: (0, 2), Kind.Q5_1: (0, 2), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
"""Where a block keeps its float16 numbers; elsewhere only at its beginning."""


SHARES = {Kind.Q4_K: 1 / 32, Kind.Q5_K: 1 / 32, Kind.Q6_K: 1 / 64}
"""By what a block's scale is less than other kinds' where its parts have scales of their own, about so large."""


def blocks(kind: Kind, rows: int, cols: int, random: torch.Generator) -> StoredTensor:
    """Random integers under scales of a model's size, so that float16 has room for a gate times what it lets pass."""
    layout = LAYOUTS[kind]
    raw = torch.randint(0, 256, (rows * cols // layout.block_size, layout.block_bytes), generator=random).to(
        torch.uint8
    )
    for at in HALVES.get(kind, (0,)):
        wide = (torch.rand(raw.shape[0], 1, generator=random) * 0.01 + 0.001) * SHARES.get(kind, 1.0)
        half = wide.to(torch.float16)
        raw[:, at : at + 2] = half.view(torch.uint8)
    return StoredTensor(f"a {kind}", kind, (rows, cols), raw.view(-1))


def layer(stored: Sequence[StoredTensor], bias: Tensor | None, device: torch.device) -> object:
    def plain() -> PlainLinear:
        raise AssertionError("a CPU's")

    return quantised_linear(stored, bias, Place(device, DTYPE, True), plain, False, lambda *_: None)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rows", [1, 5, 140])
def test_gguf_blocks_stay_packed_and_give_their_product(
    kind: Kind, rows: int, device: torch.device, random: torch.Generator, close: Check
) -> None:
    stored = [blocks(kind, 24, 256, random), blocks(kind, 8, 256, random)]
    bias = torch.randn(32, generator=random).to(device, DTYPE)
    made = layer(stored, bias, device)
    assert isinstance(made, GroupedGpuLinear)
    dense = sum(part.shape[0] * part.shape[1] for part in stored) * 2
    assert made.weight.nbytes < 0.7 * dense
    numbers = torch.cat([part.dense() for part in stored]).double()
    x = torch.randn(rows, 256, generator=random).to(device, DTYPE)
    residual = torch.randn(rows, 32, generator=random).to(device, DTYPE)
    expected = x.double().cpu() @ numbers.T + bias.double().cpu()
    # Scales are rounded to float16 where a format works them out.
    loose(made(x), expected)
    loose(made.added(x, residual.clone()), expected + residual.double().cpu())
    norm = torch.randn(256, generator=random).to(device, DTYPE)
    wide = x.double().cpu()
    normed = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * norm.double().cpu()
    gate, up = (normed @ numbers.T + bias.double().cpu()).chunk(2, 1)
    loose(made.normed_gated(x, norm, 1e-5), silu(gate) * up)


def loose(found: Tensor, wanted: Tensor) -> None:
    assert float((found.double().cpu() - wanted).norm() / wanted.norm()) < 3e-3


def test_blocks_of_unequal_groups_lie_side_by_side(device: torch.device, random: torch.Generator) -> None:
    stored = [blocks(Kind.Q4_K, 16, 256, random), blocks(Kind.Q6_K, 8, 256, random)]
    made = layer(stored, None, device)
    assert isinstance(made, StackedGpuLinear)
    x = torch.randn(3, 256, generator=random).to(device, DTYPE)
    numbers = torch.cat([part.dense() for part in stored]).double()
    loose(made(x), x.double().cpu() @ numbers.T)


def test_blocks_of_4_and_8_bits_in_groups_of_32_are_one_weight(device: torch.device, random: torch.Generator) -> None:
    stored = [blocks(Kind.Q4_0, 16, 256, random), blocks(Kind.Q8_0, 8, 256, random)]
    made = layer(stored, None, device)
    assert isinstance(made, GroupedGpuLinear)
    x = torch.randn(3, 256, generator=random).to(device, DTYPE)
    numbers = torch.cat([part.dense() for part in stored]).double()
    loose(made(x), x.double().cpu() @ numbers.T)


@pytest.mark.parametrize("rows", [1, 7, *([40] if GPU else [])])
def test_a_plain_weight_becomes_e4m3_by_rows(rows: int, device: torch.device, random: torch.Generator) -> None:
    weight = torch.randn(48, 96, generator=random).to(device, DTYPE)
    weight[3] *= 50
    made = online_fp8(weight, None)
    assert isinstance(made, FloatGpuLinear)
    x = torch.randn(rows, 96, generator=random).to(device, DTYPE)
    wanted = x.double().cpu() @ weight.double().cpu().T
    # Every output by its own row's size: the large row takes nothing from the others.
    size = x.double().cpu().norm(dim=1, keepdim=True) * weight.double().cpu().norm(dim=1)
    assert ((made(x).double().cpu() - wanted).abs() <= 0.02 * size).all()


def test_a_weight_of_odd_sizes_stays_plain(device: torch.device, random: torch.Generator) -> None:
    weight = torch.randn(10, 33, generator=random).to(device, DTYPE)
    assert isinstance(online_fp8(weight, None), PlainLinear)


def e4m3(rows: int, cols: int, input_scale: float | None, random: torch.Generator) -> FloatTensor:
    data = torch.randn(rows, cols, generator=random).to(torch.float8_e4m3fn)
    given = None if input_scale is None else torch.tensor([input_scale])
    return FloatTensor("e4m3", Kind.E4M3, (rows, cols), data, torch.rand(rows, generator=random) + 0.5, given)


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_static_scales_of_inputs_are_obeyed_where_inputs_become_e4m3(
    rows: int, device: torch.device, random: torch.Generator
) -> None:
    parts = [e4m3(32, 64, 0.001, random), e4m3(16, 64, 0.002, random)]
    made = layer(parts, None, device)
    assert isinstance(made, FloatGpuLinear)
    x = torch.randn(rows, 64, generator=random).to(device, DTYPE)
    numbers = torch.cat([part.dense() for part in parts]).double()
    wide = x.double().cpu()
    if rows > 16:
        # The published formula, with the larger scale of the two; 448 is the largest e4m3 number.
        cut = (wide / 0.002).clamp(-448, 448)
        assert (cut.abs() == 448).any()
        wide = cut.to(torch.float8_e4m3fn).double() * 0.002
    wanted = wide @ numbers.T
    # The interpreter loses the carry of some numbers that become e4m3.
    assert float((made(x).double().cpu() - wanted).norm() / wanted.norm()) < (4e-3 if GPU or rows <= 16 else 5e-2)


def test_a_gate_is_computed_where_inputs_become_e4m3(device: torch.device, random: torch.Generator) -> None:
    part = e4m3(48, 64, None, random)
    made = layer([part], None, device)
    assert isinstance(made, FloatGpuLinear)
    gate_up = torch.randn(20, 128, generator=random).to(device, DTYPE)
    residual = torch.randn(20, 48, generator=random).to(device, DTYPE)
    assert not made.reads(residual)
    gate, up = gate_up.double().cpu().chunk(2, 1)
    v = silu(gate) * up
    scale = v.abs().amax(1, keepdim=True) / fp8.LARGEST
    wanted = (v / scale).to(torch.float8_e4m3fn).double() * scale @ part.dense().double().T + residual.double().cpu()
    found = made.gated_added(gate_up, residual.clone()).double().cpu()
    assert float((found - wanted).norm() / wanted.norm()) < (1e-2 if GPU else 5e-2)
