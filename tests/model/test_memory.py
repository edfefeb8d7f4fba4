"""The arithmetic of the KV cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vserve.errors import StartupError
from vserve.model.config import Architecture, Experts, ModelConfig
from vserve.model.memory import GIB, CacheForm, host_budget, host_memory, plan_cache, step_bytes, token_bytes

CONFIG = ModelConfig(
    architecture=Architecture.LLAMA,
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    max_position=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
)
FLOAT = CacheForm.of("auto", "float32")


@pytest.mark.parametrize(
    ("asked", "activations", "dtype", "head"),
    [
        ("auto", "float32", "float32", 64 * 4),
        ("auto", "bfloat16", "bfloat16", 64 * 2),
        ("float16", "float32", "float16", 64 * 2),
        ("float32", "bfloat16", "float32", 64 * 4),
        ("fp8", "bfloat16", "fp8_e4m3", 64 + 2),
        ("fp8_e4m3", "float32", "fp8_e4m3", 64 + 2),
    ],
)
def test_a_token_takes_two_rows_a_layer_and_fp8_a_scale_for_each_head(
    asked: str, activations: str, dtype: str, head: int
) -> None:
    form = CacheForm.of(asked, activations)
    assert form.dtype == dtype
    assert token_bytes(CONFIG, form) == 2 * 30 * 3 * head
    plan = plan_cache(CONFIG, budget_bytes=GIB, form=form, block_size=8, max_model_len=None)
    assert plan.num_blocks == GIB // (8 * 2 * 30 * 3 * head)
    assert dtype in plan.explain()


@pytest.mark.parametrize(
    ("budget", "asked", "blocks", "longest"),
    [(GIB, None, 1456, 8192), (GIB, 512, 1456, 512), (100 * 2**20, None, 142, 2272), (100 * 2**20, 2272, 142, 2272)],
)
def test_the_budget_becomes_blocks_and_a_longest_sequence_that_fits_them(
    budget: int, asked: int | None, blocks: int, longest: int
) -> None:
    plan = plan_cache(CONFIG, budget_bytes=budget, form=FLOAT, block_size=16, max_model_len=asked)
    assert (plan.num_blocks, plan.max_model_len) == (blocks, longest)
    assert plan.max_model_len <= plan.tokens
    assert plan.num_blocks * plan.block_bytes <= budget
    assert str(blocks) in plan.explain()


@pytest.mark.parametrize(
    ("budget", "asked", "named"),
    [(GIB, 8193, "8193"), (100 * 2**20, 8192, "--kv-cache-memory-bytes"), (1000, None, "--kv-cache-memory-bytes")],
)
def test_what_does_not_fit_is_said_with_the_numbers_and_the_flag(budget: int, asked: int | None, named: str) -> None:
    with pytest.raises(StartupError, match=named):
        plan_cache(CONFIG, budget_bytes=budget, form=FLOAT, block_size=16, max_model_len=asked)


@pytest.mark.parametrize(
    ("limit", "used", "available"), [("max", "5", 8 * GIB), (str(2 * GIB), str(GIB), GIB), (None, None, 8 * GIB)]
)
def test_the_control_group_counts(tmp_path: Path, limit: str | None, used: str | None, available: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * 2**20} kB\n")
    if limit is not None and used is not None:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit + "\n")
        (tmp_path / "sys/fs/cgroup/memory.current").write_text(used + "\n")
    assert host_memory(tmp_path) == available


def test_a_host_gives_a_quarter_and_at_most_4_gib() -> None:
    assert host_budget(8 * GIB) == 2 * GIB
    assert host_budget(100 * GIB) == 4 * GIB


def test_a_step_takes_its_widest_layer_and_its_logits() -> None:
    small = step_bytes(CONFIG, tokens=16, draws=1, element_bytes=2)
    assert small == 16 * (3 * 1536 + 2 * 15 * 64 + 4 * 576) * 2 + 49152 * 6
    assert step_bytes(CONFIG, tokens=16, draws=2, element_bytes=2) == small + 49152 * 6


def test_what_a_step_takes_counts_the_experts_of_each_token_and_capped_logits() -> None:
    plain = step_bytes(CONFIG, tokens=16, draws=2, element_bytes=2)
    experts = Experts(count=64, active=4, intermediate_size=300, normalised=True)
    mixture = step_bytes(replace(CONFIG, experts=experts), tokens=16, draws=2, element_bytes=2)
    assert mixture - plain == 16 * (4 * (300 * 2 + 576 * 4) + 64 * 10)
    capped = step_bytes(replace(CONFIG, logit_softcap=30.0), tokens=16, draws=2, element_bytes=2)
    assert capped - plain == 2 * 49152 * 4


def test_a_window_leaves_the_plan_of_the_cache_as_it_is() -> None:
    assert token_bytes(replace(CONFIG, windows=(64,) * 30), FLOAT) == token_bytes(CONFIG, FLOAT)
