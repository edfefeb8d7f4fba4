"""Calls of tools are told from content, the same wherever the text is cut, and nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vserve.text.parts import CallArguments, CallBegin, Content, Part, merged
from vserve.text.tools import HERMES, LLAMA3_JSON, MISTRAL, CallSyntax
from vserve.text.tools_splitter import CallSplitter

NAMES = ("f", "get_weather", "g-2")
HIDDEN = {"hermes": (), "llama3_json": ("<|python_tag|>",), "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")}


def split(
    syntax: CallSyntax, pieces: Sequence[str], hold: bool, hidden: Sequence[str] | None = None
) -> tuple[Part, ...]:
    ids = count()
    splitter = CallSplitter(
        syntax,
        NAMES,
        hold=hold,
        hidden=HIDDEN[syntax.form.value] if hidden is None else hidden,
        new_id=lambda: f"id{next(ids)}",
    )
    parts = [part for piece in pieces for part in splitter.push(piece)]
    parts += splitter.flush()
    made = merged(parts)
    begun = [part for part in made if isinstance(part, CallBegin)]
    assert [part.index for part in begun] == list(range(len(begun)))
    assert splitter.num_calls <= len(begun)
    return made


def call(name: str, arguments: str, index: int = 0) -> tuple[Part, ...]:
    return (CallBegin(index, f"id{index}", name), CallArguments(index, arguments))


ARGS = '{"city": "Zürich \\u00e9 \\"x\\"", "n": [1, -2.5e3, true, null, {}], "deep": {"a": {"b": []}}}'
ONE = f'{{"name": "get_weather", "arguments": {ARGS}}}'
LLAMA = f'{{"name": "get_weather", "parameters": {ARGS}}}'

# format, text, parts
CASES: list[tuple[CallSyntax, str, tuple[Part, ...]]] = [
    (HERMES, "", ()),
    (HERMES, "plain text < <tool </tool_call> end \n", (Content("plain text < <tool </tool_call> end \n"),)),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", call("get_weather", ARGS)),
    (HERMES, f"<tool_call>{ONE}</tool_call>", call("get_weather", ARGS)),
    (HERMES, f"<tool_call>\n{ONE}", call("get_weather", ARGS)),
    (
        HERMES,
        f"Let me look.\n\n<tool_call>\n{ONE}\n</tool_call>\n",
        (Content("Let me look."), *call("get_weather", ARGS)),
    ),
    (HERMES, f"\n<tool_call>\n{ONE}\n</tool_call>\n Done.", (*call("get_weather", ARGS), Content("Done."))),
    (
        HERMES,
        f'<tool_call>{ONE}</tool_call>\n<tool_call>\n{{"name": "f", "arguments": {{}}}}\n</tool_call>',
        (*call("get_weather", ARGS), *call("f", "{}", 1)),
    ),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', call("f", '{"a": 1}')),
    (HERMES, '<tool_call>{"id": "x", "type": "function", "name": "f", "arguments": {}}</tool_call>', call("f", "{}")),
    (LLAMA3_JSON, LLAMA, call("get_weather", ARGS)),
    (LLAMA3_JSON, "\n" + LLAMA, call("get_weather", ARGS)),
    (LLAMA3_JSON, "<|python_tag|>" + LLAMA, call("get_weather", ARGS)),
    (LLAMA3_JSON, "Right.\n<|python_tag|>" + LLAMA, (Content("Right."), *call("get_weather", ARGS))),
    (
        LLAMA3_JSON,
        f'{LLAMA}; {{"name": "f", "parameters": {{}}}}\n{{"name": "f", "parameters": {{"a":1}}}}',
        (*call("get_weather", ARGS), *call("f", "{}", 1), *call("f", '{"a":1}', 2)),
    ),
    (LLAMA3_JSON, LLAMA + " is it.", (*call("get_weather", ARGS), Content("is it."))),
    (LLAMA3_JSON, "See " + LLAMA, (Content("See " + LLAMA),)),
    (LLAMA3_JSON, '<|python_tag|>brave_search.call(query="x")', (Content('brave_search.call(query="x")'),)),
    (LLAMA3_JSON, '{"answer": 42}', (Content('{"answer": 42}'),)),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}]", call("get_weather", ARGS)),
    (MISTRAL, f"[TOOL_CALLS][{ONE}, {ONE}]", (*call("get_weather", ARGS), *call("get_weather", ARGS, 1))),
    (
        MISTRAL,
        'Yes.[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefgh1"}] ',
        (Content("Yes."), *call("f", "{}")),
    ),
    (MISTRAL, f"[TOOL_CALLS]get_weather{ARGS}", call("get_weather", ARGS)),
    (
        MISTRAL,
        f"[TOOL_CALLS]get_weather[ARGS]{ARGS}[TOOL_CALLS]g-2[ARGS]{{}}",
        (*call("get_weather", ARGS), *call("g-2", "{}", 1)),
    ),
    (MISTRAL, f"[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{ARGS}", call("f", ARGS)),
    (MISTRAL, "a [ b [TOOL", (Content("a [ b [TOOL"),)),
]

# What only looks like a call is content to the last character, whoever waits for the whole of it.
LOOKS: list[tuple[CallSyntax, str]] = [
    (HERMES, '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}'[:-1]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "x'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": "{}"}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f"}</tool_call>'),
    (HERMES, '<tool_call>\n{"arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "why": 1, "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 01}}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": tru}}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "\n"}}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "\\x"}}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "\\u12G4"}}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": [1}}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1,}}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {' + '"a": {' * 70),
    (HERMES, "<tool_call> " + "x" * 500),
    (HERMES, 'so: <tool_call>{"' + "k" * 500),
    (HERMES, "  <tool_call>"),
    (HERMES, "<tool_call><function=f>"),
    (LLAMA3_JSON, '{"name": "nobody", "parameters": {}}'),
    (LLAMA3_JSON, ' {"name": "f", "parameters": {]'),
    (LLAMA3_JSON, "{"),
    (LLAMA3_JSON, "{ "),
]


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize(("syntax", "text", "parts"), CASES)
def test_a_text_is_split_the_same_wherever_it_is_cut(
    syntax: CallSyntax, text: str, parts: tuple[Part, ...], hold: bool
) -> None:
    assert split(syntax, [text], hold) == parts
    assert split(syntax, list(text), hold) == parts
    for cut in range(1, len(text)):
        assert split(syntax, [text[:cut], text[cut:]], hold) == parts


@pytest.mark.parametrize(("syntax", "text"), LOOKS)
def test_what_only_looks_like_a_call_is_content_to_the_last_character(syntax: CallSyntax, text: str) -> None:
    want = (Content(text),)
    for cut in range(len(text)):
        assert split(syntax, [text[:cut], text[cut:]], True, ()) == want
    assert split(syntax, list(text), True, ()) == want


@pytest.mark.parametrize(("syntax", "text"), LOOKS)
def test_a_stream_loses_nothing_of_a_broken_call_wherever_it_is_cut(syntax: CallSyntax, text: str) -> None:
    parts = split(syntax, [text], False, ())
    for cut in range(len(text)):
        assert split(syntax, [text[:cut], text[cut:]], False, ()) == parts
    said = "".join(part.text for part in parts if not isinstance(part, CallBegin))
    assert text.endswith(said.lstrip()) or text == said


def test_a_stream_passes_arguments_on_as_they_are_written_and_says_first_whose_they_are() -> None:
    splitter = CallSplitter(HERMES, NAMES, hold=False, new_id=lambda: "id")
    assert splitter.push('<tool_call>\n{"name": "f", "arguments": ') == []
    assert splitter.push('{"a"') == [CallBegin(0, "id", "f"), CallArguments(0, '{"a"')]
    assert splitter.push(": 1") == [CallArguments(0, ": 1")]
    assert (splitter.push("}"), splitter.num_calls) == ([CallArguments(0, "}")], 1)
    assert splitter.push("}\n</tool_call>") == []
    assert splitter.flush() == []


def test_a_special_token_that_opens_no_call_is_shown_to_nobody() -> None:
    text = "a [TOOL_CALLS] b [ARGS] c [TOOL_CALLS]nobody[ARGS]{} d"
    want = (Content("a  b  c nobody{} d"),)
    for cut in range(len(text)):
        assert split(MISTRAL, [text[:cut], text[cut:]], True) == want


def test_a_failed_call_does_not_hide_the_next_one() -> None:
    text = '<tool_call>oops <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert split(HERMES, [text], True) == (Content("<tool_call>oops"), *call("f", "{}"))


ALPHABET = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', "{", "}", '{"a": [1, "x"]}', '"', "\n", " ", "f",
     ",", "<|python_tag|>", "[TOOL_CALLS]", "[", "]", "[ARGS]", ";", "é", "<", "\\", "1"]
)  # fmt: skip


@given(st.lists(ALPHABET, max_size=25), st.sampled_from([HERMES, LLAMA3_JSON, MISTRAL]), st.booleans(), st.data())
def test_no_text_is_lost_and_no_cut_matters(
    pieces: list[str], syntax: CallSyntax, hold: bool, data: st.DataObject
) -> None:
    text = "".join(pieces)
    parts = split(syntax, [text], hold, ())
    cut = data.draw(st.integers(0, len(text)))
    assert split(syntax, [text[:cut], text[cut:]], hold, ()) == parts
    assert split(syntax, list(text), hold, ()) == parts
    if not any(isinstance(part, CallBegin) for part in parts):
        assert "".join(part.text for part in parts if isinstance(part, Content)) == text
    at = 0
    for part in parts:  # in order, each a piece of the text
        if not isinstance(part, CallBegin):
            place = text.find(part.text, at)
            assert place >= 0
            at = place + len(part.text)
    if hold:
        for part in parts:
            if isinstance(part, CallArguments):
                json.loads(part.text)


def test_a_long_answer_of_broken_calls_is_read_in_linear_time() -> None:
    """Ten times the text takes the reader ten times the steps."""
    import sys

    def steps(text: str) -> int:
        seen = 0

        def tracer(frame: object, event: str, argument: object) -> None:
            nonlocal seen
            seen += 1

        splitter = CallSplitter(HERMES, NAMES, hold=True, new_id=lambda: "id")
        sys.setprofile(tracer)
        try:
            splitter.push(text)
            splitter.flush()
        finally:
            sys.setprofile(None)
        return seen

    piece = '<tool_call>{"name": "f", "arguments": {"a": <tool_call>'
    assert steps(piece * 400) < 11 * steps(piece * 40)
