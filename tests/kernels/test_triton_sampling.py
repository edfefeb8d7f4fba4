"""Draws on the device, against the same draw with a sort in float64; penalties, bans and log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vserve.kernels import reference_gpu
from vserve.kernels.sampling import bias_and_ban, count_tokens, penalise, sample, token_logprobs

GPU = torch.cuda.is_available()
SIZES = [7, 1000, 9001] + ([49152, 128256, 262144] if GPU else [])


@dataclass(frozen=True, slots=True)
class Way:
    """How a row is drawn."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


WAYS = [
    Way(0.0, 3, 0.5, 0.1),
    Way(),
    Way(0.3),
    Way(2.5, top_k=1),
    Way(1.5, top_k=5),
    Way(1.0, top_k=40),
    Way(1.0, top_p=0.9),
    Way(3.0, top_p=0.95),
    Way(1.0, top_p=1e-6),
    Way(1.0, min_p=0.05),
    Way(1.0, min_p=1.0),
    Way(2.0, top_k=50, top_p=0.8),
    Way(1.3, top_k=1000, top_p=0.99, min_p=0.001),
    Way(0.7, top_p=0.9, min_p=0.02),
    Way(1.0, top_k=20, min_p=0.02),
]


def columns(ways: list[Way], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.tensor([way.temperature for way in ways], device=device),
        torch.tensor([way.top_k for way in ways], dtype=torch.int32, device=device),
        torch.tensor([way.top_p for way in ways], device=device),
        torch.tensor([way.min_p for way in ways], device=device),
    )


def seeds_of(count: int, device: torch.device, random: torch.Generator) -> tuple[Tensor, Tensor]:
    seeds = torch.randint(-(1 << 62), 1 << 62, (count,), generator=random)
    return seeds.to(device), torch.arange(count).to(device)


@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("size", SIZES)
def test_every_way_of_drawing_is_the_one_with_a_sort(
    size: int, spread: float, device: torch.device, random: torch.Generator
) -> None:
    logits = torch.randn(len(WAYS), size, generator=random).mul(spread).to(device)
    seeds, counters = seeds_of(len(WAYS), device, random)
    arguments = [logits, *columns(WAYS, device), seeds, counters]
    ids = sample(*arguments)
    expected = reference_gpu.sample(*[x.cpu() for x in arguments])
    assert ids.tolist() == expected.tolist()


def test_rows_may_lie_apart_and_the_logits_stay_as_they_are(device: torch.device, random: torch.Generator) -> None:
    wide = torch.randn(2, 500, generator=random).to(device)
    before = wide.clone()
    ways = columns([Way(1.0, top_k=5), Way(1.0, top_p=0.5)], device)
    seeds, counters = seeds_of(2, device, random)
    assert (
        sample(wide[:, :301], *ways, seeds, counters).tolist()
        == sample(wide[:, :301].contiguous(), *ways, seeds, counters).tolist()
    )
    assert torch.equal(wide, before)


@pytest.mark.parametrize("way", [Way(0.0), Way(1.0), Way(1.0, top_k=2), Way(1.0, top_p=0.9), Way(1.0, min_p=0.5)])
def test_a_row_without_a_distribution_gives_minus_one(way: Way, device: torch.device, random: torch.Generator) -> None:
    logits = torch.randn(4, 5000, generator=random)
    logits[0, 4999] = float("nan")
    logits[1, 3] = float("inf")
    logits[2] = float("-inf")
    logits[3, 1:4900] = float("-inf")
    seeds, counters = seeds_of(4, device, random)
    ids = sample(logits.to(device), *columns([way] * 4, device), seeds, counters).tolist()
    assert ids[:3] == [-1, -1, -1]
    assert ids[3] == 0 or 4900 <= ids[3] < 5000


@pytest.mark.parametrize("way", [Way(0.0), Way(1.0, top_k=1), Way(1.0, top_p=1e-3), Way(1.0, min_p=1.0)])
def test_ties_at_the_edge_are_all_kept_and_greedy_takes_the_lowest_id(
    way: Way, device: torch.device, random: torch.Generator
) -> None:
    rows = 40
    logits = torch.zeros(rows, 300)
    logits[:, [17, 200, 250]] = 4.0
    seeds, counters = seeds_of(rows, device, random)
    drawn = set(sample(logits.to(device), *columns([way] * rows, device), seeds, counters).tolist())
    assert drawn == ({17} if way.temperature == 0 else {17, 200, 250})


