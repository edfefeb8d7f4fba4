"""Which experts a token takes, and the pairs of each expert, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from vserve.kernels import reference_gpu
from vserve.kernels.route import group, route


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("tokens", "count", "active"), [(1, 128, 8), (7, 60, 6), (3, 8, 2), (2, 5, 5), (4, 1, 1)])
def test_routes_are_the_float64_ones(
    tokens: int, count: int, active: int, normalised: bool, device: torch.device, random: torch.Generator
) -> None:
    scores = torch.randn(tokens, count, generator=random).to(device)
    found = route(scores, active, normalised=normalised)
    chosen, weights = reference_gpu.route(scores.cpu().double(), active, normalised=normalised)
    assert torch.equal(found.chosen.cpu().long(), chosen)
    assert torch.allclose(found.weights.cpu().double(), weights, atol=1e-6)


def test_of_equal_scores_the_first_experts_are_taken(device: torch.device) -> None:
    scores = torch.tensor([[0.0, 3.0, 1.0, 3.0, 1.0, 1.0], [2.0] * 6], device=device)
    found = route(scores, 4, normalised=True)
    assert found.chosen.tolist() == [[1, 3, 2, 4], [0, 1, 2, 3]]
    assert torch.allclose(found.weights[1], torch.tensor(0.25, device=device))


def test_a_row_of_nan_takes_different_experts_and_touches_no_other(device: torch.device) -> None:
    scores = torch.randn(3, 20, generator=torch.Generator().manual_seed(2)).to(device)
    alone = route(scores[2:], 4, normalised=True)
    scores[0], scores[1] = torch.nan, -torch.inf
    found = route(scores, 4, normalised=True)
    assert found.chosen[:2].tolist() == [[0, 1, 2, 3]] * 2
    assert torch.equal(found.chosen[2:], alone.chosen)
    assert torch.equal(found.weights[2:], alone.weights)


@pytest.mark.parametrize(("tokens", "count", "active"), [(1, 128, 8), (300, 7, 2), (5, 300, 3), (41, 4, 1)])
def test_pairs_are_grouped_as_a_stable_sort_does(
    tokens: int, count: int, active: int, device: torch.device, random: torch.Generator
) -> None:
    chosen = torch.stack([torch.randperm(count, generator=random)[:active] for _ in range(tokens)]).to(torch.int32)
    chosen[:, 0][chosen[:, 0] == 3] = 2  # an expert that few take, or nobody
    experts, order = chosen.flatten().sort(stable=True)
    found = group(chosen.to(device), count)
    assert torch.equal(found.order.cpu().long(), order)
    assert torch.equal(found.starts.cpu().long(), torch.searchsorted(experts.long(), torch.arange(count + 1)))
