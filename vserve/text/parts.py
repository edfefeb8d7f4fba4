"""What a model's text is made of, in the order it arrives: reasoning, content and calls of tools.

Plain values between whoever splits the text and whoever words a reply.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the reasoning; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a tool begins.  index >= 0 counts the calls of one answer; id is the server's own."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments; never empty, and only after its CallBegin."""

    index: int
    text: str


Part = Reasoning | Content | CallBegin | CallArguments
