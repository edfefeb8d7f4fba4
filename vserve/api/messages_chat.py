"""A request of /v1/messages in the words of /v1/chat/completions, and the other's complaints in its own.  Pure.

So everything that chat serves (tools, schemas, reasoning, sampling) is served here by the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import orjson

from vserve.api import messages_fields as row
from vserve.api import schema
from vserve.api.fields import Table, Values, read, without_effect
from vserve.api.nested import Checked
from vserve.api.prompts import Message
from vserve.api.requests import ChatRequest, parse_chat
from vserve.errors import BadRequest

_OWN_NAMES = {
    # field of chat: field here
    "stop": "stop_sequences",
    "user": "metadata.user_id",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
    "chat_template_kwargs": "thinking",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "max_completion_tokens": "max_tokens",
}
_TOOL_CHOICE: dict[str, object] = {"auto": "auto", "any": "required", "none": "none"}


def parse_messages(rows: Table, body: dict[str, object], vocab_size: int, strict: bool) -> ChatRequest:
    """body, which rows describes, as the chat request it means.  Raises BadRequest that names body's own fields."""
    values, unknown = read(body, rows, vocab_size, strict)
    given = (values[row.THINKING], values[row.METADATA], values[row.OUTPUT], values[row.TOOL_CHOICE])
    inner = [*_ignored(values[row.SYSTEM]), *_ignored(values[row.TURNS]), *_ignored(values[row.TOOLS])]
    for checked in given:
        inner += checked.ignored if checked is not None else ()
    if strict and inner:
        raise without_effect(inner[0])
    fields = _chat_fields(values)
    with own_words():
        asked = parse_chat(fields, vocab_size, strict)
    theirs = [_OWN_NAMES.get(name, name) for name in asked.wanted.ignored]
    everything = tuple(dict.fromkeys((*unknown, *inner, *theirs)))
    return replace(asked, wanted=replace(asked.wanted, ignored=everything))


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """A BadRequest about a field of chat becomes one about the field it was made of."""
    try:
        yield
    except BadRequest as error:
        name, dot, rest = (error.param or "").partition(".")
        own = _OWN_NAMES.get(name)
        if own is None:
            raise
        raise BadRequest(error.message.replace(f"`{name}", f"`{own}"), param=own + dot + rest) from None


def _ignored(value: str | Sequence[Checked] | None) -> Iterator[str]:
    """The names without effect in blocks, at whatever depth."""
    if value is None or isinstance(value, str):
        return
    for checked in value:
        yield from checked.ignored
        content = checked.values[row.SAID]  # results and answers have a field of that name too, the rest has none
        if not isinstance(content, str):
            yield from _ignored(content)


def _chat_fields(values: Values) -> dict[str, object]:
    """The body of the chat request.  None stands for: not sent."""
    stop = values[row.STOP_SEQUENCES]
    made: dict[str, object] = {
        "model": values[schema.MODEL],
        "messages": _conversation(values),
        "max_completion_tokens": values[row.MAX_TOKENS],
        "stream": values[schema.STREAM],
        "temperature": values[row.TEMPERATURE],
        "top_p": values[row.TOP_P],
        "top_k": values[row.TOP_K],
        "stop": list(stop) or None,
    }
    made |= _thinking(values) | _tools(values)
    metadata, output = values[row.METADATA], values[row.OUTPUT]
    if metadata is not None:
        made["user"] = metadata.values[row.USER_ID]
    if output is not None:
        made["reasoning_effort"] = output.values[row.EFFORT]
        shape = output.values[row.FORMAT]
        if shape is not None:
            named = {"name": "answer", "schema": shape.values[row.SCHEMA], "strict": True}
            made["response_format"] = {"type": "json_schema", "json_schema": named}
    if values[row.TURNS][-1].tag == "assistant":  # the answer goes on with what is there of it
        made["continue_final_message"] = True
    return made


