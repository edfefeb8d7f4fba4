"""Stop strings: finding them in a stream of text, and holding back what may become one.

Owns the automaton and the few characters held back.  It must not know about tokens or replies.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class _Automaton:
    """All stop strings as one automaton (Aho and Corasick 1975): state 0 has read nothing of any of them.

    next_states[state][char] leads on, falls_to[state] is where to retry when it does not; lengths[state] is how many
    characters of a stop string have been read, ends[state] the longest stop string that ends there, or None.
    first finds a character that any stop string begins with.
    """

    next_states: tuple[dict[str, int], ...]
    falls_to: tuple[int, ...]
    lengths: tuple[int, ...]
    ends: tuple[str | None, ...]
    first: re.Pattern[str]


class StopMatcher:
    """Passes text on until a stop string appears.  One instance per stream, used by one thread at a time.

    The match that ends first wins, and of several that end together the longest.  It is the same however the text is
    cut into pieces.  Time is linear in the text, whatever the stop strings.  With include the matched string is still
    passed on, otherwise the text ends before it.
    """

    __slots__ = ("_automaton", "_held", "_include", "_matched", "_state")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """stops may be empty; an empty string among them raises ValueError, as it would match everywhere."""
        self._automaton = _automaton(tuple(stops)) if stops else None
        self._include = include
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._matched

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next text; return what may be passed on now, and the stop string found, if any.

        What is held back is exactly the longest end of the text that a stop string begins with.  After a match
        nothing more is passed on.
        """
        automaton = self._automaton
        if automaton is None:
            return text, None
        if self._matched is not None:
            return "", self._matched
        if self._state == 0 and automaton.first.search(text) is None:
            return text, None
        return self._scan(automaton, text)

    def flush(self) -> str:
        """What was held back, once the text has ended without a match."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _scan(self, automaton: _Automaton, text: str) -> tuple[str, str | None]:
        next_states, falls_to, ends = automaton.next_states, automaton.falls_to, automaton.ends
        state = self._state
        # The held text is exactly what the state stands for, so only the new text is read.
        for position, char in enumerate(text):
            while state and char not in next_states[state]:
                state = falls_to[state]
            state = next_states[state].get(char, 0)
            stop = ends[state]
            if stop is not None:
                self._matched = stop
                whole = self._held + text[: position + 1]
                self._held, self._state = "", 0
                return whole if self._include else whole[: -len(stop)], stop
        whole = self._held + text
        keep = len(whole) - automaton.lengths[state]
        self._state, self._held = state, whole[keep:]
        return whole[:keep], None


_CACHED_CHARS = 256
"""Clients choose the strings, and a state takes about 300 bytes: only short lists are kept, 64 of them."""


def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _cached(stops) if sum(map(len, stops)) <= _CACHED_CHARS else _compile(stops)


@lru_cache(maxsize=64)
def _cached(stops: tuple[str, ...]) -> _Automaton:
    return _compile(stops)


def _compile(stops: tuple[str, ...]) -> _Automaton:
    if not all(stops):
        raise ValueError("a stop string is empty")
    next_states: list[dict[str, int]] = [{}]
    lengths = [0]
    ends: list[str | None] = [None]
    for stop in stops:
        state = 0
        for char in stop:
            if char not in next_states[state]:
                next_states[state][char] = len(next_states)
                next_states.append({})
                lengths.append(lengths[state] + 1)
                ends.append(None)
            state = next_states[state][char]
        ends[state] = stop
    falls_to = [0] * len(next_states)
    # Breadth first: where a state falls to is shorter, so it is known already.
    queue = deque(next_states[0].values())
    while queue:
        state = queue.popleft()
        for char, after in next_states[state].items():
            fall = falls_to[state]
            while fall and char not in next_states[fall]:
                fall = falls_to[fall]
            falls_to[after] = next_states[fall].get(char, 0)
            queue.append(after)
        # Its own string is longer than any that ends where it falls to.
        ends[state] = ends[state] or ends[falls_to[state]]
    first = re.compile("[" + "".join(map(re.escape, dict.fromkeys(stop[0] for stop in stops))) + "]")
    return _Automaton(tuple(next_states), tuple(falls_to), tuple(lengths), tuple(ends), first)
