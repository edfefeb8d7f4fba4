"""What may be drawn, and prompts that are scored: on the fake model, at both depths, whatever is preempted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
from fakes import VOCAB, FakeModel, fake_logits, solo
from hypothesis import given, settings
from hypothesis import strategies as st

from vserve.engine.constraint import DrawMask, unpack
from vserve.engine.request import Emit, FinishReason, GenRequest, RequestFault, RequestId, SamplingParams
from vserve.engine.runner import Pending, Runner
from vserve.engine.sampler import token_logprobs
from vserve.engine.scheduler import Limits, Scheduler
from vserve.engine.sequence import Plan
from vserve.engine.sequence import Sequence as Live
from vserve.errors import BadRequest

EOS = 47
GREEDY = SamplingParams(temperature=0.0)


def packed(ids: Sequence[int]) -> bytes:
    flags = np.zeros(VOCAB, np.bool_)
    flags[list(ids)] = True
    return np.packbits(flags, bitorder="little").tobytes()


class Steps:
    """A constraint that knows whether it was advanced wrongly: id number i of the answer is i modulo three, modulo
    three; after `length` ids the answer ends.  breaks_at: there it fails."""

    def __init__(self, length: int, breaks_at: int | None = None) -> None:
        self._length = length
        self._breaks_at = breaks_at
        self._seen: list[int] = []

    def mask(self, generated: Sequence[int]) -> bytes:
        assert list(generated[: len(self._seen)]) == self._seen, "ids were taken back or changed"
        assert len(generated) <= len(self._seen) + 1, "an id was skipped"
        assert all(token % 3 == place % 3 for place, token in enumerate(generated))
        self._seen = list(generated)
        if len(generated) == self._breaks_at:
            raise BadRequest("the constraint broke")
        if len(generated) >= self._length:
            return packed([EOS])
        return packed([token for token in range(VOCAB) if token % 3 == len(generated) % 3 and token != EOS])


def expected(prompt: Sequence[int], length: int, max_tokens: int) -> list[int]:
    """What ``Steps`` makes of the fake model's greedy answer."""
    tokens, answer = list(prompt), list[int]()
    while len(answer) < min(length, max_tokens):
        scores = fake_logits(tokens + answer)
        allowed = [token for token in range(VOCAB) if token % 3 == len(answer) % 3 and token != EOS]
        answer.append(max(allowed, key=lambda token: (scores[token], -token)))
    return answer if len(answer) == max_tokens else [*answer, EOS]


class Turned:
    """Scheduler and runner turned by hand."""

    def __init__(self, depth: int, model: FakeModel | None = None, **limits: int) -> None:
        plain = {
            "num_blocks": 64,
            "block_size": 4,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "max_model_len": 80,
        }
        self.scheduler = Scheduler(Limits(**(plain | limits), vocab_size=VOCAB), draw_seed=lambda: 4)  # type: ignore[arg-type]
        self.size = self.scheduler.limits.block_size
        model = model or FakeModel()
        cache = model.new_cache(self.scheduler.limits.num_blocks, self.size)
        self.runner = Runner(model, cache, max_num_seqs=self.scheduler.limits.max_num_seqs, max_model_len=80)
        self.depth = depth
        self.flight: deque[tuple[Plan, Pending]] = deque()
        self.emits: dict[int, list[Emit]] = {}
        self.plans: list[Plan] = []

    def add(self, request: GenRequest) -> None:
        refused = self.scheduler.add(request, 0.0)
        self.emits[request.id] = [] if refused is None else [refused]

    def turn(self) -> None:
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            self.plans.append(plan)
            self.flight.append((plan, self.runner.launch(plan)))
        if plan is None or len(self.flight) >= self.depth:
            done, pending = self.flight.popleft()
            for emit in self.scheduler.commit(done, pending.wait(), 0.0):
                self.emits[emit.id].append(emit)

    def run(self, *requests: GenRequest) -> None:
        for request in requests:
            self.add(request)
        while self.scheduler.live or self.flight:
            self.turn()
        assert self.scheduler.pool.held == 0

    def ids(self, request_id: int) -> list[int]:
        return [token for emit in self.emits[request_id] for token in emit.ids]

    def finish(self, request_id: int) -> FinishReason | None:
        return self.emits[request_id][-1].finish


