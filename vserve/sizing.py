"""What a model takes of a GPU's memory: weights, steps, graphs, libraries and, in what is left, the KV cache.

The one arithmetic of ``vserve plan`` and of starting, which replaces the planned figures by measured ones where it has
them.  Pure: knows configurations and the limits of steps, no tensor, no file and no device; imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from vserve.engine.limits import MAX_SCORED_TOKENS
from vserve.engine.shapes import MAX_GRAPH_TOKENS, MIXED_CHUNKS
from vserve.errors import StartupError
from vserve.model.config import ModelConfig
from vserve.model.families import family_of
from vserve.model.gguf import TensorInfo
from vserve.model.kinds import Kind
from vserve.model.memory import CachePlan, gib, step_bytes
from vserve.model.quantization import Method, Quantization
from vserve.model.tensors import expected_shapes, linear_shapes

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
    """How the linear layers' weights lie on a GPU: bits each; per group of `group` inputs a scale and a zero point.

    group None: one scale an output.  is_float: e4m3 numbers, whose products with many rows take them as they are;
    integers are written out for those.  row_bytes: for each input of a layer besides (an order of groups).
    """

    name: str
    bits: int
    group: int | None = None
    zero_bits: int = 0
    row_bytes: int = 0
    is_float: bool = False

    @classmethod
    def of(cls, found: Quantization) -> Quantisation:
        """That of a checkpoint, as model/gpu_linear.py packs it."""
        if found.method is Method.FP8:
            return cls("fp8", 8, is_float=True)
        zero_bits = 0 if found.symmetric else 16
        return cls(found.method.value, found.bits, found.group, zero_bits, 8 if found.ordered else 0)

    @property
    def written_rows(self) -> int | None:
        """Rows above which a product writes the integers out; None: never."""
        return None if self.is_float else WRITTEN_ROWS[self.bits]

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a layer of this size can be packed; else it is plain."""
        return inputs % 32 == 0 and not (self.is_float and outputs % 16)

    def layer_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of one layer's weight."""
        groups = -(-inputs // (self.group or inputs)) * outputs
        scale_bytes = 4 if self.is_float else 2
        return outputs * inputs * self.bits // 8 + groups * scale_bytes + groups * self.zero_bits // 8 + (
            inputs * self.row_bytes)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensors:
    """The tensors of a GGUF file by its own names: a GPU keeps matrices of blocks packed, but for the embedding."""

    tensors: Mapping[str, TensorInfo]

    @property
    def name(self) -> str:
        return "gguf"

    @property
    def written_rows(self) -> int | None:
        """Rows above which some product writes its integers out; None for a file of plain numbers alone."""
        return min((WRITTEN_ROWS[form.bits] for form in self.packed().values()), default=None)

    def packed(self) -> dict[str, Quantisation]:
        """How each matrix that stays packed lies on a GPU."""
        return {
            name: BLOCKS[info.kind]
            for name, info in self.tensors.items()
            if info.kind in BLOCKS and len(info.shape) == 2 and name != EMBEDDING
        }

    def weight_bytes(self, config: ModelConfig, element_bytes: int) -> int:
        packed, taken = self.packed(), 0
        for name, info in self.tensors.items():
            if name == "rope_freqs.weight" or (name == HEAD and config.tie_embeddings):
                continue
            if name in packed:
                outputs, inputs = info.shape
                taken += packed[name].layer_bytes(outputs, inputs)
            else:
                taken += math.prod(info.shape) * element_bytes
        return taken + (_counter_bytes(config) if packed else 0)


EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
"""GGUF names of tables: an embedding is plain on a GPU, a head of its own is packed as it is stored."""
BLOCKS: Final[Mapping[Kind, Quantisation]] = {
    Kind.Q4_0: Quantisation("Q4_0", 4, 32),
    Kind.Q4_1: Quantisation("Q4_1", 4, 32, zero_bits=16),
    Kind.Q5_0: Quantisation("Q5_0", 8, 32),
    Kind.Q5_1: Quantisation("Q5_1", 8, 32, zero_bits=16),
    Kind.Q8_0: Quantisation("Q8_0", 8, 32),
    Kind.Q4_K: Quantisation("Q4_K", 4, 32, zero_bits=16),
    Kind.Q5_K: Quantisation("Q5_K", 8, 32, zero_bits=16),
    Kind.Q6_K: Quantisation("Q6_K", 8, 16),
}
"""How GGUF blocks lie on a GPU: their integers in 4 or 8 bits, scales and minima in float16."""
COUNTERS_BYTES: Final = 4 << 13
"""Beside every packed matrix, for the programs of one product to join their sums."""
WRITTEN_ROWS: Final = {4: 512, 8: 128}
"""Bits -> a product of more rows writes packed integers out as plain numbers (kernels/grouped.py's MOST_ROWS)."""


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


