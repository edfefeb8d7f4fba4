"""The request fields that say what text is allowed: response_format, structured_outputs, and the guided_* of old.

Owns how each is spelled and that at most one of them constrains an answer; a constraint leaves as a GrammarSpec.
Knows no grammar library: whether a source can be compiled shows later.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import orjson

from vserve.api.fields import Bool, Kind, Object, Schema, Text, member, needed, or_null, wrong
from vserve.errors import BadRequest, shorten
from vserve.text.grammar_spec import GrammarKind, GrammarSpec

MAX_SOURCE = 2**18
"""Most characters of a schema, pattern or grammar, and of all choices together."""
MAX_CHOICES = 1024
_MAX_PATTERN = 256
SCHEMA_NAME = Text(256, 1)
SCHEMA_DESCRIPTION = Text(2**16)

_JSON_KINDS = (GrammarKind.JSON_OBJECT, GrammarKind.JSON_SCHEMA)


@dataclass(frozen=True, slots=True)
class Constraint:
    """What one field asks for.  path: the field, for messages."""

    path: str
    spec: GrammarSpec


@dataclass(frozen=True, slots=True)
class SchemaKind:
    """A JSON Schema: an object, or the text of one."""

    def check(self, value: object, path: str, vocab_size: int) -> Constraint:
        if isinstance(value, str):
            try:
                value = orjson.loads(Text(MAX_SOURCE).check(value, path, 0))
            except orjson.JSONDecodeError:
                raise BadRequest(f"`{path}` is a string, but not the text of a JSON Schema.", param=path) from None
        if not isinstance(value, dict):
            raise wrong(path, "a JSON Schema (an object)", value)
        source = json.dumps(value, ensure_ascii=False, separators=(",", ":"))  # integers of any size, unlike orjson
        if len(source) > MAX_SOURCE:
            raise BadRequest(f"`{path}` has {len(source)} characters as JSON, the limit is {MAX_SOURCE}.", param=path)
        return Constraint(path, GrammarSpec(GrammarKind.JSON_SCHEMA, source))

    def schema(self) -> Schema:
        # The text of one is taken too: older clients send it so.
        return {"type": "object"}


@dataclass(frozen=True, slots=True)
class Source:
    """A regular expression or a grammar, as text."""

    kind: GrammarKind

    def check(self, value: object, path: str, vocab_size: int) -> Constraint:
        return Constraint(path, GrammarSpec(self.kind, Text(MAX_SOURCE, 1).check(value, path, 0)))

    def schema(self) -> Schema:
        return Text(MAX_SOURCE, 1).schema()


@dataclass(frozen=True, slots=True)
class Choices:
    """A list of texts, one of which is the answer."""

    def check(self, value: object, path: str, vocab_size: int) -> Constraint:
        if not isinstance(value, list):
            raise wrong(path, "a list of strings", value)
        if not 1 <= len(value) <= MAX_CHOICES:
            raise BadRequest(f"`{path}` takes 1 to {MAX_CHOICES} strings, got {len(value)}.", param=path)
        texts = [Text(MAX_SOURCE, 1).check(item, f"{path}[{i}]", 0) for i, item in enumerate(value)]
        if sum(map(len, texts)) > MAX_SOURCE:
            raise BadRequest(
                f"`{path}` has {sum(map(len, texts))} characters in all, the limit is {MAX_SOURCE}.", param=path
            )
        return Constraint(path, GrammarSpec(GrammarKind.CHOICE, orjson.dumps(texts).decode()))

    def schema(self) -> Schema:
        return {"type": "array", "items": Text(MAX_SOURCE, 1).schema(), "minItems": 1, "maxItems": MAX_CHOICES}


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """OpenAI's object: type text, json_object or json_schema (name, description, schema, strict).

    A schema is followed to the letter, with strict and without.
    """

    def check(self, value: object, path: str, vocab_size: int) -> Constraint | None:
        body = Object(16).check(value, path, 0)
        match body.get("type"):
            case "text":
                return None
            case "json_object":
                return Constraint(path, GrammarSpec(GrammarKind.JSON_OBJECT, ""))
            case "json_schema":
                return self._schema(body.get("json_schema"), f"{path}.json_schema")
            case kind:
                raise wrong(f"{path}.type", "text, json_object or json_schema", kind)

    def _schema(self, value: object, path: str) -> Constraint:
        body = Object(16).check(value, path, 0)
        known(body, path, ("name", "description", "schema", "strict"))
        needed(body, "name", path, SCHEMA_NAME)
        member(body, "description", path, SCHEMA_DESCRIPTION)
        member(body, "strict", path, Bool())
        return member(body, "schema", path, SchemaKind()) or Constraint(path, GrammarSpec(GrammarKind.JSON_OBJECT, ""))

    def schema(self) -> Schema:
        named: Schema = {
            "type": "object",
            "properties": {
                "name": SCHEMA_NAME.schema(),
                "description": or_null(SCHEMA_DESCRIPTION.schema()),
                "schema": or_null(SchemaKind().schema()),
                "strict": or_null(Bool().schema()),
            },
            "required": ["name"],
            "additionalProperties": False,
            "maxProperties": 16,
        }
        plain: Schema = {
            "type": "object",
            "properties": {"type": {"type": "string", "enum": ["text", "json_object"]}},
            "required": ["type"],
            "maxProperties": 16,
        }
        schema: Schema = {
            "type": "object",
            "properties": {"type": {"type": "string", "const": "json_schema"}, "json_schema": named},
            "required": ["type", "json_schema"],
            "maxProperties": 16,
        }
        return {"anyOf": [plain, schema]}


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """vLLM's object: one of json, regex, choice, grammar and json_object, and for JSON what may stand between tokens.

    disable_any_whitespace: none; whitespace_pattern: a regular expression.  disable_fallback has nothing to switch
    off: there is one back end.
    """

    def check(self, value: object, path: str, vocab_size: int) -> Constraint:
        body = {name: item for name, item in Object(16).check(value, path, 0).items() if item is not None}
        plain = ("json_object", "disable_fallback", "disable_any_whitespace", "disable_additional_properties")
        known(body, path, (*_KINDS, *plain, "whitespace_pattern"))
        flags = {name: Bool().check(body[name], f"{path}.{name}", 0) for name in plain if name in body}
        if flags.get("disable_additional_properties"):
            raise BadRequest(
                f"`{path}.disable_additional_properties` is not supported; set `additionalProperties` in the schema.",
                param=f"{path}.disable_additional_properties",
            )
        found = [kind.check(body[name], f"{path}.{name}", 0) for name, kind in _KINDS.items() if name in body]
        if flags.get("json_object"):
            found.append(Constraint(f"{path}.json_object", GrammarSpec(GrammarKind.JSON_OBJECT, "")))
        made = only(found)
        if made is None:
            raise BadRequest(
                f"`{path}` must have one of json, regex, choice, grammar and json_object: true.", param=path
            )
        if flags.get("disable_any_whitespace"):
            if "whitespace_pattern" in body:
                raise BadRequest(
                    f"`{path}` has both disable_any_whitespace and whitespace_pattern.",
                    param=f"{path}.whitespace_pattern",
                )
            return spaced(made, "", f"{path}.disable_any_whitespace")
        if "whitespace_pattern" in body:
            pattern = WHITESPACE.check(body["whitespace_pattern"], f"{path}.whitespace_pattern", 0)
            return spaced(made, pattern, f"{path}.whitespace_pattern")
        return made

    def schema(self) -> Schema:
        spacings: list[Schema] = [
            {"disable_any_whitespace": or_null(Bool().schema())},
            {"disable_any_whitespace": {"enum": [False, None]}, "whitespace_pattern": or_null(WHITESPACE.schema())},
        ]
        unspaced: list[Schema] = [{"disable_any_whitespace": {"enum": [False, None]}}]
        options: list[Schema] = []
        for name, kind in (*_KINDS.items(), ("json_object", None)):
            value: Schema = {"const": True} if kind is None else kind.schema()
            rest: Schema = {
                "json_object": {"enum": [False, None]},
                "disable_fallback": or_null(Bool().schema()),
                "disable_additional_properties": {"enum": [False, None]},
            }
            for spacing in spacings if name in ("json", "json_object") else unspaced:
                options.append(
                    {
                        "type": "object",
                        "properties": {**rest, **spacing, name: value},
                        "required": [name],
                        "additionalProperties": {"type": "null"},
                        "maxProperties": 16,
                    }
                )
        return {"anyOf": options}


_KINDS: dict[str, Kind[Constraint]] = {
    "json": SchemaKind(),
    "regex": Source(GrammarKind.REGEX),
    "choice": Choices(),
    "grammar": Source(GrammarKind.LARK),
}
WHITESPACE = Text(_MAX_PATTERN)


def only(found: Sequence[Constraint | None]) -> Constraint | None:
    """The one constraint there is, if any.  Raises BadRequest for two."""
    given = [one for one in found if one is not None]
    if len(given) > 1:
        raise BadRequest(
            f"`{given[0].path}` and `{given[1].path}` both constrain the answer; give one of them.",
            param=given[1].path,
        )
    return given[0] if given else None


def spaced(constraint: Constraint | None, pattern: str, path: str) -> Constraint:
    """The constraint with this pattern between the tokens of its JSON.  Raises BadRequest where it is not JSON."""
    if constraint is None or constraint.spec.kind not in _JSON_KINDS:
        raise BadRequest(f"`{path}` needs a JSON schema or json_object to apply to.", param=path)
    return replace(constraint, spec=replace(constraint.spec, whitespace=pattern))


def known(body: dict[str, object], path: str, names: Sequence[str]) -> None:
    """Raises BadRequest for a key of body that is not one of names."""
    for name in body:
        if name not in names:
            raise BadRequest(f"`{path}` has no key {shorten(name)}.", param=path)
