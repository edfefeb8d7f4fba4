"""What a model takes of a GPU's memory: weights, steps, graphs, libraries and, in what is left, the KV cache.

The one arithmetic of ``vserve plan`` and of starting, which replaces the planned figures by measured ones where it has
them.  Pure: knows configurations and the limits of steps, no tensor, no file and no device; imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from vserve.engine.scheduler import MAX_SCORED_TOKENS
from vserve.engine.shapes import MAX_GRAPH_TOKENS, MIXED_CHUNKS
from vserve.errors import StartupError
from vserve.model.config import ModelConfig
from vserve.model.memory import CachePlan, gib, step_bytes
from vserve.model.tensors import expected_shapes

ELEMENT_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
LIBRARIES_BYTES: Final = 3 << 28
"""Reserved for graphs, compiled kernels and the libraries' workspaces."""
CONTEXT_BYTES: Final = 1 << 29
"""About what the driver takes of a GPU before the first tensor; starting measures it."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Defaults of a device for the flags that were not given."""

    max_num_seqs: int
    max_num_batched_tokens: int


SIZES: Final = {"cpu": Sizes(32, 512), "cuda": Sizes(256, 8192)}


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the linear layers' weights are stored: bits each; per group of `group` inputs a scale and a zero point.

    group None: one float32 scale an output.  row_bytes: for each input of a layer besides (GPTQ's order of groups).
    """

    name: str
    bits: int
    group: int | None = None
    zero_bits: int = 0
    row_bytes: int = 0

    def layer_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of one layer's weight; embeddings, norms and the head stay as they are."""
        weight = outputs * inputs * self.bits // 8
        if self.group is None:
            return weight + 4 * outputs
        groups = -(-inputs // self.group) * outputs
        return weight + groups * 2 + groups * self.zero_bits // 8 + inputs * self.row_bytes


@dataclass(frozen=True, slots=True)
class Reserve:
    """What must stay free of the KV cache, in bytes: the largest step by kernels, one of a graph, and the libraries."""

    step: int
    graph: int
    libraries: int = LIBRARIES_BYTES

    @property
    def total(self) -> int:
        return self.step + self.graph + self.libraries


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a GPU's memory goes, in bytes; weights and context may be planned or measured, cache is made to fit.

    total: of the GPU.  allowed: what --gpu-memory-utilization lets the server take.
    """

    total: int
    allowed: int
    weights: int
    context: int
    reserve: Reserve
    cache: CachePlan

    @property
    def planned(self) -> int:
        """All that is taken when the largest step runs."""
        return self.weights + self.context + self.reserve.total + self.cache.num_blocks * self.cache.block_bytes

    def lines(self) -> tuple[str, ...]:
        """The arithmetic for people, one term a line."""
        return (
            f"weights {gib(self.weights)}, driver {gib(self.context)}, steps {gib(self.reserve.step)}, "
            f"graphs {gib(self.reserve.graph)}, libraries {gib(self.reserve.libraries)}",
            self.cache.explain(),
            f"{gib(self.planned)} planned of {gib(self.allowed)} allowed on a GPU of {gib(self.total)}",
        )


def weight_bytes(config: ModelConfig, element_bytes: int, quantisation: Quantisation | None = None) -> int:
    """Bytes of all weights on a GPU: a tied head is the embedding, and counts once."""
    taken = 0
    for name, shape in expected_shapes(config).items():
        # Matrices of a numbered layer are linear; those outside are tables, the head among them, and never quantised.
        linear = len(shape) == 2 and any(part.isdigit() for part in name.split("."))
        if quantisation is not None and linear:
            taken += quantisation.layer_bytes(*shape)
        else:
            taken += math.prod(shape) * element_bytes
    return taken


def reserve(config: ModelConfig, *, max_num_seqs: int, max_tokens: int, element_bytes: int) -> Reserve:
    """For steps of at most so many sequences and tokens."""
    draws = max_num_seqs + min(MIXED_CHUNKS, max_num_seqs)
    return Reserve(
        # Steps that score prompts run without a graph; a row of theirs is held twice while its best are sought.
        step=step_bytes(config, tokens=max_tokens, draws=draws + 2 * MAX_SCORED_TOKENS, element_bytes=element_bytes),
        graph=step_bytes(config, tokens=min(max_tokens, MAX_GRAPH_TOKENS), draws=draws, element_bytes=element_bytes),
    )


def cache_budget(*, total: int, utilization: float, taken: int, reserve: Reserve) -> int:
    """Bytes for the KV cache beside what is taken already (weights, driver).  StartupError when nothing is left."""
    allowed = int(total * utilization)
    budget = allowed - taken - reserve.total
    if budget <= 0:
        raise StartupError(
            f"the GPU has {gib(total)}, --gpu-memory-utilization {utilization:g} allows "
            f"{gib(allowed)}, {gib(taken)} are taken and steps need {gib(reserve.total)}: nothing is left for the KV "
            "cache; raise --gpu-memory-utilization, lower --max-num-batched-tokens or take a smaller model"
        )
    return budget


def element_type(asked: str, saved: str | None, device: str) -> str:
    """The type that --dtype means: with auto float32 on a CPU, and on a GPU the checkpoint's own if it is float16."""
    if asked != "auto":
        return asked
    if device == "cpu":
        return "float32"
    return "float16" if saved == "float16" else "bfloat16"


def fitting_sequences(cache: CachePlan, tokens: int) -> int:
    """Sequences of so many tokens, prompt and answer together, that the cache holds at once without recomputing any."""
    return cache.num_blocks // -(-tokens // cache.block_size)
