"""The decoder against transformers on small random models, however the work is cut into steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.model.driving import CPU, Driver, Run, config_of, decoder_of, distance, judged, random_model
from vserve.model import layers
from vserve.model.config import RopeKind, RopeScaling
from vserve.model.loader import load_dummy

SHAPES: dict[str, dict[str, object]] = {
    "group 2": {},
    "group 1": {"num_key_value_heads": 4},
    "group 3, head 64": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1},
    "group 4, head 96": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 96},
    "head 10": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "one layer": {"num_hidden_layers": 1},
    "odd sizes": {"vocab_size": 101, "hidden_size": 60, "intermediate_size": 77, "num_attention_heads": 6},
    "large vocabulary": {"vocab_size": 4608, "tie_word_embeddings": True},
}
SCALINGS: dict[str, dict[str, object]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, fitted": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 0.8,
        "truncate": False,
    },
}
CUTS = {"whole": [70], "chunks": [33, 5, 20], "token, then pages": [1, 16, 16], "token by token": []}


def prompt(length: int = 70, vocab: int = 97) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_those_of_transformers_however_the_prompt_is_cut(shape: dict[str, object]) -> None:
    model = random_model(**shape)
    ids = prompt()
    wanted = judged(model, ids)
    driver = Driver(decoder_of(model), 24)
    driver.fill(torch.nan)
    for name, cut in CUTS.items():
        assert distance(driver.logits(ids, cut), wanted) < 1e-4, name


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_positions_are_scaled_as_in_transformers(scaling: dict[str, object]) -> None:
    model = random_model(rope_parameters=scaling | {"rope_theta": 10000.0})
    ids = prompt(200)
    driver = Driver(decoder_of(model), 32)
    assert distance(driver.logits(ids, [150, 30]), judged(model, ids)) < 1e-4


def test_rotary_factors_divide_the_frequencies() -> None:
    config = config_of(random_model())
    plain, _ = layers.rotary_frequencies(config)
    scaling = RopeScaling(RopeKind.FACTORS, factors=tuple(range(1, 13)))
    scaled, magnitude = layers.rotary_frequencies(replace(config, rope_scaling=scaling))
    assert torch.equal(scaled, plain / torch.arange(1, 13))
    assert magnitude == 1.0


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_greedy_text_is_that_of_a_sequence_alone_in_any_batch(batch: int, block_size: int) -> None:
    model = random_model(num_key_value_heads=1)
    decoder = decoder_of(model)
    prompts = [prompt(length)[-length:] for length in (1, 3, 16, 17, 40, 5, 31, 64, 2)]
    found = Driver(decoder, 64, block_size).generate(prompts, 24, batch, 13)
    for ids, output in zip(prompts, found, strict=True):
        best = judged(model, ids + output)[len(ids) - 1 : -1].argmax(-1)
        assert best.tolist() == output


def test_only_the_rows_that_are_asked_for_are_returned() -> None:
    driver = Driver(decoder_of(random_model()), 16)
    run = Run(prompt(20), 0)
    assert driver.step([(run, 7)]).shape == (1, 97)
    assert driver.step([(run, 7)], every_logit=True).shape == (7, 97)
    nothing = driver.step([(run, 6)], logits=False)
    assert nothing.shape == (0, 97)
    assert nothing.dtype == torch.float32


def test_a_chunk_without_logits_still_writes_its_keys() -> None:
    model = random_model()
    ids = prompt(40)
    driver = Driver(decoder_of(model), 16)
    run = Run(ids, 0)
    driver.step([(run, 25)], logits=False)
    assert distance(driver.step([(run, 15)], every_logit=True), judged(model, ids)[25:]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32_within_its_rounding(dtype: torch.dtype) -> None:
    model = random_model(initializer_range=0.05)
    ids = prompt(50)
    found = Driver(decoder_of(model, dtype), 16).logits(ids, [30, 10])
    assert found.dtype == torch.float32
    assert distance(found, judged(model, ids)) < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_a_cache_is_zeroed_pages_of_every_layer() -> None:
    config = config_of(random_model())
    cache = load_dummy(config, device=CPU, dtype=torch.float16).new_cache(5, 8)
    assert len(cache.pairs) == len(cache.keys) == len(cache.values) == 3
    assert cache.pairs[0].shape == (5, 8, 2, 2, 24)
    assert cache.keys[0].shape == cache.values[2].shape == (5, 8, 2, 24)
    assert cache.keys[0].dtype == torch.float16
    assert not any(pair.any() for pair in cache.pairs)
    cache.pairs[1][0, 0, 1] = 1.0
    assert cache.values[1].sum() == 48
    assert cache.keys[1].sum() == 0
