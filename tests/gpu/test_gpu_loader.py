"""Weights on their way to the GPU: every number arrives, in whatever pieces and on however many threads."""

from __future__ import annotations

import pytest
import torch

from tests.model.driving import config_of, random_model, weights_of
from vserve.model import loader, upload
from vserve.model.gpu_decoder import GpuDecoder, _Dense
from vserve.model.linear import PlainLinear

CUDA = torch.device("cuda")


@pytest.mark.parametrize("buffer_bytes", [1 << 10, 1 << 14, upload.BUFFER_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_holds_the_files_numbers(
    buffer_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "BUFFER_BYTES", buffer_bytes)
    model = random_model()
    weights, config = weights_of(model), config_of(model)
    decoder = loader.load_weights(weights, config, device=CUDA, dtype=dtype)
    assert isinstance(decoder, GpuDecoder)
    assert decoder._fused is not None
    for number, layer in enumerate(decoder._fused[0]):
        assert isinstance(layer.mlp, _Dense)
        for linear, names in (
            (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (layer.output, ("self_attn.o_proj",)),
            (layer.mlp.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
            (layer.mlp.down, ("mlp.down_proj",)),
        ):
            assert isinstance(linear, PlainLinear)
            wanted = torch.cat([weights.get(f"model.layers.{number}.{name}.weight").data for name in names])
            assert torch.equal(linear.weight.cpu(), wanted.to(dtype)), (number, names)
    ids = torch.arange(config.vocab_size, device=CUDA)
    assert torch.equal(decoder._embedding(ids).cpu(), weights.get("model.embed_tokens.weight").data.to(dtype))


def test_a_buffer_is_not_filled_again_before_it_has_been_copied() -> None:
    uploader = upload.Uploader(CUDA)
    target = torch.empty((64, upload.BUFFER_BYTES // 16), dtype=torch.float32, device=CUDA)  # four rows a buffer

    def part(start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(torch.arange(start, stop, dtype=torch.float32)[:, None].expand_as(out))

    torch.cuda._sleep(200_000_000)  # the copies wait behind it
    uploader.rows(target, part)
    uploader.close()
    assert torch.equal(target.cpu(), torch.arange(64.0)[:, None].expand(64, target.shape[1]))
