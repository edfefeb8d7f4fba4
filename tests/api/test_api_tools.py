"""Tools and reasoning over a real socket: what the model is told, how its answer is split, and how that is worded."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from tests import fakes_api
from tests.fakes_api import EOS, LETTERS, Stand, says

standing = partial(fakes_api.standing, context=2048)

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ö"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
QWEN = """{%- if tools %}{{ '[tools ' + (tools | length) | string + ']' }}{% endif %}
{%- for m in messages %}{{ '[' + m.role + ']' }}{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + ':' + c.function.arguments.city }}
{{- '</tool_call>' }}
{%- endfor %}{% endfor %}{%- if add_generation_prompt %}{{ '[assistant]' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""


def ask(stand: Stand, **fields: Any) -> Any:
    reply = stand.post(PATH, {"messages": HI, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def prompt(stand: Stand) -> str:
    return LETTERS.decode(stand.engine.requests[-1].prompt)


def folded(events: list[Any], index: int = 0) -> tuple[dict[str, Any], str | None]:
    """The message that the deltas of a stream add up to, as a client adds them, and the finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "reasoning_content": "", "calls": []}
    finish = None
    for event in events[:-1]:
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            finish = choice["finish_reason"] or finish
            for key, value in choice["delta"].items():
                if key == "tool_calls":
                    (part,) = value
                    if "id" in part:
                        assert part["index"] == len(message["calls"])
                        assert part["type"] == "function"
                        assert part["function"]["arguments"] == ""
                        message["calls"].append([part["function"]["name"], ""])
                    else:
                        message["calls"][part["index"]][1] += part["function"]["arguments"]
                elif key == "function_call":
                    message.setdefault("function_call", {"name": "", "arguments": ""})
                    for name, text in value.items():
                        message["function_call"][name] += text
                elif key != "role":
                    message[key] += value
    return message, finish


def called(message: dict[str, Any]) -> list[list[str]]:
    return [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]


# what the model says, the content, its calls
SAID: list[tuple[str, str | None, list[list[str]]]] = [
    (CALL, None, [["get_weather", '{"city": "Ö"}']]),
    (f"Well.\n\n{CALL}\n{NOW}", "Well.", [["get_weather", '{"city": "Ö"}'], ["now", "{}"]]),
    ("Hello", "Hello", []),
    ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
]


@pytest.mark.parametrize(("text", "content", "calls"), SAID)
def test_calls_are_told_from_content_whole_and_streamed(text: str, content: str | None, calls: list[list[str]]) -> None:
    with standing(says(text + EOS)) as stand:
        choice = ask(stand, tools=TOOLS)["choices"][0]
        assert choice["message"]["content"] == content
        assert called(choice["message"]) == calls
        assert ("tool_calls" in choice["message"]) == bool(calls)
        assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
        assert len({call["id"] for call in choice["message"].get("tool_calls", [])}) == len(calls)
        message, finish = folded(stand.events(PATH, {"messages": HI, "tools": TOOLS}))
        assert (message["content"] or None, message["calls"]) == (content, calls)
        assert finish == choice["finish_reason"]


def test_streamed_arguments_arrive_while_they_are_written() -> None:
    with standing(says(CALL + EOS), engine={"step_s": 0.01}) as stand:
        events = stand.events(PATH, {"messages": HI, "tools": TOOLS})
        deltas = [event["choices"][0]["delta"] for event in events[:-1]]
        calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert len(calls) > 3
        assert calls[0].keys() == {"index", "id", "type", "function"}
        assert all(call.keys() == {"index", "function"} for call in calls[1:])


def test_a_call_cut_off_is_content_when_whole_and_a_beginning_when_streamed() -> None:
    with standing(says(CALL)) as stand:
        fields = {"tools": TOOLS, "max_tokens": len(CALL) - 20}
        choice = ask(stand, **fields)["choices"][0]
        assert (choice["finish_reason"], called(choice["message"])) == ("length", [])
        assert CALL.startswith(choice["message"]["content"])
        message, finish = folded(stand.events(PATH, {"messages": HI, **fields}))
        assert finish == "length"
        assert message["calls"][0][0] == "get_weather"
        assert '{"city": "Ö"}'.startswith(message["calls"][0][1])


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_an_answer_ends_with_its_first(stream: bool) -> None:
    with standing(says(f"{CALL}\n{NOW}{EOS}")) as stand:
        fields = {"messages": HI, "tools": TOOLS, "parallel_tool_calls": False}
        if stream:
            message, finish = folded(stand.events(PATH, fields))
            calls = message["calls"]
        else:
            choice = ask(stand, **fields)["choices"][0]
            calls, finish = called(choice["message"]), choice["finish_reason"]
            assert choice["message"]["content"] is None
        assert (calls, finish) == ([["get_weather", '{"city": "Ö"}']], "tool_calls")


def test_functions_of_old_are_served_in_their_own_words() -> None:
    with standing(says(f"{CALL}\n{NOW}{EOS}")) as stand:
        choice = ask(stand, functions=[WEATHER])["choices"][0]
        assert choice["finish_reason"] == "function_call"
        assert choice["message"]["function_call"] == {"name": "get_weather", "arguments": '{"city": "Ö"}'}
        assert "tool_calls" not in choice["message"]
        message, finish = folded(stand.events(PATH, {"messages": HI, "functions": [WEATHER]}))
        assert (message["function_call"], finish) == (choice["message"]["function_call"], "function_call")
        ask(stand, functions=[WEATHER], function_call="none")
        assert "get_weather" not in prompt(stand)


def test_a_template_without_tools_is_told_of_them_in_messages() -> None:
    with standing() as stand:
        ask(stand, tools=TOOLS)
        said = prompt(stand)
        assert said.startswith("<|im_start|>system\n# Tools")
        for tool in TOOLS:
            assert json.dumps(tool, ensure_ascii=False) in said
        ask(stand, tools=TOOLS, messages=[{"role": "system", "content": "Be brief."}, *HI])
        assert prompt(stand).startswith("<|im_start|>system\nBe brief.\n\n# Tools")
        ask(stand, tools=TOOLS, tool_choice="none")
        assert prompt(stand) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


TURNS: list[dict[str, Any]] = [
    *HI,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
            {"id": "b", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rom"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "cold"},
    {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "warm"}]},
]


def test_earlier_calls_and_results_are_spelled_out_where_the_template_has_no_words_for_them() -> None:
    with standing() as stand:
        ask(stand, messages=TURNS)
        assert prompt(stand) == (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom"}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\ncold\n</tool_response>\n<tool_response>\nwarm\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_a_template_with_tools_gets_them_and_arguments_as_objects() -> None:
    with standing(template=QWEN) as stand:
        ask(stand, messages=TURNS, tools=TOOLS)
        assert prompt(stand) == (
            "[tools 2][user]hi[assistant]<tool_call>get_weather:Oslo</tool_call><tool_call>get_weather:Rom</tool_call>"
            "[tool]cold[tool]warm[assistant]"
        )
        legacy = [
            *HI,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"city": "Oslo"}'}},
            {"role": "function", "name": "f", "content": "cold"},
        ]
        ask(stand, messages=legacy)
        assert prompt(stand) == "[user]hi[assistant]<tool_call>f:Oslo</tool_call>[tool]cold[assistant]"


THOUGHT = "<think>\nHm, so.\n</think>\n\nYes."


def test_reasoning_is_told_from_the_answer_under_both_names_and_counted() -> None:
    with standing(says(THOUGHT + EOS), template=QWEN) as stand:
        body = ask(stand)
        message = body["choices"][0]["message"]
        assert (message["reasoning"], message["reasoning_content"], message["content"]) == (
            "Hm, so.",
            "Hm, so.",
            "Yes.",
        )
        counted = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
        # Letter by letter: the end of <think>, the line breaks, the thought and all of </think> but its last letter.
        assert counted == len("\nHm, so.\n</think") < body["usage"]["completion_tokens"]
        streamed, finish = folded(stand.events(PATH, {"messages": HI}))
        assert (streamed["reasoning"], streamed["reasoning_content"]) == ("Hm, so.", "Hm, so.")
        assert (streamed["content"], finish) == ("Yes.", "stop")
        message = ask(stand, include_reasoning=False)["choices"][0]["message"]
        assert (message["reasoning"], message["reasoning_content"], message["content"]) == (None, None, "Yes.")
        streamed, _ = folded(stand.events(PATH, {"messages": HI, "include_reasoning": False}))
        assert (streamed["reasoning"], streamed["content"]) == ("", "Yes.")


def test_calls_follow_reasoning() -> None:
    with standing(says(f"<think>I call {NOW}</think>\n{CALL}{EOS}"), template=QWEN) as stand:
        message = ask(stand, tools=TOOLS)["choices"][0]["message"]
        assert message["reasoning"] == f"I call {NOW}"
        assert (message["content"], called(message)) == (None, [["get_weather", '{"city": "Ö"}']])


def test_effort_turns_thinking_off_where_the_template_has_the_switch() -> None:
    with standing(says(THOUGHT + EOS), template=QWEN) as stand:
        assert ask(stand, reasoning_effort="none")["choices"][0]["message"]["content"] == THOUGHT
        assert prompt(stand).endswith("[assistant]<think>\n\n</think>\n\n")
        reply = stand.post(PATH, {"messages": HI, "reasoning_effort": "high"})
        assert reply.headers["x-ignored-params"] == "reasoning_effort"
        reply = stand.post(PATH, {"messages": HI, "reasoning_effort": "high", "chat_template_kwargs": {"a": 1}})
        assert prompt(stand).endswith("[assistant]")
    with standing(strict=True) as stand:
        assert stand.post(PATH, {"messages": HI, "reasoning_effort": "none"}).status_code == 200
        reply = stand.post(PATH, {"messages": HI, "reasoning_effort": "high"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "reasoning_effort")
    with standing(template="{{ reasoning_effort }}") as stand:
        assert "x-ignored-params" not in stand.post(PATH, {"messages": HI, "reasoning_effort": "high"}).headers
        assert prompt(stand) == "high"


def test_a_budget_without_reasoning_is_reported_and_one_that_cannot_be_kept_is_refused() -> None:
    with standing() as stand:
        reply = stand.post(PATH, {"messages": HI, "thinking_token_budget": 5})
        assert reply.headers["x-ignored-params"] == "thinking_token_budget"
    with standing(template=QWEN) as stand:
        reply = stand.post(PATH, {"messages": HI, "thinking_token_budget": 5})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "thinking_token_budget")


def test_parsers_can_be_chosen_and_switched_off() -> None:
    with standing(says(CALL + EOS), tool_call_parser="none") as stand:
        message = ask(stand, tools=TOOLS)["choices"][0]["message"]
        assert message["content"] == CALL
        reply = stand.post(PATH, {"messages": HI, "tools": TOOLS, "tool_choice": "required"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")
    with standing(says('[TOOL_CALLS] [{"name": "now", "arguments": {}}]' + EOS), tool_call_parser="mistral") as stand:
        call = ask(stand, tools=TOOLS)["choices"][0]["message"]["tool_calls"][0]
        assert (call["function"], len(call["id"])) == ({"name": "now", "arguments": "{}"}, 9)
    with standing(says("Hm.</think>Yes." + EOS), reasoning_parser="deepseek_r1") as stand:
        message = ask(stand)["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == ("Hm.", "Yes.")
    with standing(says(THOUGHT + EOS), template=QWEN, reasoning_parser="none") as stand:
        assert ask(stand)["choices"][0]["message"]["content"] == THOUGHT


def test_stop_strings_logprobs_and_ids_go_with_parts() -> None:
    with standing(says(THOUGHT + EOS), template=QWEN) as stand:
        choice = ask(stand, stop="so", logprobs=True, return_token_ids=True)["choices"][0]
        assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("Hm, ", None)
        assert choice["stop_reason"] == "so"
        assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == len("<think>\nHm, so")
        events = stand.events(PATH, {"messages": HI, "logprobs": True, "return_token_ids": True})
        ids = [id for event in events[1:-1] for id in event["choices"][0].get("token_ids", [])]
        assert LETTERS.decode(ids) == THOUGHT + EOS


def test_strict_that_cannot_be_kept_is_reported() -> None:
    strict = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    with standing(says("Hello" + EOS)) as stand:  # no grammars: the fake engine draws under no mask
        reply = stand.post(PATH, {"messages": HI, "tools": strict})
        assert (reply.status_code, reply.headers["x-ignored-params"]) == (200, "tools[].strict")
        reply = stand.post(PATH, {"messages": HI, "tools": strict, "tool_choice": "required"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")
