"""Which tensors a model of some configuration has, under which names and in which shapes; and whether a file has them.

Knows no file format, reads no tensor but a bias that should not be there, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from vserve.errors import StartupError, shorten
from vserve.model.cache_scales import names_in
from vserve.model.config import ModelConfig, NormKind
from vserve.model.families import Names, family_of
from vserve.model.kinds import Kind

if TYPE_CHECKING:
    from vserve.model.weights import Weights

Shape = tuple[int, ...]


def names_of(weights: Weights, config: ModelConfig) -> Names:
    """The family's names as weights has them."""
    return family_of(config.architecture).names.fitted(weights.names())


def linear_shapes(config: ModelConfig, names: Names) -> Iterator[tuple[str, int, int, bool]]:
    """(module, outputs, inputs, has a bias) of every linear layer of the blocks, then of the ends' projections."""
    width = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for layer in range(config.num_layers):
        prefix = names.base + names.layer.format(layer)
        rows = (queries, keys, keys) if len(names.qkv) == 3 else (queries + 2 * keys,)
        for name, outputs in zip(names.qkv, rows, strict=True):
            yield prefix + name, outputs, width, config.attention_bias
        yield prefix + names.output, width, queries, config.output_bias
        if config.experts is not None and config.has_experts(layer):
            yield prefix + names.router, config.experts.count, width, False
            inner = config.experts.intermediate_size
            for expert in range(config.experts.count):
                inside = prefix + names.expert.format(expert)
                for name in names.expert_gate_up:
                    yield inside + name, inner, width, False
                yield inside + names.expert_down, width, inner, False
        else:
            inner = config.intermediate_size
            halves = 2 if config.gated else 1
            for name in names.gate_up:
                yield prefix + name, inner * halves // len(names.gate_up), width, config.mlp_bias
            yield prefix + names.down, width, inner, config.mlp_bias
    if config.embedding_size is not None:
        assert names.project_in is not None
        assert names.project_out is not None
        yield names.base + names.project_in, width, config.embedding_size, False
        yield names.base + names.project_out, config.embedding_size, width, False


def norm_widths(config: ModelConfig, names: Names) -> Iterator[tuple[str, int, bool]]:
    """(module, width, has a bias) of every norm."""
    biased = config.norm is NormKind.LAYER
    for layer in range(config.num_layers):
        prefix = names.base + names.layer.format(layer)
        modules = [names.attention_norm, names.mlp_norm]
        if config.sandwich:
            modules += [names.attention_post_norm, names.mlp_post_norm]
        for name in modules:
            yield prefix + name, config.hidden_size, biased
        if config.qk_norm:
            yield prefix + names.q_norm, config.head_dim, False
            yield prefix + names.k_norm, config.head_dim, False
    if config.final_norm:
        yield names.base + names.final_norm, config.hidden_size, biased


def expected(config: ModelConfig, names: Names) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of every tensor that a model of config must have; one at a time, for config is untrusted."""
    table = (config.vocab_size, config.embedding_size or config.hidden_size)
    yield f"{names.base}{names.embedding}.weight", table
    if not config.tie_embeddings:
        yield f"{names.head}.weight", table
    if config.position_offset is not None:
        yield (
            f"{names.base}{names.positions}.weight",
            (config.max_position + config.position_offset, config.hidden_size),
        )
    for module, width, biased in norm_widths(config, names):
        yield f"{module}.weight", (width,)
        if biased:
            yield f"{module}.bias", (width,)
    for module, outputs, inputs, biased in linear_shapes(config, names):
        yield f"{module}.weight", (inputs, outputs) if config.transposed else (outputs, inputs)
        if biased:
            yield f"{module}.bias", (outputs,)


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor that a model of config must have."""
    return dict(expected(config, family_of(config.architecture).names))


def linear_numbers(config: ModelConfig) -> int:
    """Numbers in all linear layers; a head that is the embedding is not counted."""
    numbers = sum(rows * cols for _, rows, cols, _ in linear_shapes(config, family_of(config.architecture).names))
    return numbers if config.tie_embeddings else numbers + config.vocab_size * config.hidden_size


def check(weights: Weights, config: ModelConfig) -> Names:
    """The names that weights uses; StartupError unless it holds exactly the tensors of config, each in its shape.

    Read past: a head that is the embedding again, and a quantised layer's bias of zeros.  Scales of keys and values may
    be there.
    """
    names = names_of(weights, config)
    model = f"a {config.num_layers}-layer {config.architecture}"
    positions = f"{names.base}{names.positions}.weight"
    known = set()
    for name, wanted in expected(config, names):
        known.add(name)
        if name not in weights:
            raise StartupError(f"tensor {name} is missing, which {model} needs with shape {_text(wanted)}")
        found = weights.get(name).shape
        if name == positions and len(found) == 2 and found[0] > wanted[0] and found[1] == wanted[1]:
            continue  # --max-model-len leaves later positions unused
        if found != wanted:
            raise StartupError(
                f"tensor {name} has shape {_text(found)}, but {model} of this size needs {_text(wanted)}"
            )
    known.update(names_in(weights, config, names))
    for name in weights.names():
        # A tied head may be stored too: it is the embedding again, and transformers reads past it as well.
        if name not in known and name != f"{names.head}.weight" and not name.endswith(names.harmless):
            if _is_empty_bias(weights, name, known):
                continue
            raise StartupError(f"tensor {shorten(name)} is not one of {model}: the file holds another model")
    return names


def _is_empty_bias(weights: Weights, name: str, known: Collection[str]) -> bool:
    """Whether it is a bias of nothing but zeros of a layer of integers: AutoGPTQ writes one for every layer."""
    weight = name.removesuffix(".bias") + ".weight"
    if not name.endswith(".bias") or weight not in known:
        return False
    layer, bias = weights.get(weight), weights.get(name)
    return layer.kind is Kind.GROUPED and bias.shape == layer.shape[:1] and not bias.dense().count_nonzero()


def _text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
