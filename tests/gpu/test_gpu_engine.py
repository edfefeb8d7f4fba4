"""The engine on a GPU: captured graphs against single kernels, batches against solo runs, and everything given back."""

from __future__ import annotations

import random

import pytest
import torch
from fakes_gpu import VOCAB, Engine, Parts, config, cuda_runner, masked_requests, plain_runner, scores_of

from vserve.engine.cuda_runner import CudaRunner
from vserve.engine.request import FinishReason, GenRequest, RequestId, SamplingParams
from vserve.engine.scheduler import Limits

DEVICE = torch.device("cuda")
GREEDY = SamplingParams(temperature=0.0)
SIZES = {"num_blocks": 512, "block_size": 16, "max_num_seqs": 40, "max_num_batched_tokens": 256, "max_model_len": 256}


@pytest.fixture(scope="module")
def parts() -> Parts:
    """In float32: its texts have no near ties, so they must be equal whatever the batch."""
    return Parts(config(layers=3, heads=8, kv_heads=2, width=64), DEVICE, torch.float32, 0.06)


@pytest.fixture(scope="module")
def coarse() -> Parts:
    return Parts(config(layers=3, heads=8, kv_heads=2, width=64), DEVICE, torch.bfloat16, 0.06)


def captured(parts: Parts, limits: Limits) -> CudaRunner:
    """A runner that has every graph."""
    runner = cuda_runner(parts)(limits)
    while runner.idle():
        pass
    assert runner.num_graphs == len(runner.buckets.graphs())
    return runner


def prompts(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(texts: list[list[int]], max_tokens: int) -> list[GenRequest]:
    return [GenRequest(RequestId(i), text, max_tokens, GREEDY) for i, text in enumerate(texts)]


@pytest.mark.parametrize("count", [1, 3, 17, 60])
def test_graphs_kernels_and_the_plain_runner_say_the_same(parts: Parts, count: int) -> None:
    wanted = greedy(prompts(count, count), 12)
    plain = Engine(plain_runner(parts), 1, **SIZES).run(wanted)
    assert Engine(cuda_runner(parts, use_graphs=False), **SIZES).run(wanted) == plain
    assert Engine(lambda limits: captured(parts, limits), **SIZES).run(wanted) == plain


def test_a_prompt_alone_and_in_any_batch_has_the_same_text(parts: Parts) -> None:
    wanted = greedy(prompts(30, 5), 16)
    together = Engine(lambda limits: captured(parts, limits), **SIZES).run(wanted)
    one = Engine(lambda limits: captured(parts, limits), **SIZES)
    for request in wanted:
        assert one.run([request])[request.id] == together[request.id]
        one.emits.clear()


def test_the_same_seeds_twice_are_bit_equal(coarse: Parts) -> None:
    kinds = [
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, seed=4),
        SamplingParams(temperature=1.3, repetition_penalty=1.3, frequency_penalty=0.3, seed=5, logprobs=3),
        GREEDY,
    ]
    wanted = [
        GenRequest(RequestId(i), text, 30, kinds[i % len(kinds)]) for i, text in enumerate(prompts(48, 9, longest=100))
    ]
    first, second = (Engine(lambda limits: captured(coarse, limits), **SIZES) for _ in range(2))
    assert first.run(wanted) == second.run(wanted)
    assert [emit.logprobs for emit in first.emits] == [emit.logprobs for emit in second.emits]


def test_a_thousand_mixed_requests_with_preemptions_and_cancels_give_everything_back(parts: Parts) -> None:
    rng = random.Random(1)
    sizes = SIZES | {"num_blocks": 60, "max_prefill_chunk": 64}
    engine = Engine(lambda limits: captured(parts, limits), **sizes)
    kinds = [GREEDY, SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=0.0, presence_penalty=1.0)]
    wanted = [
        GenRequest(RequestId(i), text, rng.randint(1, 90), kinds[i % 3]) for i, text in enumerate(prompts(1000, 2, 100))
    ]
    cancelled: set[int] = set()
    for request in wanted:
        assert engine.scheduler.add(request, 0.0) is None
        if rng.random() < 0.7:
            engine.turn()
        if rng.random() < 0.15:
            victim = wanted[rng.randrange(request.id + 1)]
            emit = engine.scheduler.cancel(victim.id, FinishReason.CANCELLED, 0.0)
            if emit is not None:
                cancelled.add(victim.id)
    while engine.turn():
        pass
    assert not engine.scheduler.live
    engine.scheduler.pool.check()
    assert engine.scheduler.pool.held == 0
    assert engine.scheduler.stats().preemptions_total > 0
    assert cancelled
    texts = engine.texts(wanted)
    whole = [request for request in wanted if request.id not in cancelled]
    assert all(len(texts[request.id]) == request.max_tokens for request in whole)
    checked = whole[::50]
    alone = Engine(lambda limits: captured(parts, limits), **SIZES)
    assert {request.id: texts[request.id] for request in checked} == alone.run(checked)


def test_a_long_prompt_in_chunks_over_a_shared_beginning_is_the_plain_runners(parts: Parts) -> None:
    beginning = [token * 7 % VOCAB for token in range(200)]
    wanted = greedy([beginning, [*beginning[:170], 1, 2, 3], beginning[:96]], 8)
    sizes = SIZES | {"max_num_batched_tokens": 48}
    assert Engine(lambda limits: captured(parts, limits), **sizes).run(wanted) == Engine(
        plain_runner(parts), 1, **sizes
    ).run(wanted)


def test_bf16_texts_leave_the_plain_runners_only_at_near_ties(coarse: Parts) -> None:
    """Where the two first differ, the plain runner's logits of both ids are within bf16's rounding."""
    sampling = SamplingParams(temperature=0.0, logprobs=5)
    wanted = [GenRequest(RequestId(i), text, 24, sampling) for i, text in enumerate(prompts(24, 11))]
    plain, gpu = Engine(plain_runner(coarse), 1, **SIZES), Engine(lambda limits: captured(coarse, limits), **SIZES)
    theirs, mine = plain.run(wanted), gpu.run(wanted)
    logprobs = {
        request.id: [e.logprobs[0] for e in plain.emits if e.id == request.id and e.logprobs] for request in wanted
    }
    for request in wanted:
        for place, (a, b) in enumerate(zip(theirs[request.id], mine[request.id], strict=True)):
            if a != b:
                top = dict(logprobs[request.id][place].top)
                assert b in top, f"request {request.id}, token {place}: {b} is not among the likely {top}"
                assert top[a] - top[b] < 0.15  # two steps of a bf16 logit between 8 and 16
                break


@pytest.mark.parametrize("count", [2, 18, 40])
def test_masks_and_scored_prompts_are_the_same_with_graphs_and_without(parts: Parts, count: int) -> None:
    plain = Engine(plain_runner(parts), 1, **SIZES)
    texts = plain.run(masked_requests(count))
    for make in (cuda_runner(parts, use_graphs=False), lambda limits: captured(parts, limits)):
        engine = Engine(make, **SIZES)
        assert engine.run(masked_requests(count)) == texts
        mine, theirs = scores_of(engine), scores_of(plain)
        assert mine.keys() == theirs.keys()
        for name, entries in theirs.items():
            assert [entry[1:] for entry in mine[name]] == [entry[1:] for entry in entries]
            assert [entry[0] for entry in mine[name]] == pytest.approx([entry[0] for entry in entries], abs=1e-3)
