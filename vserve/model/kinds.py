"""The kinds of tensor a model file may hold: how many numbers a block has and how many bytes it takes.

The block formats are those of GGML (ggml-common.h in llama.cpp documents their bytes).  Knows no file format: a GGUF
type number or a safetensors dtype is turned into a ``Kind`` by its reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # headers are read before, and without, the second that torch takes to import
    import torch


class Kind(StrEnum):
    """How the numbers of a tensor are stored; equal to its name as a string."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"


@dataclass(frozen=True, slots=True)
class Layout:
    """One block of a kind: block_size numbers in block_bytes bytes; plain: torch's name of its type, if it has one."""

    block_size: int
    block_bytes: int
    plain: str | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of a plain kind; None for the quantised ones."""
        if self.plain is None:
            return None
        import torch

        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[self.plain]


LAYOUTS: dict[Kind, Layout] = {
    Kind.F32: Layout(1, 4, "float32"),
    Kind.F16: Layout(1, 2, "float16"),
    Kind.BF16: Layout(1, 2, "bfloat16"),
    Kind.Q4_0: Layout(32, 2 + 16),
    Kind.Q4_1: Layout(32, 2 + 2 + 16),
    Kind.Q5_0: Layout(32, 2 + 4 + 16),
    Kind.Q5_1: Layout(32, 2 + 2 + 4 + 16),
    Kind.Q8_0: Layout(32, 2 + 32),
    Kind.Q4_K: Layout(256, 2 + 2 + 12 + 128),
    Kind.Q5_K: Layout(256, 2 + 2 + 12 + 32 + 128),
    Kind.Q6_K: Layout(256, 128 + 64 + 16 + 2),
}
