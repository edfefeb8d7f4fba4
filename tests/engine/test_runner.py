"""Plans become tensors, tensors become text: on real pages, at one and two steps in flight."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from fakes import VOCAB, FakeModel, solo

from vserve.engine.batch import BatchBuilder
from vserve.engine.request import Emit, FinishReason, GenRequest, RequestId, SamplingParams
from vserve.engine.runner import Pending, Runner
from vserve.engine.scheduler import Limits, Scheduler
from vserve.engine.sequence import Plan

GREEDY = SamplingParams(temperature=0.0)


class Engine:
    """Scheduler and runner turned by hand."""

    def __init__(self, depth: int, model: FakeModel | None = None, /, **limits: int) -> None:
        plain: dict[str, int] = {
            "num_blocks": 64,
            "block_size": 4,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 80,
        }
        self.limits = Limits(**(plain | limits))  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.limits, draw_seed=lambda: 4)
        self.model = model or FakeModel()
        cache = self.model.new_cache(self.limits.num_blocks, self.limits.block_size)
        self.runner = Runner(
            self.model, cache, max_num_seqs=self.limits.max_num_seqs, max_model_len=self.limits.max_model_len
        )
        self.depth = depth
        self.in_flight: deque[tuple[Plan, Pending]] = deque()
        self.emits: list[Emit] = []

    def run(self, requests: list[GenRequest]) -> dict[int, list[int]]:
        for request in requests:
            assert self.scheduler.add(request, 0.0) is None
        while self.scheduler.live or self.in_flight:
            plan = self.scheduler.plan(0.0)
            if plan is not None:
                self.in_flight.append((plan, self.runner.launch(plan)))
            if plan is None or len(self.in_flight) >= self.depth:
                done, pending = self.in_flight.popleft()
                self.emits += self.scheduler.commit(done, pending.wait(), 0.0)
        assert self.scheduler.pool.held == 0
        return {
            request.id: [token for emit in self.emits if emit.id == request.id for token in emit.ids]
            for request in requests
        }


def requests(sampling: SamplingParams, count: int = 7, max_tokens: int = 12) -> list[GenRequest]:
    return [
        GenRequest(RequestId(name), [name % 3 + 1, 2, 3, *range(name * 2 % 11)], max_tokens, sampling)
        for name in range(count)
    ]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 8, "max_prefill_chunk": 3},
        {"num_blocks": 12},
        {"num_blocks": 12, "prefix_caching": False, "block_size": 3},
    ],
    ids=["roomy", "one row", "small chunks", "few blocks", "few blocks and no prefix cache"],
)
@pytest.mark.promise("R7")
def test_every_text_is_the_solo_text(depth: int, limits: dict[str, int]) -> None:
    wanted = requests(GREEDY)
    assert Engine(depth, **limits).run(wanted) == {request.id: solo(request) for request in wanted}


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=5),
        SamplingParams(seed=5, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01),
        SamplingParams(seed=5, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.5, logprobs=2),
        SamplingParams(temperature=0.0, frequency_penalty=1.0, logit_bias=((3, 2.0),)),
    ],
)
def test_the_same_seed_gives_the_same_text_whatever_the_batch_depth_and_preemptions(sampling: SamplingParams) -> None:
    wanted = requests(sampling)
    alone = {request.id: Engine(1).run([request])[request.id] for request in wanted}
    for depth in (1, 2):
        tight = Engine(depth, num_blocks=12, max_num_batched_tokens=16, max_prefill_chunk=4)
        assert tight.run(wanted) == alone
        assert tight.scheduler.stats().preemptions_total > 0
    assert len({tuple(text) for text in alone.values()}) > 1


def test_requests_without_a_seed_draw_from_the_seed_they_are_given() -> None:
    request = GenRequest(RequestId(1), [1, 2], 20, SamplingParams(temperature=2.0))
    seeded = GenRequest(RequestId(1), [1, 2], 20, SamplingParams(temperature=2.0, seed=4))
    assert Engine(1).run([request]) == Engine(1).run([seeded])


def test_min_tokens_and_stop_ids_hold() -> None:
    stops = frozenset(range(0, 48, 2))
    request = GenRequest(RequestId(1), [1, 2, 3], 30, GREEDY, min_tokens=6, stop_ids=stops)
    engine = Engine(2)
    text = engine.run([request])[1]
    assert text == solo(request)
    assert len(text) > 6
    assert all(token % 2 for token in text[:6])
    assert engine.emits[-1].finish is FinishReason.STOP
    assert engine.emits[-1].stop_id == text[-1]


@pytest.mark.promise("R7", "fault: invalid numbers")
def test_a_row_of_nan_ends_its_request_and_no_other() -> None:
    engine = Engine(2, FakeModel(poison=47))
    others = requests(GREEDY, 4)
    bad = GenRequest(RequestId(9), [1, 47, 3, 4, 5, 6, 7, 8, 9], 5, GREEDY)
    texts = engine.run([*others[:2], bad, *others[2:]])
    clean = [request for request in others if 47 not in solo(request)[:-1]]
    assert clean
    assert all(texts[request.id] == solo(request) for request in clean)
    (end,) = [emit for emit in engine.emits if emit.id == 9]
    assert end.finish is FinishReason.ERROR
    assert end.error is not None
    assert "invalid numbers" in end.error


def test_parameters_the_sampler_cannot_use_end_their_request_and_no_other() -> None:
    engine = Engine(1)
    good = requests(GREEDY, 2)
    bad = GenRequest(RequestId(9), [1], 5, SamplingParams(logit_bias=((2**70, 1.0),)))
    texts = engine.run([bad, *good])
    assert [emit.finish for emit in engine.emits if emit.id == 9] == [FinishReason.ERROR]
    assert all(texts[request.id] == solo(request) for request in good)


def test_a_chunk_that_does_not_end_its_prompt_asks_for_no_logits() -> None:
    engine = Engine(1, max_num_batched_tokens=8)
    request = GenRequest(RequestId(1), list(range(20)), 1, GREEDY)
    assert engine.run([request]) == {1: solo(request)}
    assert engine.model.steps == [(8,), (8,), (4,)]


def test_a_step_is_laid_out_as_the_contract_says() -> None:
    scheduler = Scheduler(Limits(16, 4, 4, 32, 64))
    builder = BatchBuilder(max_num_seqs=4, max_blocks=16, block_size=4, vocab_size=VOCAB, device=torch.device("cpu"))
    scheduler.add(GenRequest(RequestId(1), [10, 11, 12, 13, 14], 3, GREEDY), 0.0)
    first = scheduler.plan(0.0)
    assert first is not None
    builder.build(first)
    scheduler.add(GenRequest(RequestId(2), [20, 21, 22], 3, GREEDY), 0.0)
    plan = scheduler.plan(0.0)  # one decode whose id is still on the device, and one prompt
    assert plan is not None
    batch = builder.build(plan)
    step, (one, two) = batch.step, [work.sequence for work in plan.works]
    assert step.ids.tolist() == [0, 20, 21, 22]
    assert (batch.fed, batch.fed_rows) == ([0], [one.row])
    assert step.positions.tolist() == [5, 0, 1, 2]
    assert step.slots.tolist() == [one.blocks[1] * 4 + 1, *(two.blocks[0] * 4 + place for place in range(3))]
    assert step.query_starts.tolist() == [0, 1, 4]
    assert step.context_lens.tolist() == [6, 3] == list(step.context_lens_host)
    assert step.query_lens == (1, 3)
    assert step.block_tables.tolist() == [one.blocks, [two.blocks[0], 0]]
    assert step.logit_rows.tolist() == [0, 3]
    assert batch.draw_rows == [one.row, two.row]
    wide, narrow = (step.ids, step.positions, step.slots, step.logit_rows), (step.query_starts, step.block_tables)
    assert {tensor.dtype for tensor in wide} == {torch.int64}
    assert {tensor.dtype for tensor in (*narrow, step.context_lens)} == {torch.int32}
    assert all(tensor.is_contiguous() for tensor in (*wide, *narrow, step.context_lens))
