"""Reasoning is told from the answer, the same wherever the text is cut, and nothing of either is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vserve.text.answer import AnswerSplitter
from vserve.text.parts import CallArguments, CallBegin, Content, Part, Reasoning, merged
from vserve.text.reasoning import ReasoningSplitter, ReasoningStyle, Start, start_of, style_of
from vserve.text.tools import HERMES
from vserve.text.tools_splitter import CallSplitter

# start, text, reasoning, content
CASES: list[tuple[Start, str, str, str]] = [
    (Start.INSIDE, "I think.\n</think>\n\nYes. ", "I think.", "Yes. "),
    (Start.INSIDE, "<think>\nI think.\n</think>\nYes.", "I think.", "Yes."),
    (Start.INSIDE, "\n<think>I think", "I think", ""),
    (Start.INSIDE, "never closed </thin \n", "never closed </thin \n", ""),
    (Start.INSIDE, "</think>Yes.", "", "Yes."),
    (Start.INSIDE, "<thin", "<thin", ""),
    (Start.INSIDE, "<thinx y</think>z", "<thinx y", "z"),
    (Start.INSIDE, "a</think></think> b", "a", "</think> b"),
    (Start.INSIDE, "x" + " " * 100 + "</think>y", "x" + " " * 36, "y"),
    (Start.INSIDE, "", "", ""),
    (Start.OPEN, "<think>\n\n</think>\n\nYes.", "", "Yes."),
    (Start.OPEN, "\n <think> a\nb </think> Yes.", "a\nb", "Yes."),
    (Start.OPEN, " \nPlain <think>no</think>", "", " \nPlain <think>no</think>"),
    (Start.OPEN, " \n", "", " \n"),
    (Start.OPEN, " " * 100 + "<think>a</think>b", "", " " * 100 + "<think>a</think>b"),
    (Start.OPEN, "<thi", "", "<thi"),
    (Start.OPEN, "<think", "", "<think"),
    (Start.OPEN, "<think>", "", ""),
]


def split(start: Start, pieces: Sequence[str]) -> tuple[Part, ...]:
    splitter = ReasoningSplitter(start)
    parts = [part for piece in pieces for part in splitter.push(piece)]
    return merged([*parts, *splitter.flush()])


@pytest.mark.parametrize(("start", "text", "reasoning", "content"), CASES)
def test_a_text_is_split_the_same_wherever_it_is_cut(start: Start, text: str, reasoning: str, content: str) -> None:
    want = tuple(part for part in (Reasoning(reasoning), Content(content)) if part.text)
    for cut in range(len(text) + 1):
        assert split(start, [text[:cut], text[cut:]]) == want
    assert split(start, list(text)) == want


WORDS = st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "é", " " * 70])


def judged(start: Start, text: str) -> tuple[Part, ...]:
    """The same by looking at the whole text at once."""
    body = text.lstrip(" \n")
    opened = body.startswith("<think>") and (start is Start.INSIDE or len(text) - len(body) <= 64)
    if start is Start.OPEN and not opened:
        return (Content(text),) if text else ()
    body = body.removeprefix("<think>").lstrip(" \n") if opened else body
    thought, closed, answer = body.partition("</think>")
    if closed:
        spaces = len(thought) - len(thought.rstrip(" \n"))
        thought = thought[: len(thought) - min(64, spaces)]
        answer = answer.lstrip(" \n")
    return tuple(part for part in (Reasoning(thought), Content(answer)) if part.text)


@given(st.lists(WORDS, max_size=20), st.sampled_from(Start), st.data())
def test_nothing_but_marks_and_the_space_around_them_is_lost(
    pieces: list[str], start: Start, data: st.DataObject
) -> None:
    text = "".join(pieces)
    cut = data.draw(st.integers(0, len(text)))
    want = judged(start, text)
    assert split(start, [text]) == want
    assert split(start, [text[:cut], text[cut:]]) == want
    assert split(start, list(text)) == want


def test_whether_text_is_reasoning_is_known_while_it_arrives() -> None:
    splitter = ReasoningSplitter(Start.OPEN)
    seen = []
    for piece in ("<thi", "nk>", "\n", "a", "</think", ">", "\n", "b"):
        splitter.push(piece)
        seen.append(splitter.reasoning)
    assert seen == [False, True, True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ messages[0].content }}", None),
        ("{{ content.split('</think>')[-1] }}", ReasoningStyle.QWEN3),
        ("{{ '<think>\\n' }}", ReasoningStyle.QWEN3),
    ],
)
def test_the_style_follows_from_the_template(template: str, style: ReasoningStyle | None) -> None:
    assert style_of(template) is style


R1, Q3 = ReasoningStyle.DEEPSEEK_R1, ReasoningStyle.QWEN3


@pytest.mark.parametrize(
    ("style", "prompt", "continued", "start"),
    [
        (Q3, "user\nhi\nassistant\n", None, Start.OPEN),
        (Q3, "user\nhi\nassistant\n<think>\n", None, Start.INSIDE),
        (Q3, "user\nhi\nassistant\n<think>\n\n</think>\n\n", None, None),
        (Q3, "user\nwrite <think> please\nassistant\n", None, Start.OPEN),
        (R1, "user\nhi\nassistant\n", None, Start.INSIDE),
        (R1, "user\nhi\nassistant\n<think></think>", None, None),
        (R1, "user <think>\nassistant\nso", "so", Start.INSIDE),
        (Q3, "assistant\n<think>so", "<think>so", Start.INSIDE),
        (Q3, "assistant\n<think>so</think>", "<think>so</think>it", None),
    ],
)
def test_how_an_answer_begins_follows_from_the_end_of_the_prompt_alone(
    style: ReasoningStyle, prompt: str, continued: str | None, start: Start | None
) -> None:
    assert start_of(style, prompt, continued) is start


@pytest.mark.parametrize("shows", [True, False])
def test_calls_are_looked_for_behind_the_reasoning_only(shows: bool) -> None:
    said = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"I could {said}.</think>\nWell.\n{said}"
    for cut in range(len(text)):
        splitter = AnswerSplitter(
            ReasoningSplitter(Start.INSIDE), CallSplitter(HERMES, ["f"], hold=False, new_id=lambda: "id"), shows
        )
        parts = merged([*splitter.push(text[:cut]), *splitter.push(text[cut:]), *splitter.flush()])
        thoughts = [Reasoning(f"I could {said}.")] if shows else []
        assert list(parts) == [*thoughts, Content("Well."), CallBegin(0, "id", "f"), CallArguments(0, "{}")]
        assert splitter.num_calls == 1
