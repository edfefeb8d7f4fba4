"""Quantised checkpoints made here, by the published formulas and without the code that reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "mixtral", "phi3", "gemma2", "gemma3", "opt")
"""GPT-2 keeps its weights turned: no tool writes such checkpoints of it."""

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def words(q: Tensor, bits: int, places: tuple[int, ...]) -> Tensor:
    """Integers [R, C] -> int32 [R, C * bits / 32]; places: which of a word's columns lies where, lowest bits first."""
    per_word = 32 // bits
    rows, columns = q.shape
    packed = torch.zeros(rows, columns // per_word, dtype=torch.int64)
    for part, place in enumerate(places):
        packed |= q[:, place::per_word].to(torch.int64) << (bits * part)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def awq_tensors(outputs: int, inputs: int, group: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a matrix as AutoAWQ's gemm layout has them, and the numbers they stand for, float64 [N, K]."""
    q = torch.randint(0, 16, (inputs, outputs), generator=generator)
    z = torch.randint(0, 16, (inputs // group, outputs), generator=generator)
    scales = (torch.rand(inputs // group, outputs, generator=generator) * 0.02 + 0.005).to(torch.float16)
    numbers = (q - z.repeat_interleave(group, 0)).double() * scales.double().repeat_interleave(group, 0)
    parts = {"qweight": words(q, 4, AWQ_PLACES), "qzeros": words(z, 4, AWQ_PLACES), "scales": scales}
    return parts, numbers.T


def gptq_tensors(
    outputs: int,
    inputs: int,
    group: int,
    generator: torch.Generator,
    bits: int,
    *,
    ordered: bool,
    sym: bool,
    shift: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """The same as AutoGPTQ has them.  ordered: g_idx sorted (no act-order).  shift: what packed zeros lack."""
    groups = inputs // group
    index = torch.arange(inputs) // group
    if not ordered:
        index = index[torch.randperm(inputs, generator=generator)]
    q = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    z = torch.randint(shift, 2**bits, (groups, outputs), generator=generator)
    if sym:
        z = torch.full_like(z, 2 ** (bits - 1))
    scales = (torch.rand(groups, outputs, generator=generator) * 0.3 / 2**bits + 0.001).to(torch.float16)
    numbers = scales.double()[index] * (q - z[index]).double()
    natural = tuple(range(32 // bits))
    parts = {
        "qweight": words(q.T.contiguous(), bits, natural).T.contiguous(),
        "qzeros": words(z - shift, bits, natural),
        "scales": scales,
        "g_idx": index.to(torch.int32),
    }
    return parts, numbers.T


def fp8_tensors(
    outputs: int, inputs: int, by_row: bool, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    data = torch.randn(outputs, inputs, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(outputs, 1, generator=generator) * 0.1 + 0.02 if by_row else torch.tensor(0.07)
    return {"weight": data, "weight_scale": scale}, data.double() * scale.double()


def static_fp8_tensors(outputs: int, inputs: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    parts, numbers = fp8_tensors(outputs, inputs, False, generator)
    return {**parts, "input_scale": torch.tensor(0.03)}, numbers


def quantise(folder: Path, dense: Path, make: Any, settings: dict[str, object]) -> None:
    """Write the model of the folder dense to folder with its layers' matrices replaced by what make draws.

    dense gets the same numbers written out, so that the two are one model.  What the settings' modules_to_not_convert
    name stays as it is.
    """
    left = settings.get("modules_to_not_convert", ())
    assert isinstance(left, list | tuple)
    generator = torch.Generator().manual_seed(7)
    folder.mkdir()
    plain = load_file(dense / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name, tensor in list(plain.items()):
        # Routers are small and stay as they are, and so does what has no whole groups.
        router = name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight"))
        router = router or any(part in name for part in left)
        if tensor.dim() == 2 and ".layers." in name and not router and tensor.shape[1] % 32 == 0:
            parts, numbers = make(*tensor.shape, generator)
            packed.update({name.removesuffix("weight") + part: value for part, value in parts.items()})
            plain[name] = numbers.to(torch.float32).contiguous()
        else:
            packed[name] = tensor
    save_file(packed, folder / "model.safetensors")
    save_file(plain, dense / "model.safetensors", {"format": "pt"})
    values = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": settings}))


def pair(model: Path, checkpoint: str, folder: Path) -> tuple[PreTrainedModel, Path]:
    """A model's folder -> transformers' model with the numbers of a checkpoint written out, and the checkpoint."""
    shutil.copytree(model, folder / "dense")
    make, settings = CHECKPOINTS[checkpoint]
    quantise(folder / "packed", folder / "dense", make, settings)
    judge = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32, attn_implementation="eager")
    return judge, folder / "packed"


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC_FP8 = {"quant_method": "fp8", "activation_scheme": "static"}


def gptq(bits: int = 4, *, ordered: bool = True, sym: bool = False, shift: int = 1, group: int = 32) -> Any:
    return lambda n, k, g: gptq_tensors(n, k, group, g, bits, ordered=ordered, sym=sym, shift=shift)


def awq(group: int = 32) -> Any:
    return lambda n, k, g: awq_tensors(n, k, group, g)


CHECKPOINTS: dict[str, tuple[Any, dict[str, object]]] = {
    "awq": (awq(), AWQ),
    "awq group 64": (awq(64), AWQ | {"group_size": 64}),
    "gptq": (gptq(), GPTQ),
    "gptq sym": (gptq(sym=True), GPTQ | {"sym": True}),
    "gptq act-order": (gptq(ordered=False), GPTQ | {"desc_act": True}),
    "gptq v2": (gptq(shift=0), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq 8": (gptq(8), GPTQ | {"bits": 8}),
    "gptq 8 sym act-order": (gptq(8, sym=True, ordered=False), GPTQ | {"bits": 8, "sym": True, "desc_act": True}),
    "fp8 tensor": (lambda n, k, g: fp8_tensors(n, k, False, g), FP8),
    "fp8 row": (lambda n, k, g: fp8_tensors(n, k, True, g), FP8),
    "fp8 static": (static_fp8_tensors, STATIC_FP8),
}
"""name -> (what draws a matrix, the quantization_config)."""