def _thinking(values: Values) -> dict[str, object]:
    thinking = values[row.THINKING]
    if thinking is None:
        return {}
    made: dict[str, object] = {"chat_template_kwargs": {"enable_thinking": thinking.tag != "disabled"}}
    if thinking.tag == "enabled":
        budget, limit = thinking.values[row.BUDGET], values[row.MAX_TOKENS]
        if budget is not None and limit is not None and budget >= limit:
            raise BadRequest(
                f"`thinking.budget_tokens` must be below `max_tokens` ({limit}), got {budget}.",
                param="thinking.budget_tokens",
            )
        made["thinking_token_budget"] = budget
    return made


def _tools(values: Values) -> dict[str, object]:
    made: dict[str, object] = {}
    if values[row.TOOLS]:
        made["tools"] = [_tool(checked.values) for checked in values[row.TOOLS]]
    chosen = values[row.TOOL_CHOICE]
    if chosen is None:
        return made
    if chosen.tag == "tool":
        made["tool_choice"] = {"type": "function", "function": {"name": chosen.values[row.CHOSEN]}}
    else:
        made["tool_choice"] = _TOOL_CHOICE[chosen.tag]
    if chosen.values[row.ONE_CALL]:
        made["parallel_tool_calls"] = False
    return made


def _tool(tool: Values) -> dict[str, object]:
    function: dict[str, object] = {"name": tool[row.TOOL_NAME], "parameters": tool[row.TOOL_INPUT]}
    if tool[row.TOOL_HELP] is not None:
        function["description"] = tool[row.TOOL_HELP]
    if tool[row.TOOL_STRICT]:
        function["strict"] = True
    return {"type": "function", "function": function}


def _conversation(values: Values) -> list[Message]:
    system = values[row.SYSTEM]
    messages: list[Message] = [] if not system else [{"role": "system", "content": _content(system)}]
    turns = values[row.TURNS]
    for i, turn in enumerate(turns):
        if turn.tag == "assistant":
            messages.append(_answer(turn.values[row.ANSWERED], f"messages[{i}].content", last=turn is turns[-1]))
        else:
            messages += _question(turn.values[row.SAID])
    return messages


def _content(blocks: row.Blocks) -> object:
    """Text blocks as chat takes them: one is a string, since not every template reads lists."""
    if isinstance(blocks, str):
        return blocks
    texts = [block.values[row.BLOCK_TEXT] for block in blocks]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _question(content: row.Blocks) -> list[Message]:
    """A user's turn: each result is a message of its own, and so is the text between two of them."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    made: list[Message] = []
    texts: list[Checked] = []
    for block in content:
        if block.tag == "text":
            texts.append(block)
            continue
        if texts:
            made.append({"role": "user", "content": _content(tuple(texts))})
            texts = []
        result = _content(block.values[row.RESULT] or "")
        made.append({"role": "tool", "tool_call_id": block.values[row.RESULT_OF], "content": result})
    if texts:
        made.append({"role": "user", "content": _content(tuple(texts))})
    return made


def _answer(content: row.Blocks, path: str, *, last: bool) -> Message:
    """An assistant's turn.  The last one can only be text: the model goes on with it."""
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts = tuple(block for block in content if block.tag == "text")
    message: Message = {"role": "assistant", "content": _content(texts) if texts else None}
    thoughts = [block.values[row.THOUGHT] for block in content if block.tag == "thinking"]
    calls = [_call(block.values) for block in content if block.tag == "tool_use"]
    if last and (calls or not texts):
        raise BadRequest(
            f"`{path}` of a last message of the assistant must be text that the answer goes on with; "
            "a tool_use is followed by its tool_result.",
            param=path,
        )
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(call: Values) -> dict[str, object]:
    function: dict[str, object] = {
        "name": call[row.CALL_NAME],
        "arguments": orjson.dumps(call[row.CALL_INPUT]).decode(),
    }
    return {"id": call[row.CALL_ID], "type": "function", "function": function}
