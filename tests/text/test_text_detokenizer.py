"""A stream's pieces, joined, are the decoded whole, and no piece ends inside a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vserve.text.detokenizer import Detokenizer
from vserve.text.tokenizer import Tokenizer

VOCABULARIES = ["smollm", "llama", "gemma", "window"]


@pytest.fixture(scope="session", params=VOCABULARIES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Tokenizer)
    return found


# Small ids are the special and the byte tokens in every vocabulary here, the last ones lie outside.
IDS = st.lists(st.integers(0, 40) | st.integers(0, 260) | st.integers(0, 49160), max_size=24)
CUTS = st.lists(st.integers(1, 4), min_size=24, max_size=24)


def pieces(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    texts = []
    for size in cuts:
        texts.append(detokenizer.push(ids[:size]))
        ids = ids[size:]
    return [*texts, detokenizer.flush()]


def one_by_one(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.push((id,)) for id in ids]


@given(ids=IDS, cuts=CUTS, skip=st.booleans())
@settings(max_examples=300)
def test_the_pieces_joined_are_the_decoded_whole(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    if tokenizer.style.name == "WINDOW":
        ids = [id % tokenizer.vocab_size for id in ids]
    detokenizer = Detokenizer(tokenizer, skip_special=skip)
    assert "".join(pieces(detokenizer, ids, cuts)) == tokenizer.decode(ids, skip_special=skip)


@given(text=st.text(max_size=40), cuts=CUTS)
def test_no_piece_of_valid_text_holds_a_broken_character(llama: Tokenizer, text: str, cuts: list[int]) -> None:
    text = text.replace("\ufffd", "").replace("\u2581", "").replace("\x00", "")
    ids = llama.encode(text, add_special=False, parse_special=False)
    detokenizer = Detokenizer(llama)
    texts = [detokenizer.push((id,)) for id in ids]
    assert "\ufffd" not in "".join(texts)
    assert "".join(texts) == text
    assert detokenizer.flush() == ""


@given(ids=IDS, skip=st.booleans())
def test_the_offsets_of_tokens_add_up(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    whole, each = Detokenizer(tokenizer, skip_special=skip), Detokenizer(tokenizer, skip_special=skip)
    released = one_by_one(each, ids)
    assert len(released) == len(ids)
    assert "".join(released) == whole.push(ids)
    assert each.flush() == whole.flush()


def test_a_character_of_several_tokens_comes_whole(smollm: Tokenizer) -> None:
    ids = smollm.encode("a😀b")
    assert len(ids) > 3
    detokenizer = Detokenizer(smollm)
    texts = one_by_one(detokenizer, ids)
    assert [text for text in texts if text] == ["a", "😀", "b"]


def test_an_unfinished_character_ends_as_a_replacement(smollm: Tokenizer) -> None:
    first = smollm.encode("😀")[0]
    detokenizer = Detokenizer(smollm)
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(("skip", "text"), [(True, "hi"), (False, "<|im_start|>hi<|im_end|>")])
def test_special_tokens_are_left_out_when_asked(smollm: Tokenizer, skip: bool, text: str) -> None:
    ids = smollm.encode("<|im_start|>hi<|im_end|>")
    assert Detokenizer(smollm, skip_special=skip).push(ids) == text


@pytest.mark.parametrize(("continuation", "text"), [(False, "hello  world"), (True, " hello  world")])
def test_a_continuation_keeps_its_leading_space(llama: Tokenizer, continuation: bool, text: str) -> None:
    ids = llama.encode("hello  world", add_special=False)
    detokenizer = Detokenizer(llama, continuation=continuation)
    assert "".join(one_by_one(detokenizer, ids)) == text


def test_only_one_leading_space_is_stripped_and_only_once(llama: Tokenizer) -> None:
    ids = llama.encode("  a", add_special=False)
    detokenizer = Detokenizer(llama)
    assert "".join(one_by_one(detokenizer, [1, *ids])) == "  a"
    assert detokenizer.push(llama.encode("b", add_special=False)) == " b"


def test_a_window_costs_the_same_however_long_the_stream(window: Tokenizer) -> None:
    detokenizer = Detokenizer(window, skip_special=True)
    ids = window.encode("hello world ") * 100
    assert "".join(one_by_one(detokenizer, [*ids, *[1] * 1000, *ids])) == window.decode([*ids, *ids], skip_special=True)
    assert detokenizer._window is not None
    assert len(detokenizer._window._ids) < 32
