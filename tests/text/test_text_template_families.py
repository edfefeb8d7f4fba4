"""Prompts in the styles of the families that people serve equal those of transformers, whatever the conversation.

The templates of templates/ were written for these tests: each has the marks of its family and the features that the
family's own template uses.  The default model's is its real one.
"""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from vserve.errors import BadRequest
from vserve.text.template import ChatTemplate

Message = dict[str, object]

FOLDER = Path(__file__).parent / "templates"
STYLES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
TEXT_ARGUMENTS = ("deepseek",)
"""Styles whose templates join the arguments of a call as text."""
OURS = {name: ChatTemplate(source, bos_token="<s>", eos_token="</s>") for name, source in STYLES.items()}

TOOLS: list[Message] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wie <b>warm</b> & 'wo'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},
]
DOCUMENTS: list[Message] = [{"title": 'A "title"', "text": "größer"}, {"title": "B", "text": ""}]

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=24) | st.sampled_from(
    [
        "",
        " ",
        "\n\nspaced\t ",
        "<think>\nwhy\n</think>\n\nso",
        "{{ 1 }}{% raw %}",
        "<|im_end|>",
        "[INST]",
        "\u2028é你好",
    ]
)
arguments = st.dictionaries(words, words | st.integers() | st.none() | st.lists(st.booleans(), max_size=2), max_size=2)


@st.composite
def exchanges(draw: st.DrawFn) -> list[Message]:
    """A question and its answer, with calls of tools and their results between them or not."""
    messages: list[Message] = [{"role": "user", "content": draw(words)}]
    if draw(st.booleans()):
        ids = ["abcdefgh" + str(number) for number in range(draw(st.integers(1, 2)))]
        functions = [{"name": "weather", "arguments": json.dumps(draw(arguments), ensure_ascii=False)} for _ in ids]
        calls = [{"id": id, "type": "function", "function": made} for id, made in zip(ids, functions, strict=True)]
        messages.append({"role": "assistant", "content": draw(st.just("") | words), "tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": id, "name": "weather", "content": draw(words)} for id in ids]
    answer: Message = {"role": "assistant", "content": draw(words)}
    if draw(st.booleans()):
        answer["reasoning_content"] = draw(words)
    return [*messages, answer]


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    system: list[Message] = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    turns = [message for turn in draw(st.lists(exchanges(), max_size=2)) for message in turn]
    return [*system, *turns, {"role": "user", "content": draw(words)}]


def theirs(source: str, messages: list[Message], as_text: bool, **options: object) -> str | None:
    """What transformers makes of it, handed the arguments as objects, or as_text; None where the template refuses."""
    messages = copy.deepcopy(messages)
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) and not as_text else ():
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", **options}
    try:
        rendered: Any = render_jinja_template([messages], chat_template=source, **settings)
    except (jinja2.TemplateError, TypeError, ValueError):
        return None
    return str(rendered[0][0])


def ours(template: ChatTemplate, messages: list[Message], **options: Any) -> str | None:
    try:
        return template.render(messages, **options)
    except BadRequest:
        return None


@given(
    name=st.sampled_from(sorted(STYLES)),
    messages=conversations(),
    tools=st.sampled_from([None, TOOLS, TOOLS[:1]]),
    documents=st.sampled_from([None, DOCUMENTS]),
    generation=st.booleans(),
    extra=st.sampled_from([{}, {"enable_thinking": False}, {"enable_thinking": True}, {"date_string": "1 Jan"}]),
)
def test_any_conversation_reads_as_transformers_writes_it(
    name: str,
    messages: list[Message],
    tools: list[Message] | None,
    documents: list[Message] | None,
    generation: bool,
    extra: dict[str, object],
) -> None:
    before = copy.deepcopy(messages)
    options = {"tools": tools, "documents": documents, "add_generation_prompt": generation}
    wanted = theirs(STYLES[name], messages, name in TEXT_ARGUMENTS, **options, **extra)
    assert ours(OURS[name], messages, extra=extra, **options) == wanted
    assert messages == before


@given(name=st.sampled_from(sorted(STYLES)), messages=conversations(), begun=words)
def test_any_begun_answer_goes_on_as_transformers_lets_it(name: str, messages: list[Message], begun: str) -> None:
    messages = [*messages, {"role": "assistant", "content": begun}]
    wanted = theirs(STYLES[name], messages, name in TEXT_ARGUMENTS, continue_final_message=True)
    assert ours(OURS[name], messages, continue_final_message=True) == wanted


