"""One choice: decoding, stop strings, counting and ending, token by token and in lumps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes_api import EOS_ID, LETTERS
from vserve.api.choice import Choice, Reading, Splitting
from vserve.api.shapes import Piece
from vserve.engine.request import Emit, FinishReason, GenRequest, RequestId, Timing, TokenLogprobs
from vserve.errors import ApiError, DeadlineExceeded, EngineDied, InternalError, Unavailable
from vserve.text.answer import AnswerSplitter
from vserve.text.parts import CallArguments, CallBegin, Content, Reasoning, merged
from vserve.text.reasoning import ReasoningSplitter, Start
from vserve.text.tools import HERMES
from vserve.text.tools_splitter import CallSplitter

ID = RequestId(1)
TIMING = Timing(0.0, 1.0, 2.0, 3.0)


class Ear:
    """A Listener that remembers."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.texts: list[str] = []
        self.cancelled = 0
        self.ended = 0
        self.errors: list[ApiError] = []

    def text(self, choice: Choice, text: str) -> None:
        self.texts.append(text)

    def more(self, choice: Choice) -> None:
        piece = choice.take()
        self.pieces.append(piece)
        self.texts.append(piece.text)

    def finished(self, choice: Choice) -> None:
        self.more(choice)
        self.ended += 1

    def cancel(self, choice: Choice) -> None:
        self.cancelled += 1

    def fail(self, error: ApiError) -> None:
        self.errors.append(error)


def reading(**changes: Any) -> Reading:
    base: dict[str, Any] = {
        "tokenizer": LETTERS, "skip_special": True, "continuation": True, "stops": (), "include_stop": False,
        "min_tokens": 0, "eos_ids": frozenset({EOS_ID}), "keep_ids": False, "keep_logprobs": False,
        "scored": False, "count_chunks": False,
    }  # fmt: skip
    return Reading(**{**base, **changes})


def choose(how: Reading) -> tuple[Choice, Ear]:
    choice, ear = Choice(0, True, [1], GenRequest(ID, [1], 100), how, ""), Ear()
    choice.attach(ear)
    return choice, ear


def thinks_and_calls(one_call: bool = False) -> Splitting:
    """Reasoning first, then content and calls of f."""
    return Splitting(
        make=lambda: AnswerSplitter(
            ReasoningSplitter(Start.INSIDE), CallSplitter(HERMES, ["f"], hold=False, new_id=lambda: "id")
        ),
        one_call=one_call,
        reasons=True,
    )


def ids(text: str) -> tuple[int, ...]:
    return tuple(LETTERS.encode(text, add_special=False))


def test_text_arrives_as_it_is_pushed_and_a_stop_id_is_counted_but_not_shown() -> None:
    choice, ear = choose(reading())
    choice.push(Emit(ID, ids("Hel"), cached_tokens=3))
    choice.push(Emit(ID, ids("lo")))
    choice.push(Emit(ID, (*ids("!"), EOS_ID), FinishReason.STOP, EOS_ID, timing=TIMING))
    assert ear.texts == ["Hel", "lo", "!"]
    assert (choice.num_tokens, choice.cached_tokens, choice.timing) == (7, 3, TIMING)
    assert (choice.finish, choice.stop_reason, ear.ended) == (FinishReason.STOP, None, 1)


def test_a_stop_token_id_is_the_stop_reason_and_shown_only_when_asked_for() -> None:
    stop = ids("!")[0]
    for include, text in ((False, "Hi"), (True, "Hi!")):
        choice, ear = choose(reading(include_stop=include))
        choice.push(Emit(ID, ids("Hi!"), FinishReason.STOP, stop))
        assert ("".join(ear.texts), choice.stop_reason, choice.num_tokens) == (text, stop, 3)


@pytest.mark.parametrize("lump", [1, 2, 5, 100])
@pytest.mark.parametrize(("include", "text"), [(False, "one tw"), (True, "one two\n")])
def test_a_stop_string_cuts_the_text_and_the_count_wherever_the_tokens_are_cut(
    lump: int, include: bool, text: str
) -> None:
    choice, ear = choose(reading(stops=("xyz", "o\n"), include_stop=include, keep_ids=True, keep_logprobs=True))
    said = ids("one two\nthree")
    for start in range(0, len(said), lump):
        part = said[start : start + lump]
        choice.push(Emit(ID, part, logprobs=tuple(TokenLogprobs(-1.0, 1) for _ in part)))
    assert "".join(ear.texts) == text
    assert (choice.finish, choice.stop_reason, choice.num_tokens) == (FinishReason.STOP, "o\n", 8)
    assert (ear.cancelled, ear.ended) == (1, 1)
    assert tuple(token for piece in ear.pieces for token in piece.ids) == said[:8]
    assert tuple(token for piece in ear.pieces for token, _ in piece.drawn) == said[:8]


def test_a_possible_beginning_of_a_stop_string_is_held_back_and_released() -> None:
    choice, ear = choose(reading(stops=("END",)))
    choice.push(Emit(ID, ids("a E")))
    choice.push(Emit(ID, ids("N")))
    assert "".join(ear.texts) == "a "
    choice.push(Emit(ID, ids("D"), FinishReason.LENGTH))
    assert (choice.finish, choice.stop_reason, ear.cancelled) == (FinishReason.STOP, "END", 0)
    choice, ear = choose(reading(stops=("END",)))
    choice.push(Emit(ID, ids("a EN"), FinishReason.LENGTH))
    assert ("".join(ear.texts), choice.finish) == ("a EN", FinishReason.LENGTH)


