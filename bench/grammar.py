"""What structured output costs with the default model: compiling, masks, and a decode step with and without one.

    python bench/grammar.py [--record] [--steps 60]

One JSON line a source: seconds until it compiled (or was refused) and milliseconds a mask on random text.  One a batch
size: milliseconds of a decode step whose rows are all free, and whose rows all follow a grammar (the least of five
medians; the two take turns, so that a neighbour's burst of work spoils both).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

# In place of this folder: bench/http.py would hide the standard library's package from torch.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from vserve.model import cpu  # noqa: E402

os.environ.update(cpu.library_environment(os.environ, reduced_precision=False))  # as the server does, before torch

import torch  # noqa: E402

from bench import record  # noqa: E402
from vserve.engine.request import GenRequest, RequestId, SamplingParams  # noqa: E402
from vserve.engine.runner import Runner  # noqa: E402
from vserve.engine.scheduler import Limits, Scheduler  # noqa: E402
from vserve.errors import BadRequest  # noqa: E402
from vserve.model import loader, source  # noqa: E402
from vserve.text import gguf_vocab  # noqa: E402
from vserve.text.grammar import Grammar, Grammars  # noqa: E402
from vserve.text.grammar_spec import GrammarKind, GrammarSpec  # noqa: E402

BATCHES = (1, 4)
PROMPT = list(range(100, 132))


def json_schema(schema: object) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def wide(count: int) -> GrammarSpec:
    """An object of so many optional properties."""
    return json_schema({"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(count)}})


RULES = "\n".join(f'r{i}: "x" r{i + 1}' for i in range(20_000))
SOURCES = {
    "any object": GrammarSpec(GrammarKind.JSON_OBJECT, ""),
    "a person": json_schema(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
            "required": ["name", "age", "tags"],
        }
    ),
    "a pattern": GrammarSpec(GrammarKind.REGEX, r"(\w{1,12} ){3,40}\."),
    "300 properties": wide(300),
    "3000 properties": wide(3000),
    "multiples of a prime": json_schema({"multipleOf": 999983, "minimum": 0, "maximum": 10**15, "type": "integer"}),
    "nested repetition": GrammarSpec(GrammarKind.REGEX, "((((a{100}){100}){100}){100})"),
    "20000 rules": GrammarSpec(GrammarKind.LARK, f'start: r0\n{RULES}\nr20000: "z"'),
}  # fmt: skip


def masks_ms(grammar: Grammar, steps: int) -> list[float]:
    """Milliseconds of each mask of one random text."""
    matcher, ids, times = grammar.matcher(), list[int](), list[float]()
    draw = random.Random(1)
    for _ in range(steps):
        began = time.perf_counter()
        mask = matcher.mask(ids)
        times.append((time.perf_counter() - began) * 1e3)
        bits = int.from_bytes(mask, "little")
        place = draw.randrange(bits.bit_length())
        tail = bits >> place
        ids.append(place + (tail & -tail).bit_length() - 1)
        if ids[-1] <= 2:  # the end of the text
            ids.clear()
            matcher = grammar.matcher()
    return times


def step_ms(runner: Runner, grammar: Grammar | None, batch: int, steps: int) -> float:
    """Median milliseconds of a decode step of batch rows."""
    scheduler = Scheduler(Limits(512, 16, 32, 512, 512, prefix_caching=False))
    for number in range(batch):
        constraint = None if grammar is None else grammar.matcher()
        sampling = SamplingParams(temperature=0.8, seed=number)
        scheduler.add(GenRequest(RequestId(number), PROMPT, steps, sampling, constraint=constraint), 0.0)
    times = []
    while (plan := scheduler.plan(0.0)) is not None:
        began = time.perf_counter()
        scheduler.commit(plan, runner.launch(plan).wait(), 0.0)
        if plan.num_decodes == batch == len(plan.works):
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--record", action="store_true", help="append to bench/results/grammar.jsonl")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    found = source.resolve(None, environ=os.environ)
    assert found.gguf_metadata is not None
    tokenizer = gguf_vocab.build(found.gguf_metadata)
    began = time.perf_counter()
    grammars = Grammars(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)
    index_s = time.perf_counter() - began
    began = time.perf_counter()
    grammars.compile(GrammarSpec(GrammarKind.REGEX, "a"), "bench")
    numbers: dict[str, object] = {"what": "start", "index_s": index_s, "first_compile_s": time.perf_counter() - began}
    record.emit("grammar", {key: _short(value) for key, value in numbers.items()}, record=options.record)
    for name, spec in SOURCES.items():
        numbers = {"what": "source", "source": name}
        began = time.perf_counter()
        try:
            grammar = grammars.compile(spec, "bench")
            numbers["compile_s"] = time.perf_counter() - began
            times = masks_ms(grammar, 300)
            numbers |= {"mask_ms": statistics.fmean(times), "slowest_mask_ms": max(times)}
        except BadRequest as error:
            numbers |= {"refused_s": time.perf_counter() - began, "reason": error.message}
        record.emit("grammar", {key: _short(value) for key, value in numbers.items()}, record=options.record)
    decoder = loader.load(found, device=torch.device("cpu"), dtype=torch.float32)
    runner = Runner(decoder, decoder.new_cache(512, 16), max_num_seqs=32, max_model_len=512)
    grammar = grammars.compile(SOURCES["a pattern"], "bench")
    for batch in BATCHES:
        pairs = [
            (step_ms(runner, None, batch, options.steps), step_ms(runner, grammar, batch, options.steps))
            for _ in range(5)
        ]
        free, bound = (min(one) for one in zip(*pairs, strict=True))
        numbers = {"what": "step", "batch": batch, "free_ms": free, "constrained_ms": bound}
        record.emit("grammar", {key: _short(value) for key, value in numbers.items()}, record=options.record)
    grammars.close()


def _short(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
