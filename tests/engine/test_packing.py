"""The words of a GPU step, read back as the device reads them, against what the plans say."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest

from vserve.engine.packing import Packed, Packer, Words, fits
from vserve.engine.request import GenRequest, RequestId, SamplingParams
from vserve.engine.scheduler import Limits, Scheduler
from vserve.engine.sequence import Plan, Results, Sequence
from vserve.engine.shapes import Buckets, Layout

SIZE, ROWS = 4, 6


class Device:
    """Rows as the device keeps them, brought up to date by the words of each step alone."""

    def __init__(self, special: frozenset[int] = frozenset(), broken: frozenset[int] = frozenset()) -> None:
        self.buckets = Buckets(ROWS, 64)
        self.packer = Packer(max_num_seqs=ROWS, block_size=SIZE, on_enter=self.enter)
        self.tables = np.full((ROWS, 64), -1)
        self.owner: list[int | None] = [None] * ROWS
        self.prompts = [0] * ROWS
        self.special, self.broken = special, broken

    def enter(self, sequence: Sequence, row: int) -> bool:
        if sequence.id in self.broken:
            raise ValueError("no such parameter")
        self.owner[row] = sequence.id
        return sequence.id in self.special

    def step(self, plan: Plan) -> Packed:
        """Pack the plan, apply its words, and check every token, table and draw of it."""
        chunks = len(plan.works) - plan.num_decodes
        shape = self.buckets.choose(plan.num_decodes, chunks, plan.num_tokens)
        assert fits(plan, shape)
        layout = Layout(shape, SIZE)
        words: Words = np.full(layout.words, 77, np.int32)  # what an earlier step left there
        packed = self.packer.pack(plan, layout, words)
        fields = {name: words[span.slice] for name, span in layout.fields.items()}
        if shape.is_decode:
            self.check_decodes(plan, fields)
        else:
            self.check_mixed(plan, fields, packed)
        assert packed.draws == sum(work.samples for work in plan.works)
        return packed

    def check_decodes(self, plan: Plan, fields: dict[str, Words]) -> None:
        num = len(plan.works)
        assert fields["rows"].tolist()[num:] == [-1] * (len(fields["rows"]) - num)
        for place, (sequence, start, *_) in enumerate(plan.works):
            row, fresh = int(fields["rows"][place]), int(fields["fresh"][place])
            assert (row, int(fields["positions"][place])) == (sequence.row, start)
            if fresh >= 0:
                self.tables[row, start // SIZE] = fresh
            self.check_table(sequence, row, start + 1)

    def check_mixed(self, plan: Plan, fields: dict[str, Words], packed: Packed) -> None:
        updates = fields["updates"].reshape(-1, 3).tolist()
        for row, column, block in updates + ([] if packed.overflow is None else packed.overflow.tolist()):
            if row >= 0:
                self.tables[row, column] = block
        for entry in fields["entries"].reshape(-1, 8).tolist():
            if entry[0] >= 0:
                self.prompts[entry[0]] = entry[7]
        at, draws = 0, 0
        room = len(fields["sequence_rows"]) - len(fields["entries"]) // 8
        for place, (sequence, start, count, samples, _) in enumerate(plan.works):
            row, slot = sequence.row, place if place < plan.num_decodes else place - plan.num_decodes + room
            assert row is not None
            known = sequence.tokens[start : start + count]
            assert fields["token_ids"][at : at + count].tolist() == ([-1] if place < plan.num_decodes else known)
            assert fields["positions"][at : at + count].tolist() == list(range(start, start + count))
            assert set(fields["rows"][at : at + count].tolist()) == {row}
            assert (fields["sequence_rows"][slot], fields["lens"][slot]) == (row, start + count)
            if place >= plan.num_decodes:
                assert (fields["starts"][slot], fields["starts"][slot + 1]) == (at, at + count)
            at += count
            if samples:
                assert (fields["draw_tokens"][draws], fields["draw_rows"][draws]) == (at - 1, row)
                draws += 1
            assert self.prompts[row] == sequence.prompt_length
            self.check_table(sequence, row, start + count)
        assert set(fields["rows"][at:].tolist()) <= {-1}
        assert set(fields["draw_rows"][draws:].tolist()) <= {-1}
        assert int(fields["lens"].astype(bool).sum()) == len(plan.works)

    def check_table(self, sequence: Sequence, row: int, length: int) -> None:
        needed = -(-length // SIZE)
        assert self.tables[row, :needed].tolist() == sequence.blocks[:needed]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("blocks", [18, 100])
def test_the_words_of_every_step_say_what_its_plan_says(depth: int, blocks: int) -> None:
    rng = random.Random(blocks + depth)
    scheduler = Scheduler(Limits(blocks, SIZE, ROWS, 48, 64, max_prefill_chunk=9))
    device, in_flight = Device(), deque[Plan]()
    names = iter(range(10_000))
    for turn in range(400):
        if turn < 300 and rng.random() < 0.3:
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 40))]
            scheduler.add(GenRequest(RequestId(next(names)), prompt, rng.randint(1, 20)), 0.0)
        plan = scheduler.plan(0.0)
        if plan is not None:
            device.step(plan)
            in_flight.append(plan)
        if in_flight and (plan is None or len(in_flight) >= depth):
            done = in_flight.popleft()
            scheduler.commit(done, Results([rng.randrange(3) for work in done.works if work.samples]), 0.0)
    assert scheduler.stats().finished_total > 20
    assert (scheduler.stats().preemptions_total > 0) == (blocks == 18)


def plans(device: Device, requests: list[GenRequest], steps: int) -> list[Packed]:
    scheduler = Scheduler(Limits(100, SIZE, ROWS, 48, 64))
    for request in requests:
        scheduler.add(request, 0.0)
    packed = []
    for _ in range(steps):
        plan = scheduler.plan(0.0)
        assert plan is not None
        packed.append(device.step(plan))
        scheduler.commit(plan, Results([1] * packed[-1].draws), 0.0)
    return packed


def test_special_and_broken_draws_are_named_in_every_step() -> None:
    requests = [GenRequest(RequestId(name), [1, 2, name], 9) for name in range(3)]
    found = plans(Device(special=frozenset({1}), broken=frozenset({2})), requests, 3)
    named = [([(place, one.id, length) for place, one, length in packed.special], packed.broken) for packed in found]
    assert named == [([(1, 1, 3 + step)], [2]) for step in range(3)]


def test_parameters_that_fit_no_word_break_their_own_draws_only() -> None:
    unfit = SamplingParams(top_p="high")  # type: ignore[arg-type]
    requests = [GenRequest(RequestId(0), [1], 9, unfit), GenRequest(RequestId(1), [2], 9)]
    device = Device()
    scheduler = Scheduler(Limits(100, SIZE, ROWS, 48, 64))
    for request in requests:
        scheduler.add(request, 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    layout = Layout(device.buckets.choose(0, 2, 2), SIZE)
    assert device.packer.pack(plan, layout, np.zeros(layout.words, np.int32)).broken == [0]


def test_a_long_cached_beginning_that_the_words_cannot_hold_overflows() -> None:
    scheduler = Scheduler(Limits(400, SIZE, ROWS, 1000, 900))
    device, prompt = Device(), [token % 7 for token in range(800)]
    for name in range(2):
        scheduler.add(GenRequest(RequestId(name), prompt, 1), 0.0)
        plan = scheduler.plan(0.0)
        assert plan is not None
        device.tables = np.full((ROWS, 400), -1) if not name else device.tables
        packed = device.step(plan)
        assert (packed.overflow is not None) == (name == 1)
        scheduler.commit(plan, Results([1] * packed.draws), 0.0)
