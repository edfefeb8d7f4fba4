"""The kinds of field that only /v1/responses has: metadata, text, reasoning, tools, include and the like.

Each checks its JSON and says it in the words of chat completions where those have them.  Knows no other endpoint's
rows and nothing of how a response is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from vserve.api.fields import Bool, Object, OneOf, Schema, Text, or_null, show, wrong
from vserve.api.structured import SCHEMA_DESCRIPTION, SCHEMA_NAME, known
from vserve.api.tools import NAME_LIMIT, TOOL_LIMIT, distinct, function_schema, function_tool, named_list
from vserve.errors import BadRequest, shorten

LOGPROBS = "message.output_text.logprobs"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
VERBOSITIES = ("low", "medium", "high")
_SUMMARIES = ("auto", "concise", "detailed")
_NAME = Text(NAME_LIMIT, 1)
_INCLUDABLE = (
    LOGPROBS,
    # Without effect:
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "reasoning.encrypted_content", "web_search_call.action.sources",
    "web_search_call.results",
)  # fmt: skip


def one_of(value: object, words: tuple[str, ...], path: str) -> str:
    """value, if it is one of words; BadRequest otherwise."""
    if isinstance(value, str) and value in words:
        return value
    raise wrong(path, "one of " + ", ".join(words), value)


@dataclass(frozen=True, slots=True)
class Metadata:
    """An object of at most max_pairs strings; keys and values are bounded in characters."""

    max_pairs: int = 16
    key_length: int = 64
    value_length: int = 512

    def check(self, value: object, path: str, vocab_size: int) -> dict[str, str]:
        pairs = Object(self.max_pairs).check(value, path, vocab_size)
        checked: dict[str, str] = {}
        for key, text in pairs.items():
            if len(key) > self.key_length:
                raise BadRequest(
                    f"`{path}` has a key of {len(key)} characters, the limit is {self.key_length}.", param=path
                )
            checked[key] = Text(self.value_length).check(text, f"{path}.{key}", vocab_size)
        return checked

    def schema(self) -> Schema:
        return {
            "type": "object",
            "maxProperties": self.max_pairs,
            "propertyNames": {"maxLength": self.key_length},
            "additionalProperties": Text(self.value_length).schema(),
        }


@dataclass(frozen=True, slots=True)
class Include:
    """A list of further things to return; ignored: those that no response of this server has."""

    def check(self, value: object, path: str, vocab_size: int) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise wrong(path, "a list of strings", value)
        if len(value) > len(_INCLUDABLE):
            raise BadRequest(f"`{path}` takes at most {len(_INCLUDABLE)} names, got {len(value)}.", param=path)
        return tuple(one_of(item, _INCLUDABLE, f"{path}[{i}]") for i, item in enumerate(value))

    def schema(self) -> Schema:
        return {"type": "array", "items": OneOf(_INCLUDABLE).schema(), "maxItems": len(_INCLUDABLE)}


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """What the text is to be like.  format: as it came; response_format: the same as chat completions have it."""

    format: dict[str, object] | None = None
    response_format: dict[str, object] | None = None
    verbosity: str | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextKind:
    """An object with format and verbosity."""

    def check(self, value: object, path: str, vocab_size: int) -> TextAnswer:
        body = Object(16).check(value, path, vocab_size)
        unknown = tuple(f"{path}.{name}" for name in body if name not in ("format", "verbosity"))
        verbosity, format = body.get("verbosity"), body.get("format")
        if verbosity is not None:
            verbosity = one_of(verbosity, VERBOSITIES, f"{path}.verbosity")
        if format is None:
            return TextAnswer(None, None, verbosity, unknown)
        shape = Object(16).check(format, f"{path}.format", vocab_size)
        return TextAnswer(shape, _response_format(shape, f"{path}.format"), verbosity, unknown)

    def schema(self) -> Schema:
        fields: Schema = {"format": or_null(_format_schema()), "verbosity": or_null(OneOf(VERBOSITIES).schema())}
        return {**Object(16).schema(), "properties": fields}


def _response_format(shape: dict[str, object], path: str) -> dict[str, object] | None:
    kind = one_of(shape.get("type"), ("text", "json_object", "json_schema"), f"{path}.type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": kind}
    known(shape, path, ("type", "name", "description", "schema", "strict"))
    SCHEMA_NAME.check(shape.get("name"), f"{path}.name", 0)
    if shape.get("description") is not None:
        SCHEMA_DESCRIPTION.check(shape["description"], f"{path}.description", 0)
    if shape.get("strict") is not None:
        Bool().check(shape["strict"], f"{path}.strict", 0)
    if not isinstance(shape.get("schema"), dict):
        raise wrong(f"{path}.schema", "a JSON Schema object", shape.get("schema"))
    return {"type": kind, "json_schema": {key: item for key, item in shape.items() if key != "type"}}


def _format_schema() -> Schema:
    """What ``_response_format`` takes."""
    plain: Schema = {"type": OneOf(("text", "json_object")).schema()}
    described: Schema = {
        "type": {"type": "string", "const": "json_schema"},
        "name": SCHEMA_NAME.schema(),
        "description": or_null(SCHEMA_DESCRIPTION.schema()),
        "schema": {"type": "object"},
        "strict": or_null(Bool().schema()),
    }
    required = ["type", "name", "schema"]
    return {
        "anyOf": [
            {**Object(16).schema(), "properties": plain, "required": ["type"]},
            {"type": "object", "properties": described, "required": required, "additionalProperties": False},
        ]
    }


@dataclass(frozen=True, slots=True)
class Thinking:
    """How the model is to reason, as asked."""

    effort: str | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningKind:
    """An object with effort; a summary of the reasoning is never made, so asking for one is reported."""

    def check(self, value: object, path: str, vocab_size: int) -> Thinking:
        body = Object(16).check(value, path, vocab_size)
        effort = body.get("effort")
        if effort is not None:
            effort = one_of(effort, EFFORTS, f"{path}.effort")
        for name in ("summary", "generate_summary"):
            if body.get(name) is not None:
                one_of(body[name], _SUMMARIES, f"{path}.{name}")
        unknown = tuple(f"{path}.{name}" for name, item in body.items() if name != "effort" and item is not None)
        return Thinking(effort, unknown)

    def schema(self) -> Schema:
        summary = or_null(OneOf(_SUMMARIES).schema())
        effort = or_null(OneOf(EFFORTS).schema())
        fields: Schema = {"effort": effort, "summary": summary, "generate_summary": dict(summary)}
        return {**Object(16).schema(), "properties": fields}


@dataclass(frozen=True, slots=True)
class FunctionTools:
    """A list of function tools; tools that a server would run itself are refused by name."""

    max_items: int = TOOL_LIMIT

    def check(self, value: object, path: str, vocab_size: int) -> tuple[dict[str, object], ...]:
        if not isinstance(value, list):
            raise wrong(path, "a list of tools", value)
        if len(value) > self.max_items:
            raise BadRequest(f"`{path}` takes at most {self.max_items} tools, got {len(value)}.", param=path)
        for i, item in enumerate(value):
            if isinstance(item, dict) and item.get("type") != "function":
                raise BadRequest(
                    f"`{path}[{i}].type` is {show(item.get('type'))}: this server runs no tools of its own, only tools "
                    "of type function, which the client runs, can be given.",
                    param=f"{path}[{i}].type",
                )
        tools = [function_tool(item, f"{path}[{i}]", item) for i, item in enumerate(value)]
        return tuple(tool.definition for tool in distinct(tools, path))

    def schema(self) -> Schema:
        return named_list(_tagged(function_schema()))


def _tagged(function: Schema) -> Schema:
    """The schema of a function whose type stands beside its name."""
    fields, required = function["properties"], function["required"]
    assert isinstance(fields, dict)
    assert isinstance(required, list)
    kind: Schema = {"type": "string", "const": "function"}
    return {**function, "properties": {"type": kind, **fields}, "required": ["type", *required]}


def chat_tool(tool: dict[str, object]) -> dict[str, object]:
    """A checked function tool as chat completions have it."""
    return {"type": "function", "function": {key: item for key, item in tool.items() if key != "type"}}


@dataclass(frozen=True, slots=True)
class Choosing:
    """Which tools may or must be called.

    raw: as it came.  chat: the tool_choice of chat completions.  allowed: the only tools to offer; None is all.
    """

    raw: str | dict[str, object]
    chat: str | dict[str, object]
    allowed: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class ResponseToolChoice:
    """none, auto, required, one function, or a list of allowed functions."""

    def check(self, value: object, path: str, vocab_size: int) -> Choosing:
        modes = ("none", "auto", "required")
        if isinstance(value, str):
            word = one_of(value, modes, path)
            return Choosing(word, word)
        if not isinstance(value, dict):
            raise wrong(path, "none, auto, required or an object that names a function", value)
        if value.get("type") == "function":
            return Choosing(value, {"type": "function", "function": {"name": _function(value, path)}})
        if value.get("type") != "allowed_tools":
            raise BadRequest(
                f"`{path}.type` is {show(value.get('type'))}; this server knows function and allowed_tools.",
                param=f"{path}.type",
            )
        mode = one_of(value.get("mode"), ("auto", "required"), f"{path}.mode")
        tools = value.get("tools")
        if not isinstance(tools, list) or not 1 <= len(tools) <= TOOL_LIMIT:
            raise wrong(f"{path}.tools", f"a list of 1 to {TOOL_LIMIT} functions", tools)
        names = [_function(tool, f"{path}.tools[{i}]") for i, tool in enumerate(tools)]
        return Choosing(value, mode, frozenset(names))

    def schema(self) -> Schema:
        named: Schema = {"type": "object", "properties": {"name": _NAME.schema()}, "required": ["name"]}
        tools: Schema = {"type": "array", "items": _tagged(named), "minItems": 1, "maxItems": TOOL_LIMIT}
        fields: Schema = {
            "type": {"type": "string", "const": "allowed_tools"},
            "mode": OneOf(("auto", "required")).schema(),
            "tools": tools,
        }
        several: Schema = {"type": "object", "properties": fields, "required": list(fields)}
        return {"anyOf": [OneOf(("none", "auto", "required")).schema(), _tagged(named), several]}


def _function(value: object, path: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise wrong(path, "an object of type function with a name", value)
    return _NAME.check(value.get("name"), f"{path}.name", 0)


@dataclass(frozen=True, slots=True)
class PromptText:
    """A string, as in the short form; prompt templates, which are objects, are refused."""

    def check(self, value: object, path: str, vocab_size: int) -> str:
        if isinstance(value, dict):
            raise BadRequest(
                f"`{path}` is an object: no prompt templates are stored here; send `input`, or `{path}` as a string.",
                param=path,
            )
        if not isinstance(value, str):
            raise wrong(path, "a string", value)
        return value

    def schema(self) -> Schema:
        return {"type": "string"}


@dataclass(frozen=True, slots=True)
class ResponseId:
    """An id that this server could have made."""

    def check(self, value: object, path: str, vocab_size: int) -> str:
        text = Text(128, 1).check(value, path, vocab_size)
        if not text.startswith("resp_"):
            raise BadRequest(f"`{path}` is {shorten(text)}, which is no id of a response (resp_…).", param=path)
        return text

    def schema(self) -> Schema:
        return {**Text(128, 1).schema(), "pattern": "^resp_"}


@dataclass(frozen=True, slots=True)
class StreamChoices:
    """The options of a stream, none of which changes anything here: names to report."""

    def check(self, value: object, path: str, vocab_size: int) -> tuple[str, ...]:
        body = Object(16).check(value, path, vocab_size)
        return tuple(f"{path}.{name}" for name, item in body.items() if item not in (None, False))

    def schema(self) -> Schema:
        return Object(16).schema()