def test_draws_follow_the_distribution(device: torch.device, random: torch.Generator) -> None:
    rows, size, way = 4096, 24, Way(1.2, top_k=12)
    logits = torch.randn(size, generator=random).mul(1.5).expand(rows, size).contiguous()
    seeds, counters = torch.full((rows,), 1234), torch.arange(rows)
    arguments = (logits, *columns([way] * rows, torch.device("cpu")), seeds, counters)
    ids = reference_gpu.sample(*arguments)
    # The kernel draws the same; the interpreter would take a minute for all of them.
    some = slice(0, rows if GPU else 64)
    assert sample(*(x[some].to(device) for x in arguments)).tolist() == ids[some].tolist()
    scores = logits[0].double() / way.temperature
    chances = torch.where(reference_gpu.kept(scores, way.top_k, way.top_p, way.min_p), scores.exp(), 0.0)
    chances /= chances.sum()
    counts = torch.bincount(ids, minlength=size)
    used = chances > 0
    assert int(counts[~used].sum()) == 0
    chi_square = ((counts - rows * chances).square()[used] / (rows * chances[used])).sum()
    assert float(chi_square) < 31.3  # 11 degrees of freedom: one in a thousand is larger


def test_a_draw_depends_on_its_row_alone(device: torch.device, random: torch.Generator) -> None:
    logits = torch.randn(6, 700, generator=random).to(device)
    ways = columns([Way(1.0, top_p=0.9)] * 6, device)
    seeds, counters = seeds_of(6, device, random)
    together = sample(logits, *ways, seeds, counters)
    alone = [
        int(sample(logits[i : i + 1], *(w[i : i + 1] for w in ways), seeds[i : i + 1], counters[i : i + 1]))
        for i in range(6)
    ]
    assert together.tolist() == alone


def test_biases_bans_and_penalties_change_the_rows_that_have_them(
    device: torch.device, random: torch.Generator
) -> None:
    size, rows = 5000, torch.tensor([2, -1, 0])
    logits = torch.randn(3, size, generator=random)
    bias_ids = torch.tensor([[3, 4999, -1], [0, 1, 2], [7, 8, -1]], dtype=torch.int32)
    biases = torch.tensor([[1.5, -100.0, 9.0], [9.0, 9.0, 9.0], [2.0, 3.0, 9.0]])
    banned = torch.tensor([[5, -1], [5, 6], [8, 9]], dtype=torch.int32)
    lengths, free_from = torch.tensor([10, 0, 10]), torch.tensor([10, 99, 11])
    counts = torch.randint(0, 6, (3, size), generator=random, dtype=torch.int32)
    repetition, presence, frequency = (
        torch.tensor([1.3, 2.0, 0.8]),
        torch.tensor([0.5, 1, -1]),
        torch.tensor([0.25, 1, 2]),
    )

    expected = logits.double()
    for row, state in enumerate(rows.tolist()):
        if state < 0:
            continue
        for token, bias in zip(bias_ids[state].tolist(), biases[state].tolist(), strict=True):
            if token >= 0:
                expected[row, token] += bias
        if lengths[row] < free_from[state]:
            expected[row, banned[state].long()] = float("-inf")
        seen, times = counts[state] != 0, (counts[state] // 2).double()
        x, penalty = expected[row], repetition[state].double()
        x = torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
        expected[row] = x - frequency[state].double() * times - presence[state].double() * (times > 0)

    out = logits.to(device)
    on = [x.to(device) for x in (rows, lengths, bias_ids, biases, banned, free_from)]
    bias_and_ban(out, *on)
    penalise(out, *(x.to(device) for x in (rows, counts, repetition, presence, frequency)))
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_generated_tokens_are_counted_once_each(device: torch.device) -> None:
    counts = torch.zeros(4, 10, dtype=torch.int32, device=device)
    rows = torch.tensor([3, -1, 0, 1], device=device)
    count_tokens(counts, rows, torch.tensor([9, 2, 0, -1], device=device))
    count_tokens(counts, rows, torch.tensor([9, 2, 4, -1], device=device))
    assert {(r, t): int(counts[r, t]) for r, t in counts.nonzero().tolist()} == {(3, 9): 4, (0, 0): 2, (0, 4): 2}


@pytest.mark.parametrize("size", SIZES)
def test_log_probabilities_and_ranks_are_those_of_the_softmax(
    size: int, device: torch.device, random: torch.Generator
) -> None:
    logits = torch.randn(3, size, generator=random).mul(5)
    logits[1, 1 : size // 2] = float("-inf")
    ids = torch.randint(0, size, (3,), generator=random)
    ids[1] = 0
    logprobs, ranks = token_logprobs(logits.to(device), ids.to(device))
    scores = logits.gather(1, ids[:, None])
    torch.testing.assert_close(
        logprobs.cpu().double(), logits.double().log_softmax(1).gather(1, ids[:, None])[:, 0], rtol=1e-5, atol=2e-5
    )
    assert ranks.tolist() == ((logits > scores).sum(1) + 1).tolist()
