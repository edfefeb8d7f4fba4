"""Blocks are never lost, never in two states, and free + held + cached is their number after every act."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vserve.engine.pages import PagePool


class PoolMachine(RuleBasedStateMachine):
    """Sequences take, share, name and give back blocks at random, beside a model that counts."""

    @initialize(total=st.integers(1, 12))
    def start(self, total: int) -> None:
        self.pool = PagePool(total)
        self.holds: list[list[int]] = []
        self.named: dict[bytes, int] = {}

    @rule(count=st.integers(0, 6))
    def take(self, count: int) -> None:
        if count > self.pool.available:
            with pytest.raises(ValueError, match="available"):
                self.pool.take(count)
            return
        held = {block for blocks in self.holds for block in blocks}
        free = self.pool.free
        taken = self.pool.take(count)
        assert len(set(taken)) == count
        assert not held & set(taken)
        if count <= free:  # nothing had to be evicted
            assert all(self.pool.find(key) == block for key, block in self.named.items())
        self.named = {key: block for key, block in self.named.items() if block not in taken}
        self.holds.append(taken)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.holds) - 1))
        self.pool.give_back(reversed(self.holds.pop(place)))

    @precondition(lambda self: any(self.holds))
    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def name(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from([block for blocks in self.holds for block in blocks]))
        self.pool.name(block, key)
        if key not in self.named and block not in self.named.values():
            self.named[key] = block
        assert self.pool.find(key) == self.named.get(key)

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.named)))
        block = self.pool.find(key)
        assert block == self.named[key]
        self.pool.share([block])
        self.holds.append([block])

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.named)))
        self.pool.forget([self.named.pop(key)])
        assert self.pool.find(key) is None

    @rule()
    def forget_all(self) -> None:
        self.pool.forget(list(self.named.values()))
        self.named.clear()
        assert self.pool.cached == 0

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        self.pool.check()
        assert self.pool.free + self.pool.held + self.pool.cached == self.pool.total
        holders = Counter(block for blocks in self.holds for block in blocks)
        assert self.pool.held == len(holders)
        assert all(self.pool.is_held(block) for block in holders)
        assert self.pool.cached == len(set(self.named.values()) - holders.keys())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_least_recently_held_cached_block_is_evicted_first() -> None:
    pool = PagePool(3)
    blocks = pool.take(3)
    for number, block in enumerate(blocks):
        pool.name(block, bytes([number]))
    pool.give_back([blocks[1], blocks[0], blocks[2]])
    pool.share([blocks[1]])
    pool.give_back([blocks[1]])  # used again: now the youngest
    assert [pool.take(1)[0] for _ in range(3)] == [blocks[0], blocks[2], blocks[1]]


def test_a_block_given_back_twice_or_named_by_nobody_is_a_bug_that_shows() -> None:
    pool = PagePool(2)
    (block,) = pool.take(1)
    pool.give_back([block])
    with pytest.raises(ValueError, match="nobody holds"):
        pool.give_back([block])
    with pytest.raises(ValueError, match="nobody holds"):
        pool.name(block, b"key")


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PagePool(0)
