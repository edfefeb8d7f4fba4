"""GGUF files of transformers' random models, for every family that has a GGUF form.

The gguf package names the tensors and writes the file; norms and rotary rows are changed as llama.cpp's converter does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from tests.model.families import CASES, VOCAB, make

LAYERS = 8
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_layer": 8}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
}
"""GGUF name -> case, and what the case has differently: GGUF files of Gemma do not say the scale of scores."""


def model_of(name: str, kind: GGMLQuantizationType | None = None) -> Any:
    """transformers' model of a GGUF name; with kind its layers hold only what blocks of that kind can."""
    case, changes = SETTINGS[name]
    model = make(CASES[case], **({"num_hidden_layers": LAYERS} if name != "gpt2" else {}), **changes)
    if kind is not None:
        for theirs, tensor in model.state_dict().items():
            if in_blocks(theirs, tensor):
                # A file's row is one of tensor, or of it turned; rows that change places take their blocks along.
                rows = tensor.t() if name == "gpt2" else tensor
                rows.copy_(torch.from_numpy(dequantize(quantize(rows.contiguous().numpy(), kind), kind)))
    return model


def in_blocks(theirs: str, tensor: Tensor) -> bool:
    """Whether a file of quantised blocks has this tensor in blocks: a layer's matrix that is whole blocks."""
    return tensor.dim() == 2 and (".layers." in theirs or ".h." in theirs) and not any(n % 32 for n in tensor.shape)


def write(path: Path, name: str, model: Any, leave_out: str = "", kind: GGMLQuantizationType | None = None) -> None:
    """Write model as a file of the architecture name, without the tensor leave_out; kind: of the layers' matrices."""
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        add_rotary(writer, config)
    if name.startswith(("gemma", "phi3")):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    architecture = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for theirs, tensor in model.state_dict().items():
        if theirs == leave_out or (theirs == "lm_head.weight" and config.tie_word_embeddings):
            continue
        known = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert known is not None, theirs
        rows = converted(name, theirs, tensor, config).contiguous().numpy()
        if kind is not None and in_blocks(theirs, tensor):
            writer.add_tensor(known, quantize(rows, kind), raw_dtype=kind)
        else:
            writer.add_tensor(known, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_rotary(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
    part = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head_dim * part))


def converted(family: str, name: str, tensor: Tensor, config: Any) -> Tensor:
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1.0
    if family == "gpt2" and tensor.dim() == 2 and ".h." in name:
        return tensor.t()
    if family != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)
