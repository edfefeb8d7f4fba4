"""Field tables: what each endpoint takes, refuses and reports."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vserve.api import schema
from vserve.api.fields import Fate, Field
from vserve.api.requests import (
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from vserve.errors import BadRequest

VOCAB = 300
HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    return parse_chat({"messages": HI, **fields}, VOCAB)


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion({"prompt": "hi", **fields}, VOCAB)


BAD_SHARED: list[tuple[str, Any, str]] = [
    # field, value, what the message must hold
    ("temperature", 2.01, "between 0 and 2"),
    ("temperature", -0.1, "between 0 and 2"),
    ("temperature", True, "between 0 and 2"),
    ("temperature", "1", "between 0 and 2"),
    ("temperature", math.nan, "nan"),
    ("temperature", math.inf, "inf"),
    ("top_p", 0, "above 0 and at most 1"),
    ("top_p", 1.5, "1.5"),
    ("top_k", -2, "-2"),
    ("top_k", 1.0, "integer"),
    ("min_p", 1.1, "1.1"),
    ("repetition_penalty", 0, "above 0"),
    ("presence_penalty", 2.1, "between -2 and 2"),
    ("frequency_penalty", -2.1, "between -2 and 2"),
    ("n", 0, "between 1 and 128"),
    ("n", 129, "between 1 and 128"),
    ("n", True, "integer"),
    ("seed", 2**63, "integer"),
    ("seed", 1.5, "integer"),
    ("max_tokens", -1, "-1"),
    ("max_tokens", 2**31, "2147483648"),
    ("max_tokens", "5", "'5'"),
    ("min_tokens", -1, "-1"),
    ("stop", 5, "a string or a list of strings"),
    ("stop", "", "between 1 and 1024 characters"),
    ("stop", ["a", ""], "stop[1]"),
    ("stop", ["a"] * 65, "at most 64"),
    ("stop", ["a", 3], "stop[1]"),
    ("stop", "x" * 1025, "1025"),
    ("stop_token_ids", [VOCAB], f"{VOCAB}"),
    ("stop_token_ids", [1, True], "stop_token_ids[1]"),
    ("stop_token_ids", [1, -1], "stop_token_ids[1]"),
    ("stop_token_ids", 5, "a list of token ids"),
    ("logit_bias", [1], "an object"),
    ("logit_bias", {"x": 1}, "'x'"),
    ("logit_bias", {str(VOCAB): 1}, f"below {VOCAB}"),
    ("logit_bias", {"-1": 1}, "'-1'"),
    ("logit_bias", {"٣": 1}, "not a token id"),
    ("logit_bias", {"9" * 5000: 1}, "not a token id"),
    ("logit_bias", {"1": 101}, "between -100 and 100"),
    ("logit_bias", {"1": None}, "between -100 and 100"),
    ("logit_bias", {str(i): 0 for i in range(1025)}, "at most 1024"),
    ("stream", "yes", "true or false"),
    ("stream", 1, "true or false"),
    ("stream_options", {"include_usage": True}, "only when `stream` is true"),
    ("stream_options", [], "an object"),
    ("ignore_eos", 0, "true or false"),
    ("truncate_prompt_tokens", 0, "-1 or an integer between 1"),
    ("truncate_prompt_tokens", -2, "-2"),
    ("priority", "high", "'high'"),
    ("cache_salt", "", "between 1 and"),
    ("timeout_ms", 0, "between 1 and"),
    ("request_id", "a b", "visible ASCII"),
    ("request_id", "a" * 129, "129"),
    ("user", 5, "a string"),
    ("model", 5, "a string"),
    ("use_beam_search", True, "not supported"),
    ("logits_processors", ["x"], "not supported"),
]

BAD_CHAT: list[tuple[str, Any, str]] = [
    ("messages", "hi", "a list of messages"),
    ("messages", [], "at least one message"),
    ("messages", [5], "messages[0]"),
    ("messages", [{"content": "x"}], "messages[0].role"),
    ("messages", [{"role": 5, "content": "x"}], "messages[0].role"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
    ("messages", [{"role": "user", "content": [5]}], "messages[0].content[0]"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], "image_url"),
    ("messages", [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "input_audio"),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": 5}]}], "content[0].text"),
    ("messages", [{"role": "assistant", "tool_calls": [5]}], "tool_calls[0]"),
    ("messages", HI * 4097, "at most 4096"),
    ("max_tokens", 0, "between 1 and"),
    ("max_completion_tokens", 0, "between 1 and"),
    ("logprobs", 5, "true or false"),
    ("top_logprobs", 21, "between 0 and 20"),
    ("top_logprobs", 3, "needs `logprobs`"),
    ("tools", "f", "a list of objects"),
    ("tools", [5], "tools[0]"),
    ("tools", [{"type": "custom", "custom": {}}], "tools[0].type"),
    ("tools", [{"type": "function"}], "tools[0].function"),
    ("tools", [{"function": {}}], "tools[0].function.name"),
    ("tools", [{"function": {"name": "a b"}}], "letters, digits"),
    ("tools", [{"function": {"name": "x" * 65}}], "between 1 and 64"),
    ("tools", [{"function": {"name": "f", "description": 5}}], "description"),
    ("tools", [{"function": {"name": "f", "parameters": []}}], "parameters"),
    ("tools", [{"function": {"name": "f", "parameters": {"type": "string"}}}], "parameters.type"),
    ("tools", [{"function": {"name": "f", "strict": 1}}], "strict"),
    ("tools", [{"function": {"name": "f"}}, {"function": {"name": "f"}}], "tools[1]"),
    ("tools", [{"function": {"name": "f"}}] * 129, "at most 128"),
    ("tools", [{"function": {"name": "f", "parameters": {"x": "y" * 2**18}}}], "262144"),
    ("tool_choice", "maybe", "none, auto, required"),
    ("tool_choice", "required", "no `tools`"),
    ("tool_choice", {"type": "function"}, "tool_choice.function"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "not in `tools`"),
    ("tool_choice", {"type": "custom"}, "tool_choice.type"),
    ("tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "is empty"),
    ("functions", [{"name": ""}], "functions[0].name"),
    ("function_call", {"name": "f"}, "not in `functions`"),
    ("function_call", "required", "none, auto"),
    ("parallel_tool_calls", "x", "true or false"),
    ("include_reasoning", 1, "true or false"),
    ("reasoning_effort", "much", "one of none, minimal"),
    ("thinking_token_budget", -1, "between 0"),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}], "arguments"),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}], "function.name"),
    ("messages", [{"role": "assistant", "tool_calls": [{"type": "x", "function": {"name": "f"}}]}], "[0].type"),
    ("messages", [{"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "f"}}]}], "tool_calls[0].id"),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 129}], "at most 128"),
    ("messages", [{"role": "assistant", "function_call": {"arguments": "{}"}}], "function_call.name"),
    ("messages", [{"role": "assistant", "tool_calls": [], "function_call": {"name": "f"}}], "both"),
    ("messages", [{"role": "tool", "content": "x", "tool_call_id": 5}], "tool_call_id"),
    ("messages", [{"role": "tool"}], "content"),
    ("messages", [{"role": "function", "content": "x"}], "messages[0].name"),
    ("chat_template", "{{ 1 }}", "not supported"),
    ("chat_template_kwargs", {"messages": []}, "may not set 'messages'"),
    ("documents", ["x"], "documents[0]"),
    ("modalities", ["audio"], "not supported"),
    ("continue_final_message", "x", "true or false"),
]

BAD_COMPLETION: list[tuple[str, Any, str]] = [
    ("prompt", None, "required"),
    ("prompt", 5, "a string"),
    ("prompt", {}, "an object"),
    ("prompt", [], "at least one prompt"),
    ("prompt", [[]], "prompt[0]"),
    ("prompt", ["a", 5], "prompt[1]"),
    ("prompt", [[1], "a"], "prompt[1]"),
    ("prompt", [1, "a"], "prompt[1]"),
    ("prompt", [1, True], "prompt[1]"),
    ("prompt", [1, 2.0], "prompt[1]"),
    ("prompt", [VOCAB], f"between 0 and {VOCAB - 1}"),
    ("prompt", [[1], [-1]], "prompt[1][0]"),
    ("prompt", ["a"] * 1025, "at most 1024"),
    ("max_tokens", 0, "unless `echo`"),
    ("logprobs", 21, "between 0 and 20"),
    ("logprobs", True, "integer"),
    ("best_of", 3, "must equal `n`"),
    ("suffix", "x", "not supported"),
]


@pytest.mark.parametrize(("field", "value", "said"), BAD_SHARED + BAD_CHAT)
@pytest.mark.promise(
    "input: huge counts",
    "input: numbers of no range",
    "input: huge lists",
    "input: odd token ids",
    "input: image URLs",
    "input: template from the request",
)
def test_a_bad_chat_field_is_named_with_its_value_or_limit(field: str, value: Any, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**{field: value})
    assert said in caught.value.message
    assert field in caught.value.message
    assert caught.value.param is not None
    assert caught.value.param.startswith(field)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(("field", "value", "said"), BAD_SHARED + BAD_COMPLETION)
@pytest.mark.promise("input: huge counts", "input: odd token ids")
def test_a_bad_completion_field_is_named_with_its_value_or_limit(field: str, value: Any, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(**{field: value})
    assert said in caught.value.message
    assert field in caught.value.message
    assert caught.value.param is not None
    assert caught.value.param.startswith(field)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", None),
        ("tools", []),
        ("tool_choice", "none"),
        ("tool_choice", "auto"),
        ("tool_choice", None),
        ("response_format", {"type": "text"}),
        ("response_format", None),
        ("logprobs", False),
        ("logprobs", None),
        ("top_logprobs", 0),
        ("n", 1),
        ("stop", None),
        ("stop", []),
        ("parallel_tool_calls", True),
        ("parallel_tool_calls", False),
        ("store", False),
        ("service_tier", "auto"),
        ("modalities", ["text"]),
        ("reasoning_effort", None),
        ("bad_words", []),
        ("use_beam_search", False),
        ("length_penalty", 1.0),
        ("user", "someone"),
        ("seed", -1),
        ("temperature", 0),
        ("temperature", 2),
        ("top_k", -1),
    ],
)
def test_a_value_that_asks_for_nothing_is_taken_without_a_word(field: str, value: Any) -> None:
    assert chat(**{field: value}).wanted.ignored == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("metadata", {"a": "b"}),
        ("service_tier", "flex"),
        ("verbosity", "low"),
        ("prediction", {"type": "content", "content": "x"}),
        ("no_such_field", 1),
        ("no_such_field", None),
    ],
)
def test_a_field_without_effect_is_reported_and_refused_when_strict(field: str, value: Any) -> None:
    assert chat(**{field: value}).wanted.ignored == (field,)
    with pytest.raises(BadRequest) as caught:
        parse_chat({"messages": HI, field: value}, VOCAB, strict=True)
    assert caught.value.param == field


def test_an_unknown_stream_option_is_reported_under_its_path() -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    request = chat(stream=True, stream_options=options)
    assert request.wanted.ignored == ("stream_options.include_obfuscation",)
    assert request.wanted.stream_options.include_usage
    with pytest.raises(BadRequest, match="include_obfuscation"):
        parse_chat({"messages": HI, "stream": True, "stream_options": options}, VOCAB, strict=True)


def test_max_completion_tokens_wins_over_max_tokens() -> None:
    wanted = chat(max_tokens=5, max_completion_tokens=7).wanted
    assert (wanted.max_tokens, wanted.max_tokens_field) == (7, "max_completion_tokens")
    assert chat(max_tokens=5).wanted.max_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ("hi",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1, 2], [3]], ([1, 2], [3])),
    ],
)
def test_every_form_of_prompt_is_understood(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


def test_message_content_keeps_its_form_and_null_is_only_for_calls() -> None:
    request = chat(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"], "name": "x"},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ]
    )
    first, second, third, fourth = request.conversation.messages
    assert first["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert first["name"] == "x"
    assert second["content"] == ""
    assert third["content"] is None
    assert fourth["tool_call_id"] == "1"


def test_continuing_the_last_message_turns_the_generation_prompt_off_unless_both_are_asked_for() -> None:
    conversation = chat(continue_final_message=True).conversation
    assert (conversation.continue_final_message, conversation.add_generation_prompt) == (True, False)
    with pytest.raises(BadRequest, match="cannot both be true"):
        chat(continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "a", "text": "b"}, {"text": "a", "messages": HI}, {"text": None}, {"text": 5}]
)
def test_tokenize_takes_exactly_one_thing_to_tokenize(body: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        parse_tokenize(body, VOCAB)


@pytest.mark.parametrize("body", [{}, {"tokens": [1], "token_ids": [1]}, {"tokens": "x"}, {"tokens": [1.0]}])
def test_detokenize_takes_exactly_one_list(body: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        parse_detokenize(body, VOCAB)


def test_special_tokens_are_added_to_texts_and_not_to_messages_by_default() -> None:
    assert parse_tokenize({"text": "a"}, VOCAB).add_special
    assert not parse_tokenize({"text": "a", "add_special_tokens": False}, VOCAB).add_special
    conversation = parse_tokenize({"messages": HI}, VOCAB).conversation
    assert conversation is not None
    assert not conversation.add_special


@pytest.mark.parametrize("rows", [schema.CHAT, schema.COMPLETIONS, schema.TOKENIZE, schema.DETOKENIZE])
def test_every_row_says_what_it_means_and_refused_rows_have_no_default(rows: dict[str, Field[object]]) -> None:
    for name, field in rows.items():
        assert field.name == name
        assert field.help
        if field.fate is not Fate.OBEYED:
            assert field.default is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(sorted({*schema.CHAT, *schema.COMPLETIONS, "x"})), JSON, max_size=6))
def test_any_body_is_a_request_or_a_bad_request(body: dict[str, object]) -> None:
    for parse in (parse_chat, parse_completion, parse_tokenize, parse_detokenize):
        for extra in ({}, {"messages": HI}, {"prompt": "x"}, {"tokens": [1]}):
            with contextlib.suppress(BadRequest):
                parse({**body, **extra}, VOCAB)