def weight_bytes(
    config: ModelConfig, element_bytes: int, quantisation: Quantisation | GgufTensors | None = None
) -> int:
    """Bytes of all weights on a GPU: a tied head is the embedding, and counts once.

    Embeddings, norms, the head and routers stay plain, but for a GGUF file's head; so do experts whose inputs lie in
    orders of their own.
    """
    if isinstance(quantisation, GgufTensors):
        return quantisation.weight_bytes(config, element_bytes)
    taken = sum(math.prod(shape) for shape in expected_shapes(config).values()) * element_bytes
    if quantisation is None:
        return taken
    for outputs, inputs in _quantised_shapes(config, experts=not quantisation.row_bytes):
        if quantisation.fits(outputs, inputs):
            taken += quantisation.layer_bytes(outputs, inputs) - outputs * inputs * element_bytes
    return taken + _counter_bytes(config)


def _quantised_shapes(config: ModelConfig, *, experts: bool) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) of every matrix of the layers that a quantised checkpoint keeps packed on a GPU.

    experts: whether those of experts are among them.
    """
    names = family_of(config.architecture).names
    expert = "." + names.expert.partition("{")[0]
    for module, outputs, inputs, _ in linear_shapes(config, names):
        in_layer = any(part.isdigit() for part in module.split("."))
        is_plain = config.experts is not None and (module.endswith(names.router) or (expert in module and not experts))
        if in_layer and not is_plain:
            yield outputs, inputs


def _counter_bytes(config: ModelConfig) -> int:
    """Four packed matrices a layer: what makes queries, keys and values is one, and so are gate and up."""
    return config.num_layers * (4 if config.experts is None else 2) * COUNTERS_BYTES


def reserve(
    config: ModelConfig,
    *,
    max_num_seqs: int,
    max_tokens: int,
    element_bytes: int,
    quantisation: Quantisation | GgufTensors | None = None,
) -> Reserve:
    """For steps of at most so many sequences and tokens."""
    draws = max_num_seqs + min(MIXED_CHUNKS, max_num_seqs)
    # Steps that score prompts run without a graph; a row of theirs is held twice while its best are sought.
    scored = draws + 2 * MAX_SCORED_TOKENS
    graph_tokens = min(max_tokens, MAX_GRAPH_TOKENS)
    step, graph = (
        step_bytes(config, tokens=tokens, draws=rows, element_bytes=element_bytes)
        + written_numbers(config, quantisation, tokens=tokens, draws=rows) * element_bytes
        for tokens, rows in ((max_tokens, scored), (graph_tokens, draws))
    )
    return Reserve(step, graph)


def written_numbers(
    config: ModelConfig, quantisation: Quantisation | GgufTensors | None, *, tokens: int, draws: int
) -> int:
    """Numbers of the largest matrix that a step writes out for its products, one matrix at a time; 0 for none."""
    most = None if quantisation is None else quantisation.written_rows
    if most is None:
        return 0
    width, sizes = config.hidden_size, [0]
    if tokens > most:
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes += [(queries + 2 * keys) * width, queries * width]
        if not all(config.has_experts(layer) for layer in range(config.num_layers)):
            sizes.append((2 if config.gated else 1) * config.intermediate_size * width)
    # A head has as many rows as are drawn from.
    if isinstance(quantisation, GgufTensors) and not config.tie_embeddings:
        form = quantisation.packed().get(HEAD)
        if form is not None and draws > WRITTEN_ROWS[form.bits]:
            sizes.append(math.prod(quantisation.tensors[HEAD].shape))
    return max(sizes)


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
