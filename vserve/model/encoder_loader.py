"""load_encoder: an embedding model's files -> an ``Encoder`` ready to run.

Owns the names and shapes of every tensor that BERT and RoBERTa have.  All are checked before the first is read.
Knows no file format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from vserve.errors import StartupError, shorten
from vserve.model.encoder import Encoder, EncoderBlock, Norm, ScoreHead, Tables
from vserve.model.encoder_config import Activation, EncoderConfig
from vserve.model.encoder_source import EncoderSource
from vserve.model.linear import Activated, Linear, dense_linear, gelu_linear
from vserve.model.weights import Weights

Progress = Callable[[int, int], None]
"""Told (done, total) bytes after each layer."""

_WORDS: Final = "embeddings.word_embeddings.weight"
_PREFIXES: Final = ("", "bert.", "roberta.")
_UNUSED: Final = ("pooler.", "cls.", "lm_head.", "classifier.", "embeddings.position_ids", "embeddings.token_type_ids")
"""What a checkpoint may hold beside the layers: heads of its training, and numbers that follow from the shape."""


def load_encoder(
    source: EncoderSource, *, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
) -> Encoder:
    """Read source's weights onto device in dtype.  StartupError for a tensor missing, misshapen or unknown."""
    return _Loading(source.open_weights(), source, device, dtype, progress).encoder()


def expected_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Name, without the model's prefix, -> shape of every tensor that is read; biases and norms included."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        _WORDS: (config.vocab_size, width),
        "embeddings.position_embeddings.weight": (config.num_positions, width),
        "embeddings.token_type_embeddings.weight": (config.num_types, width),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(config.num_layers):
        prefix = f"encoder.layer.{layer}."
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
        for name, outputs, inputs in (
            ("attention.self.query", width, width),
            ("attention.self.key", width, width),
            ("attention.self.value", width, width),
            ("attention.output.dense", width, width),
            ("intermediate.dense", inner, width),
            ("output.dense", width, inner),
        ):
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            shapes[f"{prefix}{name}.bias"] = (outputs,)
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    for name, outputs in zip(_head(config), (width, 1), strict=False):
        shapes[f"{name}.weight"] = (outputs, width)
        shapes[f"{name}.bias"] = (outputs,)
    return shapes


def _head(config: EncoderConfig) -> tuple[str, ...]:
    """The two matrices of a cross-encoder's head; () for a model without one."""
    if not config.architecture.cross:
        return ()
    return (
        ("classifier.dense", "classifier.out_proj") if config.architecture.roberta else ("pooler.dense", "classifier")
    )


class _Loading:
    """One model being read."""

    def __init__(
        self,
        weights: Weights,
        source: EncoderSource,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None,
    ) -> None:
        self._weights = weights
        self._source = source
        self._config = source.config
        self._device = device
        self._dtype = dtype
        self._progress = progress
        self._done = 0
        self._names = _checked(weights, source.config)

    def encoder(self) -> Encoder:
        embeddings = "embeddings."
        tables = Tables(
            self._tensor(_WORDS),
            self._tensor(embeddings + "position_embeddings.weight"),
            self._tensor(embeddings + "token_type_embeddings.weight"),
            self._norm(embeddings + "LayerNorm"),
        )
        blocks = []
        for layer in range(self._config.num_layers):
            blocks.append(self._block(f"encoder.layer.{layer}."))
            if self._progress is not None:
                self._progress(min(self._done, self._weights.total_bytes), self._weights.total_bytes)
        names = _head(self._config)
        head = ScoreHead(self._linear(names[0]), self._linear(names[1])) if names else None
        return Encoder(self._config, tables, blocks, head, self._source.poolings)

    def _block(self, prefix: str) -> EncoderBlock:
        return EncoderBlock(
            qkv=self._linear(*(f"{prefix}attention.self.{part}" for part in ("query", "key", "value"))),
            output=self._linear(f"{prefix}attention.output.dense"),
            attention_norm=self._norm(f"{prefix}attention.output.LayerNorm"),
            up=self._activated(f"{prefix}intermediate.dense"),
            down=self._linear(f"{prefix}output.dense"),
            mlp_norm=self._norm(f"{prefix}output.LayerNorm"),
        )

    def _activated(self, module: str) -> Linear:
        weight, bias = self._tensor(f"{module}.weight"), self._tensor(f"{module}.bias")
        match self._config.activation:
            case Activation.GELU:
                return gelu_linear(weight, bias, "none")
            case Activation.GELU_NEW | Activation.GELU_TANH:
                return gelu_linear(weight, bias, "tanh")
            case Activation.RELU:
                return Activated(dense_linear(weight, bias), functional.relu)

    def _linear(self, *modules: str) -> Linear:
        """The layers of modules as one, their outputs in this order."""
        weights = [self._tensor(f"{module}.weight") for module in modules]
        biases = [self._tensor(f"{module}.bias") for module in modules]
        return dense_linear(torch.cat(weights), torch.cat(biases))

    def _norm(self, module: str) -> Norm:
        return Norm(self._tensor(f"{module}.weight"), self._tensor(f"{module}.bias"))

    def _tensor(self, name: str) -> Tensor:
        stored = self._weights.get(self._names[name])
        self._done += stored.nbytes
        return stored.dense(self._dtype).to(self._device)


def _checked(weights: Weights, config: EncoderConfig) -> dict[str, str]:
    """Our name -> the file's name of every tensor that is read.  StartupError unless all are there as they must be."""
    shapes = expected_shapes(config)
    model = f"a {config.num_layers}-layer {config.architecture}"
    prefix = next((prefix for prefix in _PREFIXES if prefix + _WORDS in weights), None)
    if prefix is None:
        raise StartupError(f"tensor {_WORDS} is missing, which {model} needs")
    names: dict[str, str] = {}
    for name, shape in shapes.items():
        stored = _stored_name(name, prefix, weights)
        if stored is None:
            raise StartupError(f"tensor {prefix}{name} is missing, which {model} needs with shape {list(shape)}")
        found = weights.get(stored).shape
        if found != shape:
            raise StartupError(f"tensor {stored} has shape {list(found)}, but {model} of this size needs {list(shape)}")
        names[name] = stored
    used = frozenset(names.values())
    for name in weights.names():
        if name not in used and not name.removeprefix(prefix).startswith(_UNUSED):
            raise StartupError(f"tensor {shorten(name)} is not one of {model}: the file holds another model")
    return names


def _stored_name(name: str, prefix: str, weights: Weights) -> str | None:
    """The file's name of a tensor: with the model's prefix, a head's without; norms also by their older names."""
    older = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    for candidate in (prefix + name, prefix + older, name):
        if candidate in weights:
            return candidate
    return None
