"""What one request field may hold: kinds with their bounds, and the row type of the field tables.

Knows nothing of any endpoint.  A kind turns a JSON value into a checked Python value or raises BadRequest naming the
field, the value and the limit; its attributes hold all there is to know, so that a schema can be written from them.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

from vserve.api.body import kind_of
from vserve.errors import ECHO_LIMIT, BadRequest, shorten

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Schema = dict[str, object]
"""A JSON Schema, draft 2020-12."""


class Fate(enum.Enum):
    """What becomes of a field that the client sent.

    OBEYED: it does what its documentation says.  REFUSED: 400, except for values that ask for nothing.  IGNORED:
    accepted without effect and listed in x-ignored-params, except for values that ask for nothing.
    """

    OBEYED = "obeyed"
    REFUSED = "refused"
    IGNORED = "ignored"


class Kind(Protocol[T_co]):
    """One type of value with its bounds."""

    def check(self, value: object, path: str, vocab_size: int) -> T_co:
        """value (never None) as T; BadRequest when it is not one.  path names the field in messages."""

    def schema(self) -> Schema:
        """The JSON Schema (2020-12) of the values that check takes, a fresh object; the vocabulary's size apart."""


@dataclass(frozen=True, slots=True)
class Field(Generic[T]):
    """One row of a field table.  null from a client always means: not sent.

    default: what stands in for a missing field (None where the model or the server decides).
    harmless: values of a REFUSED or IGNORED field that ask for nothing and are taken without a word.
    """

    name: str
    kind: Kind[T]
    default: T
    help: str
    fate: Fate = Fate.OBEYED
    harmless: tuple[object, ...] = ()
    required: bool = False

    def asks_nothing(self, value: object) -> bool:
        """True for a harmless value; types must match too, as 0 == False in Python."""
        return any(type(value) is type(known) and value == known for known in self.harmless)

    def schema(self, strict: bool) -> Schema:
        """The JSON Schema of the values a request may hold, null among them where that means: not sent."""
        if self.fate is Fate.OBEYED:
            made, text = self.kind.schema(), self.help
            if isinstance(self.default, bool | int | float | str):
                # Not the keyword "default": generators of typed clients take a field that has one for always there.
                text = f"{text} (default {json.dumps(self.default)})"
        elif self.fate is Fate.REFUSED or strict:
            made = {"enum": list(self.harmless)}
            text = f"Not served ({self.help}): only values that ask for nothing are taken."
        else:
            made, text = {}, f"Taken without effect: {self.help}."
        return {**(made if self.required else or_null(made)), "description": text}


class Values:
    """The fields of one request after the check."""

    __slots__ = ("_found",)

    def __init__(self, found: dict[str, object]) -> None:
        self._found = found

    def __getitem__(self, field: Field[T]) -> T:
        if field.name in self._found:
            return cast(T, self._found[field.name])  # put there by this field's own kind
        return field.default

    def given(self, field: Field[T]) -> bool:
        """Whether the client sent the field (null does not count)."""
        return field.name in self._found


AnyField = Field[object]
Table = dict[str, AnyField]


def table(*rows: object) -> Table:
    """Rows by name.  Raises ValueError for two rows of one name."""
    made: Table = {}
    for row in cast(Sequence[AnyField], rows):
        if row.name in made:
            raise ValueError(f"two rows for the field {row.name}")
        made[row.name] = row
    return made


def read(
    body: dict[str, object], rows: Table, vocab_size: int, strict: bool, prefix: str = ""
) -> tuple[Values, tuple[str, ...]]:
    """Check body against the table: its values, and the names that have no effect.

    prefix: the path of body in a larger one, with its dot.  Raises BadRequest for a value out of bounds, a missing
    required field, a REFUSED field and, when strict, for a name without effect.
    """
    found: dict[str, object] = {}
    ignored: list[str] = []
    for name, value in body.items():
        field, path = rows.get(name), prefix + name
        if field is None:
            ignored.append(path)
        elif value is None:
            continue
        elif field.fate is Fate.OBEYED:
            found[name] = field.kind.check(value, path, vocab_size)
        elif not field.asks_nothing(value):
            if field.fate is Fate.REFUSED:
                raise BadRequest(f"`{path}` is not supported by this version of the server.", param=path)
            ignored.append(path)
    for field in rows.values():
        if field.required and field.name not in found:
            path = prefix + field.name
            raise BadRequest(f"`{path}` is required.", param=path)
    if strict and ignored:
        raise without_effect(ignored[0])
    return Values(found), tuple(ignored)


def object_schema(rows: Table, strict: bool) -> Schema:
    """The JSON Schema of a body that ``read`` takes.  Rules that join several fields are not in it."""
    made: Schema = {
        "type": "object",
        "properties": {name: field.schema(strict) for name, field in rows.items()},
        "additionalProperties": not strict,
    }
    required = [name for name, field in rows.items() if field.required]
    return {**made, "required": required} if required else made


