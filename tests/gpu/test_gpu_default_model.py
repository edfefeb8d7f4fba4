"""The default model on the GPU against the CPU's path on the same machine: equal texts up to the first near tie."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from default_model import default_model
from fakes_gpu import Engine

from vserve.engine.cuda_runner import CudaRunner
from vserve.engine.request import GenRequest, RequestId, SamplingParams
from vserve.engine.runner import Runner
from vserve.engine.scheduler import Limits
from vserve.model import loader
from vserve.model.gpu_decoder import GpuDecoder
from vserve.text import gguf_vocab

TOKENS = 48
SIZES = {
    "num_blocks": 512,
    "block_size": 16,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "max_model_len": 512,
    "prefix_caching": False,
}
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "A list of planets: Mercury, Venus, Earth,",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n\nI am writing to",
)


def requests() -> list[GenRequest]:
    metadata = default_model().gguf_metadata
    assert metadata is not None
    sampling = SamplingParams(temperature=0.0, logprobs=5)
    prompts = gguf_vocab.build(metadata).encode_batch(PROMPTS)
    return [GenRequest(RequestId(i), tuple(prompt), TOKENS, sampling) for i, prompt in enumerate(prompts)]


@cache
def from_the_cpu() -> tuple[dict[int, list[int]], dict[int, list[dict[int, float]]]]:
    """(ids, the likely ids' log-probabilities at each place) of every request, in float32 on the CPU."""
    decoder = loader.load(default_model(), device=torch.device("cpu"), dtype=torch.float32)

    def make(limits: Limits) -> Runner:
        cache = decoder.new_cache(limits.num_blocks, limits.block_size)
        return Runner(decoder, cache, max_num_seqs=limits.max_num_seqs, max_model_len=limits.max_model_len)

    engine = Engine(make, 1, **SIZES)
    ids = engine.run(requests())
    likely: dict[int, list[dict[int, float]]] = {name: [] for name in ids}
    for emit in engine.emits:
        likely[emit.id] += [dict(one.top) for one in emit.logprobs or ()]
    return ids, likely


@pytest.mark.parametrize(("dtype", "tie"), [(torch.float32, 2e-3), (torch.bfloat16, 0.4)], ids=["float32", "bfloat16"])
def test_the_gpus_text_is_the_cpus_up_to_the_first_near_tie(dtype: torch.dtype, tie: float) -> None:
    """tie: the most by which two logits of about 20 change places in dtype, weights rounded to it included."""
    decoder = loader.load(default_model(), device=torch.device("cuda"), dtype=dtype)
    assert isinstance(decoder, GpuDecoder)

    def make(limits: Limits) -> CudaRunner:
        runner = CudaRunner(
            decoder,
            decoder.new_cache(limits.num_blocks, limits.block_size),
            max_num_seqs=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            max_tokens=limits.max_num_batched_tokens,
        )
        while runner.idle():
            pass
        return runner

    ids, likely = from_the_cpu()
    mine = Engine(make, **SIZES).run(requests())
    same = 0
    for name, theirs in ids.items():
        assert len(mine[name]) == len(theirs)
        parted = next((i for i, (a, b) in enumerate(zip(theirs, mine[name], strict=True)) if a != b), None)
        same += len(theirs) if parted is None else parted
        if parted is not None:
            top = likely[name][parted]
            a, b = theirs[parted], mine[name][parted]
            print(f"{dtype}: request {name} parts at token {parted}, gap {top[a] - top.get(b, float('-inf')):.4f}")
            assert b in top, f"request {name}, token {parted}: {b} is not among the likely {top}"
            assert top[a] - top[b] < tie, f"request {name}, token {parted}"
    print(f"{dtype}: {same} of {TOKENS * len(ids)} tokens before the first that differs")
    assert same >= TOKENS * len(ids) // 4, "texts part so early that ties cannot be the reason"
