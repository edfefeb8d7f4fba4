"""Experts: a mixture of gated MLPs of which each token takes a few (Shazeer et al. 2017, arXiv:1701.06538).

The tokens are grouped by expert and each expert is a pair of linear layers in any form; on a GPU the weights of all are
in two tensors (gpu_experts.py).  Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vserve.model.linear import Linear


class Experts(Protocol):
    """x [T, D] -> [T, D], in x's dtype and in new memory."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Routing:
    """The scores of all experts, and how many a token takes with which weights: as config.Experts has it."""

    router: Linear
    active: int
    normalised: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> the chosen experts [T, k] int64, largest first, and their weights [T, k] float32."""
        scores = self.router(x).to(torch.float32).softmax(dim=-1)
        weights, chosen = scores.topk(self.active, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return chosen, weights


class GroupedExperts:
    """Experts one after another, each on its own tokens."""

    def __init__(
        self,
        routing: Routing,
        gate_up: Sequence[Linear],
        down: Sequence[Linear],
        activate: Callable[[Tensor], Tensor],
    ) -> None:
        """gate_up[e]: D -> 2F, gate first; down[e]: F -> D; activate: [T, 2F] -> [T, F]."""
        self._routing = routing
        self._gate_up = tuple(gate_up)
        self._down = tuple(down)
        self._activate = activate

    def __call__(self, x: Tensor) -> Tensor:
        chosen, weights = self._routing(x)
        places = chosen.flatten()
        order = places.argsort(stable=True)
        counts = torch.bincount(places, minlength=len(self._down)).tolist()
        tokens = order // chosen.shape[1]
        inputs = x.index_select(0, tokens)
        parts = []
        start = 0
        for expert, count in enumerate(counts):
            if count:
                part = inputs[start : start + count]
                parts.append(self._down[expert](self._activate(self._gate_up[expert](part))))
                start += count
        if not parts:
            return torch.zeros_like(x)
        # Summed in float32, and for a token always in the order of its experts, whatever else is in the batch.
        y = torch.cat(parts).to(torch.float32) * weights.flatten().index_select(0, order).unsqueeze(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return y.index_select(0, back).view(*chosen.shape, -1).sum(1).to(x.dtype)
