"""Checkpoints that are broken, hostile or of another model: one line that says what, before much memory is taken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.driving import CPU
from tests.model.families import ARCHITECTURES, CASES, config_json, make, saved
from vserve.errors import StartupError
from vserve.model.config import Architecture, ModelConfig
from vserve.model.loader import load
from vserve.model.source import resolve

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = list(ARCHITECTURES.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a test may change what transformers saved."""
    return tmp_path / "model"


def copy(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The case's files in folder; returns its tensors."""
    shutil.copytree(saved(name)[1], folder)
    return load_file(folder / "model.safetensors")


def error_of(folder: Path, **options: Any) -> str:
    with pytest.raises(StartupError) as caught:
        load(resolve(str(folder), environ={}), device=CPU, dtype=torch.float32, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_needed_and_no_other_is_taken(name: str, folder: Path) -> None:
    tensors = copy(name, folder)
    for victim in list(tensors)[:: max(1, len(tensors) // 7)]:
        save_file({key: value for key, value in tensors.items() if key != victim}, folder / "model.safetensors")
        assert f"tensor {victim} is missing" in error_of(folder)
        save_file(tensors | {victim: tensors[victim][..., 1:].clone()}, folder / "model.safetensors")
        assert f"tensor {victim} has shape" in error_of(folder)
    save_file(tensors | {"adapter.weight": torch.zeros(3)}, folder / "model.safetensors")
    assert "adapter.weight' is not one of" in error_of(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_that_are_not_finite_are_refused_unless_allowed(name: str, folder: Path) -> None:
    tensors = copy(name, folder)
    for place, victim in enumerate(list(tensors)[:: max(1, len(tensors) // 9)]):
        spoilt = tensors[victim].clone()
        spoilt.view(-1)[-1] = (torch.nan, torch.inf, -torch.inf)[place % 3]
        save_file(tensors | {victim: spoilt}, folder / "model.safetensors")
        assert f"tensor {victim} holds NaN or infinite numbers" in error_of(folder)
        load(resolve(str(folder), environ={}), device=CPU, dtype=torch.float32, allow_nan=True)


def test_numbers_past_the_range_of_float16_are_refused_in_it_and_large_ones_are_not(folder: Path) -> None:
    tensors = copy("llama", folder)
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[7] = 1e5
    save_file(tensors, folder / "model.safetensors")
    source = resolve(str(folder), environ={})
    load(source, device=CPU, dtype=torch.bfloat16)
    with pytest.raises(StartupError, match=r"up_proj.weight has numbers too large for torch.float16; try --dtype bf"):
        load(source, device=CPU, dtype=torch.float16)
    # Sums that overflow are looked at again: each number is finite.
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors")
    load(resolve(str(folder), environ={}), device=CPU, dtype=torch.float32)


def test_checkpoints_saved_without_their_prefix_load(folder: Path) -> None:
    tensors = copy("gpt2", folder)
    save_file({key.removeprefix("transformer."): value for key, value in tensors.items()}, folder / "model.safetensors")
    load(resolve(str(folder), environ={}), device=CPU, dtype=torch.float32)


def test_old_checkpoints_masks_are_passed_over(folder: Path) -> None:
    tensors = copy("gpt2", folder)
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(4)}
    save_file(tensors | masks, folder / "model.safetensors")
    load(resolve(str(folder), environ={}), device=CPU, dtype=torch.float32)


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    make(CASES["qwen3-moe"]).save_pretrained(folder, max_shard_size="100kB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    load(resolve(str(folder), environ={}), device=CPU, dtype=torch.float32)
    shards[1].unlink()
    with pytest.raises(StartupError, match=f"shard .{shards[1].name}. is missing"):
        resolve(str(folder), environ={})


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "window of text": ("mistral", {"sliding_window": "4096"}, "sliding_window"),
    "negative window": ("mistral", {"sliding_window": -1}, "sliding_window"),
    "layer types of another number": ("gemma2", {"layer_types": ["full_attention"]}, "one type for each of 4 layers"),
    "unknown layer type": ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "only full_attention and sliding"),
    "layer types of numbers": ("qwen2, upper layers windowed", {"layer_types": [1] * 4}, "must be a list of at most"),
    "more experts than there are": ("mixtral", {"num_experts_per_tok": 5}, "from 1 to 4"),
    "a million experts": ("mixtral", {"num_local_experts": 10**6}, "num_local_experts"),
    "no experts": ("qwen3-moe", {"num_local_experts": 0}, "num_local_experts"),
    "dense layers of text": ("qwen3-moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
    "factors of another number": (
        "phi3, long",
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
        "must be 12 factors",
    ),
    "an odd part of a head": (
        "phi3",
        {"rope_parameters": {"partial_rotary_factor": 0.3}},
        "must leave an even part",
    ),
    "partial rotary elsewhere": ("qwen2", {"partial_rotary_factor": 0.5}, "only 1.0 is supported"),
    "cap of nothing": ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
    "other activation": ("gemma2", {"hidden_activation": "silu"}, "only gelu_new, gelu_pytorch_tanh are supported"),
    "gates of gpt2": ("gpt2", {"activation_function": "swiglu"}, "activation_function"),
    "scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "only false is supported"),
    "norms without weights": ("opt", {"layer_norm_elementwise_affine": False}, "only true is supported"),
    "a rotation of windowed layers": (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}, "full_attention": {}}},
        "only default is supported for windowed",
    ),
    "both directions": ("gemma3", {"use_bidirectional_attention": True}, "only false is supported"),
}


@pytest.mark.parametrize(("name", "changes", "problem"), BAD.values(), ids=BAD)
def test_a_feature_that_is_not_there_is_refused_by_its_key(name: str, changes: dict[str, Any], problem: str) -> None:
    values = config_json(name) | changes
    with pytest.raises(StartupError) as caught:
        ModelConfig.from_json(values)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_told_what_is_supported() -> None:
    with pytest.raises(StartupError) as caught:
        ModelConfig.from_json({"architectures": ["MambaForCausalLM"]})
    for known in Architecture:
        assert known in str(caught.value)


def test_code_that_a_configuration_names_is_not_run_and_pickles_are_not_opened(folder: Path) -> None:
    copy("qwen2", folder)
    trap = folder / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(trap)!r}, 'w')\n")
    values = config_json("qwen2") | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load(resolve(str(folder), environ={}), device=CPU, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    assert "never loaded" in error_of(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"num_hidden_layers": 1000}, "model.layers.4.input_layernorm.weight is missing"),
        ({"vocab_size": 1 << 22, "hidden_size": 1 << 17}, "has shape"),
        ({"num_local_experts": 4096, "num_experts": 4096}, "mlp.gate.weight has shape [8, 96]"),
    ],
    ids=["unknown", "too many layers", "too large", "many experts"],
)
def test_the_command_ends_with_2_and_one_line(changes: dict[str, Any], problem: str, folder: Path) -> None:
    """Under a bound of memory that the files fit, and the model that config.json tells of does not."""
    copy("qwen3-moe", folder)
    values = config_json("qwen3-moe") | changes
    (folder / "config.json").write_text(json.dumps(values))
    bounded = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30)); "
    run = "from vserve.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", bounded + run, "serve", "--model", str(folder), "--port", "0", "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert problem in last
    assert "Traceback" not in done.stderr
