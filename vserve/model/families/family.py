"""What a family of models is made of: how its configuration is read, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from vserve.model.config import Architecture, ModelConfig
from vserve.model.fields import Fields

GgufShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Names:
    """Where a checkpoint keeps each part: module names, to which ".weight" and ".bias" are added.

    base stands before all but the head; some checkpoints are saved without it.  layer stands, with the number of the
    layer put in, before what a layer has.  qkv, gate_up: one fused module, or those that are stacked in this order; an
    MLP without a gate has its up projection there.  expert: with the number put in, before expert_gate_up and
    expert_down, which a layer of experts has in place of gate_up and down.  None: the family has no such part.
    harmless: endings of tensors that old checkpoints hold and nobody needs.
    """

    base: str = "model."
    embedding: str = "embed_tokens"
    positions: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    layer: str = "layers.{}."
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_post_norm: str = "post_feedforward_layernorm"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    expert_gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"
    final_norm: str = "norm"
    head: str = "lm_head"
    harmless: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def fitted(self, stored: Iterable[str]) -> Names:
        """These names as a checkpoint with the tensors `stored` has them: with base, or without."""
        return self if any(name.startswith(self.base) for name in stored) else replace(self, base="")


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A family's GGUF form: the value of general.architecture, its reader, and which GGUF names mean which module.

    tensors: GGUF name within a block -> module of a layer.  top: GGUF name -> module outside of layers, base left out.
    read(fields, shapes, rope_factors).  interleaved: q and k are stored in the order of rotating pairs.
    """

    name: str
    read: Callable[[Fields, GgufShapes, tuple[float, ...]], ModelConfig]
    tensors: Mapping[str, str]
    top: Mapping[str, str]
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: read(fields of config.json), the names of its tensors, and its GGUF form if it has one."""

    architecture: Architecture
    read: Callable[[Fields], ModelConfig]
    names: Names
    gguf: GgufFamily | None = None
