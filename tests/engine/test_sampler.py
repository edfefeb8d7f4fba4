"""Each filter against a naive oracle, the drawn frequencies against the distribution, and rows that fail alone."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vserve.engine.request import GenRequest, RequestId, SamplingParams
from vserve.engine.sampler import Draw, RowState, draw, keep_from, pick, sample, token_logprobs, uniform
from vserve.engine.sequence import Sequence

V = 500


def state(
    params: SamplingParams,
    prompt: list[int] | None = None,
    generated: list[int] | None = None,
    *,
    seed: int = 1,
    min_tokens: int = 0,
    stop_ids: frozenset[int] = frozenset(),
) -> RowState:
    request = GenRequest(RequestId(1), prompt or [1], 1000, params, min_tokens=min_tokens, stop_ids=stop_ids)
    sequence = Sequence(request, 1, seed)
    sequence.tokens += generated or []
    return RowState(sequence, V)


def logits(seed: int, size: int = V, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def naive_distribution(row: np.ndarray, params: SamplingParams, prompt: list[int], generated: list[int]) -> list[float]:
    """Probabilities by the definitions, one token at a time, in float64."""
    scores = [float(score) for score in row]
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in range(len(scores)):
        if token in prompt or token in generated:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        scores[token] -= params.frequency_penalty * generated.count(token)
        scores[token] -= params.presence_penalty * (token in generated)
    scores = [score / params.temperature for score in scores]
    kept = set(range(len(scores)))
    if params.top_k:
        edge = sorted(scores, reverse=True)[min(params.top_k, len(scores)) - 1]
        kept = {token for token in kept if scores[token] >= edge}
    if params.min_p:
        kept = {token for token in kept if math.exp(scores[token] - max(scores)) >= params.min_p}
    if params.top_p < 1:
        whole = sum(math.exp(scores[token] - max(scores)) for token in kept)
        mass = 0.0
        for token in sorted(kept, key=lambda token: -scores[token]):
            if mass >= params.top_p * whole:
                kept.remove(token)
            mass += math.exp(scores[token] - max(scores))
    weights = [math.exp(scores[token] - max(scores)) if token in kept else 0.0 for token in range(len(scores))]
    return [weight / sum(weights) for weight in weights]


PARAMS = {
    "temperature alone": SamplingParams(),
    "hot": SamplingParams(temperature=2.0),
    "cold": SamplingParams(temperature=0.2),
    "top_k": SamplingParams(top_k=7),
    "top_k of one": SamplingParams(top_k=1),
    "top_k beyond the vocabulary": SamplingParams(top_k=10_000),
    "top_p": SamplingParams(top_p=0.8),
    "top_p of nearly nothing": SamplingParams(top_p=1e-6),
    "top_p of nearly everything": SamplingParams(top_p=0.999999, temperature=2.0),
    "min_p": SamplingParams(min_p=0.05),
    "min_p of one": SamplingParams(min_p=1.0),
    "top_k and top_p": SamplingParams(top_k=20, top_p=0.7),
    "top_k, min_p and top_p": SamplingParams(top_k=50, min_p=0.02, top_p=0.9, temperature=1.5),
    "repetition": SamplingParams(repetition_penalty=1.5),
    "repetition as a reward": SamplingParams(repetition_penalty=0.7, top_k=30),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=-0.5),
    "all penalties": SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, top_p=0.95),
    "bias": SamplingParams(logit_bias=((3, 9.0), (5, -100.0), (7, 8.5)), top_k=10),
}
PROMPT = [3, 4, 5, 6, 7, 3, 3]
GENERATED = [7, 8, 9, 9, 9, 30, 7]


@pytest.mark.parametrize("name", PARAMS)
def test_what_can_be_drawn_and_how_often_is_what_the_definitions_say(name: str) -> None:
    params = PARAMS[name]
    row = logits(7)
    expected = naive_distribution(row, params, PROMPT, GENERATED)
    row_state = state(params, PROMPT, GENERATED, seed=11)
    before = row.copy()
    base, draws = len(PROMPT) + len(GENERATED), 4000
    seen = Counter(draw(row, row_state, base + number) for number in range(draws))
    assert np.array_equal(row, before)
    assert all(expected[token] > 0 for token in seen)
    # Pearson's chi-square over cells with at least five expected draws, the rest as one cell.
    cells = [(seen[token], draws * chance) for token, chance in enumerate(expected) if draws * chance >= 5]
    cells.append((draws - sum(found for found, _ in cells), max(draws - sum(wanted for _, wanted in cells), 1e-9)))
    chi = sum((found - wanted) ** 2 / wanted for found, wanted in cells if wanted > 1e-6)
    freedom = max(len(cells) - 1, 1)
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 5


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 700),
    spread=st.sampled_from([0.0, 0.01, 1.0, 5.0, 50.0]),
    levels=st.sampled_from([0, 3]),
    top_k=st.integers(0, 720),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
def test_the_filters_keep_the_set_that_the_definitions_keep_with_ties_whole(
    seed: int, size: int, spread: float, levels: int, top_k: int, top_p: float, min_p: float
) -> None:
    scores = logits(seed, size, spread)
    if levels:
        scores = np.round(scores / max(spread, 1.0) * levels).astype(np.float32)  # many ties
    scores -= scores.max()
    edge = keep_from(scores, top_k, top_p, min_p)
    kept = scores >= edge
    exact = scores.astype(np.float64)
    allowed = np.ones(size, bool)
    if 0 < top_k < size:
        allowed &= exact >= np.sort(exact)[size - top_k]
    if min_p > 0:
        allowed &= exact >= np.float32(math.log(min_p))
    if top_p < 1:
        weights = np.where(allowed, np.exp(exact), 0.0)
        goal = top_p * weights.sum()
        above = np.array([weights[exact > score].sum() for score in exact])
        slack = 1e-5 * weights.sum()  # float32 sums may fall on either side of an edge
        assert not (kept & allowed & (above > goal + slack)).any()
        assert not (~kept & allowed & (above < goal - slack)).any()
        assert kept.any()
        assert not (kept & ~allowed).any()
    else:
        assert np.array_equal(kept, allowed)


@given(seed=st.integers(0, 99), size=st.integers(1, 1100), chance=st.floats(0, 1, exclude_max=True))
def test_pick_inverts_the_distribution_with_or_without_an_edge(seed: int, size: int, chance: float) -> None:
    scores = logits(seed, size)
    scores -= scores.max()
    running = np.cumsum(np.exp(scores.astype(np.float64)))
    for edge in (-math.inf, -1e9):
        token = pick(scores, edge, chance)
        below = running[token - 1] / running[-1] if token else 0.0
        assert below - 1e-5 <= chance <= running[token] / running[-1] + 1e-5


@pytest.mark.parametrize("chance", [0.0, 0.5, 1 - 2**-53])
def test_pick_never_returns_a_token_without_weight(chance: float) -> None:
    for size in (1, 2, 256, 257, 1000):
        for place in {0, size // 2, size - 1}:
            scores = np.full(size, -np.inf, np.float32)
            scores[place] = 0.0
            assert pick(scores, -math.inf, chance) == place
            assert pick(scores, -5.0, chance) == place


def test_uniform_numbers_are_even_and_differ_by_seed_and_counter() -> None:
    numbers = np.array([[uniform(seed, counter) for counter in range(200)] for seed in range(50)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(set(numbers.ravel())) == numbers.size
    cells = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((cells - 500) ** 2 / 500).sum() < 50
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.03
    assert uniform(2**64 + 5, 1) == uniform(5, 1)  # any whole number is a seed
    assert 0 <= uniform(-(2**70), 0) < 1


def test_a_seed_gives_the_same_draw_alone_and_in_any_batch() -> None:
    rows = np.stack([logits(number) for number in range(6)])
    params = SamplingParams(temperature=1.3, top_p=0.9)
    alone = [sample(torch.from_numpy(rows[k : k + 1]), [Draw(state(params, seed=k), 9 + k)]).ids[0] for k in range(6)]
    order = [5, 2, 0, 4, 1, 3]
    batch = sample(torch.from_numpy(rows[order]), [Draw(state(params, seed=k), 9 + k) for k in order])
    assert batch.ids == [alone[k] for k in order]


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie() -> None:
    rows = torch.zeros(3, V)
    rows[1, [40, 70]] = 2.0
    rows[2, 499] = 1.0
    params = SamplingParams(temperature=0.0)
    assert sample(rows, [Draw(state(params), 1) for _ in range(3)]).ids == [0, 40, 499]
    tiny = SamplingParams(temperature=1e-300)
    assert sample(rows, [Draw(state(tiny), 1) for _ in range(3)]).ids == [0, 40, 499]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_ids_cannot_be_drawn_before_min_tokens(temperature: float) -> None:
    row = torch.full((1, V), -50.0)
    row[0, 10], row[0, 11] = 9.0, 5.0
    params = SamplingParams(temperature=temperature)
    row_state = state(params, [1, 2, 3], min_tokens=2, stop_ids=frozenset({10}))
    assert [sample(row, [Draw(row_state, length)]).ids[0] for length in (3, 4)] == [11, 11]
    greedy_state = state(SamplingParams(temperature=0.0), [1, 2, 3], min_tokens=2, stop_ids=frozenset({10}))
    assert sample(row, [Draw(greedy_state, 5)]).ids == [10]


def test_a_greedy_request_feels_bias_and_penalties() -> None:
    row = torch.zeros(1, V)
    row[0, 5], row[0, 6] = 3.0, 2.5
    biased = state(SamplingParams(temperature=0.0, logit_bias=((9, 4.0), (5, -1.0))))
    assert sample(row, [Draw(biased, 1)]).ids == [9]
    penalised = state(SamplingParams(temperature=0.0, frequency_penalty=0.4))
    assert [sample(row, [Draw(penalised, 1 + k)]).ids[0] for k in range(4)] == [5, 5, 6, 5]


def test_penalties_count_the_same_whether_tokens_came_one_by_one_or_after_a_preemption() -> None:
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7)
    grown = state(params, list(range(20)))
    fresh = [int(token) for token in np.random.default_rng(3).integers(0, V, 60)]
    for token in fresh:
        assert grown.seen is not None
        grown.seen.add(token)
    rebuilt = state(params, list(range(20)), fresh)
    row = logits(5)
    one, other = row.copy(), row.copy()
    assert grown.seen is not None
    assert rebuilt.seen is not None
    grown.seen.penalise(one, params)
    rebuilt.seen.penalise(other, params)
    assert np.array_equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_distribution_is_an_error_of_that_row_alone(bad: float, temperature: float) -> None:
    rows = torch.from_numpy(np.stack([logits(1), logits(2), logits(3)]))
    draws = [Draw(state(SamplingParams(temperature=temperature, logprobs=1), seed=k), 5) for k in range(3)]
    clean = sample(rows, draws)
    rows[1, 77] = bad
    results = sample(rows, draws)
    assert set(results.errors) == {1}
    assert set(results.logprobs) == {0, 2}
    assert (results.ids[0], results.ids[2]) == (clean.ids[0], clean.ids[2])
    rows[1] = -math.inf
    assert set(sample(rows, draws).errors) == {1}


def test_a_request_that_leaves_itself_nothing_to_draw_or_breaks_the_sampler_ends_alone() -> None:
    rows = torch.zeros(4, 3)
    masked = state(SamplingParams(), min_tokens=5, stop_ids=frozenset({0, 1, 2}))
    outside = state(SamplingParams(logit_bias=((99, 1.0),)))
    results = sample(rows, [Draw(masked, 1), Draw(outside, 1), Draw(None, 1), Draw(state(SamplingParams()), 1)])
    assert set(results.errors) == {0, 1, 2}
    assert 0 <= results.ids[3] < 3


@pytest.mark.parametrize("top", [0, 1, 5, 20, V, V + 3])
def test_logprobs_are_those_of_the_unmodified_distribution(top: int) -> None:
    row = logits(4)
    wanted = torch.log_softmax(torch.from_numpy(row).double(), 0)
    found = sample(
        torch.from_numpy(row)[None], [Draw(state(SamplingParams(temperature=0.3, top_k=3, logprobs=top)), 1)]
    )
    token, entry = found.ids[0], found.logprobs[0]
    assert entry.logprob == pytest.approx(float(wanted[token]), abs=1e-5)
    assert entry.rank == int((wanted > wanted[token]).sum()) + 1
    best = torch.topk(wanted, min(top, V))
    assert [place for place, _ in entry.top] == best.indices.tolist()
    assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_most_likely_ids_are_right_among_ties() -> None:
    row = np.zeros(V, np.float32)
    row[400] = 1.0
    assert [token for token, _ in token_logprobs(row, 3, 4).top] == [400, 0, 1, 2]
    assert token_logprobs(row, 3, 0).rank == 2


def test_a_step_without_draws_has_no_results() -> None:
    assert sample(torch.empty(0, V), []).ids == []
