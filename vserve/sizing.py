"""What a model takes of a GPU's memory: weights, steps, graphs, libraries and, in what is left, the KV cache.

The one arithmetic of ``vserve plan`` and of starting, which replaces the planned figures by measured ones where it has
them.  Pure: knows configurations and the limits of steps, no tensor, no file and no device; imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vserve.engine.limits import MAX_SCORED_TOKENS
from vserve.engine.shapes import MAX_GRAPH_TOKENS, MIXED_CHUNKS
from vserve.errors import StartupError
from vserve.model.config import ModelConfig
from vserve.model.families import family_of, gguf_of
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
    integers are written out for those.  row_bytes: for each input of a layer besides (an order of groups).  found: the
    checkpoint's own settings, which may leave modules plain.  centre: the integer that is 0, where all have the same.
    """

    name: str
    bits: int
    group: int | None = None
    zero_bits: int = 0
    row_bytes: int = 0
    is_float: bool = False
    found: Quantization | None = None
    centre: int | None = None

    @classmethod
    def of(cls, found: Quantization) -> Quantisation:
        """That of a checkpoint, as model/gpu_linear.py packs it."""
        if found.method is Method.FP8:
            return cls("fp8", 8, is_float=True, found=found)
        zero_bits = 0 if found.symmetric else 16
        return cls(found.method.value, found.bits, found.group, zero_bits, 8 if found.ordered else 0, found=found)

    @property
    def written_rows(self) -> int | None:
        """Rows above which a product writes the integers out; None: never."""
        return None if self.is_float else WRITTEN_ROWS[self.bits]

    def packs(self, modules: Sequence[str], outputs: int, inputs: int) -> bool:
        """Whether the layer of these modules, stacked to this size, is packed; else it is plain."""
        if self.found is not None and any(self.found.skips(module) for module in modules):
            return False
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
        """How each matrix that may stay packed lies on a GPU, alone."""
        return {
            name: BLOCKS[info.kind]
            for name, info in self.tensors.items()
            if info.kind in BLOCKS and len(info.shape) == 2 and name != EMBEDDING
        }

    def weight_bytes(self, config: ModelConfig, element_bytes: int) -> int:
        packed, taken, counters = self.packed(), 0, 0
        for names in self._layers(config):
            infos = [self.tensors[name] for name in names]
            forms = [packed[name] for name in names if name in packed]
            if len(forms) < len(names):
                taken += sum(math.prod(info.shape) for info in infos) * element_bytes
                continue
            joined = _joined(forms)
            for info, form in zip(infos, forms, strict=True):
                outputs, inputs = info.shape
                taken += (joined or form).layer_bytes(outputs, inputs)
            counters += 1 if joined is not None else len(forms)
        return taken + counters * COUNTERS_BYTES

    def _layers(self, config: ModelConfig) -> Iterator[list[str]]:
        """The names of all tensors that a GPU holds, those that make one layer together."""
        names, form = family_of(config.architecture).names, gguf_of(config.architecture)
        kinds = {module: kind for kind, module in form.tensors.items()}
        stacks = [[kinds[module] for module in stack if module in kinds] for stack in (names.qkv, names.gate_up)]
        beside = {kind: stack for stack in stacks if len(stack) > 1 for kind in stack}
        for name in self.tensors:
            if name == "rope_freqs.weight" or (name == HEAD and config.tie_embeddings):
                continue
            prefix, _, kind = name.removesuffix(".weight").rpartition(".")
            stack = beside.get(kind, [kind]) if name.endswith(".weight") else []
            together = [other for other in (f"{prefix}.{part}.weight" for part in stack) if other in self.tensors]
            if not together or name == together[0]:
                yield together or [name]


def _joined(forms: Sequence[Quantisation]) -> Quantisation | None:
    """How matrices lie that are packed as one (gpu_linear.blocks_linear); None: each is packed alone."""
    if len({form.group for form in forms}) > 1:
        return None
    # Integers around the same middle need no minimum, and bytes hold what four bits hold.
    kept = all(form.centre is not None and form.centre == forms[0].centre for form in forms)
    return replace(forms[0], bits=max(form.bits for form in forms), zero_bits=0 if kept else 16)


EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
"""GGUF names of tables: an embedding is plain on a GPU, a head of its own is packed as it is stored."""
BLOCKS: Final[Mapping[Kind, Quantisation]] = {
    Kind.Q4_0: Quantisation("Q4_0", 4, 32, centre=8),
    Kind.Q4_1: Quantisation("Q4_1", 4, 32, zero_bits=16),
    Kind.Q5_0: Quantisation("Q5_0", 8, 32, centre=16),
    Kind.Q5_1: Quantisation("Q5_1", 8, 32, zero_bits=16),
    Kind.Q8_0: Quantisation("Q8_0", 8, 32, centre=128),
    Kind.Q4_K: Quantisation("Q4_K", 4, 32, zero_bits=16),
    Kind.Q5_K: Quantisation("Q5_K", 8, 32, zero_bits=16),
    Kind.Q6_K: Quantisation("Q6_K", 8, 16, centre=32),
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
    for modules, outputs, inputs in _quantised_layers(config):
        of_expert = _of_expert(config, modules[0])
        if quantisation.packs(modules, outputs, inputs) and not (of_expert and quantisation.row_bytes):
            taken += quantisation.layer_bytes(outputs, inputs) - outputs * inputs * element_bytes
            taken += 0 if of_expert else COUNTERS_BYTES
    return taken


def _quantised_layers(config: ModelConfig) -> Iterator[tuple[list[str], int, int]]:
    """(modules, outputs, inputs) of the layers that a quantised checkpoint keeps packed on a GPU.

    What makes queries, keys and values is one layer, and so are gate and up.
    """
    names = family_of(config.architecture).names
    stacks = [stack for stack in (names.qkv, names.gate_up, names.expert_gate_up) if len(stack) > 1]
    modules: list[str] = []
    rows = 0
    for module, outputs, inputs, _ in linear_shapes(config, names):
        in_layer = any(part.isdigit() for part in module.split("."))
        if not in_layer or (config.experts is not None and module.endswith(names.router)):
            continue
        modules.append(module)
        rows += outputs
        if not any(module.endswith(stack[:-1]) for stack in stacks):
            yield modules, rows, inputs
            modules, rows = [], 0


def _of_expert(config: ModelConfig, module: str) -> bool:
    names = family_of(config.architecture).names
    return config.experts is not None and "." + names.expert.partition("{")[0] in module


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
