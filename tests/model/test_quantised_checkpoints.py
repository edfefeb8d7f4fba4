"""AWQ, GPTQ and fp8 checkpoints against the published formulas, and whole models against dense ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from tests.model import quantised
from tests.model.driving import CPU, Driver, config_of, distance, judged, random_model
from tests.model.quantised import AWQ, CHECKPOINTS, FP8, GPTQ, awq
from vserve.errors import StartupError
from vserve.model.grouped_weights import FloatTensor, GroupedTensor
from vserve.model.linear import GroupedLinear
from vserve.model.loader import load, load_dummy
from vserve.model.quantization import Method, Quantization, choose, read
from vserve.model.source import resolve


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(name, folder of the quantised model, folder of the same model dense)."""
    base = tmp_path_factory.mktemp("model")
    dense, folder = base / "dense", base / "quantised"
    random_model(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(dense)
    make, settings = CHECKPOINTS[request.param]
    quantised.quantise(folder, dense, make, settings)
    return request.param, folder, dense


def test_every_tensor_is_the_published_formula_bit_by_bit(pair: tuple[str, Path, Path]) -> None:
    _, folder, dense = pair
    weights, wanted = resolve(str(folder), environ={}).open_weights(), load_file(dense / "model.safetensors")
    assert set(weights.names()) == set(wanted)
    quantised_ones = 0
    for name, numbers in wanted.items():
        stored = weights.get(name)
        assert stored.shape == tuple(numbers.shape)
        assert torch.equal(stored.dense(), numbers), name
        if isinstance(stored, GroupedTensor | FloatTensor):
            quantised_ones += 1
            order = torch.tensor([3, 0, 7])
            assert torch.equal(stored.rows(2, 9).dense(), numbers[2:9])
            assert torch.equal(stored.select_rows(order).dense(), numbers[order])
            out = torch.empty(4, numbers.shape[1], dtype=torch.float16)
            stored.write_rows(1, 5, out)
            assert torch.equal(out, numbers[1:5].half())
    assert quantised_ones == 14


def test_logits_are_those_of_the_dense_model_of_the_same_numbers(pair: tuple[str, Path, Path]) -> None:
    name, folder, dense = pair
    judge = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ids = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    decoder = load(resolve(str(folder), environ={}), device=CPU, dtype=torch.float32)
    if name.startswith("awq"):
        assert isinstance(decoder._blocks[0].output, GroupedLinear)
    wanted = judged(judge, ids)
    driver = Driver(decoder, 24)
    for cut in ([40], [33, 1, 1, 5], []):
        assert distance(driver.logits(ids, cut), wanted) < 1e-4, cut


def test_an_opt_model_in_awq_speaks_like_its_dense_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 64,
        "init_std": 0.15,
    }
    OPTForCausalLM(OPTConfig(**shape)).save_pretrained(tmp_path / "dense")
    quantised.quantise(tmp_path / "awq", tmp_path / "dense", awq(), AWQ)
    source = resolve(str(tmp_path / "awq"), environ={})
    assert source.quantization == Quantization(Method.AWQ, 4, 32)
    decoder = load(source, device=CPU, dtype=torch.float32)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ids = list(range(3, 30))
    assert distance(Driver(decoder, 24).logits(ids, [20, 1]), judged(judge, ids)) < 1e-4


@pytest.mark.parametrize("quantization", [Quantization(Method.AWQ, 4, 32), Quantization(Method.GPTQ, 8, None)])
def test_random_weights_can_be_quantised(quantization: Quantization) -> None:
    model = random_model(hidden_size=64, intermediate_size=128)
    decoder = load_dummy(config_of(model), device=CPU, dtype=torch.float32, quantization=quantization)
    assert Driver(decoder, 24).logits(list(range(9)), [9]).isfinite().all()


@pytest.mark.parametrize("number", [0.0, 1e-4, torch.nan])
@pytest.mark.parametrize("layers", ["qkv", "q"])
def test_biases_that_autogptq_writes_are_read_past_where_they_are_zero(
    layers: str, number: float, tmp_path: Path
) -> None:
    dense, folder = tmp_path / "dense", tmp_path / "gptq"
    random_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(dense)
    make, settings = CHECKPOINTS["gptq"]
    quantised.quantise(folder, dense, make, settings)
    tensors = load_file(folder / "model.safetensors")
    for layer in layers:
        name = f"model.layers.0.self_attn.{layer}_proj.bias"
        tensors[name] = torch.zeros(tensors[name.replace("bias", "scales")].shape[1], dtype=torch.float16)
    tensors["model.layers.0.self_attn.q_proj.bias"][-1] = number
    save_file(tensors, folder / "model.safetensors")
    source = resolve(str(folder), environ={})
    if number != 0.0:
        with pytest.raises(StartupError, match=r"q_proj\.bias' is not one of a 1-layer LlamaForCausalLM"):
            load(source, device=CPU, dtype=torch.float32)
        return
    judge = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    decoder = load(source, device=CPU, dtype=torch.float32)
    assert distance(Driver(decoder, 24).logits(list(range(9)), [6, 1]), judged(judge, list(range(9)))) < 1e-4


