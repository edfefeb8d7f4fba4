"""Every architecture through the engine with captured graphs, in mixed batches: texts and scores of transformers."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.scored import DEVICE, EXPERTS_SHARE, check
from tests.model.families import ARCHITECTURES, saved
from vserve.model.loader import load
from vserve.model.source import resolve

NAMES = {**ARCHITECTURES, "gemma3": "gemma3, scaled", "opt post-norm": "opt, norms behind"}


@pytest.mark.oracle("gpu")
@pytest.mark.parametrize("name", NAMES)
def test_float32_texts_of_mixed_batches_are_those_of_transformers(name: str) -> None:
    judge, folder = saved(NAMES[name])
    check(load(resolve(str(folder), environ={}), device=DEVICE, dtype=torch.float32), judge, 1e-4)


@pytest.mark.oracle("gpu")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_texts_leave_those_of_transformers_at_near_ties_only(
    name: str, dtype: torch.dtype, limit: float
) -> None:
    judge, folder = saved(NAMES[name])
    decoder = load(resolve(str(folder), environ={}), device=DEVICE, dtype=dtype)
    check(decoder, judge, limit, EXPERTS_SHARE.get(name, 1.0))
