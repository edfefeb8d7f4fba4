"""Stop strings are found at the same place however the text is cut, and nothing is held back in vain."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vserve.text.stops import StopMatcher

LETTERS = st.text(alphabet="ab.", max_size=30)
STOPS = st.lists(st.text(alphabet="ab.", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the match that ends first, of several the longest: by trying every end."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            stop = max(here, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def held_back(text: str, stops: list[str]) -> str:
    """The longest end of text that some stop string begins with, the whole of it left out."""
    ends = (text[start:] for start in range(len(text)))
    return next((end for end in ends if any(stop.startswith(end) for stop in stops)), "")


@given(texts=st.lists(LETTERS, max_size=8), stops=STOPS, include=st.booleans())
@settings(max_examples=1000)
def test_a_match_is_the_same_however_the_text_is_cut(texts: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    released = ""
    seen = ""
    for text in texts:
        piece, stop = matcher.push(text)
        released += piece
        seen += text
        expected, expected_stop = naive(seen, stops, include)
        assert stop == matcher.matched == expected_stop
        if stop is None:
            held = held_back(seen, stops)
            assert released == seen.removesuffix(held)
        else:
            assert released == expected
    released += matcher.flush()
    assert released == naive(seen, stops, include)[0]
    assert matcher.flush() == ""


@pytest.mark.parametrize(
    ("stops", "pushes", "released", "stop"),
    [
        ([], ["anything"], ["anything"], None),
        (["\n"], ["one\ntwo"], ["one"], "\n"),
        (["END"], ["th", "e EN", "D of it"], ["th", "e ", ""], "END"),
        (["END"], ["E", "E", "N", "x"], ["", "E", "", "ENx"], None),
        (["abcd", "bc"], ["a", "b", "c", "d"], ["", "", "a", ""], "bc"),
        (["bc", "abc"], ["xabc"], ["x"], "abc"),
        (["aab"], ["aaaaab"], ["aaa"], "aab"),
        (["。终"], ["你好。", "终了"], ["你好", ""], "。终"),
        (["]", "-^"], ["a-", "^b"], ["a", ""], "-^"),
    ],
)
def test_stop_cases(stops: list[str], pushes: list[str], released: list[str], stop: str | None) -> None:
    matcher = StopMatcher(stops)
    assert [matcher.push(text)[0] for text in pushes] == released
    assert matcher.matched == stop


def test_the_matched_string_can_be_kept() -> None:
    matcher = StopMatcher(["END"], include=True)
    assert matcher.push("the EN") == ("the ", None)
    assert matcher.push("D, really") == ("END", "END")


def test_after_a_match_nothing_more_comes_out() -> None:
    matcher = StopMatcher(["x"])
    assert matcher.push("axb") == ("a", "x")
    assert matcher.push("more") == ("", "x")
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""]])
def test_an_empty_stop_string_is_a_mistake_of_the_caller(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(stops)


@pytest.mark.promise("input: backtracking")
def test_a_stop_string_that_nearly_matches_for_ever_takes_linear_time() -> None:
    # Quadratic work would be 4 * 10**10 steps here, which the suite's time limit ends.
    matcher = StopMatcher(["a" * 200_000 + "b"])
    for _ in range(400):
        matcher.push("a" * 1_000)
    assert len(matcher.flush()) == 200_000
