"""Linear layers: every form gives the product of the exact weights, whatever the number of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vserve.model import linear, quant
from vserve.model.kinds import LAYOUTS, Kind
from vserve.model.linear import GroupedLinear, PackedLinear, PlainLinear, dense_linear
from vserve.model.weights import StoredTensor

ROWS = [0, 1, 2, 3, linear.FEW_ROWS, linear.FEW_ROWS + 1, 33]
GROUPED_KINDS = [kind for kind in Kind if quant.can_group(kind)]


def distance(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)) if len(wanted) else 0.0


def stored_matrix(kind: Kind, rows: int, cols: int) -> StoredTensor:
    """Random blocks of a kind whose scales are drawn too: real ones come from a quantiser, these from anywhere."""
    values = (np.random.default_rng(0).standard_normal((rows, cols)) * 0.3).astype(np.float32)
    try:
        raw = quants.quantize(values, GGMLQuantizationType[kind])
    except NotImplementedError:  # the oracle reads the K kinds but does not write them
        layout = LAYOUTS[kind]
        raw = np.random.default_rng(1).integers(0, 256, (rows, cols // layout.block_size, layout.block_bytes), np.uint8)
        raw[..., :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    return StoredTensor("w", kind, (rows, cols), torch.from_numpy(raw.reshape(-1).copy()))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", GROUPED_KINDS)
@pytest.mark.parametrize("copied", [True, False], ids=["with a dense copy", "alone"])
def test_quantised_weights_are_used_exactly(kind: Kind, rows: int, copied: bool) -> None:
    torch.manual_seed(0)
    stored = stored_matrix(kind, 96, 512)
    dense, bias, x = stored.dense(), torch.randn(96), torch.randn(rows, 512)
    many = dense_linear(dense, bias) if copied else None
    found = GroupedLinear(*quant.unpack_groups(stored), bias, many)(x)
    assert found.is_contiguous()
    assert distance(found, x.double() @ dense.double().t() + bias.double()) < 3e-6


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outputs", [4096, 4100, 8192, 4099 * 3, 4201])
def test_a_wide_layer_gives_the_same_in_tiles(outputs: int, symmetric: bool, rows: int) -> None:
    torch.manual_seed(0)
    q = torch.randint(0, 256, (outputs, 32), dtype=torch.uint8)
    scale = torch.rand(outputs, 1) * 0.1
    minimum = scale * -128.0 if symmetric else torch.randn(outputs, 1)
    x = torch.randn(rows, 32)
    wanted = x.double() @ (q.double() * scale.double() + minimum.double()).t()
    assert distance(GroupedLinear(q, scale, minimum)(x), wanted) < 3e-6


@given(st.integers(1, 1 << 20))
def test_tiles_divide_a_layer_and_narrow_layers_are_whole(outputs: int) -> None:
    width = linear.tile_width(outputs)
    assert outputs % width == 0
    assert width == outputs or (outputs > 4096 and 32 <= width <= 1024)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_every_index_of_a_tile_is_in_exactly_one_bag_of_each_row(
    tiles: int, groups: int, rows: int, zeros: bool
) -> None:
    extra = 3 * groups if zeros else 0
    index, offsets = linear._bags(tiles, groups, rows, extra)
    assert offsets[-1] == len(index)
    assert len(offsets) == 1 + tiles * rows * (groups + zeros)
    assert index.sort().values.tolist() == sorted(list(range(tiles * (groups * 32 + extra))) * rows)


@pytest.mark.parametrize("spread", [0.0, 1e-30, 1.0, 1e20])
def test_zeros_survive_as_bytes_to_the_precision_of_float32(spread: float) -> None:
    torch.manual_seed(0)
    zero = torch.randn(1, 40, 2) * spread
    rows = linear._zero_rows(zero)
    tail = rows[0, :, 40:].contiguous().view(torch.float32).double()
    numbers = (rows[0, :, :40].double() * tail[:, :1] + tail[:, 1:]).view(3, 2, 40).sum(0)
    assert (numbers - zero[0].t()).abs().max() <= zero.abs().max() * 2.0**-22


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", [PlainLinear, PackedLinear, dense_linear])
@pytest.mark.parametrize("biased", [True, False])
def test_dense_forms_agree_with_the_product(form: type[PlainLinear], rows: int, biased: bool) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(70, 50), torch.randn(70) if biased else None, torch.randn(rows, 50)
    wanted = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert distance(form(weight, bias)(x), wanted) < 3e-6


def test_the_input_is_left_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64)
    kept = x.clone()
    q = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    GroupedLinear(q, torch.rand(32, 2), torch.rand(32, 2))(x)
    assert torch.equal(x, kept)


def test_only_float32_on_a_cpu_is_grouped_or_packed() -> None:
    assert not linear.has_grouped(torch.device("cpu"), torch.bfloat16)
    assert not linear.has_grouped(torch.device("cuda"), torch.float32)
    assert isinstance(dense_linear(torch.zeros(4, 4, dtype=torch.bfloat16)), PlainLinear)
