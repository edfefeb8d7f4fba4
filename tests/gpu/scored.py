"""A decoder's texts through the engine, graphs captured, each token and score held against transformers' own."""

from __future__ import annotations

from itertools import chain

import torch
from fakes_gpu import Engine
from transformers import PreTrainedModel

from tests.model.driving import judged
from tests.model.families import VOCAB
from vserve.engine.cuda_runner import CudaRunner
from vserve.engine.request import GenRequest, RequestId, SamplingParams
from vserve.engine.scheduler import Limits
from vserve.model.decoder import Decoder
from vserve.model.gpu_decoder import GpuDecoder

DEVICE = torch.device("cuda")
LENGTHS = (1, 30, 70, 5, 49, 12, 100, 3)
"""Of the prompts: longer than every window of the families, and more than a step takes."""
TOKENS = 24
EXPERTS_SHARE = dict.fromkeys(("mixtral", "qwen3-moe"), 0.5)
"""Of the places, in half precision: where two experts have nearly the same score, rounding chooses another."""
SIZES = {"num_blocks": 64, "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 160}


def runner(decoder: GpuDecoder, limits: Limits) -> CudaRunner:
    """A runner of decoder that has captured every graph; what is read of its cache before it is written shows."""
    cache = decoder.new_cache(limits.num_blocks, limits.block_size)
    for pair in cache.pairs:
        pair.fill_(torch.nan)
    made = CudaRunner(
        decoder,
        cache,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        max_tokens=limits.max_num_batched_tokens,
    )
    while made.idle():
        pass
    assert made.num_graphs
    return made


def check(decoder: Decoder, judge: PreTrainedModel, limit: float, share: float = 1.0) -> None:
    """Every token is the judge's likeliest behind the same text, or within limit of it, and the five likeliest have the
    judge's log-probabilities within limit; both as parts of the largest logit, at a share of the places."""
    assert isinstance(decoder, GpuDecoder)
    sampling = SamplingParams(temperature=0.0, logprobs=5)
    requests = [
        GenRequest(
            RequestId(length), torch.randint(3, VOCAB, (length,), generator=seeded(length)).tolist(), TOKENS, sampling
        )
        for length in LENGTHS
    ]
    engine = Engine(lambda limits: runner(decoder, limits), **SIZES)
    texts = engine.run(requests)
    errors: list[float] = []
    for request in requests:
        ids = texts[request.id]
        assert len(ids) == TOKENS
        scores = chain.from_iterable(emit.logprobs or () for emit in engine.emits if emit.id == request.id)
        logits = judged(judge, [*request.prompt, *ids])[len(request.prompt) - 1 : -1]
        size = float(logits.abs().max())
        for token, score, row in zip(ids, scores, logits, strict=True):
            wanted = row.log_softmax(0)
            apart = [abs(logprob - float(wanted[other])) for other, logprob in score.top]
            errors.append(max(*apart, float(row.max() - row[token])) / size)
    errors.sort()
    print(f"{len(errors)} tokens, errors: median {errors[len(errors) // 2]:.1e}, largest {errors[-1]:.1e}")
    assert errors[int(share * (len(errors) - 1))] < limit


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)
