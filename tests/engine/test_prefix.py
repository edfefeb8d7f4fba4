"""A key names salt and every token so far; nothing else has it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vserve.engine.prefix import block_keys, root_key

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(tokens=TOKENS, size=st.sampled_from([1, 4, 8]), cut=st.integers(0, 40))
def test_keys_are_the_same_computed_at_once_or_block_by_block(tokens: list[int], size: int, cut: int) -> None:
    whole = block_keys(root_key(b"salt"), tokens, size)
    assert len(whole) == len(tokens) // size
    place = min(cut, len(whole))
    first = block_keys(root_key(b"salt"), tokens[: place * size], size)
    parent = first[-1] if first else root_key(b"salt")
    assert first + block_keys(parent, tokens[place * size :], size) == whole


@given(
    tokens=st.lists(st.integers(0, 1000), min_size=8, max_size=32), place=st.integers(0, 31), other=st.integers(0, 9)
)
def test_a_changed_token_changes_its_key_and_all_later_ones(tokens: list[int], place: int, other: int) -> None:
    changed = list(tokens)
    place %= len(tokens)
    changed[place] = tokens[place] + 1 + other
    before, after = (block_keys(root_key(b""), ids, 4) for ids in (tokens, changed))
    same = place // 4
    assert before[:same] == after[:same]
    assert not set(before[same:]) & set(after[same:])


@given(one=st.binary(max_size=40), other=st.binary(max_size=40))
@pytest.mark.promise("input: other tenants' prefixes")
def test_salts_never_share_a_block(one: bytes, other: bytes) -> None:
    keys, others = (block_keys(root_key(salt), [1, 2, 3, 4], 2) for salt in (one, other))
    assert (keys == others) == (one == other)
    assert one == other or not set(keys) & set(others)
