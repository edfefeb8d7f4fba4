"""A JSON value that arrives in pieces: where it ends, and where it stops being JSON.

Owns the grammar of RFC 8259 as one table of states.  It keeps no text and makes no values: whoever reads has the text.
"""

from __future__ import annotations

import enum
import re

DEPTH_LIMIT = 64
_SPACE = " \t\n\r"
_SCALAR_LIMIT = 512
"""Most characters of a number, true, false or null."""
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR_CHARS = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_HEX = frozenset("0123456789abcdefABCDEF")


class State(enum.Enum):
    """What may come next."""

    VALUE = enum.auto()
    VALUE_OR_END = enum.auto()  # behind [
    KEY_OR_END = enum.auto()  # behind {
    KEY = enum.auto()
    COLON = enum.auto()
    COMMA_OR_END = enum.auto()
    STRING = enum.auto()
    ESCAPE = enum.auto()
    HEX = enum.auto()
    SCALAR = enum.auto()
    DONE = enum.auto()
    BROKEN = enum.auto()


_ENDS = frozenset({State.DONE, State.BROKEN})


class JsonReader:
    """Reads one JSON object.  One instance a value; time is linear in the text, memory is the depth's."""

    __slots__ = ("_closers", "_hex_left", "_is_key", "_scalar", "state")

    def __init__(self) -> None:
        self.state = State.VALUE
        self._closers: list[str] = []
        self._is_key = False
        self._hex_left = 0
        self._scalar = ""

    def feed(self, text: str, at: int) -> int:
        """Read text from at; returns the place of the first character that is not part of the value.

        That is the text's end while ``state`` is neither DONE nor BROKEN.
        """
        while at < len(text) and self.state not in _ENDS:
            match self.state:
                case State.STRING:
                    at = self._string(text, at)
                case State.SCALAR:
                    at = self._in_scalar(text, at)
                case State.ESCAPE | State.HEX:
                    at += self._escape(text[at])
                case _:
                    char = text[at]
                    at += 1 if char in _SPACE else self._structure(char)
        return at

    def _string(self, text: str, at: int) -> int:
        match = _PLAIN.match(text, at)
        assert match is not None  # it matches nothing, too
        at = match.end()
        if at == len(text):
            return at
        if text[at] == '"':
            self.state = State.COLON if self._is_key else State.COMMA_OR_END
        elif text[at] == "\\":
            self.state = State.ESCAPE
        else:
            self.state = State.BROKEN
            return at
        return at + 1

    def _escape(self, char: str) -> int:
        if self.state is State.HEX:
            if char not in _HEX:
                return self._broken()
            self._hex_left -= 1
            self.state = State.HEX if self._hex_left else State.STRING
        elif char == "u":
            self.state, self._hex_left = State.HEX, 4
        elif char in '"\\/bfnrt':
            self.state = State.STRING
        else:
            return self._broken()
        return 1

    def _in_scalar(self, text: str, at: int) -> int:
        match = _SCALAR_CHARS.match(text, at)
        assert match is not None
        end = min(match.end(), at + _SCALAR_LIMIT - len(self._scalar))
        self._scalar += text[at:end]
        if end == len(text):
            return end
        if _SCALAR.fullmatch(self._scalar) is None or end != match.end():
            self._broken()
        else:
            self.state = State.COMMA_OR_END
        return end

    def _structure(self, char: str) -> int:
        """Take one character between strings and numbers; 1 where it was taken, 0 where it is looked at again."""
        state = self.state
        if char in "}]" and state in (State.COMMA_OR_END, State.KEY_OR_END, State.VALUE_OR_END):
            if not self._closers or self._closers[-1] != char:
                return self._broken()
            self._closers.pop()
            self.state = State.COMMA_OR_END if self._closers else State.DONE
            return 1
        match state:
            case State.KEY | State.KEY_OR_END if char == '"':
                self.state, self._is_key = State.STRING, True
            case State.COLON if char == ":":
                self.state = State.VALUE
            case State.COMMA_OR_END if char == ",":
                self.state = State.KEY if self._closers[-1] == "}" else State.VALUE
            case State.VALUE | State.VALUE_OR_END:
                return self._value(char)
            case _:
                return self._broken()
        return 1

    def _value(self, char: str) -> int:
        if char in "{[":
            if len(self._closers) == DEPTH_LIMIT:
                return self._broken()
            self._closers.append("}" if char == "{" else "]")
            self.state = State.KEY_OR_END if char == "{" else State.VALUE_OR_END
        elif not self._closers:  # only an object is read at the top
            return self._broken()
        elif char == '"':
            self.state, self._is_key = State.STRING, False
        else:
            self.state, self._scalar = State.SCALAR, ""
            return 0 if _SCALAR_CHARS.fullmatch(char) else self._broken()
        return 1

    def _broken(self) -> int:
        self.state = State.BROKEN
        return 0
