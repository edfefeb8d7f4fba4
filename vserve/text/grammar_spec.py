"""What text a request allows: ``GrammarSpec``, a plain value that whoever reads a request hands to whoever compiles it.

Knows no library and no token.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class GrammarKind(enum.Enum):
    """How the source of a grammar is to be read."""

    JSON_OBJECT = "json_object"  # any JSON object; the source is empty
    JSON_SCHEMA = "json_schema"  # the source is a JSON Schema
    REGEX = "regex"
    CHOICE = "choice"  # the source is a JSON list of strings
    LARK = "grammar"  # the source is a grammar in Lark's notation, or in GBNF (with "::=")


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """One grammar that an answer must follow, as text; two equal ones compile to the same.

    whitespace: for JSON, the regular expression of what may stand between its tokens; "" for nothing, None for any
    whitespace.
    """

    kind: GrammarKind
    source: str
    whitespace: str | None = None