@given(messages=conversations(), generation=st.booleans())
def test_the_default_models_own_template_too(
    smollm_metadata: dict[str, object], messages: list[Message], generation: bool
) -> None:
    source = str(smollm_metadata["tokenizer.chat_template"])
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert ours(template, messages, add_generation_prompt=generation) == theirs(
        source, messages, False, add_generation_prompt=generation
    )


QUESTION: list[Message] = [{"role": "user", "content": "Hot in 東京?"}]
CALLED: list[Message] = [
    *QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "abcdefgh0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "東京"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefgh0", "content": "31"},
]
GOLDEN = {
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\nHot in 東京?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "weather", "parameters": {"city": "東京"}}<|eot_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"31"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
    "qwen2": "<|im_start|>user\nHot in 東京?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n31\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>user\nHot in 東京?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n31\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "mistral-v3": '<s>[INST]Hot in 東京?[/INST][TOOL_CALLS][{"name": "weather", "arguments": {"city": "東京"}, '
    '"id": "abcdefgh0"}]</s>[TOOL_RESULTS]{"content": "31", "call_id": "abcdefgh0"}[/TOOL_RESULTS]',
    "deepseek": '<s><|User|>Hot in 東京?<|call|>function<|sep|>weather\n{"city": "東京"}<|/call|>'
    "<|output|>31<|/output|>",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_call_and_its_result_read_so(name: str) -> None:
    assert OURS[name].render(CALLED).endswith(GOLDEN[name])


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("llama3", "Year: 1999\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"),
        ("mistral-v1", "<s>[INST] Hi [/INST]\n"),
        ("gemma2", "<s><start_of_turn>user\nHi<end_of_turn>\n"),
        ("gemma3", "<s><start_of_turn>user\nHi<end_of_turn>\n"),
        ("phi3", "<|user|>\nHi<|end|>\n</s>"),
        ("phi4", "<|user|>Hi<|end|></s>"),
        ("command", "<s><|User|>Hi<|END|>"),
    ],
)
def test_a_short_prompt_reads_so(name: str, end: str) -> None:
    template = ChatTemplate(STYLES[name], bos_token="<s>", eos_token="</s>", now=lambda: datetime(1999, 1, 2))
    assert template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=False).endswith(end)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_reaches_the_template_under_each_of_its_names(key: str) -> None:
    messages: list[Message] = [*QUESTION, {"role": "assistant", "content": "Yes", key: "It is August."}]
    for name in ("reasoning_content", "thinking"):
        source = f"{{% for m in messages %}}{{{{ m.{name} if m.{name} is defined }}}}{{% endfor %}}"
        assert ChatTemplate(source).render(messages) == "It is August." == theirs(source, messages, False)
    assert "<think>\nIt is August.\n</think>\n\nYes" in OURS["qwen3"].render(messages)
    assert set(messages[-1]) == {"role", "content", key}


@pytest.mark.parametrize(
    ("source", "as_text"),
    [
        ("{{ 'x' + c.function.arguments }}", True),
        ("{{ c['function']['arguments'] ~ 'x' }}", True),
        ("{{ c.function.arguments }}", True),
        ("{% set a = c.function.arguments %}{{ 'x' + a + 'y' }}", True),
        ("{{ c.function.arguments | tojson }}", False),
        ("{{ 'x' + c.function.arguments | tojson }}", False),
        ("{{ c.function | tojson }}", False),
        ("{% if c.function.arguments is string %}{{ c.function.arguments }}{% endif %}", False),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}{% endfor %}", False),
    ],
)
def test_arguments_are_text_only_where_the_template_joins_them_as_text(source: str, as_text: bool) -> None:
    probe = "{% for c in messages[1].tool_calls %}" + source + "{{ '' if c.function.arguments is mapping else '!' }}"
    if "is string" in source:  # asks itself; the probe would be a second question
        probe = "{% for c in messages[1].tool_calls %}" + source.replace("%}{{", "%}!{{")
    assert ("!" in ChatTemplate(probe + "{% endfor %}").render(CALLED)) is as_text


@pytest.mark.parametrize(
    "source", ["{% set n = namespace(_x=1) %}", "{% set n = namespace() %}{% set n.__len__ = 1 %}"]
)
def test_a_namespace_takes_no_names_of_pythons(source: str) -> None:
    with pytest.raises(BadRequest, match="underscore"):
        ChatTemplate(source).render(QUESTION)
    assert theirs(source, QUESTION, False) is None
