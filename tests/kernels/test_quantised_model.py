"""Whole quantised models in the form for a GPU, interpreted where there is none, against the dense model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model import quantised
from tests.model.driving import Driver, distance, judged, random_model
from vserve.model.gpu_decoder import GpuDecoder
from vserve.model.loader import load_weights
from vserve.model.source import resolve

LIMIT = 3e-2 if torch.cuda.is_available() else 1e-4
"""The GPU computes in bfloat16."""


@pytest.mark.parametrize("name", quantised.CHECKPOINTS)
def test_logits_are_those_of_the_dense_model(name: str, device: torch.device, tmp_path: Path) -> None:
    random_model(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    make, settings = quantised.CHECKPOINTS[name]
    quantised.quantise(tmp_path / "packed", tmp_path / "dense", make, settings)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ids = torch.randint(0, 97, (9,), generator=torch.Generator().manual_seed(2)).tolist()
    source = resolve(str(tmp_path / "packed"), environ={})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder = load_weights(source.open_weights(), source.config, device=device, dtype=dtype, for_gpu=True)
    assert isinstance(decoder, GpuDecoder)
    assert decoder._fused is not None or name == "gptq act-order"
    # Several rows at once and single ones: both kernels.
    assert distance(Driver(decoder, 24).logits(ids, [6, 1]).cpu(), judged(judge, ids)) < LIMIT
