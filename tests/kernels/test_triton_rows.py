"""Inputs gathered from the rows: every used field is written, padding writes nothing, and poison is never read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from vserve.kernels import rows

SIZE, MOST_BLOCKS, HALF = 4, 5, 6
POISON = -(2**31)


def filled(inputs: rows.Inputs) -> rows.Inputs:
    """The same, with NaN and a number that no test expects in every place."""
    for field in dataclasses.fields(inputs):
        tensor = getattr(inputs, field.name)
        tensor.fill_(float("nan") if tensor.is_floating_point() else POISON)
    return inputs


def words(value: float) -> int:
    """A float32 as the int32 of its bits."""
    return int(torch.tensor([value], dtype=torch.float32).view(torch.int32))


@pytest.fixture
def kept(device: torch.device) -> rows.Rows:
    """Three rows whose used entries are known and whose others are poison."""
    made = rows.new_rows(3, MOST_BLOCKS, device)
    made.tables.fill_(POISON)
    made.params.fill_(POISON)
    made.last_ids[:] = torch.tensor([70, 71, 72], device=device)
    updates = [[0, 0, 9], [2, 0, 4], [2, 1, 3], [2, 2, 8], [-1, 0, 1]]
    entries = [
        [0, words(0.5), 7, words(0.9), words(0.1), 5, 1, 2],
        [2, words(2.0), 0, words(1.0), 0, 6, 0, 9],
        [-1] * 8,
    ]
    rows.enter(made, *(torch.tensor(some, dtype=torch.int32, device=device) for some in (updates, entries)))
    return made


@pytest.fixture
def angles(device: torch.device) -> tuple[Tensor, Tensor]:
    cos = torch.arange(32.0 * HALF, device=device).view(32, HALF)
    return cos, -cos


def on(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_a_decode_step_gathers_what_its_rows_hold(
    kept: rows.Rows, angles: tuple[Tensor, Tensor], device: torch.device
) -> None:
    inputs = filled(rows.new_inputs(3, 3, 3, MOST_BLOCKS, HALF, device))
    # Row 2 at its tenth token, row 0 at the first token of a new block 6, and padding.
    step = on(device, 2, 0, -1), on(device, 9, 4, 31), on(device, -1, 6, -1)
    rows.decode_inputs(kept, *step, *angles, SIZE, inputs)
    assert inputs.ids[:2].tolist() == [72, 70]
    assert inputs.slots.tolist() == [8 * SIZE + 1, 6 * SIZE, -1]
    assert inputs.context_lens.tolist() == [10, 5, 0]
    assert inputs.tables[0].tolist() == [4, 3, 8, POISON, POISON]
    assert inputs.tables[1].tolist() == [9, 6, POISON, POISON, POISON]
    assert inputs.tables[2].tolist() == [POISON] * MOST_BLOCKS
    assert torch.equal(inputs.cos[:2], angles[0][[9, 4]])
    assert torch.equal(inputs.sin[:2], angles[1][[9, 4]])
    assert inputs.temperature.tolist() == [2.0, 0.5, 0.0]
    assert inputs.top_k[:2].tolist() == [0, 7]
    assert inputs.top_p.tolist() == pytest.approx([1.0, 0.9, 1.0])
    assert inputs.min_p[:2].tolist() == pytest.approx([0.0, 0.1])
    assert inputs.seeds[:2].tolist() == [6, (1 << 32) | 5]
    assert inputs.counters[:2].tolist() == [10 - 9, 5 - 2]
    assert kept.tables[0].tolist() == [9, 6, POISON, POISON, POISON]


def test_a_mixed_step_gathers_prompts_and_decodes_alike(
    kept: rows.Rows, angles: tuple[Tensor, Tensor], device: torch.device
) -> None:
    inputs = filled(rows.new_inputs(4, 3, 3, MOST_BLOCKS, HALF, device))
    inputs.context_lens[:] = on(device, 10, 2, 0)
    rows.mixed_inputs(
        kept,
        on(device, -1, 50, 51, -1),  # the last id of row 2, two ids of row 0's prompt, padding
        on(device, 9, 0, 1, 31),
        on(device, 2, 0, 0, -1),
        on(device, 2, 0, -1),
        on(device, 0, 2, 0),
        on(device, 2, 0, -1),
        *angles,
        SIZE,
        inputs,
    )
    assert inputs.ids[:3].tolist() == [72, 50, 51]
    assert inputs.slots.tolist() == [8 * SIZE + 1, 9 * SIZE, 9 * SIZE + 1, -1]
    assert inputs.tables[0].tolist() == [4, 3, 8, POISON, POISON]
    assert inputs.tables[1].tolist() == [9, POISON, POISON, POISON, POISON]
    assert inputs.tables[2].tolist() == [POISON] * MOST_BLOCKS
    assert torch.equal(inputs.cos[:3], angles[0][[9, 0, 1]])
    assert inputs.temperature.tolist() == [2.0, 0.5, 0.0]
    assert inputs.seeds[:2].tolist() == [6, (1 << 32) | 5]
    assert inputs.counters[:2].tolist() == [10 - 9, 2 - 2]


def test_drawn_ids_are_kept_by_row_and_one_that_could_not_be_drawn_indexes_nothing(
    kept: rows.Rows, device: torch.device
) -> None:
    drawn = torch.full((4,), POISON, dtype=torch.int64, device=device)
    ids = torch.tensor([33, -1, 44], device=device)
    rows.keep(kept, on(device, 2, 0, -1), ids, drawn)
    assert drawn.tolist() == [33, -1, 44, POISON]
    assert kept.last_ids.tolist() == [0, 71, 33]
