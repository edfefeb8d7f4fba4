"""What vserve plan says of a GPU's memory against what a start with the same flags takes.  `-s` prints both."""

from __future__ import annotations

import gc
import io
from pathlib import Path

import pytest
import torch

from vserve.assemble import assemble
from vserve.config import Config
from vserve.engine.inbox import Inbox
from vserve.engine.request import GenRequest, RequestId, SamplingParams
from vserve.model.memory import gib
from vserve.model.outline import outline
from vserve.observe.progress import Reporter
from vserve.plan import Wanted, answered

MODELS = Path(__file__).resolve().parent.parent.parent / "bench" / "models"
CLOSE = 0.05


@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("name", ["llama-1b", "llama-8b"])
def test_a_start_takes_what_was_planned_for_it(name: str, tokens: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = Config(model=str(MODELS / name), load_format="dummy", max_num_batched_tokens=tokens)
    total = torch.cuda.mem_get_info()[1]
    found = outline(str(MODELS / name), environ={})
    planned = answered(found, config, Wanted(total, 1024, 256, None), None).plan
    assert planned is not None
    engine = assemble(
        config, Inbox(1024), lambda emits, stats: None, lambda error: None, Reporter(io.StringIO(), print)
    )
    scheduler, runner = engine.loop._scheduler, engine.loop._runner
    # As many prompts as fill the largest step, drawn from too.
    for number in range(256):
        prompt = [(number * 7 + at) % 32000 for at in range(tokens // 64)]
        scheduler.add(GenRequest(RequestId(number), prompt, 4, SamplingParams(temperature=1.0, seed=number)), 0.0)
    while (plan := scheduler.plan(0.0)) is not None:
        scheduler.commit(plan, runner.launch(plan).wait(), 0.0)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    tensors = torch.cuda.max_memory_allocated() - before
    cache = engine.plan.num_blocks * engine.plan.block_bytes
    for line in (*planned.lines(), *engine.memory):
        print(line)
    print(f"planned {gib(planned.planned)}, taken {gib(total - free)}, tensors at most {gib(tensors)}")
    assert tensors - cache - planned.weights <= planned.reserve.step + planned.reserve.graph
    assert planned.weights == pytest.approx(tensors - cache, rel=0.25)  # the rest are steps and graphs
    assert engine.plan.num_blocks == pytest.approx(planned.cache.num_blocks, rel=CLOSE)
    assert total - free == pytest.approx(planned.planned, rel=CLOSE)
