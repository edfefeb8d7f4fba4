"""Kinds of request field that are made of others: objects with a table of their own, tagged objects, lists.

Knows nothing of any endpoint; the plain kinds are fields.py's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from vserve.api.fields import Kind, Schema, Table, Values, object_schema, read, wrong
from vserve.errors import BadRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Checked:
    """An object inside a body, after its check.  ignored: the fields without effect, each as path.name."""

    values: Values
    tag: str
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """An object with a field table of its own."""

    rows: Table

    def check(self, value: object, path: str, vocab_size: int) -> Checked:
        if not isinstance(value, dict):
            raise wrong(path, "an object", value)
        values, unknown = read(value, self.rows, vocab_size, strict=False, prefix=f"{path}.")
        # Without indexes: the header that lists them is bounded, and a list repeats itself.
        return Checked(values, "", tuple(re.sub(r"\[\d+\]", "", name) for name in unknown))

    def schema(self) -> Schema:
        return object_schema(self.rows, strict=False)


@dataclass(frozen=True, slots=True)
class Tagged:
    """An object whose field ``by`` says which table holds for its other fields.  note: why there are no more."""

    tables: Mapping[str, Table]
    by: str = "type"
    note: str = ""

    def check(self, value: object, path: str, vocab_size: int) -> Checked:
        if not isinstance(value, dict):
            raise wrong(path, "an object", value)
        tag = value.get(self.by)
        rows = self.tables.get(tag) if isinstance(tag, str) else None
        if not isinstance(tag, str) or rows is None:
            raise wrong(f"{path}.{self.by}", f"one of {', '.join(self.tables)}{self.note}", tag)
        rest = {name: item for name, item in value.items() if name != self.by}
        checked = Record(rows).check(rest, path, vocab_size)
        return Checked(checked.values, tag, checked.ignored)

    def schema(self) -> Schema:
        return {"anyOf": [self._option(tag, object_schema(rows, strict=False)) for tag, rows in self.tables.items()]}

    def _option(self, tag: str, made: Schema) -> Schema:
        fields, required = made["properties"], made.get("required", [])
        assert isinstance(fields, dict)
        assert isinstance(required, list)
        tagged = {self.by: {"type": "string", "const": tag}, **fields}
        return {**made, "properties": tagged, "required": [self.by, *required]}


@dataclass(frozen=True, slots=True)
class Items(Generic[T]):
    """A list of least to most values of one kind."""

    kind: Kind[T]
    most: int
    least: int = 0

    def check(self, value: object, path: str, vocab_size: int) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise wrong(path, "a list", value)
        if not self.least <= len(value) <= self.most:
            raise BadRequest(f"`{path}` takes {self.least} to {self.most} items, got {len(value)}.", param=path)
        return tuple(self.kind.check(item, f"{path}[{i}]", vocab_size) for i, item in enumerate(value))

    def schema(self) -> Schema:
        return {"type": "array", "items": self.kind.schema(), "minItems": self.least, "maxItems": self.most}
