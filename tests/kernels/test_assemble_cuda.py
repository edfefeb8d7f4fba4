"""What a start says when the GPU's memory runs out."""

from __future__ import annotations

import pytest
import torch

from vserve import assemble_cuda
from vserve.engine.shapes import Buckets
from vserve.errors import StartupError

MESSAGE = (
    "CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 1.00 MiB is "
    "free. Including non-PyTorch memory, this process has 8.86 GiB memory in use."
)


def test_running_out_of_gpu_memory_is_one_line_with_the_numbers_and_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 80 << 30))
    with pytest.raises(StartupError) as raised, assemble_cuda.explained("loading weights"):
        raise torch.OutOfMemoryError(MESSAGE)
    text = str(raised.value)
    assert "\n" not in text
    for part in ("loading weights", "224.00 MiB wanted", "1.00 MiB of 80.00 GiB free", "--gpu-memory-utilization"):
        assert part in text


def test_any_other_failure_passes_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), assemble_cuda.explained("loading weights"):
        raise ZeroDivisionError


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33, 128, 256, 1024])
def test_every_batch_of_decodes_fits_a_graph_that_a_start_captures(rows: int) -> None:
    sizes = [shape.tokens for shape in assemble_cuda.first_shapes(Buckets(rows, 2048)) if shape.is_decode]
    for decodes in range(1, rows + 1):
        taken = min(size for size in sizes if size >= decodes)
        assert taken == rows or taken < 8 * decodes  # nearest: one of few, not the largest


@pytest.mark.parametrize("rows", [1, 8, 33, 256])
@pytest.mark.parametrize("tokens", [16, 512, 2048])
def test_a_prompt_of_one_chunk_fits_a_graph_that_a_start_captures(rows: int, tokens: int) -> None:
    buckets = Buckets(rows, tokens)
    mixed = [shape for shape in assemble_cuda.first_shapes(buckets) if not shape.is_decode]
    assert any(not shape.decodes and shape.tokens == min(512, tokens) for shape in mixed)
    assert set(mixed) <= set(buckets.graphs())