def or_null(schema: Schema) -> Schema:
    """schema, and null."""
    if not schema:
        return {}
    if "anyOf" not in schema and "type" not in schema and "enum" not in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    made = dict(schema)  # each of the three, where it is there, has to let null through
    if isinstance(options := made.get("anyOf"), list):
        made["anyOf"] = [*options, {"type": "null"}]
    if isinstance(kind := made.get("type"), str):
        made["type"] = [kind, "null"]
    if isinstance(values := made.get("enum"), list):
        made["enum"] = [*values, None]
    return made


def without_effect(name: str) -> BadRequest:
    """What strict mode says of a field that would be listed in x-ignored-params."""
    message = f"The field {shorten(name)} is unknown or has no effect here; this server refuses such fields (strict)."
    return BadRequest(message, param=name[:ECHO_LIMIT])


def show(value: object) -> str:
    """A client's value as it stands in a message: short, whatever its size."""
    return kind_of(value) if isinstance(value, dict | list) else shorten(value)


def wrong(path: str, want: str, value: object) -> BadRequest:
    """The error for a value that is not what the field takes."""
    return BadRequest(f"`{path}` must be {want}, got {show(value)}.", param=path)


@dataclass(frozen=True, slots=True)
class Bool:
    """true or false."""

    def check(self, value: object, path: str, vocab_size: int) -> bool:
        if value is True or value is False:
            return value
        raise wrong(path, "true or false", value)

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Int:
    """A whole number in [low, high]; 5.0 and true are not whole numbers."""

    low: int
    high: int

    def check(self, value: object, path: str, vocab_size: int) -> int:
        if type(value) is int and self.low <= value <= self.high:
            return value
        raise wrong(path, f"an integer between {self.low} and {self.high}", value)

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Kept:
    """How many to keep: a whole number from 1 to high, or -1 for as many as fit."""

    high: int

    def check(self, value: object, path: str, vocab_size: int) -> int:
        if type(value) is int and (value == -1 or 1 <= value <= self.high):
            return value
        raise wrong(path, f"-1 or an integer between 1 and {self.high}", value)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "integer", "minimum": -1, "maximum": -1}, Int(1, self.high).schema()]}


@dataclass(frozen=True, slots=True)
class Float:
    """A finite number in [low, high], or (low, high] when above is set."""

    low: float
    high: float
    above: bool = False

    def check(self, value: object, path: str, vocab_size: int) -> float:
        if (type(value) is float or type(value) is int) and math.isfinite(value):
            number = float(value)
            if self.low <= number <= self.high and not (self.above and number == self.low):
                return number
        bounds = f"above {self.low:g} and at most" if self.above else f"between {self.low:g} and"
        raise wrong(path, f"a number {bounds} {self.high:g}", value)

    def schema(self) -> Schema:
        least = "exclusiveMinimum" if self.above else "minimum"
        return {"type": "number", least: self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Text:
    """A string of at least min_length and at most max_length characters; visible: ASCII 0x21 to 0x7e only."""

    max_length: int
    min_length: int = 0
    visible: bool = False

    def check(self, value: object, path: str, vocab_size: int) -> str:
        if type(value) is not str:
            raise wrong(path, "a string", value)
        if not self.min_length <= len(value) <= self.max_length:
            raise BadRequest(
                f"`{path}` must have between {self.min_length} and {self.max_length} characters, got {len(value)}.",
                param=path,
            )
        if self.visible and not all("!" <= char <= "~" for char in value):
            raise wrong(path, "visible ASCII characters", value)
        return value

    def schema(self) -> Schema:
        made: Schema = {"type": "string", "minLength": self.min_length, "maxLength": self.max_length}
        return {**made, "pattern": "^[!-~]*$"} if self.visible else made


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few strings."""

    values: tuple[str, ...]

    def check(self, value: object, path: str, vocab_size: int) -> str:
        if type(value) is str and value in self.values:
            return value
        raise wrong(path, f"one of {', '.join(self.values)}", value)

    def schema(self) -> Schema:
        return {"type": "string", "enum": list(self.values)}


@dataclass(frozen=True, slots=True)
class Stops:
    """A stop string or a list of at most max_items of them, none empty."""

    max_items: int
    max_length: int

    def check(self, value: object, path: str, vocab_size: int) -> tuple[str, ...]:
        one = Text(self.max_length, 1)
        if isinstance(value, list):
            if len(value) > self.max_items:
                raise BadRequest(f"`{path}` takes at most {self.max_items} strings, got {len(value)}.", param=path)
            return tuple(one.check(item, f"{path}[{i}]", vocab_size) for i, item in enumerate(value))
        if type(value) is str:
            return (one.check(value, path, vocab_size),)
        raise wrong(path, "a string or a list of strings", value)

    def schema(self) -> Schema:
        one = Text(self.max_length, 1).schema()
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": self.max_items}]}


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A list of token ids of the model, at most max_items."""

    max_items: int

    def check(self, value: object, path: str, vocab_size: int) -> list[int]:
        if not isinstance(value, list):
            raise wrong(path, "a list of token ids", value)
        if len(value) > self.max_items:
            raise BadRequest(f"`{path}` takes at most {self.max_items} token ids, got {len(value)}.", param=path)
        # Types and bounds in three passes at C speed; the slow pass below only words the error.
        if value and not (set(map(type, value)) == {int} and min(value) >= 0 and max(value) < vocab_size):
            for i, item in enumerate(value):
                Int(0, vocab_size - 1).check(item, f"{path}[{i}]", vocab_size)
        return value

    def schema(self) -> Schema:
        return {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": self.max_items}


def member(body: Mapping[str, object], name: str, path: str, kind: Kind[T]) -> T | None:
    """That key of an object, checked; None where it is absent or null.  path: the object's."""
    value = body.get(name)
    return None if value is None else kind.check(value, f"{path}.{name}", 0)


def needed(body: Mapping[str, object], name: str, path: str, kind: Kind[T]) -> T:
    """That key of an object, checked.  Raises BadRequest where it is absent or null."""
    if body.get(name) is None:
        raise BadRequest(f"`{path}.{name}` is required.", param=f"{path}.{name}")
    return kind.check(body[name], f"{path}.{name}", 0)


@dataclass(frozen=True, slots=True)
class LogitBias:
    """An object from token id (as a string of digits) to a number in [-100, 100]."""

    max_items: int

    def check(self, value: object, path: str, vocab_size: int) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, dict):
            raise wrong(path, "an object of token ids and numbers", value)
        if len(value) > self.max_items:
            raise BadRequest(f"`{path}` takes at most {self.max_items} entries, got {len(value)}.", param=path)
        pairs: dict[int, float] = {}
        for key, bias in value.items():
            # 12 digits keep int() away from 10^5-digit keys; isascii keeps it away from other scripts' digits.
            if not (key.isascii() and key.isdigit() and len(key) <= 12 and int(key) < vocab_size):
                raise BadRequest(
                    f"`{path}` has the key {shorten(key)}, which is not a token id below {vocab_size}.", param=path
                )
            pairs[int(key)] = Float(-100, 100).check(bias, f"{path}.{key}", vocab_size)
        return tuple(pairs.items())

    def schema(self) -> Schema:
        return {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,12}$"},
            "additionalProperties": Float(-100, 100).schema(),
            "maxProperties": self.max_items,
        }


