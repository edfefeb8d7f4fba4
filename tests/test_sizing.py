"""What a model takes of a GPU, against transformers' own models and the published layouts of quantised ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.model.families import CASES, config_json, make
from vserve.errors import StartupError
from vserve.kernels.packed import Form, pack
from vserve.model.config import ModelConfig
from vserve.model.gguf import TensorInfo
from vserve.model.kinds import Kind
from vserve.model.memory import GIB, plan_cache
from vserve.model.outline import SIZES, of_size
from vserve.model.quantization import Method, Quantization
from vserve.sizing import (
    CONTEXT_BYTES,
    COUNTERS_BYTES,
    HEAD,
    WRITTEN_ROWS,
    GgufTensors,
    Plan,
    Quantisation,
    cache_budget,
    element_type,
    fitting_sequences,
    reserve,
    weight_bytes,
    written_numbers,
)

SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 3}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128}
LLAMA: dict[str, object] = {**SMALL, "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_as_many_numbers_as_transformers_has(name: str) -> None:
    parameters = make(CASES[name]).parameters()  # a tied head counts once
    wanted = sum(parameter.numel() for parameter in parameters)
    assert weight_bytes(ModelConfig.from_json(config_json(name)), 2) == 2 * wanted


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_about_as_many_numbers_as_its_name_says(size: str) -> None:
    numbers = weight_bytes(of_size(size).config, 2) // 2
    assert numbers == pytest.approx(float(size[:-1]) * 1e9, rel=0.25)


@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantised_layers_take_what_packing_them_takes(bits: int, group: int | None, symmetric: bool) -> None:
    q = torch.zeros(512, 256, dtype=torch.uint8)
    scale = torch.ones(512, 256 // (group or 256), dtype=torch.float16)
    form = Form.CENTRE if symmetric else Form.ZERO
    packed = pack(q, scale, None if symmetric else scale, bits=bits, form=form)
    found = Quantization(Method.GPTQ, bits, group, symmetric=symmetric)
    assert Quantisation.of(found).layer_bytes(512, 256) == packed.nbytes
    assert packed.counters.nbytes == COUNTERS_BYTES


def test_an_order_of_groups_has_a_number_for_each_input() -> None:
    plain, ordered = (Quantisation.of(Quantization(Method.GPTQ, 4, 64, ordered=order)) for order in (False, True))
    assert ordered.layer_bytes(512, 256) == plain.layer_bytes(512, 256) + torch.arange(256).nbytes


def test_only_the_linear_layers_of_the_blocks_are_quantised() -> None:
    config = ModelConfig.from_json({**LLAMA, "intermediate_size": 192})
    layers = 3 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 192)
    outputs = 3 * (64 + 32 + 32 + 64 + 192 + 192 + 64)
    fp8 = Quantisation("fp8", 8, is_float=True)
    taken = weight_bytes(config, 2, fp8)
    assert taken == weight_bytes(config, 2) - layers + 4 * outputs + 3 * 4 * COUNTERS_BYTES


def test_experts_are_packed_and_their_routers_are_not() -> None:
    config = ModelConfig.from_json(config_json("mixtral"))
    assert config.experts is not None
    layers, width, inner, count = config.num_layers, config.hidden_size, config.intermediate_size, config.experts.count
    attention = layers * 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * width
    experts = layers * count * 3 * width * inner
    outputs = layers * ((config.num_heads + 2 * config.num_kv_heads) * config.head_dim + width)
    counters = 2 * COUNTERS_BYTES * layers
    plain = weight_bytes(config, 2)
    in_order = weight_bytes(config, 2, Quantisation("gptq", 4, None)) - counters
    both = attention + experts
    assert in_order == plain - both * 2 + both // 2 + 2 * (outputs + layers * count * (2 * inner + width))
    orders = 8 * layers * (width + config.num_heads * config.head_dim)
    in_orders = weight_bytes(config, 2, Quantisation("gptq", 4, None, row_bytes=8)) - counters
    assert in_orders >= plain - attention * 2 + attention // 2 + 2 * outputs + orders


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


@pytest.mark.parametrize(
    ("quantisation", "tokens", "numbers"),
    [
        (None, 8192, 0),
        (Quantisation("fp8", 8, is_float=True), 8192, 0),
        (Quantisation("awq", 4, 128), WRITTEN_ROWS[4], 0),
        (Quantisation("awq", 4, 128), WRITTEN_ROWS[4] + 1, 2 * 14336 * 4096),
        (Quantisation("gptq", 8, 128), WRITTEN_ROWS[8] + 1, 2 * 14336 * 4096),
    ],
)
def test_steps_of_many_rows_reserve_the_largest_matrix_written_out(
    quantisation: Quantisation | None, tokens: int, numbers: int
) -> None:
    config = of_size("8B").config
    plain, packed = (
        reserve(config, max_num_seqs=64, max_tokens=tokens, element_bytes=2, quantisation=form)
        for form in (None, quantisation)
    )
    assert packed.step - plain.step == packed.graph - plain.graph == 2 * numbers


def test_a_packed_head_is_written_out_for_many_draws() -> None:
    config = of_size("8B").config
    head = TensorInfo(HEAD, Kind.Q6_K, (config.vocab_size, config.hidden_size), 0, 0)
    form = GgufTensors({HEAD: head})
    plain = GgufTensors({HEAD: dataclasses.replace(head, kind=Kind.F16)})
    assert written_numbers(config, plain, tokens=512, draws=512) == 0
    most = WRITTEN_ROWS[8]
    numbers = [written_numbers(config, form, tokens=512, draws=draws) for draws in (most, most + 1)]
    assert numbers == [2 * 14336 * 4096, 128256 * 4096]
