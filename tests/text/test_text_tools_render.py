"""Conversations with tools render as transformers renders them, in the styles of the families that have calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vserve.text.habits import habits_of
from vserve.text.reasoning import ReasoningStyle
from vserve.text.template import ChatTemplate
from vserve.text.tokenizer import Tokenizer
from vserve.text.tools import HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, CallSyntax
from vserve.text.tools_prompt import described, spelled_out

# One template for each style, with the features that the families' own ones use, written for these tests.
LLAMA3 = """{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- system + '<|eot_id|>' }}
{%- if tools is not none %}
    {%- set first = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer in the form ' }}
    {{- '{"name": function name, "parameters": its arguments}.\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
    {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nCall with <tool_call></tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
MISTRAL_V3 = """{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and (message == users[-1]) %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != 'return' %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ', ' }}{%- endif %}
                {%- endfor %}
                {{- '}}' }}{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' }}{%- endif %}
            {%- endfor %}
            {{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message['tool_calls'] is defined and message['tool_calls'] is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for tool_call in message['tool_calls'] %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
HERMES_2 = """{%- macro kind(schema) %}{{- {'string': 'str', 'integer': 'int'}[schema.type] }}{%- endmacro %}
{{- bos_token }}{{- '<|im_start|>system\\nFunctions: <tools> ' }}
{%- for tool in tools %}
    {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
    {{- '{"name": "' + tool.name + '", "is": "' + tool.name + '(' }}
    {%- for name, schema in tool.parameters.properties | items %}{{- name + ': ' + kind(schema) }}
        {%- if not loop.last %}{{- ', ' }}{%- endif %}
    {%- endfor %}
    {{- ')", "parameters": ' }}{{- tool.parameters | tojson }}{{- '} ' }}
{%- endfor %}
{{- '</tools><|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') or (message.role == 'assistant' and message.tool_calls is not defined) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' }}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- set name = message.name | default('function') %}
        {{- '<|im_start|>tool\\n<tool_response>\\n{"name": "' + name + '", "content": ' + message.content | tojson }}
        {{- '}\\n</tool_response>\\n<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TEMPLATES = {"llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL_V3, "hermes": HERMES_2}

TOOLS: list[dict[str, object]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <of> a city & more.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


def call(arguments: object, id: str = "abcdefgh1") -> dict[str, object]:
    return {"id": id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


# As clients send them: arguments are JSON text, and a message with calls may have no content.
TURNS: list[dict[str, object]] = [
    {"role": "user", "content": "How is Zürich?"},
    {"role": "assistant", "content": None, "tool_calls": [call('{"city": "Zürich", "days": 2}')]},
    {"role": "tool", "tool_call_id": "abcdefgh1", "name": "get_weather", "content": '{"sky": "grey"}'},
    {"role": "assistant", "content": "Grey."},
    {"role": "user", "content": "And Rome?"},
]


def judged(source: str, messages: list[dict[str, Any]], **options: object) -> str:
    """What transformers makes of it; there a caller gives arguments as an object."""
    parsed: list[dict[str, Any]] = copy.deepcopy(messages)
    for message in parsed:
        for made in message.get("tool_calls", []):
            made["function"]["arguments"] = {"city": "Zürich", "days": 2}
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, **options}
    rendered: Any = render_jinja_template([parsed], chat_template=source, **settings)
    return str(rendered[0][0])


@pytest.mark.parametrize("tools", [TOOLS, None])
@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_and_results_render_as_transformers_renders_them(
    name: str, tools: list[dict[str, object]] | None
) -> None:
    if name == "hermes" and tools is None:
        tools = []
    source = TEMPLATES[name]
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert template.knows("tools")
    assert template.knows("tool_calls")
    before = copy.deepcopy(TURNS)
    assert template.render(TURNS, tools=tools) == judged(source, TURNS, tools=tools)
    assert before == TURNS


def test_arguments_that_are_no_json_stay_text() -> None:
    turns: list[dict[str, object]] = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call("oops {")]}]
    assert '"arguments": oops {}' in ChatTemplate(QWEN).render(turns)


LETTERS = Tokenizer.of_bytes(256)


@pytest.mark.parametrize(
    ("source", "syntax", "reasoning"),
    [
        (LLAMA3, LLAMA3_JSON, None),
        (QWEN, HERMES, ReasoningStyle.QWEN3),
        (MISTRAL_V3, MISTRAL, None),
        (MISTRAL_V3.replace("'[TOOL_CALLS] ['", "'[TOOL_CALLS]' + name + '[ARGS]'"), MISTRAL_NAMED, None),
        (HERMES_2, HERMES, None),
        ("{{ messages[0].content }}", HERMES, None),
    ],
)
def test_a_models_habits_follow_from_its_template(
    source: str, syntax: CallSyntax, reasoning: ReasoningStyle | None
) -> None:
    habits = habits_of(ChatTemplate(source), LETTERS, "auto", "auto")
    assert (habits.syntax, habits.reasoning) == (syntax, reasoning)
    assert habits_of(ChatTemplate(source), LETTERS, "none", "none").syntax is None
    assert habits_of(ChatTemplate(source), LETTERS, "llama3_json", "deepseek_r1").syntax is LLAMA3_JSON


def test_a_template_for_tools_tells_of_habits_too() -> None:
    template = ChatTemplate("{{ messages }}", for_tools=ChatTemplate(MISTRAL_V3))
    assert habits_of(template, LETTERS, "auto", "auto").syntax is MISTRAL


def test_what_a_template_lacks_is_said_in_messages() -> None:
    plain = spelled_out(TURNS)
    assert [turn["role"] for turn in plain] == ["user", "assistant", "user", "assistant", "user"]
    assert plain[1]["content"] == (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
    )
    assert plain[2]["content"] == '<tool_response>\n{"sky": "grey"}\n</tool_response>'
    told = described(plain, TOOLS)
    assert told[0]["role"] == "system"
    assert "The weather <of> a city & more." in str(told[0]["content"])
    assert told[1:] == plain
    again = described(told, TOOLS)
    assert len(again) == len(told)
    assert str(again[0]["content"]).startswith(str(told[0]["content"]))