def ask(
    number: int, prompt: Sequence[int], max_tokens: int = 12, sampling: SamplingParams = GREEDY, **more: object
) -> GenRequest:
    return GenRequest(RequestId(number), list(prompt), max_tokens, sampling, stop_ids=frozenset({EOS}), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_constraint_sees_every_id_once_and_ends_the_answer(depth: int) -> None:
    engine = Turned(depth)
    prompts = [[i + 1, i + 2, i + 3] for i in range(6)]
    engine.run(*(ask(i, prompt, constraint=Steps(5)) if i % 2 else ask(i, prompt) for i, prompt in enumerate(prompts)))
    for i, prompt in enumerate(prompts):
        assert engine.ids(i) == (expected(prompt, 5, 12) if i % 2 else solo(ask(i, prompt)))
        assert engine.finish(i) is (FinishReason.STOP if engine.ids(i)[-1] == EOS else FinishReason.LENGTH)


def test_with_two_steps_in_flight_only_constrained_sequences_wait_for_their_ids() -> None:
    engine = Turned(2)
    engine.run(ask(1, [1, 2], constraint=Steps(20)), ask(2, [3, 4]))
    seen: dict[int, int] = {}
    together = 0
    for plan in engine.plans[1:]:
        for work in plan.works:
            seen[work.sequence.id] = seen.get(work.sequence.id, 0) + 1
            together += work.from_row
            assert not (work.from_row and work.sequence.id == 1)
    assert together > 0  # the free one went ahead


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 14), st.integers(0, 9), st.integers(1, 14), st.booleans(), st.booleans()),
        min_size=1,
        max_size=7,
    ),
    blocks=st.integers(8, 14),
    depth=st.sampled_from([1, 2]),
    scored=st.integers(1, 6),
)
def test_preemption_never_advances_a_constraint_twice_nor_scores_a_prompt_twice(
    jobs: list[tuple[int, int, int, bool, bool]], blocks: int, depth: int, scored: int
) -> None:
    engine = Turned(depth, num_blocks=blocks, max_num_seqs=5, max_scored_tokens=scored, max_prefill_chunk=8)
    requests = [
        ask(
            i,
            [(3 * i + place) % 40 for place in range(length)],
            max_tokens,
            constraint=Steps(steps) if bound else None,
            prompt_logprobs=2 if scoring else None,
        )
        for i, (length, steps, max_tokens, bound, scoring) in enumerate(jobs)
    ]
    engine.run(*requests)
    for request, (_, steps, max_tokens, bound, scoring) in zip(requests, jobs, strict=True):
        assert engine.ids(request.id) == (expected(request.prompt, steps, max_tokens) if bound else solo(request))
        scores = [emit.prompt_logprobs for emit in engine.emits[request.id] if emit.prompt_logprobs is not None]
        assert len(scores) == scoring
        if scoring:
            assert [entry.logprob for entry in scores[0]] == pytest.approx(truth(request.prompt), abs=1e-4)


def truth(prompt: Sequence[int]) -> list[float]:
    """Log-probabilities of a prompt's tokens but the first, by the definition."""
    values = []
    for place in range(1, len(prompt)):
        scores = fake_logits(prompt[:place])
        values.append(scores[prompt[place]] - math.log(sum(map(math.exp, scores))))
    return values


def test_a_broken_constraint_ends_its_own_request_with_the_reason() -> None:
    engine = Turned(1)
    engine.run(ask(1, [1, 2], constraint=Steps(9, breaks_at=3)), ask(2, [3, 4]))
    last = engine.emits[1][-1]
    assert (last.finish, last.error) == (FinishReason.ERROR, "the constraint broke")
    assert isinstance(last.error, RequestFault)
    assert len(engine.ids(1)) == 3
    assert engine.ids(2) == solo(ask(2, [3, 4]))


class Exploding:
    def mask(self, generated: Sequence[int]) -> bytes:
        raise RuntimeError("a bug")


def test_a_bug_in_a_constraint_harms_nobody_else_and_is_not_blamed_on_the_client() -> None:
    engine = Turned(1)
    engine.run(ask(1, [1, 2], constraint=Exploding()), ask(2, [3, 4]))
    assert engine.finish(1) is FinishReason.ERROR
    assert not isinstance(engine.emits[1][-1].error, RequestFault)
    assert engine.ids(2) == solo(ask(2, [3, 4]))


