"""The encoder on the GPU against itself on the CPU, with random weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vserve.model.encoder_config import EncoderConfig
from vserve.model.encoder_loader import expected_shapes, load_encoder
from vserve.model.encoder_source import EncoderSource, Pooling
from vserve.model.kinds import Kind
from vserve.model.weights import StoredTensor

CONFIG = {
    "vocab_size": 997,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "type_vocab_size": 1,
}


class Drawn:
    """Weights drawn at random for every tensor of a config."""

    def __init__(self, config: EncoderConfig) -> None:
        generator = torch.Generator().manual_seed(5)
        self._tensors: dict[str, Tensor] = {
            name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else 0.08)
            for name, shape in expected_shapes(config).items()
        }

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def get(self, name: str) -> StoredTensor:
        data = self._tensors[name]
        return StoredTensor(name, Kind("F32"), tuple(data.shape), data)

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())


@pytest.mark.parametrize(
    ("architecture", "poolings"),
    [
        ("XLMRobertaModel", (Pooling.CLS,)),
        ("XLMRobertaModel", tuple(Pooling)),
        ("BertModel", (Pooling.MEAN,)),
        ("BertForSequenceClassification", ()),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 6e-2)])
def test_the_gpu_gives_the_vectors_of_the_cpu(
    architecture: str,
    poolings: tuple[Pooling, ...],
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = EncoderConfig.from_json({**CONFIG, "architectures": [architecture], "num_labels": 1})
    monkeypatch.setattr(EncoderSource, "open_weights", lambda self: Drawn(config))
    source = EncoderSource(Path(), "drawn", config, poolings, False, 512, False)
    rng = random.Random(1)
    texts = [[rng.randrange(2, 997) for _ in range(size)] for size in sorted([1, 2, 7, 7, 31, 200, 511])]
    here = load_encoder(source, device=torch.device("cpu"), dtype=torch.float32).encode(texts)
    there = load_encoder(source, device=torch.device("cuda"), dtype=dtype).encode(texts)
    unit = torch.nn.functional.normalize
    if poolings:
        here, there = unit(here, dim=1), unit(there, dim=1)
    torch.testing.assert_close(there, here, rtol=0, atol=tolerance)
