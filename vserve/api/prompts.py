"""The two kinds of field that carry what the model reads: prompts and chat messages.

Knows the shapes clients send, nothing of tokenizers or templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from vserve.api.fields import Schema, Text, TokenIds, or_null, wrong
from vserve.errors import BadRequest, shorten

Prompt = str | list[int]
"""One prompt: text, or checked token ids."""

Message = dict[str, object]
"""One chat message: role and content are always there; content is a string, a list of text parts, or None.

Calls are in tool_calls and results in messages of role tool, whichever form they came in."""

PROMPT_LIMIT = 1024
MESSAGE_LIMIT = 4096
PROMPT_TOKEN_LIMIT = 2**20

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True, slots=True)
class Prompts:
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""

    max_items: int = PROMPT_LIMIT

    def check(self, value: object, path: str, vocab_size: int) -> tuple[Prompt, ...]:
        if type(value) is str:
            return (value,)
        if not isinstance(value, list):
            raise wrong(path, "a string, a list of strings, a list of token ids or a list of such lists", value)
        if not value:
            raise BadRequest(f"`{path}` is an empty list; give at least one prompt.", param=path)
        if type(value[0]) is str or isinstance(value[0], list):
            if len(value) > self.max_items:
                raise BadRequest(f"`{path}` takes at most {self.max_items} prompts, got {len(value)}.", param=path)
            return tuple(_prompt(item, f"{path}[{i}]", type(value[0]), vocab_size) for i, item in enumerate(value))
        return (TokenIds(PROMPT_TOKEN_LIMIT).check(value, path, vocab_size),)

    def schema(self) -> Schema:
        text: Schema = {"type": "string"}
        ids = {**TokenIds(PROMPT_TOKEN_LIMIT).schema(), "minItems": 1}
        return {"anyOf": [text, _many(text, self.max_items, 1), ids, _many(ids, self.max_items, 1)]}


def _prompt(item: object, path: str, kind: type, vocab_size: int) -> Prompt:
    if type(item) is not kind:
        raise wrong(path, "a string" if kind is str else "a list of token ids", item)
    if isinstance(item, str):
        return item
    if not item:
        raise BadRequest(f"`{path}` is an empty list; a prompt needs at least one token.", param=path)
    return TokenIds(PROMPT_TOKEN_LIMIT).check(item, path, vocab_size)


@dataclass(frozen=True, slots=True)
class Texts:
    """A string or a list of strings; a list stays a list."""

    max_items: int = PROMPT_LIMIT

    def check(self, value: object, path: str, vocab_size: int) -> str | tuple[str, ...]:
        if type(value) is str:
            return value
        if not isinstance(value, list):
            raise wrong(path, "a string or a list of strings", value)
        if len(value) > self.max_items:
            raise BadRequest(f"`{path}` takes at most {self.max_items} texts, got {len(value)}.", param=path)
        texts: list[str] = []
        for i, item in enumerate(value):
            if type(item) is not str:
                raise wrong(f"{path}[{i}]", "a string", item)
            texts.append(item)
        return tuple(texts)

    def schema(self) -> Schema:
        text: Schema = {"type": "string"}
        return {"anyOf": [text, _many(text, self.max_items, 0)]}


@dataclass(frozen=True, slots=True)
class Documents:
    """A list of strings or of objects with a string text; other keys of an object are not read."""

    max_items: int

    def check(self, value: object, path: str, vocab_size: int) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise wrong(path, "a list of strings or of objects with a text", value)
        if not value:
            raise BadRequest(f"`{path}` is an empty list; give at least one document.", param=path)
        if len(value) > self.max_items:
            raise BadRequest(f"`{path}` takes at most {self.max_items} documents, got {len(value)}.", param=path)
        texts: list[str] = []
        for i, item in enumerate(value):
            text = item.get("text") if isinstance(item, dict) else item
            if type(text) is not str:
                raise wrong(f"{path}[{i}]", "a string or an object with a string text", item)
            texts.append(text)
        return tuple(texts)

    def schema(self) -> Schema:
        text: Schema = {"type": "string"}
        item: Schema = {"type": "object", "properties": {"text": text}, "required": ["text"]}
        return _many({"anyOf": [text, item]}, self.max_items, 1)


@dataclass(frozen=True, slots=True)
class Messages:
    """A conversation: objects with a role and text content; further keys reach the template as they are."""

    max_items: int = MESSAGE_LIMIT

    def check(self, value: object, path: str, vocab_size: int) -> tuple[Message, ...]:
        if not isinstance(value, list):
            raise wrong(path, "a list of messages", value)
        if not value:
            raise BadRequest(f"`{path}` is empty; give at least one message.", param=path)
        if len(value) > self.max_items:
            raise BadRequest(f"`{path}` takes at most {self.max_items} messages, got {len(value)}.", param=path)
        return tuple(_with_tool_calls([_message(item, f"{path}[{i}]") for i, item in enumerate(value)]))

    def schema(self) -> Schema:
        return _many(_message_schema(), self.max_items, 1)


CALL_LIMIT = 128
"""Most calls in one message."""

_ROLE = Text(64, 1)


def _message(item: object, path: str) -> Message:
    if not isinstance(item, dict):
        raise wrong(path, "an object with role and content", item)
    if "role" not in item:
        raise BadRequest(f"`{path}.role` is required.", param=f"{path}.role")
    message: Message = dict(item)
    message["role"] = _ROLE.check(item["role"], f"{path}.role", 0)
    calls, call = item.get("tool_calls"), item.get("function_call")
    for key, value in (("tool_calls", calls), ("function_call", call)):
        if value is None:
            message.pop(key, None)
    if calls is not None:
        _check_tool_calls(calls, f"{path}.tool_calls")
    if call is not None:
        if calls is not None:
            raise BadRequest(f"`{path}` has both tool_calls and function_call.", param=f"{path}.function_call")
        _check_function(call, f"{path}.function_call")
    for key in ("tool_call_id", "name"):
        if item.get(key) is None:
            message.pop(key, None)
        else:
            Text(256).check(item[key], f"{path}.{key}", 0)
    if message["role"] == "function" and "name" not in message:
        raise BadRequest(f"`{path}.name` is required.", param=f"{path}.name")
    content = item.get("content")
    if content is None:
        if message["role"] not in ("assistant", "function"):
            raise BadRequest(f"`{path}.content` is required.", param=f"{path}.content")
        message["content"] = None if calls or call else ""
    else:
        message["content"] = _content(content, f"{path}.content")
    return message


def _with_tool_calls(messages: list[Message]) -> list[Message]:
    """messages with the older function_call and role function as the calls and results that templates know."""
    last = ""
    for i, message in enumerate(messages):
        call = message.pop("function_call", None)
        if isinstance(call, dict):
            last = f"fcall{i:04d}"  # nine letters and digits: some templates insist
            message["tool_calls"] = [{"id": last, "type": "function", "function": call}]
        if message["role"] == "function":
            message["role"] = "tool"
            message["tool_call_id"] = last or f"fcall{i:04d}"
    return messages


def text_of(message: Message) -> str:
    """The content of a checked message as one string."""
    content = message["content"]
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _content(value: object, path: str) -> str | list[dict[str, str]]:
    """A string as it is, or a list of parts ``{"type": "text", "text"}`` for the template to join or to keep."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(path, "a string or a list of content parts", value)
    return [{"type": "text", "text": _part(part, f"{path}[{i}]")} for i, part in enumerate(value)]