def test_no_stop_string_ends_a_choice_within_min_tokens() -> None:
    choice, ear = choose(reading(stops=("a",), min_tokens=3))
    choice.push(Emit(ID, ids("aabba")))
    assert ("".join(ear.texts), choice.num_tokens, choice.stop_reason) == ("aabb", 5, "a")


def test_half_a_character_is_never_said_and_a_broken_one_is_replaced_at_the_end() -> None:
    choice, ear = choose(reading())
    for token in ids("é€")[:-1]:
        choice.push(Emit(ID, (token,)))
    assert ear.texts == ["é"]
    choice.push(Emit(ID, (), FinishReason.LENGTH))
    assert "".join(ear.texts) == "é\ufffd"


@pytest.mark.parametrize(
    ("finish", "kind"), [(FinishReason.TIMEOUT, DeadlineExceeded), (FinishReason.ERROR, InternalError)]
)
def test_an_ending_that_is_a_failure_fails_the_reply_and_tells_nothing_internal(
    finish: FinishReason, kind: type[ApiError]
) -> None:
    choice, ear = choose(reading())
    choice.push(Emit(ID, (), finish, error="/secret/path"))
    assert [type(error) for error in ear.errors] == [kind]
    assert "secret" not in ear.errors[0].message


def test_the_engines_death_fails_the_reply_and_a_closed_choice_hears_nothing() -> None:
    choice, ear = choose(reading())
    choice.fail(EngineDied("x"))
    assert [type(error) for error in ear.errors] == [Unavailable]
    choice.close()
    choice.push(Emit(ID, ids("a")))
    choice.fail(EngineDied("x"))
    assert (ear.texts, len(ear.errors)) == ([], 1)


def test_a_bug_while_reading_fails_only_this_reply() -> None:
    choice, ear = choose(reading(keep_logprobs=True))
    choice.push(Emit(ID, (1, 2), logprobs=(TokenLogprobs(-1.0, 1),)))  # one is missing
    assert [type(error) for error in ear.errors] == [InternalError]


@given(st.text(max_size=40), st.lists(st.integers(1, 7)), st.booleans(), st.sampled_from([(), ("ab",), ("b", "é")]))
def test_the_text_is_the_same_however_the_tokens_arrive(
    text: str, cuts: list[int], plain: bool, stops: tuple[str, ...]
) -> None:
    said = ids(text)
    first = min((text.find(stop) for stop in stops if stop in text), default=-1)
    choice, ear = choose(reading(stops=stops, keep_ids=not plain))
    start = 0
    for cut in [*cuts, len(said)]:
        choice.push(Emit(ID, said[start : start + cut]))
        start += cut
    if choice.finish is None:
        choice.push(Emit(ID, (), FinishReason.LENGTH))
    got = "".join(ear.texts)
    assert ear.ended == 1
    if first < 0:
        assert (got, choice.num_tokens, choice.finish) == (text, len(said), FinishReason.LENGTH)
    else:
        assert text.startswith(got)
        assert not any(stop in got for stop in stops)
        assert choice.finish is FinishReason.STOP


CALLS = 'Hm.</think>Well: <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n'
SECOND = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.mark.parametrize("lump", [1, 2, 7, 500])
@pytest.mark.parametrize("extras", [{}, {"stops": ("zzz",)}, {"keep_ids": True}])
def test_an_answer_is_split_and_its_reasoning_counted_however_the_tokens_arrive(
    lump: int, extras: dict[str, Any]
) -> None:
    choice, ear = choose(reading(splitting=thinks_and_calls(), **extras))
    said = ids(CALLS + SECOND)
    for start in range(0, len(said), lump):
        choice.push(Emit(ID, said[start : start + lump]))
    choice.push(Emit(ID, (EOS_ID,), FinishReason.STOP, EOS_ID))
    assert choice.reasoning_tokens == len("Hm.</think")
    assert choice.num_calls == 2
    assert "".join(ear.texts) == "Well:"
    parts = merged([part for piece in ear.pieces for part in piece.parts or ()])
    want = (
        Reasoning("Hm."), Content("Well:"), CallBegin(0, "id", "f"), CallArguments(0, '{"a": 1}'),
        CallBegin(1, "id", "f"), CallArguments(1, "{}"),
    )  # fmt: skip
    # Content by itself takes the quick way and is in no piece.
    assert [part for part in parts if not isinstance(part, Content)] == [
        part for part in want if not isinstance(part, Content)
    ]


@pytest.mark.parametrize("lump", [1, 5, 500])
def test_an_answer_that_may_have_one_call_ends_with_it(lump: int) -> None:
    choice, ear = choose(reading(splitting=thinks_and_calls(one_call=True)))
    said = ids(CALLS + SECOND)
    for start in range(0, len(said), lump):
        choice.push(Emit(ID, said[start : start + lump]))
    assert (choice.finish, choice.stop_reason, choice.num_calls) == (FinishReason.STOP, None, 1)
    assert (ear.cancelled, ear.ended) == (1, 1)
    assert choice.num_tokens == CALLS.index("}") + 1


def test_what_is_kept_for_a_slow_reader_keeps_its_order_among_the_parts() -> None:
    choice, _ = choose(reading(splitting=thinks_and_calls()))
    choice.keep("a")
    choice.keep("b")
    assert choice.take().parts == (Content("ab"),)
