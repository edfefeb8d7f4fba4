"""GGUF files of every family that has a GGUF form, against transformers on the same random weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from tests.model.driving import CPU, Driver, distance, judged
from tests.model.families import CASES, VOCAB, make
from tests.model.gguf_files import SETTINGS, model_of, write
from vserve.errors import StartupError
from vserve.model.families import FAMILIES
from vserve.model.loader import load
from vserve.model.source import resolve


def test_every_family_with_a_gguf_form_is_tested() -> None:
    assert {family.gguf.name for family in FAMILIES if family.gguf is not None} == set(SETTINGS)


@pytest.mark.oracle("gguf")
@pytest.mark.parametrize("name", SETTINGS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    write(tmp_path / "m.gguf", name, model)
    source = resolve(str(tmp_path / "m.gguf"), environ={})
    decoder = load(source, device=CPU, dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    assert distance(Driver(decoder, 8).logits(ids, [40, 30]), judged(model, ids)) < 1e-4


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    model = make(CASES["qwen3"])
    write(tmp_path / "m.gguf", "qwen3", model, leave_out="model.layers.2.self_attn.q_norm.weight")
    source = resolve(str(tmp_path / "m.gguf"), environ={})
    with pytest.raises(StartupError, match=r"model\.layers\.2\.self_attn\.q_norm\.weight is missing"):
        load(source, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("name", ["qwen3moe", "opt", "mamba"])
def test_a_family_without_a_gguf_form_is_refused_with_those_that_have_one(name: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", name)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(StartupError, match=rf"'{name}' is not supported; supported are llama, qwen2, qwen3, phi3"):
        resolve(str(tmp_path / "m.gguf"), environ={})
