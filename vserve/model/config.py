"""What a decoder must know of a model before it reads a tensor: ``ModelConfig``, from config.json or GGUF metadata.

Owns the list of supported architectures and what may differ between them; how each is read is its family's
(vserve.model.families).  Knows nothing of files, tensors or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from vserve.model.rope_scaling import MAX_POSITION, RopeKind, RopeScaling

__all__ = [
    "MAX_POSITION",
    "Activation",
    "Architecture",
    "Experts",
    "ModelConfig",
    "NormKind",
    "RopeKind",
    "RopeScaling",
]

MAX_LAYERS: Final = 1024
MAX_WIDTH: Final = 1 << 18
MAX_HEADS: Final = 1 << 12
MAX_HEAD_DIM: Final = 1 << 12
MAX_INTERMEDIATE: Final = 1 << 21
MAX_VOCAB: Final = 1 << 23
MAX_EXPERTS: Final = 1 << 12


class Architecture(StrEnum):
    """A supported decoder, by the name config.json gives it under "architectures"."""

    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"
    QWEN3_MOE = "Qwen3MoeForCausalLM"
    MIXTRAL = "MixtralForCausalLM"
    PHI3 = "Phi3ForCausalLM"
    GEMMA2 = "Gemma2ForCausalLM"
    GEMMA3 = "Gemma3ForCausalLM"
    OPT = "OPTForCausalLM"
    GPT2 = "GPT2LMHeadModel"


class NormKind(StrEnum):
    """rms: RMS norm.  rms_plus_one: RMS norm whose weight is stored less 1.  layer: LayerNorm with a bias."""

    RMS = "rms"
    RMS_PLUS_ONE = "rms_plus_one"
    LAYER = "layer"


class Activation(StrEnum):
    """The function of an MLP; gelu_tanh is the approximation that files call gelu_new or gelu_pytorch_tanh."""

    SILU = "silu"
    RELU = "relu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of the MLP: of count gated MLPs a token takes the `active` with the largest scores.

    intermediate_size: of one expert.  normalised: the weights of a token's experts sum to 1; else they are the
    probabilities over all.  dense_layers: layers that have a plain MLP.
    """

    count: int
    active: int
    intermediate_size: int
    normalised: bool
    dense_layers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and the constants of a decoder; every number is checked and the heads divide evenly.

    max_position: the longest sequence in tokens.  norm_eps: of every norm.  rope_scaling: None for plain rotary
    embedding.  dtype: the type the checkpoint was saved in ("bfloat16"), None when the file does not say.  bos_id,
    eos_ids: as the model's own configuration names them; generation_config.json may name others.

    attention_bias: of queries, keys and values; output_bias: of the projection behind them.
    gated: the MLP is down(f(gate x) * up x); else down(f(up x)).  post_norm: norms follow the sums instead of leading
    to the layers.  sandwich: each layer's result is normalised too, before it is added (Gemma).
    final_norm: a norm precedes the head.  qk_norm: each head of the queries and keys is normalised.
    windows: for each layer the tokens that its attention sees, the own one included, None for all; () for all in all.
    local_rope_theta: of the layers with a window, whose rotation is not scaled; None: the same as everywhere.
    rotary_dim: the first so many numbers of a head are rotated; None: all.
    position_offset: positions are learned vectors, of which the first so many are spare; None: rotary embedding.
    attention_scale: of the scores; None: head_dim ** -0.5.  attention_softcap, logit_softcap: c tanh(x / c) of them.
    embedding_size: the width of embedding and head when a projection joins them to the model; None: hidden_size.
    transposed: linear weights are stored [inputs, outputs].
    """

    architecture: Architecture
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    dtype: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    norm: NormKind = NormKind.RMS
    activation: Activation = Activation.SILU
    gated: bool = True
    post_norm: bool = False
    sandwich: bool = False
    final_norm: bool = True
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    local_rope_theta: float | None = None
    rotary_dim: int | None = None
    position_offset: int | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    embedding_size: int | None = None
    experts: Experts | None = None
    transposed: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, object], where: str = "config.json") -> ModelConfig:
        """From a Hugging Face configuration; where names the file in errors.

        StartupError on an unsupported architecture or feature, or a number that is missing or out of range.
        """
        from vserve.model import families  # they are made of this module's classes

        return families.read_json(values, where)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, object],
        shapes: Mapping[str, tuple[int, ...]],
        rope_factors: tuple[float, ...] = (),
        where: str = "GGUF file",
    ) -> ModelConfig:
        """From the metadata of a GGUF file, the shapes of its tensors by GGUF name, and its rope_freqs.weight if any.

        Biases and tied embeddings are told by which tensors there are.  StartupError as ``from_json``.
        """
        from vserve.model import families

        return families.read_gguf(metadata, shapes, rope_factors, where)

    def window(self, layer: int) -> int | None:
        """Tokens that the layer's attention sees, the own one included; None: all."""
        return self.windows[layer] if self.windows else None

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer not in self.experts.dense_layers

    def limited(self, max_model_len: int | None) -> ModelConfig:
        """This model for sequences of at most so many tokens: a rotation for shorter ones may be another."""
        if max_model_len is None or max_model_len >= self.max_position:
            return self
        return replace(self, max_position=max_model_len)
