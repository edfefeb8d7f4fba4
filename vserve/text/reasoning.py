"""Reasoning: telling a model's thoughts, between ``<think>`` and ``</think>``, from its answer.

Owns the marks, where a template leaves the model with them, and the split.  White space around the marks belongs to
the marks.  Knows nothing of tools or tokens.
"""

from __future__ import annotations

import enum

from vserve.text.marks import SPACE, SPACE_LIMIT, MarkFinder
from vserve.text.parts import Content, Part, Reasoning

OPEN = "<think>"
CLOSE = "</think>"


class ReasoningStyle(enum.Enum):
    """Which models' habits are followed; the value is the flag's."""

    DEEPSEEK_R1 = "deepseek_r1"  # an answer begins with reasoning, whether it says <think> or not
    QWEN3 = "qwen3"  # an answer begins with reasoning where it, or the prompt before it, says <think>


class Start(enum.Enum):
    """How an answer begins: within the reasoning, or with what may turn out to be reasoning."""

    INSIDE = enum.auto()
    OPEN = enum.auto()


def style_of(template: str) -> ReasoningStyle | None:
    """The style of a model with this chat template; None where the template knows no reasoning."""
    return ReasoningStyle.QWEN3 if OPEN in template or CLOSE in template else None


def start_of(style: ReasoningStyle, prompt: str, continued: str | None) -> Start | None:
    """How an answer to the rendered prompt begins; None where the prompt has closed the reasoning already.

    continued: the text of the last message where the answer goes on with it.  Only that text and the very end of the
    prompt count: what users write is no mark.
    """
    if continued is not None:
        if CLOSE in continued:
            return None
        return Start.INSIDE if OPEN in continued else _by_habit(style)
    end = prompt[-256:].rstrip(SPACE)
    if end.endswith(OPEN):
        return Start.INSIDE
    return None if end.endswith(CLOSE) else _by_habit(style)


def _by_habit(style: ReasoningStyle) -> Start:
    return Start.INSIDE if style is ReasoningStyle.DEEPSEEK_R1 else Start.OPEN


class _State(enum.Enum):
    OPENING = enum.auto()  # within the reasoning; the model may still say <think> itself
    UNSURE = enum.auto()  # nothing yet but white space and perhaps the beginning of <think>
    SPACE = enum.auto()  # white space behind <think>
    INSIDE = enum.auto()
    BEHIND = enum.auto()  # white space behind </think>
    ANSWER = enum.auto()


_REASONS = frozenset({_State.OPENING, _State.SPACE, _State.INSIDE})


class ReasoningSplitter:
    """A Splitter (parts.py) that knows reasoning and content.  Reasoning that is never closed lasts to the end."""

    __slots__ = ("_finder", "_held", "_state")

    num_calls = 0

    def __init__(self, start: Start) -> None:
        self._state = _State.OPENING if start is Start.INSIDE else _State.UNSURE
        self._finder = MarkFinder((CLOSE,))
        self._held = ""

    @property
    def reasoning(self) -> bool:
        return self._state in _REASONS

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        if self._state in (_State.OPENING, _State.UNSURE):
            text = self._open(text)
        if self._state is _State.SPACE:
            text = text.lstrip(SPACE)
            if text:
                self._state = _State.INSIDE
        if self._state is _State.INSIDE and text:
            found = self._finder.push(text)
            if found.before:
                parts.append(Reasoning(found.before))
            text = text[found.end :]
            if found.mark is not None:
                self._state = _State.BEHIND
        if self._state is _State.BEHIND:
            text = text.lstrip(SPACE)
            if text:
                self._state = _State.ANSWER
        if self._state is _State.ANSWER and text:
            parts.append(Content(text))
        return parts

    def flush(self) -> list[Part]:
        held = self._held + self._finder.flush()
        if not held:
            return []
        return [Reasoning(held) if self.reasoning else Content(held)]

    def _open(self, text: str) -> str:
        """Look for <think> at the beginning; returns the text that is left once that is decided."""
        whole, self._held = self._held + text, ""
        words = whole.lstrip(SPACE)
        spaces = len(whole) - len(words)
        if self._state is _State.OPENING:
            whole, spaces = words, 0
        if words.startswith(OPEN) and spaces <= SPACE_LIMIT:
            self._state = _State.SPACE
            return words[len(OPEN) :]
        if OPEN.startswith(words) and spaces <= SPACE_LIMIT:
            self._held = whole
            return ""
        self._state = _State.INSIDE if self._state is _State.OPENING else _State.ANSWER
        return whole
