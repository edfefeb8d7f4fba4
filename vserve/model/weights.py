"""A tensor as its file stores it, and the set of tensors of one model, whatever the file format.

``StoredTensor.data`` is a window on the mapped file: nothing is read or copied until it is used.  What the methods
return is new memory (but for ``blocks`` and ``rows``, which are windows too), so a model that is loaded no longer
depends on the file.  Knows no file format and no architecture.  Any thread may read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vserve.errors import StartupError, shorten
from vserve.model import quant
from vserve.model.kinds import LAYOUTS, Kind


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """One tensor of a model file.

    name: the Hugging Face name (model.layers.0.self_attn.q_proj.weight).  shape: torch order, so a linear layer's
    weight is (rows = outputs, cols = inputs).  data: for F32, F16, BF16 a tensor of that dtype and shape; for the
    quantised kinds the raw blocks, uint8 [rows * row_bytes] in row order.  data must not be written to.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    data: Tensor

    @property
    def quantised(self) -> bool:
        return LAYOUTS[self.kind].dtype is None

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in its file."""
        return self.data.numel() * self.data.element_size()

    @property
    def num_rows(self) -> int:
        """Product of every dimension but the last, which is the one that blocks run along."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    def blocks(self) -> Tensor:
        """The raw blocks of a quantised tensor, uint8 [num_rows, blocks_per_row * block_bytes]; a window, not a copy.

        ValueError for the plain kinds.
        """
        if not self.quantised:
            raise ValueError(f"tensor {self.name} of kind {self.kind} has no blocks")
        return self.data.reshape(self.num_rows, -1)

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Rows start to stop of a matrix, as a window: for loading a large tensor piece by piece."""
        rows, *rest = self.shape
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} of tensor {self.name}, which has {rows}")
        data = self.data
        if self.quantised:
            row_bytes = data.numel() // rows
            data = data[start * row_bytes : stop * row_bytes]
        else:
            data = data[start:stop]
        return replace(self, shape=(stop - start, *rest), data=data)

    def select_rows(self, order: Tensor) -> StoredTensor:
        """The same tensor with row i taken from row order[i] (int64), still quantised; copies the rows.

        order may name fewer rows than there are; rows are those of the first dimension.
        """
        rows, *rest = self.shape
        # As bytes, through numpy: it has no bfloat16, and torch would wake its threads for every small tensor.
        raw = self.data.reshape(rows, -1).view(torch.uint8).numpy()[order.numpy()]
        data = torch.from_numpy(raw).view(self.data.dtype)
        shape = (order.numel(), *rest)
        return replace(self, shape=shape, data=data.reshape(-1) if self.quantised else data.reshape(shape))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, as a contiguous CPU tensor of shape and dtype, always in new memory."""
        if not self.quantised:
            # copy: a mapped page whose file is cut short kills the process when it is touched.
            return self.data.to(dtype, copy=True).contiguous()
        return quant.dequantize(self.kind, self.blocks(), dtype).reshape(self.shape)

    def write_rows(self, start: int, stop: int, out: Tensor) -> None:
        """The numbers of rows start to stop, into out [stop - start, ...] of any plain dtype, on the host."""
        part = self.rows(start, stop)
        out.copy_(part.dense(out.dtype) if part.quantised else part.data)


def require_size(path: Path, size: int) -> None:
    """StartupError when a mapped file has become shorter than size bytes: touching what is gone kills the process."""
    try:
        now = path.stat().st_size
    except OSError:
        # Unlinked or renamed: the mapping holds the old file, whole.
        return
    if now < size:
        raise StartupError(f"{shorten(str(path))}: the file was cut from {size} to {now} bytes while it was read")


class Weights(Protocol):
    """Every tensor of a model by its Hugging Face name.  lm_head.weight is absent when the embedding is tied."""

    def names(self) -> Sequence[str]:
        """All names, each once, in the order of the file: reading in this order is sequential."""

    def get(self, name: str) -> StoredTensor:
        """The tensor; StartupError naming it when it is absent or of a kind that is not supported."""

    def __contains__(self, name: object) -> bool: ...

    @property
    def total_bytes(self) -> int:
        """Sum of nbytes over all tensors, for progress bars."""
