"""What a start says when the GPU's memory runs out."""

from __future__ import annotations

import pytest
import torch

from vserve import assemble_cuda
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
