"""The experts of a mixture on a GPU: the weights of all in two stacks, plain or packed, and a kernel for each product.

Knows no files.  One thread, one stream at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from vserve.kernels import early, experts, moe
from vserve.kernels.moe_packed import Stack, new_stack
from vserve.kernels.route import Routes, route
from vserve.model.gpu_linear import packed_weight
from vserve.model.linear import Linear


class GpuExperts:
    """A mixture whose tokens take the `active` experts of the largest scores; normalised: as config.Experts has it."""

    def __init__(
        self, router: Linear, active: int, normalised: bool, gate_up: Tensor | Stack, down: Tensor | Stack
    ) -> None:
        """router: D -> E; gate_up [E, 2F, D], gate first; down [E, D, F]."""
        self.router = router
        self._active = active
        self._normalised = normalised
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return experts.many(x, self._routes(self.router(x)), self._gate_up, self._down)

    def add_to(self, residual: Tensor, norm: Tensor, eps: float, scores: Tensor) -> Tensor | None:
        """residual [T, D] + the mixture of rms_norm(residual, norm, eps), for a few tokens that take plain weights.

        scores [T, E]: the router's.  None for other weights.
        """
        if not isinstance(self._gate_up, Tensor) or not isinstance(self._down, Tensor):
            return None
        routes = self._routes(scores)
        return moe.few(residual, norm, eps, routes, self._gate_up, self._down, early=early.one_row(residual))

    def add(self, x: Tensor, scores: Tensor, residual: Tensor) -> Tensor:
        """residual [T, D] + the mixture of x [T, D], whose scores [T, E] are given."""
        routes = self._routes(scores)
        return experts.many(x, routes, self._gate_up, self._down, residual, early=early.one_row(x))

    def _routes(self, scores: Tensor) -> Routes:
        return route(scores, self._active, normalised=self._normalised, early=early.one_row(scores))


def stacked(layers: Iterable[Linear], count: int) -> Stack | None:
    """The weights of so many layers as one stack; None where they are not packed, or not alike."""
    made: Stack | None = None
    for number, layer in enumerate(layers):
        weight = packed_weight(layer)
        if weight is None:
            return None
        if made is None:
            made = new_stack(count, weight)
        if not made.takes(weight):
            return None
        made.put(number, weight)
    return made
