"""What an encoder must know of a model before it reads a tensor: ``EncoderConfig``, from config.json.

Owns the list of supported encoders and every check of their numbers; the file is untrusted.  Knows nothing of files,
tensors or pooling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final

from vserve.errors import StartupError, shorten
from vserve.model.config import MAX_HEADS, MAX_INTERMEDIATE, MAX_LAYERS, MAX_POSITION, MAX_VOCAB, MAX_WIDTH
from vserve.model.fields import Fields

MAX_TYPES: Final = 1024
MAX_LABELS: Final = 1 << 16


class EncoderArchitecture(StrEnum):
    """A supported encoder, by the name config.json gives it under "architectures"."""

    BERT = "BertModel"
    BERT_MASKED = "BertForMaskedLM"
    BERT_CROSS = "BertForSequenceClassification"
    ROBERTA = "RobertaModel"
    ROBERTA_MASKED = "RobertaForMaskedLM"
    ROBERTA_CROSS = "RobertaForSequenceClassification"
    XLM_ROBERTA = "XLMRobertaModel"
    XLM_ROBERTA_MASKED = "XLMRobertaForMaskedLM"
    XLM_ROBERTA_CROSS = "XLMRobertaForSequenceClassification"

    @property
    def cross(self) -> bool:
        """Whether it reads two texts at once and gives one score, instead of a vector of one text."""
        return self.value.endswith("ForSequenceClassification")

    @property
    def roberta(self) -> bool:
        """Whether positions are counted from behind the padding id, as in RoBERTa."""
        return "Roberta" in self.value


class Activation(StrEnum):
    """The function between the two matrices of a layer, by its name in config.json."""

    GELU = "gelu"
    GELU_NEW = "gelu_new"
    GELU_TANH = "gelu_pytorch_tanh"
    RELU = "relu"


class ScoreScale(Enum):
    """What a cross-encoder's number goes through before it is a score."""

    SIGMOID = "Sigmoid"
    IDENTITY = "Identity"


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """The shape and the constants of an encoder; every number is checked and the heads divide evenly.

    max_tokens: the longest sequence.  first_position: the row of the position table that a sequence's first token has.
    score_scale: of a cross-encoder.  dimensions: sizes that vectors may be cut to, () for none and None for any.
    """

    architecture: EncoderArchitecture
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    num_positions: int
    num_types: int
    first_position: int
    layer_norm_eps: float
    activation: Activation
    score_scale: ScoreScale
    dimensions: tuple[int, ...] | None
    dtype: str | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def max_tokens(self) -> int:
        return self.num_positions - self.first_position

    @classmethod
    def from_json(cls, values: Mapping[str, object], where: str = "config.json") -> EncoderConfig:
        """From a Hugging Face configuration; where names the file in errors.

        StartupError on an unsupported architecture or feature, or a number that is missing or out of range.
        """
        architecture = _architecture(values, where)
        fields = Fields(values, where)
        _refuse_unsupported(fields)
        heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
        hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
        if hidden % heads:
            raise fields.fail("hidden_size", f"not divisible by {heads} heads")
        vocab = fields.integer("vocab_size", 1, MAX_VOCAB)
        positions = fields.integer("max_position_embeddings", 1, MAX_POSITION, 512)
        first = fields.integer("pad_token_id", 0, vocab - 1, 1) + 1 if architecture.roberta else 0
        if positions <= first:
            raise fields.fail("max_position_embeddings", f"leaves no room behind the first position {first}")
        activation = fields.text("hidden_act", Activation.GELU)
        if activation not in list(Activation):
            raise fields.fail("hidden_act", f"supported are {', '.join(Activation)}")
        if architecture.cross and _labels(fields) != 1:
            raise StartupError(
                f"{where}: a classifier of {_labels(fields)} labels; only cross-encoders, which have one, are supported"
            )
        return cls(
            architecture=architecture,
            num_layers=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
            hidden_size=hidden,
            num_heads=heads,
            intermediate_size=fields.integer("intermediate_size", 1, MAX_INTERMEDIATE),
            vocab_size=vocab,
            num_positions=positions,
            num_types=fields.integer("type_vocab_size", 1, MAX_TYPES, 2),
            first_position=first,
            layer_norm_eps=fields.number("layer_norm_eps", 1e-15, 1.0, 1e-12),
            activation=Activation(activation),
            score_scale=_score_scale(fields),
            dimensions=_dimensions(fields),
            dtype=fields.text("dtype", fields.text("torch_dtype")),
        )


def is_encoder(values: Mapping[str, object]) -> bool:
    """Whether a config.json names one of the supported encoders first."""
    names = values.get("architectures")
    return isinstance(names, list) and bool(names) and names[0] in list(EncoderArchitecture)


def _architecture(values: Mapping[str, object], where: str) -> EncoderArchitecture:
    supported = ", ".join(EncoderArchitecture)
    names = values.get("architectures")
    if not isinstance(names, list) or not names:
        raise StartupError(f'{where}: "architectures" is missing; supported embedding models are {supported}')
    if names[0] not in list(EncoderArchitecture):
        raise StartupError(
            f"{where}: architecture {shorten(names[0])} is not an embedding model; supported are {supported}"
        )
    return EncoderArchitecture(names[0])


def _refuse_unsupported(fields: Fields) -> None:
    """What a config.json may ask for that would change the numbers, were it passed over in silence."""
    if fields.text("position_embedding_type", "absolute") != "absolute":
        raise fields.fail("position_embedding_type", "only absolute is supported")
    if fields.flag("is_decoder", False):
        raise fields.fail("is_decoder", "an embedding model reads both ways")
    if fields.flag("add_cross_attention", False):
        raise fields.fail("add_cross_attention", "not supported")
    if "quantization_config" in fields:
        raise fields.fail("quantization_config", "not supported: use unquantised safetensors")


def _labels(fields: Fields) -> int:
    names = fields.mapping("id2label")
    if names is not None:
        return len(names)
    return fields.integer("num_labels", 1, MAX_LABELS, 2)


def _score_scale(fields: Fields) -> ScoreScale:
    """As sentence-transformers writes it, in its present place or the older one; sigmoid where neither says."""
    section, key = fields.section("sentence_transformers"), "activation_fn"
    if section is None or key not in section:
        section, key = fields, "sbert_ce_default_activation_function"
    name = (section.text(key) or "Sigmoid").rsplit(".", 1)[-1]
    if name not in [scale.value for scale in ScoreScale]:
        raise section.fail(key, "only Sigmoid and Identity are supported")
    return ScoreScale(name)


def _dimensions(fields: Fields) -> tuple[int, ...] | None:
    sizes = fields.integers("matryoshka_dimensions", 1, MAX_WIDTH)
    if sizes:
        return tuple(sorted(set(sizes)))
    return None if fields.flag("is_matryoshka", False) else ()
