"""The items that go into a response and come out of it: checked, named, and told to a chat template as messages.

Pure.  Every item has an id from which its response's id follows, so that item_reference finds it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vserve.api.fields import OneOf, Schema, Text, or_null, show, wrong
from vserve.api.prompts import MESSAGE_LIMIT, Message
from vserve.errors import BadRequest, shorten

Item = dict[str, object]
"""One input or output item, as it goes over the wire."""

ROLES = ("user", "assistant", "system", "developer")
_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_OWN_ID = re.compile(r"(?:msg|rs|fc|fco)_([0-9a-f]{32})i?[0-9]{4,6}")
_ID = Text(256, 1)
_STATUS = OneOf(("in_progress", "completed", "incomplete"))
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def response_id(key: str) -> str:
    """The id of the response with that key, 32 hexadecimal digits."""
    return f"resp_{key}"


def output_id(key: str, kind: str, index: int) -> str:
    """The id of an output item."""
    return f"{_PREFIX[kind]}_{key}{index:04d}"


def owner_of(item_id: str) -> str | None:
    """The id of the response that made the item id, or None for an id that this server does not make."""
    match = _OWN_ID.fullmatch(item_id)
    return None if match is None else response_id(match[1])


@dataclass(frozen=True, slots=True)
class InputItems:
    """A string, or a list of at most max_items items: one message of the user, or what the list has."""

    max_items: int = MESSAGE_LIMIT

    def check(self, value: object, path: str, vocab_size: int) -> tuple[Item, ...]:
        if isinstance(value, str):
            return (message("user", value),)
        if not isinstance(value, list):
            raise wrong(path, "a string or a list of items", value)
        if len(value) > self.max_items:
            raise BadRequest(f"`{path}` takes at most {self.max_items} items, got {len(value)}.", param=path)
        return tuple(_item(item, f"{path}[{i}]") for i, item in enumerate(value))

    def schema(self) -> Schema:
        items: Schema = {"type": "array", "items": _item_schema(), "maxItems": self.max_items}
        return {"anyOf": [{"type": "string"}, items]}


def message(role: str, text: str) -> Item:
    """A message of one text part."""
    return {"type": "message", "role": role, "status": "completed", "content": [{"type": "input_text", "text": text}]}


def named(items: Sequence[Item], key: str) -> list[Item]:
    """The items, each with an id: the one it came with, else one of the response with that key."""
    return [
        {**item, "id": item.get("id") or f"{_PREFIX[str(item['type'])]}_{key}i{i:04d}"} for i, item in enumerate(items)
    ]


def _item(item: object, path: str) -> Item:
    """The item in full form, or BadRequest with the path of what is wrong."""
    if not isinstance(item, dict):
        raise wrong(path, "an item", item)
    if item.get("id") is not None:
        _ID.check(item["id"], f"{path}.id", 0)
    if item.get("status") is not None:
        _STATUS.check(item["status"], f"{path}.status", 0)
    kind = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
    elif kind is None and item.keys() <= {"id", "type"}:  # OpenAI lets a reference go without a type
        kind = "item_reference"
    match kind:
        case "message":
            return _message(item, path)
        case "reasoning":
            return _reasoning(item, path)
        case "function_call":
            checked = {**item, "status": item.get("status") or "completed"}
            for name in ("call_id", "name"):
                checked[name] = _ID.check(item.get(name), f"{path}.{name}", 0)
            if not isinstance(item.get("arguments"), str):
                raise wrong(f"{path}.arguments", "a string of JSON", item.get("arguments"))
            return checked
        case "function_call_output":
            output = item.get("output")
            if not isinstance(output, str):
                output = _parts(output, f"{path}.output")
            return {
                **item,
                "call_id": _ID.check(item.get("call_id"), f"{path}.call_id", 0),
                "output": output,
                "status": item.get("status") or "completed",
            }
        case "item_reference":
            return {"type": "item_reference", "id": _ID.check(item.get("id"), f"{path}.id", 0)}
        case _:
            raise BadRequest(
                f"`{path}.type` is {show(kind)}, which this server cannot take; it takes message, reasoning, "
                "function_call, function_call_output and item_reference.",
                param=f"{path}.type",
            )


def _message(item: Item, path: str) -> Item:
    role = item.get("role")
    if role not in ROLES:
        raise wrong(f"{path}.role", "one of " + ", ".join(ROLES), role)
    content = item.get("content")
    if content is None:
        raise BadRequest(f"`{path}.content` is required.", param=f"{path}.content")
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        parts: list[dict[str, object]] = [{"type": kind, "text": content}]
        if role == "assistant":
            parts[0]["annotations"] = []
    else:
        parts = _parts(content, f"{path}.content")
    return {**item, "type": "message", "status": item.get("status") or "completed", "content": parts}


def _parts(value: object, path: str) -> list[dict[str, object]]:
    if not isinstance(value, list):
        raise wrong(path, "a string or a list of content parts", value)
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        key = _PARTS.get(kind) if isinstance(kind, str) else None
        if key is None:
            raise BadRequest(
                f"`{path}[{i}].type` is {show(kind)}, which this model cannot read; it takes parts of text only.",
                param=f"{path}[{i}].type",
            )
        if not isinstance(part.get(key), str):
            raise wrong(f"{path}[{i}].{key}", "a string", part.get(key))
    return value


def _reasoning(item: Item, path: str) -> Item:
    if item.get("encrypted_content") is not None:
        raise BadRequest(
            f"`{path}.encrypted_content` was not made by this server, which cannot read it; leave the item out.",
            param=f"{path}.encrypted_content",
        )
    for name in ("content", "summary"):
        parts = [] if item.get(name) is None else item[name]
        if not isinstance(parts, list):
            raise wrong(f"{path}.{name}", "a list of texts", parts)
        for i, part in enumerate(parts):
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise wrong(f"{path}.{name}[{i}]", "an object with a text", part)
    return {**item, "summary": item.get("summary") or []}


def _item_schema() -> Schema:
    """What ``_item`` takes."""
    text: Schema = {"type": "string"}
    saying: Schema = {"type": OneOf(("input_text", "output_text", "text")).schema(), "text": text}
    refusing: Schema = {"type": OneOf(("refusal",)).schema(), "refusal": text}
    part: Schema = {"anyOf": [_needing(saying), _needing(refusing)]}
    content: Schema = {"anyOf": [text, {"type": "array", "items": part}]}
    thoughts = or_null({"type": "array", "items": _needing({"text": text})})
    call, any_id = {"call_id": _ID.schema()}, {"id": or_null(_ID.schema())}
    common: Schema = {**any_id, "status": or_null(_STATUS.schema())}
    reference: Schema = {**_needing({"id": _ID.schema()}), "additionalProperties": False}
    reference["properties"] = {"id": _ID.schema(), "type": {"enum": ["item_reference", None]}}
    return {
        "anyOf": [
            _needing(
                {"role": OneOf(ROLES).schema(), "content": content}, {**common, "type": {"enum": ["message", None]}}
            ),
            _needing(
                {"type": OneOf(("reasoning",)).schema()},
                {**common, "content": thoughts, "summary": thoughts, "encrypted_content": {"type": "null"}},
            ),
            _needing(
                {"type": OneOf(("function_call",)).schema(), **call, "name": _ID.schema(), "arguments": text}, common
            ),
            _needing({"type": OneOf(("function_call_output",)).schema(), **call, "output": content}, common),
            _needing({"type": OneOf(("item_reference",)).schema(), "id": _ID.schema()}, {"status": common["status"]}),
            reference,
        ]
    }


def _needing(fields: Schema, optional: Schema | None = None) -> Schema:
    """An object that has all of fields, each as its schema says, and may have those of optional."""
    return {"type": "object", "properties": {**fields, **(optional or {})}, "required": list(fields)}


def text_of_parts(parts: object) -> str:
    """The text of checked content parts, or the string itself."""
    if isinstance(parts, str):
        return parts
    assert isinstance(parts, list)
    return "\n".join(str(part[_PARTS[part["type"]]]) for part in parts)


def messages(items: Sequence[Item]) -> list[Message]:
    """Items, references resolved, as the conversation that a chat template prints.

    A model's reasoning, words and calls of one turn make one message.  Raises BadRequest for the output of a call that
    is not there.
    """
    said: list[Message] = []
    calls: set[str] = set()
    for item in items:
        match item["type"]:
            case "message" if item["role"] == "assistant":
                _turn(said, fresh=True)["content"] = text_of_parts(item["content"])
            case "message":
                role = "system" if item["role"] == "developer" else item["role"]
                said.append({"role": role, "content": text_of_parts(item["content"])})
            case "reasoning":
                parts = item.get("content") or item.get("summary")
                assert isinstance(parts, list)
                thought = "\n".join(part["text"] for part in parts)
                said.append({"role": "assistant", "content": "", "reasoning_content": thought})
            case "function_call":
                turn = _turn(said)
                known = turn.setdefault("tool_calls", [])
                assert isinstance(known, list)
                function = {"name": item["name"], "arguments": item["arguments"]}
                known.append({"id": item["call_id"], "type": "function", "function": function})
                calls.add(str(item["call_id"]))
            case _:
                if item["call_id"] not in calls:
                    raise BadRequest(
                        f"`input` has the output of the call {shorten(item['call_id'])}, but no such function call "
                        "comes before it.",
                        param="input",
                    )
                output = text_of_parts(item["output"])
                said.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
    return said


def _turn(said: list[Message], *, fresh: bool = False) -> Message:
    """The assistant's message that is being told; with fresh one that has neither words nor calls yet."""
    if said and said[-1]["role"] == "assistant" and not (fresh and (said[-1]["content"] or "tool_calls" in said[-1])):
        return said[-1]
    said.append({"role": "assistant", "content": ""})
    return said[-1]
