"""The request fields that speak of tools: what may be called, and whether it must be.

Owns their kinds and bounds, and the older names functions and function_call, which mean the same.  Knows nothing of how
a model writes a call.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass

from vserve.api.fields import Bool, Object, Objects, Schema, Text, member, needed, or_null, wrong
from vserve.errors import BadRequest, shorten

TOOL_LIMIT = 128
TOOLS_LIMIT_CHARS = 2**18
"""Most characters of all tools together, as JSON."""
NAME_LIMIT = 64
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


@dataclass(frozen=True, slots=True)
class Tool:
    """One function.  definition: the object as the client sent it, for the template.  parameters: its JSON Schema."""

    name: str
    definition: dict[str, object]
    parameters: dict[str, object] | None
    strict: bool


class Mode(enum.Enum):
    """Whether tools are called; the value is tool_choice's."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a choice asks for.  names: the only tools that may be called, None for all.  one: exactly one call."""

    mode: Mode
    names: tuple[str, ...] | None = None
    one: bool = False


@dataclass(frozen=True, slots=True)
class ToolUse:
    """All that a request says of tools.

    tools: those that may be called, not empty.  field, choice_field: where they and the choice came from, for messages.
    one: at most one call.  legacy: the reply has function_call instead of tool_calls.
    """

    tools: tuple[Tool, ...]
    mode: Mode
    one: bool
    legacy: bool
    field: str
    choice_field: str


def function_tool(value: object, path: str, definition: dict[str, object]) -> Tool:
    """The function in value, which is all or a part of definition.  Raises BadRequest."""
    body = Object(64).check(value, path, 0)
    name = needed(body, "name", path, Text(NAME_LIMIT, 1))
    if not _NAME_CHARS.issuperset(name):
        raise wrong(f"{path}.name", "made of letters, digits, '_', '-' and '.'", name)
    member(body, "description", path, Text(TOOLS_LIMIT_CHARS))
    parameters = member(body, "parameters", path, Object(1024))
    if parameters is not None and parameters.get("type", "object") != "object":
        raise wrong(f"{path}.parameters.type", "'object'", parameters["type"])
    return Tool(name, definition, parameters, member(body, "strict", path, Bool()) or False)


def function_schema() -> Schema:
    """What ``function_tool`` takes."""
    typed: Schema = {"type": {"type": "string", "const": "object"}}
    name: Schema = {**Text(NAME_LIMIT, 1).schema(), "pattern": "^[A-Za-z0-9_.-]+$"}
    return {
        "type": "object",
        "maxProperties": 64,
        "properties": {
            "name": name,
            "description": or_null(Text(TOOLS_LIMIT_CHARS).schema()),
            "parameters": or_null({**Object(1024).schema(), "properties": typed}),
            "strict": or_null(Bool().schema()),
        },
        "required": ["name"],
    }


def named_list(item: Schema) -> Schema:
    """At most TOOL_LIMIT of them; no two may have one name, of which JSON Schema can say only that they differ."""
    return {"type": "array", "items": item, "maxItems": TOOL_LIMIT, "uniqueItems": True}


def distinct(tools: Sequence[Tool], path: str) -> tuple[Tool, ...]:
    """tools, if no two have one name and all together are not too long.  Raises BadRequest."""
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in names:
            raise BadRequest(f"`{path}[{i}]` has the name {tool.name!r} of an earlier one.", param=f"{path}[{i}]")
        names.add(tool.name)
    size = len(json.dumps([tool.definition for tool in tools], ensure_ascii=False, separators=(",", ":")))
    if size > TOOLS_LIMIT_CHARS:
        raise BadRequest(f"`{path}` has {size} characters as JSON, the limit is {TOOLS_LIMIT_CHARS}.", param=path)
    return tuple(tools)


@dataclass(frozen=True, slots=True)
class Tools:
    """A list of tools of type function."""

    def check(self, value: object, path: str, vocab_size: int) -> tuple[Tool, ...]:
        tools = []
        for i, item in enumerate(Objects(TOOL_LIMIT).check(value, path, 0)):
            if item.get("type", "function") != "function":
                raise wrong(f"{path}[{i}].type", "'function', the one type of tool this server knows", item["type"])
            if item.get("function") is None:
                raise BadRequest(f"`{path}[{i}].function` is required.", param=f"{path}[{i}].function")
            tools.append(function_tool(item["function"], f"{path}[{i}].function", item))
        return distinct(tools, path)

    def schema(self) -> Schema:
        kind: Schema = {"type": "string", "const": "function"}
        fields: Schema = {"type": kind, "function": function_schema()}
        return named_list({"type": "object", "properties": fields, "required": ["function"]})


