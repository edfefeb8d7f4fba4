"""ModelConfig from config.json and from GGUF metadata: what is read, and what is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vserve.errors import StartupError
from vserve.model.config import Architecture, ModelConfig, RopeKind, RopeScaling

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "tokenizer.ggml.tokens": ["a"] * 100,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
SHAPES: dict[str, tuple[int, ...]] = {"token_embd.weight": (100, 64)}
REMOVED = object()


def changed(base: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in (base | changes).items() if value is not REMOVED}


def test_a_plain_llama_is_read() -> None:
    assert ModelConfig.from_json(LLAMA) == ModelConfig(
        architecture=Architecture.LLAMA,
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=100,
        max_position=256,
        norm_eps=1e-5,
        rope_theta=5000.0,
        dtype="bfloat16",
        bos_id=1,
        eos_ids=(2,),
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": REMOVED}, {"num_kv_heads": 4}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"head_dim": None}, {"head_dim": 16}),
        ({"rope_theta": REMOVED}, {"rope_theta": 10000.0}),
        ({"rope_theta": REMOVED, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}, {"rope_theta": 7e5}),
        ({"rope_scaling": None}, {"rope_scaling": None}),
        ({"rope_scaling": {}}, {"rope_scaling": None}),
        ({"max_position_embeddings": REMOVED}, {"max_position": 2048}),
        ({"rms_norm_eps": REMOVED}, {"norm_eps": 1e-6}),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ({"attention_bias": True}, {"attention_bias": True, "output_bias": True}),
        ({"mlp_bias": True}, {"mlp_bias": True}),
        ({"eos_token_id": [5, 6, 5]}, {"eos_ids": (5, 6)}),
        ({"eos_token_id": None, "bos_token_id": None}, {"eos_ids": (), "bos_id": None}),
        ({"torch_dtype": REMOVED, "dtype": "float16"}, {"dtype": "float16"}),
        ({"torch_dtype": REMOVED}, {"dtype": None}),
        ({"architectures": ["Other", "LlamaForCausalLM"]}, {"architecture": Architecture.LLAMA}),
        ({"sliding_window": 32}, {"max_position": 256}),
        ({"unknown_key": [{}]}, {}),
        ({"auto_map": {"AutoModel": "evil.Model"}}, {}),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, {"windows": ()}),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, {"max_position": 256, "windows": (32, 32)}),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "max_position_embeddings": REMOVED,
                "num_key_value_heads": REMOVED,
                "num_attention_heads": 8,
            },
            {"max_position": 131072, "num_kv_heads": 8, "windows": (4096, 4096)},
        ),
    ],
)
def test_what_config_json_says_or_leaves_out(changes: dict[str, object], expected: dict[str, object]) -> None:
    config = ModelConfig.from_json(changed(LLAMA, changes))
    assert {name: getattr(config, name) for name in expected} == expected


SCALINGS: list[tuple[dict[str, object], RopeScaling]] = [
    ({"type": "linear", "factor": 2.0}, RopeScaling(RopeKind.LINEAR, 2.0, 256)),
    ({"rope_type": "dynamic", "factor": 4}, RopeScaling(RopeKind.DYNAMIC, 4.0, 256)),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        RopeScaling(RopeKind.LLAMA3, 8.0, 64),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        RopeScaling(RopeKind.YARN, 4.0, 64, attention_factor=0.1 * math.log(4) + 1),
    ),
    (
        {"type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        RopeScaling(RopeKind.YARN, 4.0, 256, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, truncate=False),
    ),
]


@pytest.mark.parametrize(("section", "expected"), SCALINGS)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling_is_read_in_the_old_and_the_new_place(
    key: str, section: dict[str, object], expected: RopeScaling
) -> None:
    assert ModelConfig.from_json(LLAMA | {key: section}).rope_scaling == expected


def test_yarn_lengthens_a_context_given_before_stretching_and_keeps_one_given_after() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert ModelConfig.from_json(LLAMA | {"rope_scaling": yarn}).max_position == 1024
    assert ModelConfig.from_json(LLAMA | {"rope_scaling": yarn, "max_position_embeddings": 1024}).max_position == 1024


@pytest.mark.parametrize("extra", [{}, {"mscale": 0.7, "mscale_all_dim": 1.0}, {"attention_factor": 1.25}])
def test_yarns_attention_factor_equals_transformers(extra: dict[str, float]) -> None:
    section = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 5000.0} | extra
    theirs: Any = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=dict(section)
    )
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](theirs, None)
    scaling = ModelConfig.from_json(LLAMA | {"rope_scaling": section}).rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", [LlamaConfig, MistralConfig])
@pytest.mark.parametrize("scaling", [None, *(section for section, _ in SCALINGS)])
def test_what_transformers_writes_is_read(family: type[Any], scaling: dict[str, object] | None, tmp_path: Path) -> None:
    rope = {"rope_theta": 20000.0} | (scaling or {"rope_type": "default"})
    theirs = family(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=2048,
        rope_parameters=rope,
        architectures=[{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[family.model_type]],
        eos_token_id=[2, 3],
    )
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_json(json.loads((tmp_path / "config.json").read_bytes()))
    assert config.head_dim == 16
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == 20000.0
    assert config.eos_ids == (2, 3)
    assert (config.rope_scaling is None) is (scaling is None)


BAD_JSON: dict[str, tuple[dict[str, object], str]] = {
    "no architectures": ({"architectures": REMOVED}, '"architectures" is missing; supported are LlamaForCausalLM'),
    "architectures of text": ({"architectures": "LlamaForCausalLM"}, '"architectures" is missing'),
    "unknown architecture": (
        {"architectures": ["BertModel"]},
        "'BertModel' is not supported; supported are LlamaForCausalLM, MistralForCausalLM",
    ),
    "number as architecture": ({"architectures": [7]}, "7 is not supported"),
    "no layers": ({"num_hidden_layers": REMOVED}, "num_hidden_layers is missing"),
    "zero layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, must be an integer from 1 to 1024"),
    "a million layers": ({"num_hidden_layers": 10**6}, "must be an integer from 1"),
    "negative width": ({"hidden_size": -64}, "hidden_size is -64"),
    "width of text": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "width true": ({"hidden_size": True}, "hidden_size is True"),
    "fractional width": ({"hidden_size": 64.5}, "hidden_size is 64.5"),
    "width past float": ({"hidden_size": 10**400}, "must be an integer"),
    "width not divisible": ({"hidden_size": 66}, "hidden size 66 is not divisible by 4 heads"),
    "odd head size": ({"head_dim": 15}, "head size 15 must be even"),
    "odd derived head size": ({"hidden_size": 60}, "head size 15 must be even"),
    "heads not divisible": ({"num_key_value_heads": 3}, "4 heads are not divisible by 3"),
    "more key heads than heads": ({"num_key_value_heads": 8}, "from 1 to 4"),
    "huge vocabulary": ({"vocab_size": 2**40}, "vocab_size"),
    "eps zero": ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
    "eps nan": ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    "theta infinite": ({"rope_theta": math.inf}, "rope_theta is inf"),
    "theta past float": ({"rope_theta": 10**400}, "rope_theta"),
    "theta of text": ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    "activation": ({"hidden_act": "gelu"}, "only silu, swish are supported"),
    "flag of text": ({"tie_word_embeddings": "yes"}, "must be true or false"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "use unquantised safetensors or a GGUF file"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "only 1.0 is supported"),
    "partial rotary inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only 1.0 is supported"),
    "rope of text": ({"rope_scaling": "linear"}, "must be an object"),
    "rope kind": ({"rope_scaling": {"type": "ntk", "factor": 2}}, "supported are default, linear, dynamic"),
    "longrope without factors": ({"rope_scaling": {"type": "longrope", "factor": 2}}, "must be 8 factors"),
    "longrope of text": (
        {"rope_scaling": {"type": "longrope", "long_factor": ["1"] * 8, "short_factor": [1] * 8}},
        "must be numbers from",
    ),
    "rope kind number": ({"rope_scaling": {"type": 3}}, "must be a string"),
    "rope factor": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    "no rope factor": ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "llama3 factors": (
        {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
        "must be above low_freq_factor 4",
    ),
    "eos outside": ({"eos_token_id": 100}, "must be token ids from 0 to 99"),
    "eos negative": ({"eos_token_id": [2, -1]}, "must be token ids"),
    "eos true": ({"eos_token_id": True}, "must be token ids"),
    "eos list too long": ({"eos_token_id": [1] * 5000}, "at most 4096"),
    "dtype number": ({"torch_dtype": 3}, "must be a string"),
    "long value": ({"hidden_size": "x" * 10**6}, "…"),
}


@pytest.mark.parametrize(("changes", "problem"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_a_bad_config_json_is_one_line_that_names_the_key(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(StartupError) as caught:
        ModelConfig.from_json(changed(LLAMA, changes), "models/x/config.json")
    message = str(caught.value)
    assert problem in message
    assert message.startswith("models/x/config.json")
    assert "\n" not in message
    assert len(message) < 600


def test_gguf_metadata_gives_the_same_configuration() -> None:
    expected = ModelConfig.from_json(changed(LLAMA, {"torch_dtype": REMOVED, "tie_word_embeddings": True}))
    assert ModelConfig.from_gguf(METADATA, SHAPES) == expected


@pytest.mark.parametrize(
    ("changes", "shapes", "expected"),
    [
        ({}, {"output.weight": (100, 64)}, {"tie_embeddings": False}),
        ({}, {"blk.0.attn_q.bias": (64,)}, {"attention_bias": True, "output_bias": False}),
        ({}, {"blk.0.attn_output.bias": (64,)}, {"output_bias": True}),
        ({}, {"blk.0.ffn_up.bias": (96,)}, {"mlp_bias": True}),
        ({}, {"token_embd.weight": (128, 64)}, {"vocab_size": 128}),
        ({"llama.attention.key_length": 32, "llama.attention.value_length": 32}, {}, {"head_dim": 32}),
        ({"llama.rope.freq_base": REMOVED}, {}, {"rope_theta": 10000.0}),
        ({"llama.attention.head_count_kv": REMOVED}, {}, {"num_kv_heads": 4}),
        ({"llama.attention.sliding_window": 64}, {}, {"max_position": 256, "windows": (64, 64)}),
        ({"llama.attention.sliding_window": 0}, {}, {"windows": ()}),
        ({"llama.expert_count": 0}, {}, {}),
        ({"llama.rope.scaling.type": "none"}, {}, {"rope_scaling": None}),
        ({"llama.rope.scale_linear": 2.0}, {}, {"rope_scaling": RopeScaling(RopeKind.LINEAR, 2.0, 256)}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            {},
            {"rope_scaling": RopeScaling(RopeKind.YARN, 4.0, 64, attention_factor=0.1 * math.log(4) + 1)},
        ),
    ],
)
def test_what_gguf_metadata_and_tensors_say(
    changes: dict[str, object], shapes: dict[str, tuple[int, ...]], expected: dict[str, object]
) -> None:
    config = ModelConfig.from_gguf(changed(METADATA, changes), SHAPES | shapes)
    assert {name: getattr(config, name) for name in expected} == expected


BAD_METADATA: dict[str, tuple[dict[str, object], str]] = {
    "no architecture": ({"general.architecture": REMOVED}, "None is not supported; supported are llama"),
    "other architecture": ({"general.architecture": "mamba"}, "'mamba' is not supported; supported are llama"),
    "architecture list": ({"general.architecture": ["llama"]}, "is not supported"),
    "experts": ({"llama.expert_count": 8}, "mixture-of-experts"),
    "no layers": ({"llama.block_count": REMOVED}, "llama.block_count is missing"),
    "heads per layer": ({"llama.attention.head_count": [4, 4]}, "must be an integer"),
    "value size": ({"llama.attention.value_length": 8}, "must equal the head size 16"),
    "partial rotary": ({"llama.rope.dimension_count": 8}, "must equal the head size 16"),
    "tokens of text": ({"tokenizer.ggml.tokens": "abc"}, "must be an array"),
    "more tokens than rows": ({"tokenizer.ggml.tokens": ["a"] * 101}, "101 tokens, the embedding only 100 rows"),
    "eos outside": ({"tokenizer.ggml.eos_token_id": 100}, "must be token ids from 0 to 99"),
    "rope kind": ({"llama.rope.scaling.type": "longrope"}, "supported are none, linear, yarn"),
    "eps missing": ({"llama.attention.layer_norm_rms_epsilon": REMOVED}, "is missing"),
}


@pytest.mark.parametrize(("changes", "problem"), BAD_METADATA.values(), ids=BAD_METADATA.keys())
def test_bad_gguf_metadata_is_one_line_that_names_the_key(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(StartupError) as caught:
        ModelConfig.from_gguf(changed(METADATA, changes), SHAPES, where="x.gguf")
    assert problem in str(caught.value)
    assert str(caught.value).startswith("x.gguf")


def test_a_gguf_without_an_embedding_is_refused() -> None:
    with pytest.raises(StartupError, match=r"token_embd\.weight is missing"):
        ModelConfig.from_gguf(METADATA, {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*LLAMA, "rope_scaling", "rope_parameters", "head_dim"]), JSON, max_size=4))
@pytest.mark.promise("R13", "fault: hostile model files")
def test_no_value_of_config_json_raises_anything_but_a_startup_error(changes: dict[str, object]) -> None:
    try:
        config = ModelConfig.from_json(LLAMA | changes)
    except StartupError:
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert config.head_dim % 2 == 0
