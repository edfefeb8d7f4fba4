"""What a model takes of a GPU, against transformers' own models and the published layouts of quantised ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from vserve.errors import StartupError
from vserve.model.config import ModelConfig
from vserve.model.memory import GIB, plan_cache
from vserve.model.outline import SIZES, of_size
from vserve.sizing import (
    CONTEXT_BYTES,
    Plan,
    Quantisation,
    cache_budget,
    element_type,
    fitting_sequences,
    reserve,
    weight_bytes,
)

SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 3}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128}

MODELS = [
    transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]),
    transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"], tie_word_embeddings=True),
    transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"], attention_bias=True, mlp_bias=True),
    transformers.MistralConfig(**SMALL, architectures=["MistralForCausalLM"], head_dim=32),
]


def parameters(config: transformers.PretrainedConfig) -> int:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())  # a tied head counts once


@pytest.mark.parametrize("config", MODELS, ids=lambda config: type(config).__name__)
def test_weights_are_as_many_numbers_as_transformers_has(config: transformers.PretrainedConfig) -> None:
    assert weight_bytes(ModelConfig.from_json(config.to_dict()), 2) == 2 * parameters(config)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_about_as_many_numbers_as_its_name_says(size: str) -> None:
    numbers = weight_bytes(of_size(size).config, 2) // 2
    assert numbers == pytest.approx(float(size[:-1]) * 1e9, rel=0.25)


def packed_bytes(method: str, outputs: int, inputs: int, group: int) -> int:
    """The tensors of one layer as AutoAWQ and GPTQ write them: eight 4-bit numbers an int32."""
    groups = inputs // group
    scales, zeros = groups * outputs * 2, groups * (outputs // 8) * 4
    weight = inputs * (outputs // 8) * 4 if method == "awq" else (inputs // 8) * outputs * 4
    return weight + scales + zeros + (0 if method == "awq" else inputs * 4)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantised_layers_take_what_their_published_tensors_take(method: str, group: int) -> None:
    quantisation = Quantisation(method, 4, group, zero_bits=4, row_bytes=0 if method == "awq" else 4)
    assert quantisation.layer_bytes(512, 256) == packed_bytes(method, 512, 256, group)


def test_only_the_linear_layers_of_the_blocks_are_quantised() -> None:
    config = ModelConfig.from_json(MODELS[0].to_dict())
    layers = 3 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 176)
    outputs = 3 * (64 + 32 + 32 + 64 + 176 + 176 + 64)
    assert weight_bytes(config, 2, Quantisation("fp8", 8)) == weight_bytes(config, 2) - layers + 4 * outputs


@given(
    gpu=st.integers(GIB, 200 * GIB),
    utilization=st.floats(0.05, 1.0),
    tokens=st.sampled_from([512, 2048, 8192]),
    rows=st.integers(1, 512),
    block_size=st.sampled_from([8, 16, 32]),
)
def test_a_plan_stays_within_what_is_allowed_and_wastes_less_than_a_block(
    gpu: int, utilization: float, tokens: int, rows: int, block_size: int
) -> None:
    config = of_size("1B").config
    kept = reserve(config, max_num_seqs=rows, max_tokens=tokens, element_bytes=2)
    weights, allowed = weight_bytes(config, 2), int(gpu * utilization)
    try:
        budget = cache_budget(total=gpu, utilization=utilization, taken=weights + CONTEXT_BYTES, reserve=kept)
        cache = plan_cache(config, budget_bytes=budget, element_bytes=2, block_size=block_size, max_model_len=None)
    except StartupError:
        block = block_size * 16 * 2 * 8 * 64 * 2
        assert weights + CONTEXT_BYTES + kept.total + block > allowed
        return
    plan = Plan(gpu, allowed, weights, CONTEXT_BYTES, kept, cache)
    assert plan.planned <= allowed < plan.planned + cache.block_bytes
    fit = fitting_sequences(cache, 1000)
    assert fit * -(-1000 // block_size) <= cache.num_blocks < (fit + 1) * -(-1000 // block_size)
    assert f"{cache.num_blocks} blocks" in "".join(plan.lines())


def test_a_gpu_that_is_too_small_is_named_with_what_is_wanted() -> None:
    kept = reserve(of_size("8B").config, max_num_seqs=256, max_tokens=8192, element_bytes=2)
    with pytest.raises(StartupError, match=r"16\.00 GiB.*--gpu-memory-utilization 0\.9 .*nothing is left"):
        cache_budget(total=16 * GIB, utilization=0.9, taken=15 * GIB, reserve=kept)


@pytest.mark.parametrize(
    ("asked", "saved", "device", "found"),
    [
        ("auto", "bfloat16", "cpu", "float32"),
        ("auto", "float32", "cuda", "bfloat16"),
        ("auto", "float16", "cuda", "float16"),
        ("auto", None, "cuda", "bfloat16"),
        ("float32", "float16", "cuda", "float32"),
        ("bfloat16", None, "cpu", "bfloat16"),
    ],
)
def test_the_type_follows_the_flag_then_the_device_then_the_file(
    asked: str, saved: str | None, device: str, found: str
) -> None:
    assert element_type(asked, saved, device) == found


def test_more_tokens_in_a_step_reserve_more_and_graphs_have_a_largest_size() -> None:
    config = of_size("8B").config
    small, large = (reserve(config, max_num_seqs=64, max_tokens=tokens, element_bytes=2) for tokens in (2048, 8192))
    assert small.step < large.step
    assert small.graph == large.graph
    assert dataclasses.replace(large, libraries=0).total == large.step + large.graph
