"""Every architecture with its layers quantised and packed on the GPU, in mixed batches through the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from tests.gpu.scored import DEVICE, EXPERTS_SHARE, check
from tests.model import quantised
from tests.model.families import saved
from tests.model.gguf_files import SETTINGS, model_of, write
from vserve.model.loader import load
from vserve.model.source import resolve

LIMIT = 0.02
"""In float16, whose rounding is an eighth of bfloat16's: what the integers stand for has to be right."""


def checked(name: str, checkpoint: str, folder: Path, limit: float) -> None:
    judge, packed = quantised.pair(saved(name)[1], checkpoint, folder)
    decoder = load(resolve(str(packed), environ={}), device=DEVICE, dtype=torch.float16)
    check(decoder, judge, limit, EXPERTS_SHARE.get(name, 1.0))


@pytest.mark.oracle("awq")
@pytest.mark.parametrize("name", quantised.FAMILIES)
def test_awq_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    checked(name, "awq", tmp_path, LIMIT)


@pytest.mark.oracle("gptq")
@pytest.mark.parametrize("name", quantised.FAMILIES)
def test_gptq_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    checked(name, "gptq", tmp_path, LIMIT)


@pytest.mark.oracle("fp8")
@pytest.mark.parametrize("name", quantised.FAMILIES)
def test_fp8_texts_are_those_of_transformers_within_the_rounding_of_activations(name: str, tmp_path: Path) -> None:
    checked(name, "fp8 row", tmp_path, 0.15)


@pytest.mark.oracle("gguf")
@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0], ids=["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", SETTINGS)
def test_gguf_texts_are_those_of_transformers(name: str, kind: GGMLQuantizationType, tmp_path: Path) -> None:
    model = model_of(name, kind)
    write(tmp_path / "m.gguf", name, model, kind=kind)
    check(load(resolve(str(tmp_path / "m.gguf"), environ={}), device=DEVICE, dtype=torch.float16), model, LIMIT)