def _part(part: object, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise wrong(path, "a content part", part)
    kind = part.get("type", "text")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise BadRequest(
            f"`{path}.type` is {shorten(kind)}, which this model cannot read; it takes parts of type text only.",
            param=f"{path}.type",
        )
    text = part.get(key)
    if not isinstance(text, str):
        raise wrong(f"{path}.{key}", "a string", text)
    return text


def _check_tool_calls(value: object, path: str) -> None:
    """Earlier calls of the conversation; the template prints them."""
    if not isinstance(value, list):
        raise wrong(path, "a list of tool calls", value)
    if len(value) > CALL_LIMIT:
        raise BadRequest(f"`{path}` takes at most {CALL_LIMIT} calls, got {len(value)}.", param=path)
    for i, call in enumerate(value):
        if not isinstance(call, dict):
            raise wrong(f"{path}[{i}]", "an object with a function", call)
        if call.get("type", "function") != "function":
            raise wrong(f"{path}[{i}].type", "'function'", call["type"])
        if call.get("id") is not None:
            Text(256).check(call["id"], f"{path}[{i}].id", 0)
        _check_function(call.get("function"), f"{path}[{i}].function")


def _check_function(value: object, path: str) -> None:
    """The name and the arguments of one call: JSON text, or the object it stands for."""
    if not isinstance(value, dict):
        raise wrong(path, "an object with name and arguments", value)
    Text(256, 1).check(value.get("name"), f"{path}.name", 0)
    arguments = value.get("arguments")
    if arguments is not None and not isinstance(arguments, str | dict):
        raise wrong(f"{path}.arguments", "a string", arguments)


def _many(items: Schema, most: int, least: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _message_schema() -> Schema:
    """What ``_message`` takes: only a message of the assistant or a function may come without content."""
    text: Schema = {"type": "string"}
    kinds = [kind for kind, key in _TEXT_PARTS.items() if key == "text"]
    part: Schema = {"type": "object", "properties": {"type": {"enum": kinds}, "text": text}, "required": ["text"]}
    refusal: Schema = {
        "type": "object",
        "properties": {"type": {"const": "refusal"}, "refusal": text},
        "required": ["type", "refusal"],
    }
    content: Schema = {"anyOf": [text, {"type": "array", "items": {"anyOf": [text, part, refusal]}}]}
    name = Text(256).schema()
    function: Schema = {
        "type": "object",
        "properties": {"name": Text(256, 1).schema(), "arguments": {"type": ["string", "object", "null"]}},
        "required": ["name"],
    }
    call: Schema = {
        "type": "object",
        "properties": {
            "type": {"type": "string", "const": "function"},
            "id": or_null(name),
            "function": function,
        },
        "required": ["function"],
    }
    calls: Schema = {"type": "array", "items": call, "maxItems": CALL_LIMIT}

    def message(role: Schema, content: Schema, *required: str, named: bool = False) -> list[Schema]:
        fields: Schema = {
            "role": role,
            "content": content,
            "tool_call_id": or_null(name),
            "name": name if named else or_null(name),
        }
        either: list[Schema] = [
            {"tool_calls": or_null(calls), "function_call": {"type": "null"}},
            {"tool_calls": {"type": "null"}, "function_call": function},
        ]
        return [
            {"type": "object", "properties": {**fields, **more}, "required": ["role", *required]} for more in either
        ]

    other: Schema = {**_ROLE.schema(), "not": {"const": "function"}}
    return {
        "anyOf": [
            *message(other, content, "content"),
            *message({"type": "string", "const": "assistant"}, or_null(content)),
            *message({"type": "string", "const": "function"}, or_null(content), "name", named=True),
        ]
    }