@pytest.mark.parametrize(
    ("scale", "problem"),
    [
        (None, "is missing, which .*q_proj.weight needs: activation_scheme is static"),
        (torch.tensor([0.1, 0.1]), r"has shape \[2\], must be one number"),
        (torch.tensor(0.0), "is 0, must be above 0"),
        (torch.tensor(torch.nan), "is nan, must be above 0"),
    ],
)
def test_a_static_scale_that_is_no_scale_is_refused(scale: Tensor | None, problem: str, tmp_path: Path) -> None:
    random_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    make, settings = CHECKPOINTS["fp8 static"]
    quantised.quantise(tmp_path / "fp8", tmp_path / "dense", make, settings)
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.input_scale"
    assert tensors.pop(name) == torch.tensor(0.03)
    save_file(tensors if scale is None else {**tensors, name: scale}, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(StartupError, match=rf"q_proj\.input_scale {problem}"):
        load(resolve(str(tmp_path / "fp8"), environ={}), device=CPU, dtype=torch.float32)


def test_scales_of_inputs_are_those_of_static_checkpoints_alone(tmp_path: Path) -> None:
    random_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    make, settings = CHECKPOINTS["fp8 static"]
    quantised.quantise(tmp_path / "fp8", tmp_path / "dense", make, settings)
    for scheme, wanted in (("static", torch.tensor([0.03])), ("dynamic", None)):
        values = json.loads((tmp_path / "fp8" / "config.json").read_text())
        values["quantization_config"]["activation_scheme"] = scheme
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(values))
        found = resolve(str(tmp_path / "fp8"), environ={}).open_weights().get("model.layers.0.mlp.down_proj.weight")
        assert isinstance(found, FloatTensor)
        assert found.input_scale == wanted


@pytest.mark.parametrize(
    ("listed", "module", "skipped"),
    [
        (["lm_head"], "model.layers.0.mlp.gate_proj", False),
        (["gate"], "model.layers.0.mlp.gate_proj", False),
        (["mlp.gate"], "model.layers.0.mlp.gate", True),
        (["model.layers.1"], "model.layers.11.mlp.up_proj", False),
        (["model.layers.1"], "model.layers.1.mlp.up_proj", True),
        (["layers.1.self_attn"], "model.layers.1.self_attn.q_proj", True),
        (["up_proj", "down_proj"], "model.layers.1.mlp.down_proj", True),
        (None, "model.layers.1.mlp.down_proj", False),
    ],
)
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_modules_are_left_plain_by_whole_parts_of_their_names(
    key: str, listed: list[str] | None, module: str, skipped: bool, tmp_path: Path
) -> None:
    values = {"quantization_config": {**FP8, key: listed}}
    found = read(tmp_path, values)
    assert found is not None
    assert found.skips(module) == skipped


