"""Engines turned by hand, over a small random model: the CUDA runner, its steps checked against the plain runner."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vserve.engine.cuda_runner import CudaPending, CudaRunner
from vserve.engine.request import Emit, GenRequest, RequestId, SamplingParams
from vserve.engine.runner import Pending, Runner
from vserve.engine.scheduler import Limits, Scheduler
from vserve.engine.sequence import Plan
from vserve.kernels import reference
from vserve.model.config import ModelConfig
from vserve.model.decoder import Decoder
from vserve.model.gpu_decoder import GpuDecoder
from vserve.model.layers import Block, DenseEmbedding, Mlp, Norm
from vserve.model.linear import PlainLinear

VOCAB = 97


def config(layers: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 16) -> ModelConfig:
    """A Llama of very few numbers."""
    return ModelConfig.from_json(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": heads * width,
            "intermediate_size": 3 * heads * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": width,
            "vocab_size": VOCAB,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
        },
        "a test",
    )


class Parts:
    """Random weights, the same for every decoder made of them."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype, spread: float = 0.25) -> None:
        generator = torch.Generator().manual_seed(1)

        def drawn(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * spread).to(device, dtype)

        width, inner = model.hidden_size, model.intermediate_size
        queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.config = model
        self.embedding = DenseEmbedding(drawn(VOCAB, width), dtype)
        self.norm = Norm(1 + drawn(width))
        self.head = PlainLinear(drawn(VOCAB, width))
        self.blocks = [
            Block(
                attention_norm=Norm(1 + drawn(width)),
                qkv=PlainLinear(drawn(queries + 2 * keys, width)),
                output=PlainLinear(drawn(width, queries)),
                mlp_norm=Norm(1 + drawn(width)),
                mlp=Mlp(PlainLinear(drawn(2 * inner, width)), PlainLinear(drawn(width, inner))),
            )
            for _ in range(model.num_layers)
        ]

    def plain(self) -> Decoder:
        return Decoder(self.config, reference, self.embedding, self.blocks, self.norm, self.head)

    def gpu(self) -> GpuDecoder:
        return GpuDecoder(self.config, self.embedding, self.blocks, self.norm, self.head)


class Engine:
    """Scheduler and runner turned by hand; make_runner(limits) -> a runner."""

    def __init__(
        self, make_runner: Callable[[Limits], Runner | CudaRunner], depth: int = 2, /, **limits: int | bool
    ) -> None:
        plain: dict[str, int | bool] = {
            "num_blocks": 64,
            "block_size": 8,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 128,
        }
        self.limits = Limits(**(plain | limits))  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.limits, draw_seed=lambda: 4)
        self.runner = make_runner(self.limits)
        self.depth = depth
        self.in_flight: deque[tuple[Plan, Pending | CudaPending]] = deque()
        self.emits: list[Emit] = []

    def turn(self) -> bool:
        """One turn of the loop; False when there was nothing to do."""
        plan = self.scheduler.plan(0.0)
        if plan is None and not self.in_flight:
            return False
        if plan is not None:
            self.in_flight.append((plan, self.runner.launch(plan)))
        if plan is None or len(self.in_flight) >= self.depth:
            done, pending = self.in_flight.popleft()
            self.emits += self.scheduler.commit(done, pending.wait(), 0.0)
        return True

    def run(self, requests: list[GenRequest]) -> dict[int, list[int]]:
        """Every request's ids."""
        for request in requests:
            assert self.scheduler.add(request, 0.0) is None
        while self.turn():
            pass
        assert not self.scheduler.live
        assert self.scheduler.pool.held == 0
        return self.texts(requests)

    def texts(self, requests: list[GenRequest]) -> dict[int, list[int]]:
        """The ids of each request so far."""
        texts: dict[int, list[int]] = {request.id: [] for request in requests}
        for emit in self.emits:
            if emit.id in texts:
                texts[emit.id] += emit.ids
        return texts


def plain_runner(parts: Parts, cache_type: torch.dtype | None = None) -> Callable[[Limits], Runner]:
    """A maker of Runner over the reference operations, with a cache of this type."""
    decoder = parts.plain()

    def make(limits: Limits) -> Runner:
        cache = decoder.new_cache(limits.num_blocks, limits.block_size, cache_type)
        return Runner(decoder, cache, max_num_seqs=limits.max_num_seqs, max_model_len=limits.max_model_len)

    return make


def cuda_runner(
    parts: Parts, cache_type: torch.dtype | None = None, *, use_graphs: bool = True
) -> Callable[[Limits], CudaRunner]:
    """A maker of CudaRunner, whose kernels are interpreted where the weights are on a CPU."""
    decoder = parts.gpu()

    def make(limits: Limits) -> CudaRunner:
        cache = decoder.new_cache(limits.num_blocks, limits.block_size, cache_type)
        for pair in (*cache.pairs, *(cache.scales or ())):
            pair.fill_(float("nan"))  # what is read before it is written shows
        return CudaRunner(
            decoder,
            cache,
            max_num_seqs=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            max_tokens=limits.max_num_batched_tokens,
            use_graphs=use_graphs,
        )

    return make


class EveryOther:
    """A constraint whose masks depend on the ids before: after an even id an odd one, and the other way round; stop
    after `length` ids."""

    def __init__(self, length: int, stop: int) -> None:
        self._length = length
        self._stop = stop
        self._seen = 0

    def mask(self, generated: Sequence[int]) -> bytes:
        assert self._seen <= len(generated) <= self._seen + 1, "an id was skipped or seen twice"
        self._seen = len(generated)
        last = generated[-1] if generated else 0
        allowed = [self._stop] if len(generated) >= self._length else range((last + 1) % 2, VOCAB, 2)
        flags = np.zeros(VOCAB, np.bool_)
        flags[list(allowed)] = True
        return np.packbits(flags, bitorder="little").tobytes()


def masked_requests(count: int) -> list[GenRequest]:
    """Requests of every kind of mask among free ones, all greedy, and some whose prompts are scored; made anew for
    each run and request, as a constraint keeps its place."""
    made = []
    for name in range(count):
        kinds: list[dict[str, object]] = [
            {"constraint": EveryOther(5, 4)},
            {},
            {"allowed_ids": tuple(range(10, 60, 7))},
            {"bad_words": ((3,), (8,), *((one, other) for one in range(0, VOCAB, 2) for other in range(0, VOCAB, 5)))},
            {"prompt_logprobs": 3},
            {"constraint": EveryOther(20, 4), "prompt_logprobs": 0},
        ]
        kind = kinds[name % len(kinds)]
        sampling = {key: kind.pop(key) for key in ("allowed_ids", "bad_words") if key in kind}
        prompt = [name % 3 + 1, 2, 3, *range(name * 2 % 11)]
        params = SamplingParams(temperature=0.0, logprobs=1, **sampling)  # type: ignore[arg-type]
        made.append(GenRequest(RequestId(name), prompt, 7, params, stop_ids=frozenset({4}), **kind))  # type: ignore[arg-type]
    return made


def scores_of(engine: Engine) -> dict[int, list[tuple[float, int, list[int]]]]:
    """What each request was told of its prompt: log-probability, rank and the likely ids at each place."""
    return {
        emit.id: [(entry.logprob, entry.rank, [id for id, _ in entry.top]) for entry in emit.prompt_logprobs]
        for emit in engine.emits
        if emit.prompt_logprobs is not None
    }