def test_a_mask_that_allows_nothing_is_the_requests_own_fault() -> None:
    class Nothing:
        def mask(self, generated: Sequence[int]) -> bytes:
            return bytes(VOCAB // 8)

    engine = Turned(1)
    engine.run(ask(1, [1, 2], constraint=Nothing()))
    assert isinstance(engine.emits[1][-1].error, RequestFault)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_ids_are_drawn(depth: int, temperature: float) -> None:
    engine = Turned(depth)
    sampling = SamplingParams(temperature=temperature, seed=1, allowed_ids=(3, 5, 46))
    engine.run(ask(1, [1, 2], 30, sampling))
    assert set(engine.ids(1)) <= {3, 5, 46}
    assert len(engine.ids(1)) == 30


@pytest.mark.parametrize("depth", [1, 2])
def test_bad_words_do_not_appear(depth: int) -> None:
    free = Turned(depth)
    free.run(ask(1, [9, 8, 7], 20))
    said = free.ids(1)
    bad = (tuple(said[2:4]), tuple(said[6:9]), (said[12],))
    engine = Turned(depth)
    engine.run(ask(1, [9, 8, 7], 20, SamplingParams(temperature=0.0, bad_words=bad)))
    answer = engine.ids(1)
    assert answer[:3] == said[:3]
    for word in bad:
        assert not any(tuple(answer[i : i + len(word)]) == word for i in range(len(answer)))


def test_min_tokens_bans_stop_ids_unless_nothing_else_is_allowed() -> None:
    request = GenRequest(
        RequestId(1), [1], 9, SamplingParams(allowed_ids=(4, EOS)), min_tokens=2, stop_ids=frozenset({EOS})
    )
    sequence = Live(request, 1, 1)
    mask = DrawMask(sequence, VOCAB)
    assert np.flatnonzero(unpack(mask.bits(1), VOCAB)).tolist() == [4]
    assert np.flatnonzero(unpack(mask.bits(3), VOCAB)).tolist() == [4, EOS]
    alone = GenRequest(
        RequestId(1), [1], 9, SamplingParams(allowed_ids=(EOS,)), min_tokens=2, stop_ids=frozenset({EOS})
    )
    assert np.flatnonzero(unpack(DrawMask(Live(alone, 1, 1), VOCAB).bits(1), VOCAB)).tolist() == [EOS]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_scored_prompt_comes_in_slices_and_reads_no_cached_block(depth: int) -> None:
    engine = Turned(depth, max_scored_tokens=5)
    prompt = list(range(1, 30))
    engine.run(ask(1, prompt))
    engine.run(ask(2, prompt, prompt_logprobs=3), ask(3, prompt))
    for plan in engine.plans:
        assert sum(len(scoring.places) for scoring in plan.scorings) <= 5
    (scores,) = [emit.prompt_logprobs for emit in engine.emits[2] if emit.prompt_logprobs is not None]
    assert engine.emits[2][0].cached_tokens == 0
    assert engine.emits[3][0].cached_tokens > 0
    for place, entry in enumerate(scores, 1):
        row = np.array(fake_logits(prompt[:place]), np.float32)
        wanted = token_logprobs(row, prompt[place], 3)
        assert (entry.rank, [token for token, _ in entry.top]) == (wanted.rank, [token for token, _ in wanted.top])
    assert [entry.logprob for entry in scores] == pytest.approx(truth(prompt), abs=1e-4)
    assert engine.ids(1) == engine.ids(2) == engine.ids(3)


def test_a_prompt_can_be_scored_without_an_answer() -> None:
    engine = Turned(2)
    prompt = list(range(1, 20))
    engine.run(ask(1, prompt, 0, prompt_logprobs=0), ask(2, [5], 0, prompt_logprobs=0))
    assert engine.ids(1) == []
    assert engine.finish(1) is FinishReason.LENGTH
    assert [entry.logprob for entry in engine.emits[1][-1].prompt_logprobs or ()] == pytest.approx(
        truth(prompt), abs=1e-4
    )
    assert engine.emits[2][-1].prompt_logprobs == ()
    engine.run(ask(3, range(40), 0, prompt_logprobs=0), ask(4, [1], 0))
    assert engine.finish(3) is FinishReason.LENGTH
    assert engine.finish(4) is FinishReason.ERROR


def test_a_prompt_without_valid_numbers_ends_with_an_error_that_is_not_the_clients() -> None:
    engine = Turned(1, FakeModel(poison=40))
    engine.run(ask(1, [1, 40, 2, 3], prompt_logprobs=1), ask(2, [4, 5]))
    assert engine.finish(1) is FinishReason.ERROR
    assert not isinstance(engine.emits[1][-1].error, RequestFault)
    assert engine.ids(2) == solo(ask(2, [4, 5]))