SETTINGS: dict[str, tuple[dict[str, object], str]] = {
    "no method": ({"bits": 4}, "quant_method is missing"),
    "another method": ({"quant_method": "bitsandbytes"}, "supported are awq, gptq, fp8"),
    "compressed tensors": ({"quant_method": "compressed-tensors"}, "supported are awq, gptq, fp8"),
    "awq of 3 bits": (AWQ | {"bits": 3}, "only 4"),
    "awq bits of text": (AWQ | {"bits": "4"}, "must be an integer"),
    "awq gemv": (AWQ | {"version": "gemv"}, "only gemm"),
    "awq without zeros": (AWQ | {"zero_point": False}, "only true"),
    "odd group": (AWQ | {"group_size": 48}, "must be -1 or one of 32, 64"),
    "group 0": (GPTQ | {"group_size": 0}, "must be -1 or one of 32, 64"),
    "gptq of 3 bits": (GPTQ | {"bits": 3}, "only 4 and 8"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "only gptq and gptq_v2"),
    "layers of their own": (GPTQ | {"dynamic": {"-:x": {}}}, "not supported"),
    "blocks": (FP8 | {"weight_block_size": [128, 128]}, "blocks are not supported"),
    "modules that are no list": (AWQ | {"modules_to_not_convert": "lm_head"}, "must be a list"),
    "scheme": (FP8 | {"activation_scheme": "token"}, "only dynamic and static"),
    "not an object": ([], "must be an object"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_not_supported_are_one_clear_line(name: str, tmp_path: Path) -> None:
    settings, problem = SETTINGS[name]
    random_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": settings}))
    with pytest.raises(StartupError, match=problem) as failure:
        resolve(str(tmp_path), environ={})
    assert "\n" not in str(failure.value)


def replaced(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(part))
        tensors[name] = change(tensors[name]).contiguous()

    return damage


def removed(part: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if name.endswith(part))]

    return damage


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "awq qweight cut": ("awq", replaced("q_proj.qweight", lambda t: t[:32]), "has shape"),
    "awq qweight flat": ("awq", replaced("q_proj.qweight", lambda t: t.view(-1)), "must be a matrix"),
    "awq qweight in part of a group": ("awq", replaced("q_proj.qweight", lambda t: t[:40]), "not whole groups of 32"),
    "awq qzeros cut": ("awq", replaced("qzeros", lambda t: t[:1]), "qzeros has shape .* needs"),
    "awq scales turned": ("awq", replaced("scales", lambda t: t.t()), "scales has shape .* needs"),
    "awq no scales": ("awq", removed("scales"), "scales is missing"),
    "awq no zeros": ("awq", removed("qzeros"), "qzeros is missing"),
    "awq scales of another type": ("awq", replaced("scales", lambda t: t.int()), "type I32"),
    "awq qweight of another type": ("awq", replaced("qweight", lambda t: t.float()), "type F32"),
    "awq NaN": ("awq", replaced("scales", lambda t: t * torch.nan), "NaN"),
    "gptq g_idx cut": ("gptq", replaced("g_idx", lambda t: t[:8]), "g_idx has shape"),
    "gptq g_idx uneven": ("gptq", replaced("g_idx", torch.zeros_like), "must name each of . groups 32 times"),
    "gptq g_idx negative": ("gptq", replaced("g_idx", lambda t: t - 1), "must name each of"),
    "fp8 scale of another length": ("fp8 row", replaced("weight_scale", lambda t: t[:5]), "one number or one a row"),
    "fp8 scale a matrix": ("fp8 row", replaced("weight_scale", lambda t: t.view(2, -1)), "one number or one a row"),
    "fp8 NaN": ("fp8 tensor", replaced("weight_scale", lambda t: t * torch.nan), "NaN"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tensors_are_one_clear_line(name: str, tmp_path: Path) -> None:
    kind, damage, problem = DAMAGES[name]
    make, settings = CHECKPOINTS[kind]
    random_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    quantised.quantise(tmp_path / "bad", tmp_path / "dense", make, settings)
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(StartupError, match=problem) as failure:
        load(resolve(str(tmp_path / "bad"), environ={}), device=CPU, dtype=torch.float32)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_may_lie_beside_config_json(name: str, tmp_path: Path) -> None:
    random_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path)
    old = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    settings = {"bits": 4, "group_size": 64} if name == "quantize_config.json" else old
    (tmp_path / name).write_text(json.dumps(settings))
    found = resolve(str(tmp_path), environ={}).quantization
    method = Method.GPTQ if name == "quantize_config.json" else Method.AWQ
    of_gptq = method is Method.GPTQ
    assert found == Quantization(method, 4, 64, zero_shift=1 if of_gptq else 0, symmetric=of_gptq)


FOUND = Quantization(Method.AWQ, 4, 128)
CHOICES: list[tuple[str, Quantization | None, Quantization | str | None]] = [
    ("auto", FOUND, FOUND),
    ("auto", None, None),
    ("none", None, None),
    ("awq", FOUND, FOUND),
    ("awq_marlin", FOUND, FOUND),
    ("gptq", FOUND, "quantised by awq"),
    ("gptq_marlin", FOUND, "quantised by awq"),
    ("fp8", FOUND, "quantised by awq"),
    ("none", FOUND, "quantised by awq"),
    ("awq", None, "is not quantised"),
    ("fp8", None, Quantization(Method.FP8, online=True)),
    ("compressed-tensors", None, "not supported"),
    ("compressed-tensors", FOUND, "not supported"),
]


@pytest.mark.parametrize(("flag", "found", "wanted"), CHOICES)
def test_the_flag_must_agree_with_the_files(
    flag: str, found: Quantization | None, wanted: Quantization | str | None
) -> None:
    if isinstance(wanted, str):
        with pytest.raises(StartupError, match=wanted):
            choose(flag, found, "model")
    else:
        assert choose(flag, found, "model") == wanted


def test_a_gguf_file_has_its_own_formats() -> None:
    assert choose("auto", None, "model", gguf=True) is None
    for flag in ("awq", "fp8"):
        with pytest.raises(StartupError, match="GGUF"):
            choose(flag, None, "model", gguf=True)
