"""A whole decoder over keys and values in e4m3, beside the same decoder over a cache of its own type."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from tests.model import families
from tests.model.driving import CPU, Driver, MemoryWeights, config_of, decoder_of, distance, random_model, weights_of
from vserve.errors import StartupError
from vserve.model.decoder import CACHE_TYPES
from vserve.model.loader import load, load_weights
from vserve.model.memory import CacheForm, plan_cache
from vserve.model.source import resolve

E4M3 = torch.float8_e4m3fn
IDS = [int(i) for i in torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(3))]
BITS_LESS = 4
"""e4m3 keeps 3 bits of mantissa, bfloat16 7: its roundings are 16 times as large, whatever a model makes of them."""


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "qwen3", "phi3", "opt", "gpt2"])
def test_logits_over_an_fp8_cache_are_near_those_over_a_float_one(name: str) -> None:
    decoder = load(resolve(str(families.saved(name)[1]), environ=os.environ), device=CPU, dtype=torch.float32)
    wanted, rounded = (Driver(decoder, 64, cache_type=kind).logits(IDS, (40, 70)) for kind in (None, torch.bfloat16))
    narrow = Driver(decoder, 64, cache_type=E4M3)
    narrow.fill(torch.nan)
    found = narrow.logits(IDS, (40, 70))
    assert 0 < (found - wanted).norm() < 2**BITS_LESS * 1.25 * (rounded - wanted).norm()
    assert (found - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize("cache_type", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_may_have_any_float_type_whatever_the_activations_have(
    dtype: torch.dtype, cache_type: torch.dtype
) -> None:
    decoder = decoder_of(random_model(), dtype)
    driver = Driver(decoder, 64, cache_type=cache_type)
    assert driver.cache.pairs[0].dtype == cache_type
    assert driver.cache.scales is None
    assert distance(driver.logits(IDS, (40, 70)), Driver(decoder, 64).logits(IDS, (40, 70))) < 0.03


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_greedy_text_over_an_fp8_cache_is_the_same_alone_and_in_any_batch(block_size: int) -> None:
    decoder = decoder_of(random_model(tie_word_embeddings=True))
    prompts = [IDS[i : i + 3 + 11 * i] for i in range(6)]
    alone = [Driver(decoder, 64, block_size, cache_type=E4M3).generate([prompt], 12, 1, 200)[0] for prompt in prompts]
    assert Driver(decoder, 128, block_size, 1, E4M3).generate(prompts, 12, 4, 7) == alone


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float16", "fp8", "fp8_e4m3"])
def test_a_cache_takes_the_bytes_that_were_planned(asked: str) -> None:
    decoder = decoder_of(random_model())
    form = CacheForm.of(asked, "float32")
    plan = plan_cache(decoder.config, budget_bytes=1 << 20, form=form, block_size=16, max_model_len=None)
    cache = decoder.planned_cache(plan)
    assert cache.pairs[0].dtype == CACHE_TYPES[form.dtype]
    taken = sum(tensor.nbytes for tensor in (*cache.pairs, *(cache.scales or ())))
    assert taken == plan.num_blocks * plan.block_bytes
    first = cache.first(1)
    assert [pair.data_ptr() for pair, _ in first.layers()] == [cache.pairs[0].data_ptr()]
    assert (first.scales is None) == (form.scale_bytes == 0)


def scaled(**scales: Tensor) -> MemoryWeights:
    """A small model whose checkpoint has these tensors in its second layer."""
    weights = weights_of(random_model())
    for name, scale in scales.items():
        weights.tensors[f"model.layers.1.self_attn.{name.replace('__', '.')}"] = scale
    return weights


@pytest.mark.parametrize(
    ("scales", "wanted"),
    [
        ({"k_scale": 0.5, "v_scale": 0.25}, (0.5, 0.25)),
        ({"k_proj__k_scale": 0.5, "v_proj__v_scale": 0.25}, (0.5, 0.25)),
        ({"k_proj__output_scale": 0.5, "v_proj__output_scale": 0.25}, (0.5, 0.25)),
        ({"kv_scale": 0.5}, (0.5, 0.5)),
        ({"k_scale": 0.5}, (0.5, 0.5)),
        ({"v_scale": 0.25}, (0.25, 0.25)),
    ],
    ids=str,
)
def test_a_checkpoint_s_own_scales_are_those_of_its_layer(
    scales: dict[str, float], wanted: tuple[float, float]
) -> None:
    weights = scaled(**{name: torch.tensor(scale) for name, scale in scales.items()})
    decoder = load_weights(weights, config_of(random_model()), device=CPU, dtype=torch.float32)
    driver = Driver(decoder, 64, cache_type=E4M3)
    driver.fill(0.0)
    driver.logits(IDS[:50], (30,))
    caches = driver.cache.scales
    assert caches is not None
    for layer, fixed in enumerate((None, wanted, None)):
        used = caches[layer][caches[layer] != 0].view(-1, 2).float()
        assert len(used) == 50 * 2
        if fixed is None:
            assert len(used.unique(dim=0)) > 50
        else:
            assert used.unique(dim=0).tolist() == [list(fixed)]


def test_values_beyond_a_given_scale_saturate_and_logits_stay_finite() -> None:
    weights = scaled(k_scale=torch.tensor(2.0**-12), v_scale=torch.tensor(2.0**-12))
    decoder = load_weights(weights, config_of(random_model()), device=CPU, dtype=torch.float32)
    driver = Driver(decoder, 64, cache_type=E4M3)
    assert driver.logits(IDS[:50], (30,)).isfinite().all()
    bits = driver.cache.pairs[1].view(torch.uint8) & 0x7F
    assert (bits == 0x7E).sum() > 100  # 448
    assert not (bits == 0x7F).any()  # NaN


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor(0.0), "k_scale is 0, must be a positive number"),
        (torch.tensor(-1.0), "k_scale is -1, must be a positive number"),
        (torch.tensor(torch.nan), "k_scale is nan, must be a positive number"),
        (torch.tensor(torch.inf), "k_scale is inf, must be a positive number"),
        (torch.ones(4), "k_scale has shape [4], must be one number"),
    ],
    ids=str,
)
def test_a_scale_that_is_none_is_one_clear_line(scale: Tensor, message: str) -> None:
    with pytest.raises(StartupError) as raised:
        load_weights(scaled(k_scale=scale), config_of(random_model()), device=CPU, dtype=torch.float32)
    assert f"tensor model.layers.1.self_attn.{message}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_scale_of_no_layer_is_a_tensor_of_another_model() -> None:
    weights = weights_of(random_model())
    weights.tensors["model.layers.7.self_attn.k_scale"] = torch.tensor(1.0)
    with pytest.raises(StartupError, match=r"model\.layers\.7\.self_attn\.k_scale' is not one of"):
        load_weights(weights, config_of(random_model()), device=CPU, dtype=torch.float32)
