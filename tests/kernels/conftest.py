"""The kernels' tests: compiled where there is a GPU, else run by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Read when Triton and the kernels are imported: before any test module of this folder.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
        # Triton 3.6 takes int() of an array of one number for the bounds of a loop; numpy 2.4 refuses that.
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index
    _convert_float = interpreter._convert_float
    _BY_TORCH = {
        interpreter.tl.bfloat16: (torch.bfloat16, torch.uint16),
        interpreter.tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    }

    def _convert_by_torch(numbers: np.ndarray, given: object, wanted: object, rounding: object) -> np.ndarray:
        # Triton 3.6 cuts numbers off where bf16 is wanted, loses the carry of a mantissa that is rounded up where e4m3
        # is (7.9 becomes 4), and reads e4m3's NaN as 480.
        if given == interpreter.tl.float32 and wanted in _BY_TORCH:
            dtype, bits = _BY_TORCH[wanted]
            return torch.from_numpy(np.array(numbers)).to(dtype).view(bits).numpy()
        if given == interpreter.tl.float8e4nv and wanted == interpreter.tl.float32:
            stored = torch.from_numpy(np.array(numbers).view(np.uint8)).view(torch.float8_e4m3fn)
            return stored.to(torch.float32).numpy().view(np.uint32)
        return _convert_float(numbers, given, wanted, rounding)

    interpreter._convert_float = _convert_by_torch

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
"""|out - reference| / |reference|, by what the operation stores."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Tensors come filled with NaN and the largest integers: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def random(request: pytest.FixtureRequest) -> torch.Generator:
    """Other numbers for every case, the same on every run."""
    return torch.Generator().manual_seed(hash_of(request.node.name))


@pytest.fixture
def close() -> Callable[[Tensor, Tensor], None]:
    """close(out, reference): out, in its own dtype, is the float64 reference but for its dtype's rounding."""

    def check(out: Tensor, reference: Tensor) -> None:
        assert out.shape == reference.shape
        wide = out.detach().cpu().double()
        assert not wide.isnan().any()
        norm = reference.norm()
        error = float((wide - reference).norm() / norm) if norm else float(wide.norm())
        assert error <= TOLERANCES[out.dtype], f"error {error:.2e} in {out.dtype}"

    return check


def hash_of(text: str) -> int:
    """The same number in every process: Python's own hash of a string is not."""
    value = 0
    for byte in text.encode():
        value = (value * 257 + byte) % (1 << 31)
    return value
