"""What a model's text is made of, in the order it arrives: reasoning, content and calls of tools.

Plain values between whoever splits the text and whoever words a reply, and the protocol between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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


class Splitter(Protocol):
    """Turns the text of one answer into parts.  One instance an answer, used by one thread at a time.

    The parts of push and flush, merged, are the same however the text is cut.
    """

    @property
    def reasoning(self) -> bool:
        """Whether text that came now would be reasoning, as far as is known."""

    @property
    def num_calls(self) -> int:
        """Calls whose arguments are complete."""

    def push(self, text: str) -> list[Part]:
        """Take the next text; return the parts that are certain now."""

    def flush(self) -> list[Part]:
        """The rest, once the text has ended.  Nothing may be pushed afterwards."""


def merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same parts with neighbours of one kind (and one call) joined."""
    if len(parts) < 2:
        return tuple(parts)
    made: list[Part] = []
    texts: list[str] = []  # of the last part: joined once, so that many small parts cost no more than a few large ones
    last: Part | None = None

    def close() -> None:
        if isinstance(last, Reasoning):
            made.append(Reasoning("".join(texts)))
        elif isinstance(last, Content):
            made.append(Content("".join(texts)))
        elif isinstance(last, CallArguments):
            made.append(CallArguments(last.index, "".join(texts)))
        texts.clear()

    for part in parts:
        if isinstance(part, CallBegin):
            close()
            made.append(part)
            last = part
            continue
        same = type(part) is type(last)
        if same and isinstance(part, CallArguments) and isinstance(last, CallArguments):
            same = part.index == last.index
        if not same:
            close()
        texts.append(part.text)
        last = part
    close()
    return tuple(made)