@dataclass(frozen=True, slots=True)
class Functions:
    """A list of functions, as they came before there were tools."""

    def check(self, value: object, path: str, vocab_size: int) -> tuple[Tool, ...]:
        functions = Objects(TOOL_LIMIT).check(value, path, 0)
        tools = [
            function_tool(item, f"{path}[{i}]", {"type": "function", "function": item})
            for i, item in enumerate(functions)
        ]
        return distinct(tools, path)

    def schema(self) -> Schema:
        return named_list(function_schema())


@dataclass(frozen=True, slots=True)
class ToolChoiceKind:
    """none, auto, required, one function by name, or a list of those allowed."""

    def check(self, value: object, path: str, vocab_size: int) -> ToolChoice:
        if isinstance(value, str):
            if value not in ("none", "auto", "required"):
                raise wrong(path, "none, auto, required or an object that names a function", value)
            return ToolChoice(Mode(value))
        body = Object(16).check(value, path, 0)
        match body.get("type", "function"):
            case "function":
                return ToolChoice(Mode.REQUIRED, (_named(body.get("function"), f"{path}.function"),), one=True)
            case "allowed_tools":
                return self._allowed(body.get("allowed_tools"), f"{path}.allowed_tools")
            case kind:
                raise wrong(f"{path}.type", "'function' or 'allowed_tools'", kind)

    def _allowed(self, value: object, path: str) -> ToolChoice:
        body = Object(16).check(value, path, 0)
        mode = body.get("mode")
        if mode not in ("auto", "required"):
            raise wrong(f"{path}.mode", "auto or required", mode)
        items = Objects(TOOL_LIMIT).check(body.get("tools"), f"{path}.tools", 0)
        names = [_named(item.get("function"), f"{path}.tools[{i}].function") for i, item in enumerate(items)]
        if not names:
            raise BadRequest(f"`{path}.tools` is empty; name at least one tool.", param=f"{path}.tools")
        return ToolChoice(Mode(mode), tuple(names))

    def schema(self) -> Schema:
        names: Schema = {"type": "string", "enum": ["none", "auto", "required"]}
        function: Schema = {"type": "object", "properties": {"function": _name_schema()}, "required": ["function"]}
        kind: Schema = {"type": "string", "const": "function"}
        one: Schema = {
            **function,
            "properties": {"type": kind, "function": _name_schema()},
            "maxProperties": 16,
        }
        mode: Schema = {"type": "string", "enum": ["auto", "required"]}
        tools: Schema = {"type": "array", "items": function, "minItems": 1, "maxItems": TOOL_LIMIT}
        allowed: Schema = {
            "type": "object",
            "properties": {"mode": mode, "tools": tools},
            "required": ["mode", "tools"],
            "maxProperties": 16,
        }
        several: Schema = {
            "type": "object",
            "properties": {"type": {"type": "string", "const": "allowed_tools"}, "allowed_tools": allowed},
            "required": ["type", "allowed_tools"],
            "maxProperties": 16,
        }
        return {"anyOf": [names, one, several]}


@dataclass(frozen=True, slots=True)
class FunctionChoiceKind:
    """none, auto, or one function by name, as it came before there were tools."""

    def check(self, value: object, path: str, vocab_size: int) -> ToolChoice:
        if isinstance(value, str):
            if value not in ("none", "auto"):
                raise wrong(path, "none, auto or an object with the name of a function", value)
            return ToolChoice(Mode(value))
        return ToolChoice(Mode.REQUIRED, (_named(value, path),), one=True)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "string", "enum": ["none", "auto"]}, _name_schema()]}


def _name_schema() -> Schema:
    """What ``_named`` takes."""
    fields: Schema = {"name": Text(NAME_LIMIT, 1).schema()}
    return {"type": "object", "properties": fields, "required": ["name"], "maxProperties": 16}


def _named(value: object, path: str) -> str:
    return needed(Object(16).check(value, path, 0), "name", path, Text(NAME_LIMIT, 1))


def tool_use(tools: tuple[Tool, ...], choice: ToolChoice | None, *, parallel: bool, legacy: bool) -> ToolUse | None:
    """The fields joined; None where no tool is to be called.  Raises BadRequest for a choice without its tool."""
    field, choice_field = ("functions", "function_call") if legacy else ("tools", "tool_choice")
    choice = choice or ToolChoice(Mode.AUTO)
    known = {tool.name for tool in tools}
    for name in choice.names or ():
        if name not in known:
            raise BadRequest(f"`{choice_field}` names {shorten(name)}, which is not in `{field}`.", param=choice_field)
    if choice.mode is Mode.REQUIRED and not tools:
        raise BadRequest(f"`{choice_field}` is 'required', but there are no `{field}`.", param=choice_field)
    if choice.mode is Mode.NONE or not tools:
        return None
    names = choice.names
    return ToolUse(
        tools=tools if names is None else tuple(tool for tool in tools if tool.name in names),
        mode=choice.mode,
        one=choice.one or legacy or not parallel,
        legacy=legacy,
        field=field,
        choice_field=choice_field,
    )
