"""Finding marks (``<tool_call>``, ``</think>``) in a stream of text, and holding back what may become one.

Owns the few characters held back.  Knows nothing of what a mark means.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

SPACE = " \t\r\n"
SPACE_LIMIT = 64
"""White space directly before a mark belongs to the mark; so much of it at most, so that what is held has a bound."""


class Found(NamedTuple):
    """What one push released.  before: text that no mark touches.  spaces: white space between it and the mark.

    mark: None where there is none yet; spaces is empty then.  end: the place in the pushed text behind the mark, or its
    end.
    """

    before: str
    spaces: str
    mark: str | None
    end: int


class MarkFinder:
    """Finds the first of some marks, none of which holds another.  One instance a stream, linear time."""

    __slots__ = ("_begins", "_held", "_marks", "_pattern")

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks = tuple(marks)
        self._begins = tuple({mark[0] for mark in self._marks})
        self._pattern = re.compile("|".join(map(re.escape, self._marks)))  # re keeps compiled patterns
        self._held = ""

    def push(self, text: str, at: int = 0) -> Found:
        """Take the text from at on, up to a mark.  To go on behind that, push the same text with ``end`` as at."""
        if not (self._held or at) and text and text[-1] not in SPACE:
            for begin in self._begins:
                if begin in text:
                    break
            else:  # the common token of a plain answer
                return Found(text, "", None, len(text))
        whole, start = text, at
        shift = len(self._held)  # what is held is the end of the text pushed before, so that this one starts at 0
        if shift:
            whole, start = self._held + text[at:], 0
        match = self._pattern.search(whole, start)
        if match is None:
            edge = _space_before(whole, start, len(whole) - self._begun(whole, start))
            self._held = whole[edge:]
            return Found(whole[start:edge], "", None, len(text))
        self._held = ""
        edge = _space_before(whole, start, match.start())
        end = match.end() if not shift else at + match.end() - shift
        return Found(whole[start:edge], whole[edge : match.start()], match[0], end)

    def flush(self) -> str:
        """What was held back, once the text has ended."""
        held, self._held = self._held, ""
        return held

    def _begun(self, text: str, start: int) -> int:
        """The length of the longest end of text[start:] that a mark begins with, and is not yet whole."""
        longest = 0
        for mark in self._marks:
            place = text.find(mark[0], max(start, len(text) - len(mark) + 1))
            while place >= 0:
                if mark.startswith(text[place:]):
                    longest = max(longest, len(text) - place)
                    break
                place = text.find(mark[0], place + 1)
        return longest


def _space_before(text: str, start: int, end: int) -> int:
    """Where the white space of text[start:end] that reaches its end begins, SPACE_LIMIT before that at most."""
    start = max(start, end - SPACE_LIMIT)
    return start + len(text[start:end].rstrip(SPACE))
