"""Every architecture through the GPU's decoder and runner: transformers' numbers.  Interpreted on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from fakes_gpu import Engine, cuda_runner, plain_runner

from tests.model.driving import Driver, distance, judged
from tests.model.families import ARCHITECTURES, VOCAB, saved
from vserve.engine.request import GenRequest, RequestId, SamplingParams
from vserve.model.config import ModelConfig
from vserve.model.decoder import Decoder
from vserve.model.gpu_decoder import GpuDecoder
from vserve.model.loader import load_weights
from vserve.model.source import resolve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = {**ARCHITECTURES, "gemma3": "gemma3, scaled", "opt post-norm": "opt, norms behind"}
FUSED = {"llama", "mistral", "qwen2", "qwen3", "phi3", "qwen3-moe", "mixtral"}


@dataclass
class Family:
    """What a test's engines are made of: the same weights for both decoders."""

    config: ModelConfig
    theirs: Decoder
    ours: GpuDecoder

    def plain(self) -> Decoder:
        return self.theirs

    def gpu(self) -> GpuDecoder:
        return self.ours


@cache
def family(name: str) -> Family:
    source = resolve(str(saved(NAMES[name])[1]), environ={})
    cpu, single = torch.device("cpu"), torch.float32
    theirs = load_weights(source.open_weights(), source.config, device=cpu, dtype=single)
    ours = load_weights(source.open_weights(), source.config, device=DEVICE, dtype=single, for_gpu=True)
    assert isinstance(ours, GpuDecoder)
    return Family(source.config, theirs, ours)


def prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.oracle("gpu")
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str) -> None:
    ours = family(name).gpu()
    assert (ours._fused is not None) is (name in FUSED)
    ids = prompt(44)
    driver = Driver(ours, 8)
    driver.fill(torch.nan)
    assert distance(driver.logits(ids, [31, 12]), judged(saved(NAMES[name])[0], ids)) < 1e-4


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mixtral"])
def test_texts_through_the_runner_are_those_of_the_plain_one(name: str) -> None:
    """The runner gathers positions and rotations itself, and windows reach back over several chunks."""
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 32}
    sampling = SamplingParams(temperature=0.0)
    wanted = [GenRequest(RequestId(length), prompt(length), 2, sampling) for length in (38, 7)]
    found = Engine(cuda_runner(family(name)), 2, **limits).run(wanted)  # type: ignore[arg-type]
    assert found == Engine(plain_runner(family(name)), 1, **limits).run(wanted)  # type: ignore[arg-type]
