"""Dequantisation and group unpacking, against the gguf package on random blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as oracle

from vserve.model import quant
from vserve.model.kinds import LAYOUTS, Kind
from vserve.model.weights import StoredTensor

HALVES = {  # byte offsets of the float16 scales in a block: random bytes there could be inf or NaN
    Kind.Q4_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_0: (0,),
    Kind.Q5_1: (0, 2),
    Kind.Q8_0: (0,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}
QUANTISED = list(HALVES)
GROUPED = [kind for kind in QUANTISED if quant.can_group(kind)]


def random_blocks(kind: Kind, rows: int, blocks_per_row: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, row bytes]: every byte random, every scale a finite float16."""
    rng = np.random.default_rng(seed)
    layout = LAYOUTS[kind]
    blocks = rng.integers(0, 256, (rows * blocks_per_row, layout.block_bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = rng.normal(0, 4, (blocks.shape[0],)).astype(np.float16)
        scales[:4] = (0.0, -0.0, 6e-8, 65504.0)[: len(scales[:4])]
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def stored(kind: Kind, blocks: np.ndarray) -> StoredTensor:
    layout = LAYOUTS[kind]
    cols = blocks.shape[1] // layout.block_bytes * layout.block_size
    return StoredTensor("w", kind, (blocks.shape[0], cols), torch.from_numpy(blocks.reshape(-1).copy()))


def bits(numbers: torch.Tensor) -> list[int]:
    return numbers.contiguous().view(torch.int32).reshape(-1).tolist()


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize(("rows", "blocks_per_row"), [(1, 1), (7, 3), (64, 9)])
def test_dequantised_numbers_equal_ggufs_bit_for_bit(kind: Kind, rows: int, blocks_per_row: int) -> None:
    blocks = random_blocks(kind, rows, blocks_per_row, seed=rows)
    expected = oracle(blocks, GGMLQuantizationType[kind.value])
    dense = stored(kind, blocks).dense()
    assert dense.shape == expected.shape
    assert bits(dense) == bits(torch.from_numpy(expected))


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_tensor_longer_than_a_chunk_is_dequantised_whole(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(kind, 13, 2)
    expected = oracle(blocks, GGMLQuantizationType[kind.value])
    monkeypatch.setattr(quant, "_CHUNK_NUMBERS", 3 * LAYOUTS[kind].block_size)
    assert bits(stored(kind, blocks).dense()) == bits(torch.from_numpy(expected))


@pytest.mark.parametrize("kind", GROUPED)
def test_groups_give_the_dequantised_numbers_exactly(kind: Kind) -> None:
    tensor = stored(kind, random_blocks(kind, 24, 5))
    rows, cols = tensor.shape
    q, scale, minimum = quant.unpack_groups(tensor)
    assert (q.dtype, scale.dtype, minimum.dtype) == (torch.uint8, torch.float32, torch.float32)
    assert (q.shape, scale.shape, minimum.shape) == ((rows, cols), (rows, cols // 32), (rows, cols // 32))
    assert int(q.max()) <= {"4": 15, "5": 31, "8": 255}[kind.value[1]]
    numbers = q.reshape(rows, -1, 32).float() * scale.unsqueeze(-1) + minimum.unsqueeze(-1)
    assert torch.equal(numbers.reshape(rows, cols), tensor.dense())


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (*GROUPED, Kind.GROUPED)])
def test_a_kind_without_groups_of_32_is_refused(kind: Kind) -> None:
    layout = LAYOUTS[kind]
    tensor = StoredTensor("w", kind, (1, layout.block_size), torch.zeros(layout.block_bytes, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no groups of 32"):
        quant.unpack_groups(tensor)


@pytest.mark.parametrize("kind", QUANTISED)
def test_rows_are_a_window_that_dequantises_like_the_whole(kind: Kind) -> None:
    tensor = stored(kind, random_blocks(kind, 10, 2))
    part = tensor.rows(3, 8)
    assert part.shape == (5, tensor.shape[1])
    assert part.data.untyped_storage().data_ptr() == tensor.data.untyped_storage().data_ptr()
    assert torch.equal(part.dense(), tensor.dense()[3:8])


@pytest.mark.parametrize("kind", QUANTISED)
def test_selected_rows_dequantise_like_the_selected_numbers(kind: Kind) -> None:
    tensor = stored(kind, random_blocks(kind, 10, 2))
    order = torch.tensor([9, 0, 4, 4])
    assert torch.equal(tensor.select_rows(order).dense(), tensor.dense()[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_are_the_float32_numbers_rounded_once(dtype: torch.dtype) -> None:
    tensor = stored(Kind.Q4_1, random_blocks(Kind.Q4_1, 4, 4))
    assert torch.equal(tensor.dense(dtype), tensor.dense().to(dtype))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_plain_numbers_come_out_in_new_memory(kind: Kind) -> None:
    data = torch.randn(3, 5).to(LAYOUTS[kind].dtype)
    tensor = StoredTensor("w", kind, (3, 5), data)
    dense = tensor.dense(data.dtype)
    assert torch.equal(dense, data)
    assert dense.data_ptr() != data.data_ptr()
    assert torch.equal(tensor.rows(1, 3).dense(), data[1:3].float())
    with pytest.raises(ValueError, match="no blocks"):
        tensor.blocks()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_rows_outside_the_tensor_are_refused(start: int, stop: int) -> None:
    tensor = StoredTensor("w", Kind.F32, (3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="rows"):
        tensor.rows(start, stop)
