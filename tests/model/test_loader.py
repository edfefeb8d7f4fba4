"""Loading: every tensor is there, in its shape, and nothing else; random weights come from their seed alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.model.driving import CPU, Driver, config_of, distance, judged, random_model, weights_of
from vserve.errors import StartupError
from vserve.model import loader, tensors
from vserve.model.safetensors_files import SafetensorsWeights


def load(tensors: dict[str, torch.Tensor] | None = None, **settings: object) -> object:
    model = random_model(**settings)
    weights = weights_of(model)
    if tensors is not None:
        weights.tensors |= tensors
    return loader.load_weights(weights, config_of(model), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
    ],
)
def test_a_missing_tensor_is_named_with_the_shape_it_should_have(name: str) -> None:
    model = random_model(attention_bias=True)
    weights = weights_of(model)
    shape = list(weights.tensors.pop(name).shape)
    with pytest.raises(StartupError) as raised:
        loader.load_weights(weights, config_of(model), device=CPU, dtype=torch.float32)
    assert name in str(raised.value)
    assert str(shape) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_shape_is_an_error_with_both_shapes() -> None:
    with pytest.raises(StartupError) as raised:
        load({"model.layers.1.self_attn.v_proj.weight": torch.zeros(96, 48)})
    for part in ("model.layers.1.self_attn.v_proj.weight", "[96, 48]", "[48, 96]"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "score.weight",
        "x" * 5000,
    ],
)
def test_an_unknown_tensor_is_an_error_of_one_short_line(name: str) -> None:
    with pytest.raises(StartupError) as raised:
        load({name: torch.zeros(96)})
    assert name[:100] in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", {}),
        ("lm_head.weight", {"tie_word_embeddings": True}),
    ],
)
def test_a_tensor_known_to_be_of_no_use_is_passed_over(name: str, settings: dict[str, object]) -> None:
    load({name: torch.zeros(97, 96)}, **settings)


def test_a_tied_head_is_the_embedding_whatever_else_is_stored() -> None:
    model = random_model(tie_word_embeddings=True)
    weights = weights_of(model)
    weights.tensors["lm_head.weight"] = torch.full((97, 96), torch.nan)
    decoder = loader.load_weights(weights, config_of(model), device=CPU, dtype=torch.float32)
    ids = list(range(20))
    assert distance(Driver(decoder, 8).logits(ids, [20]), judged(model, ids)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_stored_in_half_precision_are_computed_in_float32(dtype: torch.dtype, tied: bool) -> None:
    model = random_model(tie_word_embeddings=tied)
    for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        parameter.data.copy_(parameter.data.to(dtype))
    weights = weights_of(model)
    weights.tensors = {name: tensor.to(dtype) for name, tensor in weights.tensors.items()}
    decoder = loader.load_weights(weights, config_of(model), device=CPU, dtype=torch.float32)
    ids = list(range(30))
    assert distance(Driver(decoder, 8).logits(ids, [20]), judged(model, ids)) < 1e-4


def test_progress_rises_to_the_total_on_the_calling_thread() -> None:
    model = random_model()
    weights = weights_of(model)
    seen: list[tuple[int, int]] = []
    loader.load_weights(
        weights,
        config_of(model),
        device=CPU,
        dtype=torch.float32,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [total for _, total in seen] == [weights.total_bytes] * len(seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == weights.total_bytes


def test_loading_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    load()
    assert torch.get_num_threads() == before


def test_a_fault_on_a_loading_thread_reaches_the_caller() -> None:
    model = random_model()
    weights = weights_of(model)
    original = weights.get
    calls: dict[str, int] = {}

    def get(name: str) -> object:
        calls[name] = calls.get(name, 0) + 1
        if calls[name] == 2 and name == "model.layers.1.mlp.up_proj.weight":
            raise StartupError("the file was cut")
        return original(name)

    weights.get = get  # type: ignore[method-assign, assignment]
    with pytest.raises(StartupError, match="the file was cut"):
        loader.load_weights(weights, config_of(model), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_depend_on_the_seed_alone(tied: bool) -> None:
    config = config_of(random_model(tie_word_embeddings=tied, attention_bias=True))
    ids = list(range(30))

    def logits(seed: int) -> torch.Tensor:
        return Driver(loader.load_dummy(config, device=CPU, dtype=torch.float32, seed=seed), 8).logits(ids, [30])

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert logits(1).isfinite().all()


def test_random_weights_need_no_file_and_report_their_bytes() -> None:
    config = replace(config_of(random_model()), num_layers=2)
    seen: list[tuple[int, int]] = []
    loader.load_dummy(config, device=CPU, dtype=torch.bfloat16, progress=lambda *at: seen.append(at))
    total = 2 * sum(torch.Size(shape).numel() for shape in tensors.expected_shapes(config).values())
    assert seen[-1] == (total, total)


def test_a_checkpoint_folder_loads_and_no_longer_needs_its_file(tmp_path: Path) -> None:
    model = random_model()
    save_file(weights_of(model).tensors, tmp_path / "model.safetensors")
    decoder = loader.load_weights(SafetensorsWeights(tmp_path), config_of(model), device=CPU, dtype=torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"")
    ids = list(range(40))
    assert distance(Driver(decoder, 8).logits(ids, [25]), judged(model, ids)) < 1e-4
