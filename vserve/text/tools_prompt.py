"""Tools for models whose chat template knows none: described and called in Hermes' form, in plain messages.

Owns that wording.  Tools are never dropped: a template that would not print them is given messages that say the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vserve.text.tools import HERMES

Message = dict[str, object]

_INSTRUCTIONS = """# Tools

You may call one or more functions. These are their signatures, one JSON object a line, within <tools></tools>:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and its arguments within <tool_call></tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def described(messages: Sequence[Message], tools: Sequence[Mapping[str, object]]) -> list[Message]:
    """messages with the tools described in the system message, which is made if there is none."""
    text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer"):
        return [{**first, "content": f"{_text(first)}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def spelled_out(messages: Sequence[Message]) -> list[Message]:
    """messages without tool calls and results of their own kind: both are text, results in the user's turn.

    Results one after the other share a turn, as templates with tools have them.
    """
    made: list[Message] = []
    joins = False
    for message in messages:
        if message.get("role") == "tool":
            result = f"<tool_response>\n{_text(message)}\n</tool_response>"
            if joins:
                made[-1] = {"role": "user", "content": f"{made[-1]['content']}\n{result}"}
            else:
                made.append({"role": "user", "content": result})
            joins = True
            continue
        joins = False
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            texts = [_text(message), *map(_call, calls)]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            made.append({**rest, "content": "\n".join(text for text in texts if text)})
        else:
            made.append(dict(message))
    return made


def _call(call: object) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else ("", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{HERMES.opening}\n{{"name": {json.dumps(name)}, "arguments": {written or "{}"}}}\n{HERMES.closing}'


def _text(message: Mapping[str, object]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""
