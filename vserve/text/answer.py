"""One answer split by all that applies to it: reasoning first, then the calls in what is left.

Owns the order of the two and what is left out.  Knows no mark.
"""

from __future__ import annotations

from collections.abc import Iterable

from vserve.text.parts import Content, Part, Reasoning, Splitter


class AnswerSplitter:
    """A Splitter (parts.py) made of up to two others."""

    __slots__ = ("_calls", "_shows_reasoning", "_thoughts")

    def __init__(self, thoughts: Splitter | None, calls: Splitter | None, shows_reasoning: bool = True) -> None:
        """thoughts finds reasoning, calls the calls in its content; without shows_reasoning it is dropped."""
        self._thoughts = thoughts
        self._calls = calls
        self._shows_reasoning = shows_reasoning

    @property
    def reasoning(self) -> bool:
        return self._thoughts is not None and self._thoughts.reasoning

    @property
    def num_calls(self) -> int:
        return 0 if self._calls is None else self._calls.num_calls

    def push(self, text: str) -> list[Part]:
        return self._split([Content(text)] if self._thoughts is None else self._thoughts.push(text))

    def flush(self) -> list[Part]:
        parts = [] if self._thoughts is None else self._split(self._thoughts.flush())
        return parts if self._calls is None else [*parts, *self._calls.flush()]

    def _split(self, parts: Iterable[Part]) -> list[Part]:
        made: list[Part] = []
        for part in parts:
            if isinstance(part, Reasoning):
                if self._shows_reasoning:
                    made.append(part)
            elif isinstance(part, Content) and self._calls is not None:
                made += self._calls.push(part.text)
            else:
                made.append(part)
        return made
