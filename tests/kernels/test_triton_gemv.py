"""Small-batch linear layers with their prologues and epilogues, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vserve.kernels import reference_gpu
from vserve.kernels.gemv import gated_gemv, gemv, gemv_then_norm
from vserve.kernels.gemv_shapes import Shape

Check = Callable[[Tensor, Tensor], None]
GPU = torch.cuda.is_available()
# The interpreter multiplies no bf16 matrices; one row is no matrix.
HALVES = [torch.float16, torch.bfloat16]
ROWS = [(1, dtype) for dtype in (torch.float32, *HALVES)]
ROWS += [(rows, dtype) for rows in (2, 5, 16, 17, 64) for dtype in (HALVES if GPU else [torch.float32])]
EXTRAS = ["", "norm", "bias residual", "norm bias residual"]
# Each is compiled anew: in bf16 all extras at once stand for the rest.
WORK = [(*work, extras) for work in ROWS for extras in EXTRAS[3 if work[1] == torch.bfloat16 else 0 :]]
EPS = 1e-5
SHAPES = [(37, 64), (96, 100), (40, 1111)] + ([(4097, 4096), (576, 1536), (24, 14336)] if GPU else [])


def wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double().cpu()


@pytest.mark.parametrize(("rows", "dtype", "extras"), WORK)
@pytest.mark.parametrize(("num_out", "width"), SHAPES)
def test_a_product_with_its_extras_is_the_float64_one(
    rows: int,
    num_out: int,
    width: int,
    dtype: torch.dtype,
    extras: str,
    device: torch.device,
    random: torch.Generator,
    close: Check,
) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    x, weight = draw(rows, width), draw(num_out, width) / width**0.5
    norm = draw(width) if "norm" in extras else None
    bias = draw(num_out) if "bias" in extras else None
    residual = draw(rows, num_out) if "residual" in extras else None
    out = gemv(x, weight, norm=norm, eps=EPS, bias=bias, residual=residual)
    reference = reference_gpu.gemv(
        wide(x), wide(weight), norm=wide(norm), eps=EPS, bias=wide(bias), residual=wide(residual)
    )
    close(out, reference)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 33])
@pytest.mark.parametrize(("num_out", "width"), SHAPES)
@pytest.mark.parametrize("with_extras", [False, True])
def test_a_gated_product_is_the_float64_one(
    rows: int,
    num_out: int,
    width: int,
    with_extras: bool,
    device: torch.device,
    random: torch.Generator,
    close: Check,
) -> None:
    dtype = torch.float16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    x, weight = draw(rows, width), draw(2 * num_out, width) / width**0.5
    norm, bias = (draw(width), draw(2 * num_out)) if with_extras else (None, None)
    out = gated_gemv(x, weight, norm=norm, eps=EPS, bias=bias)
    close(out, reference_gpu.gated_gemv(wide(x), wide(weight), norm=wide(norm), eps=EPS, bias=wide(bias)))


@pytest.mark.parametrize("rows", [3, 8, 16, 33])
@pytest.mark.parametrize(("width", "inner", "num_out"), [(64, 100, 37), (100, 1111, 40)] + [(4096, 2048, 576)] * GPU)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_norm_left_to_the_products_around_it_is_the_float64_one(
    rows: int,
    width: int,
    inner: int,
    num_out: int,
    with_bias: bool,
    device: torch.device,
    random: torch.Generator,
    close: Check,
) -> None:
    dtype = torch.bfloat16 if GPU else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    x, weight, residual = draw(rows, width), draw(inner, width) / width**0.5, draw(rows, inner)
    norm, following, gates = draw(inner), draw(num_out, inner) / inner**0.5, draw(2 * num_out, inner) / inner**0.5
    bias = draw(inner) if with_bias else None
    y, normed = gemv_then_norm(x, weight, norm, bias=bias, residual=residual)
    close(y, reference_gpu.gemv(wide(x), wide(weight), bias=wide(bias), residual=wide(residual)))
    # of the sum as it was rounded
    inputs = {"norm": wide(norm), "eps": EPS}
    close(gemv(normed, following, eps=EPS), reference_gpu.gemv(wide(y), wide(following), **inputs))
    close(gated_gemv(normed, gates, eps=EPS), reference_gpu.gated_gemv(wide(y), wide(gates), **inputs))


@pytest.mark.parametrize("ahead", [1, 2, 9])
@pytest.mark.parametrize("width", [512, 300])
def test_weights_asked_for_ahead_are_used_once(
    ahead: int, width: int, device: torch.device, random: torch.Generator, close: Check
) -> None:
    x = torch.randn(5, width, generator=random).to(device)
    weight = torch.randn(42, width, generator=random).to(device) / width**0.5
    shape = Shape(16, 128, 4, 2, ahead)
    close(gemv(x, weight, shape=shape), reference_gpu.gemv(wide(x), wide(weight)))
    close(gated_gemv(x, weight, shape=shape), reference_gpu.gated_gemv(wide(x), wide(weight)))


@pytest.mark.parametrize("shape", [Shape(4, 32, 1, 1), Shape(8, 128, 2, 1)])
def test_any_shape_of_the_work_gives_the_same_product(
    shape: Shape, device: torch.device, random: torch.Generator, close: Check
) -> None:
    x = torch.randn(1, 150, generator=random).to(device)
    weight = torch.randn(21, 150, generator=random).to(device)
    close(gemv(x, weight, shape=shape), reference_gpu.gemv(wide(x), wide(weight)))


if GPU:

    def test_a_chain_launched_early_gives_the_same_bits_every_time(
        device: torch.device, random: torch.Generator
    ) -> None:
        # A missing wait for the kernel ahead would show as a difference between runs.
        # No poison: filling each output would put a kernel between every two.
        torch.use_deterministic_algorithms(False)
        weights = [torch.randn(1024, 1024, generator=random).to(device, torch.bfloat16) / 32 for _ in range(8)]
        norm = torch.ones(1024, dtype=torch.bfloat16, device=device)
        for rows in (1, 4):
            x = torch.randn(rows, 1024, generator=random).to(device, torch.bfloat16)

            def chain(pdl: bool, x: Tensor = x) -> Tensor:
                for _ in range(8):
                    for weight in weights:
                        x = gemv(x, weight, norm=norm, eps=EPS, residual=x, early=pdl)
                return x

            plain = chain(False)
            chain(True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = chain(True)
            for _ in range(200):
                out.fill_(float("nan"))
                graph.replay()
                assert torch.equal(out, plain)

    @pytest.mark.parametrize("rows", [3, 16, 32])
    def test_layers_that_leave_their_norms_to_each_other_give_the_same_bits_early_every_time(
        rows: int, device: torch.device, random: torch.Generator
    ) -> None:
        torch.use_deterministic_algorithms(False)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=random) / shape[-1] ** 0.5).to(device, torch.bfloat16)

        # Products that fill the chip, some that do not, and one of several programs a multiprocessor
        layers = [(draw(2048, 2048), draw(2 * 4096, 2048), draw(2048, 4096), draw(2 * 9000, 2048)) for _ in range(4)]
        norm = torch.ones(2048, dtype=torch.bfloat16, device=device)
        x = draw(rows, 2048) * 2048**0.5

        def chain(early: bool) -> Tensor:
            y, normed = gemv_then_norm(x, layers[0][0], norm, residual=x, early=early)
            for attended, gates, down, many in layers:
                inner = gated_gemv(normed, gates, eps=EPS, early=early)
                y, normed = gemv_then_norm(inner, down, norm, residual=y, early=early)
                wide = gated_gemv(normed, many, eps=EPS, early=early)
                y, normed = gemv_then_norm(wide[:, :2048], attended, norm, residual=y, early=early)
            return gemv(normed, layers[0][0], eps=EPS, early=early)

        plain = chain(False)
        chain(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(True)
        for _ in range(200):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, plain)
