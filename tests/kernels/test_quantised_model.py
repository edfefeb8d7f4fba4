"""Whole quantised models in the form for a GPU, interpreted where there is none, against the dense model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from default_model import default_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.model import quantised
from tests.model.driving import Driver, MemoryWeights, config_of, distance, judged, random_model, weights_of
from vserve.kernels.grouped import MOST_ROWS
from vserve.model.families import gguf_of
from vserve.model.gguf import TensorInfo
from vserve.model.gpu_decoder import GpuDecoder
from vserve.model.kinds import LAYOUTS, Kind
from vserve.model.loader import load_weights
from vserve.model.source import resolve
from vserve.model.weights import StoredTensor
from vserve.sizing import COUNTERS_BYTES, WRITTEN_ROWS, GgufTensors, Quantisation, weight_bytes

LIMITS = {torch.bfloat16: 6e-2, torch.float16: 8e-3} if torch.cuda.is_available() else {torch.float32: 1e-4}
"""About twice what the dense model itself is off by in such numbers.  The interpreter multiplies no bf16 matrices."""


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", quantised.CHECKPOINTS)
def test_logits_are_those_of_the_dense_model(
    name: str, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    random_model(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    make, settings = quantised.CHECKPOINTS[name]
    quantised.quantise(tmp_path / "packed", tmp_path / "dense", make, settings)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ids = torch.randint(0, 97, (9,), generator=torch.Generator().manual_seed(2)).tolist()
    source = resolve(str(tmp_path / "packed"), environ={})
    decoder = load_weights(source.open_weights(), source.config, device=device, dtype=dtype, for_gpu=True)
    assert isinstance(decoder, GpuDecoder)
    assert decoder._fused is not None or name == "gptq act-order"
    # Several rows at once and single ones: both kernels.
    assert distance(Driver(decoder, 24).logits(ids, [6, 1]), judged(judge, ids)) < LIMITS[dtype]


@pytest.mark.parametrize("name", ["awq", "gptq sym", "gptq act-order", "fp8 row"])
def test_mixtures_of_packed_experts_are_the_dense_ones_and_take_what_is_planned(
    name: str, device: torch.device, tmp_path: Path
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(3)
    config = MixtralConfig(**shape, **heads, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.15)
    MixtralForCausalLM(config).eval().save_pretrained(tmp_path / "dense")
    make, settings = quantised.CHECKPOINTS[name]
    quantised.quantise(tmp_path / "packed", tmp_path / "dense", make, settings)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ids = torch.randint(0, 97, (9,), generator=torch.Generator().manual_seed(2)).tolist()
    source = resolve(str(tmp_path / "packed"), environ={})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder = load_weights(source.open_weights(), source.config, device=device, dtype=dtype, for_gpu=True)
    assert isinstance(decoder, GpuDecoder)
    assert distance(Driver(decoder, 24).logits(ids, [6, 1]), judged(judge, ids)) < LIMITS[dtype]
    assert source.quantization is not None
    planned = weight_bytes(source.config, dtype.itemsize, Quantisation.of(source.quantization))
    # Queries, keys and values whose inputs lie in orders of their own are three layers with counters of their own.
    counters = 2 * 2 * COUNTERS_BYTES if "act-order" in name else 0
    assert held_bytes(decoder) == pytest.approx(planned, rel=0.005, abs=counters)


SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": True}


def storages(held: object) -> dict[int, int]:
    """Where the tensors that an object holds lie, and their bytes; what several share counts once."""
    if isinstance(held, torch.Tensor):
        return {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes()}
    if isinstance(held, tuple | list):
        parts: Iterable[object] = held
    elif type(held).__module__.startswith("vserve.model"):
        slots = [name for base in type(held).__mro__ for name in getattr(base, "__slots__", ())]
        parts = [*vars(held).values()] if hasattr(held, "__dict__") else [getattr(held, name) for name in slots]
    else:
        return {}
    return {place: size for part in parts for place, size in storages(part).items()}


def held_bytes(decoder: GpuDecoder) -> int:
    return sum(storages([decoder._embedding, decoder._blocks, decoder._norm, decoder._head]).values())


@pytest.mark.parametrize("name", quantised.CHECKPOINTS)
def test_packed_weights_take_what_is_planned(name: str, device: torch.device, tmp_path: Path) -> None:
    random_model(**SHAPE).save_pretrained(tmp_path / "dense")
    make, settings = quantised.CHECKPOINTS[name]
    quantised.quantise(tmp_path / "packed", tmp_path / "dense", make, settings)
    source = resolve(str(tmp_path / "packed"), environ={})
    assert source.quantization is not None
    decoder = load_weights(source.open_weights(), source.config, device=device, dtype=torch.bfloat16, for_gpu=True)
    assert isinstance(decoder, GpuDecoder)
    planned = weight_bytes(source.config, 2, Quantisation.of(source.quantization))
    # Layers whose inputs lie in orders of their own are packed one by one: a few counters more.
    assert held_bytes(decoder) == pytest.approx(planned, rel=0.2 if "act-order" in name else 0.002)


def test_online_fp8_takes_what_is_planned(device: torch.device, tmp_path: Path) -> None:
    random_model(**SHAPE).save_pretrained(tmp_path)
    source = resolve(str(tmp_path), environ={})
    decoder = load_weights(
        source.open_weights(), source.config, device=device, dtype=torch.bfloat16, for_gpu=True, make_fp8=True
    )
    assert isinstance(decoder, GpuDecoder)
    fp8 = Quantisation("fp8", 8, is_float=True)
    assert held_bytes(decoder) == pytest.approx(weight_bytes(source.config, 2, fp8), rel=0.002)


def test_the_blocks_of_the_default_model_take_what_is_planned(device: torch.device) -> None:
    source = default_model()
    assert source.gguf is not None
    decoder = load_weights(source.open_weights(), source.config, device=device, dtype=torch.bfloat16, for_gpu=True)
    assert isinstance(decoder, GpuDecoder)
    planned = weight_bytes(source.config, 2, GgufTensors(source.gguf.tensors))
    assert held_bytes(decoder) == pytest.approx(planned, rel=0.002)


LEFT = ["model.layers.1.self_attn", "mlp.down_proj"]


@pytest.mark.parametrize("name", ["awq", "fp8 row"])
def test_modules_left_plain_take_what_is_planned(name: str, device: torch.device, tmp_path: Path) -> None:
    random_model(**SHAPE).save_pretrained(tmp_path / "dense")
    make, settings = quantised.CHECKPOINTS[name]
    quantised.quantise(tmp_path / "packed", tmp_path / "dense", make, settings | {"modules_to_not_convert": LEFT})
    source = resolve(str(tmp_path / "packed"), environ={})
    assert source.quantization is not None
    decoder = load_weights(source.open_weights(), source.config, device=device, dtype=torch.bfloat16, for_gpu=True)
    assert isinstance(decoder, GpuDecoder)
    planned = weight_bytes(source.config, 2, Quantisation.of(source.quantization))
    assert held_bytes(decoder) == pytest.approx(planned, rel=0.002)


@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_float32_take_what_is_planned(tied: bool, device: torch.device) -> None:
    model = random_model(**SHAPE | {"tie_word_embeddings": tied})
    config = config_of(model)
    decoder = load_weights(weights_of(model), config, device=device, dtype=torch.bfloat16, for_gpu=True)
    assert isinstance(decoder, GpuDecoder)
    assert held_bytes(decoder) == weight_bytes(config, 2)


MIXED = {
    # Groups of 32 and of 16; bytes beside half bytes; one plain among packed ones; all alike.
    "attn_q": (Kind.Q4_K, Kind.Q4_0),
    "attn_k": (Kind.Q4_K, Kind.Q4_0),
    "attn_v": (Kind.Q6_K, Kind.F16),
    "attn_output": (Kind.Q5_1, Kind.Q5_0),
    "ffn_gate": (Kind.Q4_0, Kind.Q4_0),
    "ffn_up": (Kind.Q8_0, Kind.Q4_0),
    "ffn_down": (Kind.Q6_K, Kind.F32),
}
"""GGUF name -> its kind in the first layer and in the second."""


class Blocks(MemoryWeights):
    """The tensors of a model, those of kinds as blocks of zeros."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], kinds: Mapping[str, Kind]) -> None:
        super().__init__(tensors)
        self.kinds = kinds

    def get(self, name: str) -> StoredTensor:
        kind, plain = self.kinds.get(name), super().get(name)
        if kind is None or LAYOUTS[kind].block_size == 1:
            return plain
        layout = LAYOUTS[kind]
        raw = torch.zeros(plain.data.numel() // layout.block_size * layout.block_bytes, dtype=torch.uint8)
        return StoredTensor(name, kind, plain.shape, raw)


def test_layers_of_several_gguf_formats_take_what_is_planned(device: torch.device) -> None:
    model = random_model(**SHAPE)
    config, plain = config_of(model), weights_of(model)
    modules = gguf_of(config.architecture).tensors
    kinds, infos = {}, {}
    for layer in range(2):
        for name, of_layers in MIXED.items():
            stored = f"model.layers.{layer}.{modules[name]}.weight"
            kinds[stored] = of_layers[layer]
            full = f"blk.{layer}.{name}.weight"
            infos[full] = TensorInfo(full, of_layers[layer], tuple(plain.tensors[stored].shape), 0, 0)
    for name, tensor in plain.tensors.items():
        if name not in kinds:
            infos[name] = TensorInfo(name, Kind.F32, tuple(tensor.shape), 0, 0)
    weights = Blocks(plain.tensors, kinds)
    decoder = load_weights(weights, config, device=device, dtype=torch.bfloat16, for_gpu=True)
    assert isinstance(decoder, GpuDecoder)
    assert held_bytes(decoder) == weight_bytes(config, 2, GgufTensors(infos))


def test_plans_know_from_how_many_rows_weights_are_written_out() -> None:
    assert WRITTEN_ROWS == MOST_ROWS
