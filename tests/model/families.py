"""A tiny random model of every supported architecture, made and saved by transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers

VOCAB = 97
PHI_HALF = 6
_ROTARY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "initializer_range": 0.3}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(PHI_HALF)],
    "long_factor": [1.0 + 0.5 * i for i in range(PHI_HALF)],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
}


@dataclass(frozen=True)
class Case:
    """One configuration of one architecture: transformers' class, and the settings of its config."""

    model: str
    settings: dict[str, Any]


def _opt(**settings: Any) -> Case:
    shape = {"hidden_size": 96, "ffn_dim": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
    common = {"vocab_size": VOCAB, "max_position_embeddings": 256, "init_std": 0.15, "word_embed_proj_dim": 96}
    return Case("OPTForCausalLM", shape | common | settings)


def _rotary(model: str, **settings: Any) -> Case:
    return Case(model, _ROTARY | {"initializer_range": 0.15} | settings)


CASES: dict[str, Case] = {
    "llama": _rotary("LlamaForCausalLM"),
    "mistral": _rotary("MistralForCausalLM", sliding_window=24),
    "mistral, no window": _rotary("MistralForCausalLM", sliding_window=None),
    "qwen2": _rotary("Qwen2ForCausalLM"),
    "qwen2, upper layers windowed": _rotary(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=20, max_window_layers=2, tie_word_embeddings=True
    ),
    "qwen3": _rotary("Qwen3ForCausalLM", head_dim=32),
    "qwen3, biased": _rotary("Qwen3ForCausalLM", head_dim=16, attention_bias=True, tie_word_embeddings=True),
    "qwen3-moe": _rotary(
        "Qwen3MoeForCausalLM", head_dim=32, num_experts=8, moe_intermediate_size=48, norm_topk_prob=True, **_EXPERTS
    ),
    "qwen3-moe, some layers dense": _rotary(
        "Qwen3MoeForCausalLM",
        num_experts=5,
        moe_intermediate_size=40,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        **_EXPERTS,
    ),
    "mixtral": _rotary("MixtralForCausalLM", num_local_experts=4, sliding_window=28, **_EXPERTS),
    "phi3": _rotary("Phi3ForCausalLM", sliding_window=40, pad_token_id=0),
    "phi3, long": _rotary(
        "Phi3ForCausalLM", rope_parameters=_LONGROPE, original_max_position_embeddings=64, pad_token_id=0
    ),
    "gemma2": _rotary(
        "Gemma2ForCausalLM", head_dim=32, sliding_window=24, query_pre_attn_scalar=40, attn_logit_softcapping=4.0
    ),
    "gemma2, odd sizes": _rotary(
        "Gemma2ForCausalLM", head_dim=10, sliding_window=17, final_logit_softcapping=None, tie_word_embeddings=False
    ),
    "gemma3": _rotary("Gemma3ForCausalLM", head_dim=32, sliding_window=24, query_pre_attn_scalar=32),
    "gemma3, scaled": _rotary(
        "Gemma3ForCausalLM",
        head_dim=16,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    "opt": _opt(),
    "opt, norms behind": _opt(do_layer_norm_before=False, word_embed_proj_dim=48),
    "opt, no bias": _opt(enable_bias=False, activation_function="gelu", tie_word_embeddings=False),
    "gpt2": Case(
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 96, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.15},
    ),
}
ARCHITECTURES = {name.split(",", maxsplit=1)[0]: name for name in reversed(CASES)}
"""Family -> its first case."""


def make(case: Case, **changes: Any) -> Any:
    """transformers' model of the case; biases and norms that are 0 and 1 would hide a mistake, so they are not."""
    torch.manual_seed(len(case.model))
    model_class = getattr(transformers, case.model)
    config = model_class.config_class(**(case.settings | changes))
    config.bos_token_id, config.eos_token_id = 1, 2
    model = model_class(config)
    model.train(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    # Eager attention: the other paths do not cap scores.
    model.set_attn_implementation("eager")
    return model


@cache
def saved(name: str) -> tuple[Any, Path]:
    """The model of a case and the folder that transformers wrote it to; one for all tests, which change neither."""
    model = make(CASES[name])
    folder = Path(mkdtemp(prefix="family-"))
    model.save_pretrained(folder)
    return model, folder


def config_json(name: str) -> dict[str, Any]:
    """The config.json of a case."""
    values: dict[str, Any] = json.loads((saved(name)[1] / "config.json").read_text())
    return values
