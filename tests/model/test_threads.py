"""Small steps leave one core free; long prompts take them all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vserve.model.threads import SMALL_STEP_TOKENS, StepThreads


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "tokens", "wanted"),
    [
        (1, 1, 1),
        (1, 500, 1),
        (2, SMALL_STEP_TOKENS, 1),
        (2, SMALL_STEP_TOKENS + 1, 2),
        (4, 1, 3),
        (4, 500, 4),
    ],
)
def test_the_step_sets_the_threads(cores: int, tokens: int, wanted: int) -> None:
    StepThreads(cores).prepare(tokens)
    assert torch.get_num_threads() == wanted
