"""Chat templates render as transformers renders them, and a hostile one ends as a refusal."""

from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vserve.errors import BadRequest, StartupError
from vserve.text.sandbox import Bounds
from vserve.text.template import ChatTemplate, ContentFormat, find_templates, missing_template, read_template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# One template for each shape that published models use, written for these tests.
BRACKETS = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set lead = messages[0].content ~ '\n\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set lead = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- '[INST] ' ~ (lead if loop.first else '') ~ turn.content | trim ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ turn.content | trim ~ eos_token }}
    {%- endif %}
{%- endfor %}"""
HEADERS = """{% set ns = namespace(first=true) %}
{%- macro header(role) %}<|start|>{{ role }}<|end|>

{% endmacro %}
{{- bos_token -}}
{%- if tools is not none and tools is defined %}
{{- header('system') -}}
Functions:
{% for tool in tools %}
{{ tool.function | tojson(indent=2) }}
{% endfor %}
<|eot|>
{%- endif %}
{%- for message in messages %}
{{- header(message.role) }}
{%- if message.tool_calls is defined and message.tool_calls %}
{%- for call in message.tool_calls %}
{{- '{"name": "' + call.function.name + '", "parameters": ' }}{{ call.function.arguments | tojson }}}
{%- endfor %}
{%- elif message.content is none %}
{%- else %}
{%- generation %}{{ message.content | trim }}{% endgeneration %}
{%- endif %}
{{- '<|eot|>' }}
{%- set ns.first = false %}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}"""
PARTS = """{%- for message in messages -%}
<{{ message['role'] }}>
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] -%}{%- if part.type == 'text' %}({{ part.text }}){%- endif -%}
{%- endfor -%}{%- endif %}
{% endfor -%}
{% if add_generation_prompt %}<assistant>{% endif %}"""
THINKING = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{% set ns.last = messages|length - 1 - loop.index0 %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if '</think>' in content and loop.index0 < ns.last %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '[' + message.role + ']' + content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{%- endif %}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "brackets": BRACKETS,
    "headers": HEADERS,
    "parts": PARTS,
    "thinking": THINKING,
    "documents": "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}{{ messages[-1].content }}",
}
CONVERSATIONS: dict[str, list[dict[str, object]]] = {
    "one": [{"role": "user", "content": "Hello"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " spaced \n"}],
    "turns": [
        {"role": "user", "content": "héllo <b>&'\"你好"},
        {"role": "assistant", "content": "<think>x</think>\nyes"},
        {"role": "user", "content": "{{ messages }} {% raw %}"},
    ],
    "empty": [{"role": "user", "content": ""}],
}
TOOLS: list[dict[str, object]] = [
    {"type": "function", "function": {"name": "f", "description": "ü<>&", "parameters": {"type": "object"}}}
]


def judged(source: str, messages: list[dict[str, object]], **options: object) -> str:
    """What transformers makes of it."""
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, **options}
    rendered: Any = render_jinja_template([copy.deepcopy(messages)], chat_template=source, **settings)
    return str(rendered[0][0])


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation", [True, False])
def test_a_prompt_equals_that_of_transformers(name: str, conversation: str, generation: bool) -> None:
    template = ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    messages = CONVERSATIONS[conversation]
    documents = [{"title": "T", "text": "é"}]
    before = copy.deepcopy(messages)
    assert template.render(messages, tools=TOOLS, documents=documents, add_generation_prompt=generation) == judged(
        TEMPLATES[name], messages, tools=TOOLS, documents=documents, add_generation_prompt=generation
    )
    assert messages == before


@pytest.mark.parametrize("conversation", [name for name in CONVERSATIONS if name != "empty"])
@pytest.mark.parametrize("name", ["chatml", "brackets", "headers", "parts", "thinking"])
@pytest.mark.parametrize("ending", ["Sure, the", "Sure, the ", "Sure,\n"])
def test_a_continued_message_equals_that_of_transformers(name: str, conversation: str, ending: str) -> None:
    messages: list[dict[str, object]] = [*CONVERSATIONS[conversation], {"role": "assistant", "content": ending}]
    template = ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    ours = template.render(messages, continue_final_message=True)
    assert ours == judged(TEMPLATES[name], messages, continue_final_message=True, add_generation_prompt=False)
    assert ours.endswith(ending.strip() if name in ("brackets", "headers") else ending)


def test_the_default_models_own_template_works(smollm_metadata: dict[str, object]) -> None:
    source = smollm_metadata["tokenizer.chat_template"]
    assert isinstance(source, str)
    template = ChatTemplate(source, bos_token="<|im_start|>", eos_token="<|im_end|>")
    assert template.content_format is ContentFormat.STRING
    for messages in CONVERSATIONS.values():
        assert template.render(messages) == judged(source, messages)


@pytest.mark.parametrize("extra", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_extra_variables_reach_the_template(extra: dict[str, object]) -> None:
    messages = CONVERSATIONS["one"]
    assert ChatTemplate(THINKING).render(messages, extra=extra) == judged(THINKING, messages, **extra)


def test_extra_variables_do_not_replace_the_named_ones() -> None:
    template = ChatTemplate("{{ messages | length }}{{ bos_token }}{{ tools }}", bos_token="<s>")
    extra = {"messages": [], "bos_token": "x", "tools": "y", "count_step": "z"}
    assert template.render(CONVERSATIONS["turns"], extra=extra) == "3<s>None"


def test_an_absent_token_is_undefined() -> None:
    template = ChatTemplate("{{ bos_token is defined }}{{ pad_token }}", special_tokens={"pad_token": "<p>"})
    assert template.render([]) == "False<p>"


def test_the_clock_is_the_one_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render([]) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, ContentFormat.STRING),
        (BRACKETS, ContentFormat.STRING),
        (THINKING, ContentFormat.STRING),
        (PARTS, ContentFormat.PARTS),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", ContentFormat.PARTS),
        (
            "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{% endfor %}{% endfor %}",
            ContentFormat.PARTS,
        ),
        ("{% macro r(content) %}{% for p in content %}{% endfor %}{% endmacro %}", ContentFormat.PARTS),
        ("{% for p in m.content | selectattr('type', 'eq', 'text') %}{% endfor %}", ContentFormat.PARTS),
        ("{% for p in m.content.split('x') %}{% endfor %}", ContentFormat.STRING),
        ("{% for t in m.tool_calls %}{{ m.content }}{% endfor %}", ContentFormat.STRING),
    ],
)
def test_the_content_format_follows_from_the_loops(source: str, expected: ContentFormat) -> None:
    assert ChatTemplate(source).content_format is expected


def test_parts_become_text_where_the_template_takes_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<|im_end|>" in ChatTemplate(CHATML).render([{"role": "user", "content": parts}])


def test_parts_stay_parts_where_the_template_loops_over_them() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "<user>(one)(two)" in ChatTemplate(PARTS).render([{"role": "user", "content": parts}])
    # A template that never asks whether the content is a string gets a list of one part.
    source = "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": "plain"}]) == "(plain)"


def test_a_list_of_parts_can_be_continued() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": parts},
    ]
    assert ChatTemplate(PARTS).render(messages, continue_final_message=True).endswith("(one)(two")
    assert parts[1]["text"] == "two"


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": "assistant"}])
def test_a_message_without_content_is_empty_text_or_none(message: dict[str, object]) -> None:
    assert "assistant\n<|im_end|>" in ChatTemplate(CHATML).render([message])
    source = "{% for m in messages %}{{ m.content is none }}{% endfor %}"
    assert ChatTemplate(source).render([message]) == "True"


def test_tool_arguments_arrive_as_an_object() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert '"parameters": {"a": "é"}' in ChatTemplate(HEADERS).render(messages)
    assert isinstance(call["function"], dict)
    assert call["function"]["arguments"] == '{"a": "é"}'
    broken = {"function": {"name": "f", "arguments": "{oops"}}
    assert '"{oops"' in ChatTemplate(HEADERS).render([{"role": "assistant", "tool_calls": [broken]}])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no system role here') }}", "no system role here"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nests too deeply"),
    ],
)
def test_a_template_that_refuses_is_the_requests_error(source: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        ChatTemplate(source).render(CONVERSATIONS["one"])
    assert caught.value.param == "messages"
    assert len(caught.value.message) < 300


LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}"
ENDS = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        f"{LOOPS}{ENDS}",
        f"{LOOPS}x{ENDS}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for a in range(99) %}{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for a in range(99) %}{% set ns.s = ns.s|replace('x', ns.s) %}{% endfor %}",
        "{% set s = 'x' * 900000 %}{{ ([s] * 900000) | join }}",
        "{% set s = 'x' * 900000 %}{{ s.join([1] * 900000) }}",
        "{{ 'x' * 10000000000 }}",
        "{{ 10000000000 * [1] }}",
        "{{ 'x'.ljust(10000000000) }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10000000000) }}",
        "{{ '{:10000000000}'['format'](1) }}",
        "{{ ('{:10000000000}' | attr('format'))(1) }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ range(10000000000) }}",
    ],
)
@pytest.mark.promise("R13", "fault: endless template", "input: template from the request")
def test_a_template_that_would_run_or_grow_for_ever_is_refused(source: str) -> None:
    template = ChatTemplate(source, bounds=Bounds(chars=2**20, steps=100_000, time_s=30))
    with pytest.raises(BadRequest, match="refused"):
        template.render(CONVERSATIONS["one"])


@pytest.mark.promise("fault: endless template")
def test_a_template_out_of_time_is_refused() -> None:
    template = ChatTemplate(f"{LOOPS}{ENDS}", bounds=Bounds(time_s=0))
    with pytest.raises(BadRequest, match="more than 0 s"):
        template.render([])


def test_formatting_of_a_usual_size_works() -> None:
    source = "{{ '%05.2f|%s' % (1.5, 'x') }} {{ '%d' | format(3) }} {{ '{:>4}'.format('a') }} {{ 2 ** 8 }} {{ 7 % 4 }}"
    assert ChatTemplate(source).render([]) == judged(source, [])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for m in messages %}", "line 1"),
        ("a\nb {{ x", "line 2"),
        ("{% unknown %}", "unknown"),
        ("{{ x | nofilter }}", "nofilter"),
        ("x" * (2**20 + 1), "characters"),
        ("{{ " + "(" * 10_000 + ")" * 10_000 + " }}", "compiled"),
    ],
)
def test_a_broken_template_stops_the_start_with_one_line(source: str, words: str) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]],
)
def test_nothing_to_continue_is_the_clients_error(messages: list[dict[str, object]]) -> None:
    source = (
        "{% for m in messages %}{% if m.content is none %}{% endif %}{% for p in m.content %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(BadRequest, match="continue_final_message"):
        ChatTemplate(source).render(messages, continue_final_message=True)


def test_a_template_that_drops_the_last_message_cannot_continue_it() -> None:
    with pytest.raises(BadRequest, match="does not keep the last message"):
        ChatTemplate("{{ messages[0].content }}").render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], continue_final_message=True
        )


def test_threads_may_share_a_template() -> None:
    template = ChatTemplate(CHATML, bounds=Bounds(steps=50))
    conversations = [[{"role": "user", "content": f"{n}"}] * 40 for n in range(64)]
    start = threading.Barrier(4)

    def render(part: int) -> list[str]:
        start.wait()
        return [template.render(messages) for messages in conversations[part::4]]

    with ThreadPoolExecutor(4) as pool:
        for part, rendered in enumerate(pool.map(render, range(4))):
            assert rendered == [template.render(messages) for messages in conversations[part::4]]


def test_the_answer_for_a_model_without_a_template_says_what_works() -> None:
    assert "/v1/completions" in missing_template().message


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"tokenizer_config.json": "{}"}, {}),
        ({"tokenizer_config.json": '{"chat_template": null}'}, {}),
        ({"tokenizer_config.json": '{"chat_template": "A"}'}, {"default": "A"}),
        (
            {"tokenizer_config.json": json.dumps({"chat_template": [
                {"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]})},
            {"default": "A", "tool_use": "B"},
        ),
        ({"chat_template.json": '{"chat_template": "C"}', "tokenizer_config.json": "{}"}, {"default": "C"}),
        ({"chat_template.jinja": "D", "tokenizer_config.json": '{"chat_template": "A"}'}, {"default": "D"}),
        ({"chat_template.jinja": "D", "additional_chat_templates/rag.jinja": "E"}, {"default": "D", "rag": "E"}),
    ],
)  # fmt: skip
def test_templates_are_found_where_model_folders_keep_them(
    tmp_path: Path, files: dict[str, str], expected: dict[str, str]
) -> None:
    write(tmp_path, files)
    assert find_templates(tmp_path) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": '{"chat_template": 3}'},
        {"tokenizer_config.json": '{"chat_template": [{"name": "default"}]}'},
        {"tokenizer_config.json": "{"},
        {"chat_template.json": "[]"},
        {"chat_template.jinja": "\udcff"},
    ],
)
def test_an_unreadable_template_names_its_file(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    with pytest.raises(StartupError, match=next(iter(files))):
        find_templates(tmp_path)


@pytest.mark.parametrize("given", ["{{ messages[0].content }}", "{% for m in messages %}\n{{ m }}\n{% endfor %}" * 200])
def test_a_template_may_be_given_as_a_file_or_as_it_is(tmp_path: Path, given: str) -> None:
    write(tmp_path, {"own.jinja": given})
    assert read_template(given) == read_template(str(tmp_path / "own.jinja")) == given


@pytest.mark.parametrize("given", ["", "nowhere.jinja", "chatml", "x" * 5000, "a\0b"])
def test_what_is_neither_a_file_nor_a_template_is_one_line(given: str) -> None:
    with pytest.raises(StartupError, match=r"--chat-template .* is neither a file nor a template") as caught:
        read_template(given)
    assert len(str(caught.value)) < 400


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
