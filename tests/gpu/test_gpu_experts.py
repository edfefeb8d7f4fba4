"""Mixtures on a GPU: kernels that start early say what others say, and a text is the same in any batch."""

from __future__ import annotations

import pytest
import torch
from fakes_gpu import Engine, cuda_runner, plain_runner
from torch import Tensor

from vserve.engine.request import GenRequest, RequestId, SamplingParams
from vserve.kernels import experts, moe
from vserve.kernels.gemv import gemv
from vserve.kernels.route import route
from vserve.model.config import ModelConfig
from vserve.model.decoder import Decoder
from vserve.model.gpu_decoder import GpuDecoder
from vserve.model.loader import load_dummy

DEVICE = torch.device("cuda")
"""Of one layer of the chain below."""
COUNT, ACTIVE, WIDTH, INNER = 32, 4, 1024, 384


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(torch.bfloat16)


@pytest.mark.parametrize("fused", [True, False])
def test_early_kernels_say_what_others_say(fused: bool) -> None:
    """Many layers behind one another: a wait that is missing reads what the layer before has left."""
    torch.manual_seed(1)
    layers = [
        (drawn(COUNT, WIDTH), drawn(COUNT, 2 * INNER, WIDTH, scale=0.03), drawn(COUNT, WIDTH, INNER, scale=0.05))
        for _ in range(12)
    ]
    norm, first = 1 + drawn(WIDTH, scale=0.1), drawn(1, WIDTH)

    def run(early: bool) -> Tensor:
        x = first
        for router, gate_up, down in layers:
            routes = route(gemv(x, router, norm=norm, eps=1e-6, early=early), ACTIVE, normalised=True, early=early)
            if fused:
                x = moe.few(x, norm, 1e-6, routes, gate_up, down, early=early)
            else:
                x = experts.many(x, routes, gate_up, down, x, early=early) * 0.5
        return x

    wanted = run(False)
    assert not wanted.isnan().any()
    for _ in range(20):
        assert torch.equal(run(True), wanted)
    run(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(True)
    for _ in range(50):
        graph.replay()
        assert torch.equal(found, wanted)


class Mixture:
    """One decoder for both runners."""

    def __init__(self) -> None:
        config = ModelConfig.from_json(
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "hidden_size": 128,
                "intermediate_size": 256,
                "moe_intermediate_size": 64,
                "num_experts": 16,
                "num_experts_per_tok": 4,
                "norm_topk_prob": True,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "vocab_size": 97,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
                "tie_word_embeddings": False,
                "hidden_act": "silu",
            },
            "a test",
        )
        self._decoder = load_dummy(config, device=DEVICE, dtype=torch.float32)

    def plain(self) -> Decoder:
        return self._decoder

    def gpu(self) -> GpuDecoder:
        assert isinstance(self._decoder, GpuDecoder)
        return self._decoder


def test_a_text_alone_is_the_one_in_a_batch_and_kernel_by_kernel() -> None:
    parts = Mixture()
    sizes = {"num_blocks": 256, "block_size": 16, "max_num_seqs": 24, "max_num_batched_tokens": 128}
    prompts = [[(7 * i + 3 * j) % 97 for j in range(1 + 5 * i % 40)] for i in range(24)]
    wanted = [GenRequest(RequestId(i), prompt, 12, SamplingParams(temperature=0.0)) for i, prompt in enumerate(prompts)]
    together = Engine(cuda_runner(parts), **sizes).run(wanted)  # type: ignore[arg-type]
    assert Engine(cuda_runner(parts, use_graphs=False), **sizes).run(wanted) == together  # type: ignore[arg-type]
    assert Engine(plain_runner(parts), 1, **sizes).run(wanted) == together  # type: ignore[arg-type]
    for request in wanted[::5]:
        alone = Engine(cuda_runner(parts), **sizes).run([request])  # type: ignore[arg-type]
        assert alone == {request.id: together[request.id]}
