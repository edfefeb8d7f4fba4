"""Every architecture with its layers quantised, against transformers on the same numbers written out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model import quantised
from tests.model.driving import CPU, Driver, distance, judged
from tests.model.families import VOCAB, saved
from vserve.model.loader import load
from vserve.model.source import resolve

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "mixtral", "phi3", "gemma2", "gemma3", "opt")
"""GPT-2 keeps its weights turned: no tool writes such checkpoints of it."""


def check(name: str, checkpoint: str, folder: Path) -> None:
    shutil.copytree(saved(name)[1], folder / "dense")
    make, settings = quantised.CHECKPOINTS[checkpoint]
    quantised.quantise(folder / "packed", folder / "dense", make, settings)
    judge = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    decoder = load(resolve(str(folder / "packed"), environ={}), device=CPU, dtype=torch.float32)
    assert distance(Driver(decoder, 24).logits(ids, [33, 1]), judged(judge, ids)) < 1e-4


@pytest.mark.oracle("awq")
@pytest.mark.parametrize("name", FAMILIES)
def test_awq_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(name, "awq", tmp_path)


@pytest.mark.oracle("gptq")
@pytest.mark.parametrize("name", FAMILIES)
def test_gptq_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(name, "gptq act-order", tmp_path)


@pytest.mark.oracle("fp8")
@pytest.mark.parametrize("name", FAMILIES)
def test_fp8_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(name, "fp8 row", tmp_path)