@dataclass(frozen=True, slots=True)
class Object:
    """A JSON object, taken as it is, with at most max_items keys, none of them reserved."""

    max_items: int
    reserved: frozenset[str] = frozenset()

    def check(self, value: object, path: str, vocab_size: int) -> dict[str, object]:
        if not isinstance(value, dict):
            raise wrong(path, "an object", value)
        if len(value) > self.max_items:
            raise BadRequest(f"`{path}` takes at most {self.max_items} keys, got {len(value)}.", param=path)
        for key in value:
            if key in self.reserved:
                raise BadRequest(f"`{path}` may not set {shorten(key)}.", param=path)
        return value

    def schema(self) -> Schema:
        made: Schema = {"type": "object", "maxProperties": self.max_items}
        return {**made, "propertyNames": {"not": {"enum": sorted(self.reserved)}}} if self.reserved else made


@dataclass(frozen=True, slots=True)
class Objects:
    """A list of at most max_items JSON objects, taken as they are."""

    max_items: int

    def check(self, value: object, path: str, vocab_size: int) -> tuple[dict[str, object], ...]:
        if not isinstance(value, list):
            raise wrong(path, "a list of objects", value)
        if len(value) > self.max_items:
            raise BadRequest(f"`{path}` takes at most {self.max_items} items, got {len(value)}.", param=path)
        for i, item in enumerate(value):
            if not isinstance(item, dict):
                raise wrong(f"{path}[{i}]", "an object", item)
        return tuple(value)

    def schema(self) -> Schema:
        return {"type": "array", "items": {"type": "object"}, "maxItems": self.max_items}


@dataclass(frozen=True, slots=True)
class Anything:
    """Any value: the kind of fields that are refused or ignored."""

    def check(self, value: object, path: str, vocab_size: int) -> None:
        return None

    def schema(self) -> Schema:
        return {}


def typed(row: AnyField | None, text: str) -> object:
    """A value of a query as JSON would have it: a number or a switch where the row wants one, else the text itself."""
    kind = None if row is None else row.kind
    if isinstance(kind, Int) and text.isascii() and text.isdigit() and len(text) <= 16:  # int() of 10^5 digits is slow
        return int(text)
    return _SWITCHES.get(text.lower(), text) if isinstance(kind, Bool) else text


_SWITCHES = {"true": True, "1": True, "false": False, "0": False}


def refused(name: str, help: str, harmless: tuple[object, ...] = ()) -> Field[None]:
    """A row for a field that this version does not serve."""
    return Field(name, Anything(), None, help, Fate.REFUSED, harmless)


def ignored(name: str, help: str, harmless: tuple[object, ...] = ()) -> Field[None]:
    """A row for a field that is taken without effect."""
    return Field(name, Anything(), None, help, Fate.IGNORED, harmless)
