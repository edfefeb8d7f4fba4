"""Every architecture with its layers quantised, against transformers on the same numbers written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model import quantised
from tests.model.driving import CPU, Driver, distance, judged
from tests.model.families import VOCAB, saved
from vserve.model.loader import load
from vserve.model.source import resolve


def check(name: str, checkpoint: str, folder: Path) -> None:
    judge, packed = quantised.pair(saved(name)[1], checkpoint, folder)
    ids = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    decoder = load(resolve(str(packed), environ={}), device=CPU, dtype=torch.float32)
    assert distance(Driver(decoder, 24).logits(ids, [33, 1]), judged(judge, ids)) < 1e-4


@pytest.mark.oracle("awq")
@pytest.mark.parametrize("name", quantised.FAMILIES)
def test_awq_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(name, "awq", tmp_path)


@pytest.mark.oracle("gptq")
@pytest.mark.parametrize("name", quantised.FAMILIES)
def test_gptq_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(name, "gptq act-order", tmp_path)


@pytest.mark.oracle("fp8")
@pytest.mark.parametrize("name", quantised.FAMILIES)
def test_fp8_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(name, "fp8 row", tmp_path)
