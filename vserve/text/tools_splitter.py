"""Calls of tools in a model's text: telling them from content while the text arrives.

Owns what counts as a call and what becomes of text that only looks like one: it is content.  A hand-written reader over
a cursor, written as one generator that waits wherever the text ends; no character is read twice.  White space
around calls belongs to them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator

from vserve.text.marks import SPACE, MarkFinder
from vserve.text.parts import CallArguments, CallBegin, Content, Part
from vserve.text.tools import ARGS_MARK, ID_MARK, CallForm, CallSyntax
from vserve.text.tools_json import JsonReader, State

_WORD_LIMIT = 256
"""Most characters of a key, a name or an id."""

_NAME_ENDS = frozenset('{[ \t\r\n"')

Reading = Generator[None, None, None]
Word = Generator[None, None, str]


class _NoCallError(Exception):
    """What has been read since the last call is no call."""


class _EndError(Exception):
    """The text is over."""


class CallSplitter:
    """A Splitter (parts.py) that knows content and calls.

    A call is made when its name is that of a tool and its arguments are a JSON object.  With hold it is passed on
    whole, and whatever falls short of that is content.  Without, the arguments go out as they are written; should they
    turn out broken, those that went out stay, and the rest is content.
    """

    __slots__ = (
        "_after_call", "_at", "_chunk", "_ended", "_finder", "_from", "_hidden", "_hold", "_names", "_new_id", "_next",
        "_out", "_raw", "_run", "_syntax", "num_calls",
    )  # fmt: skip

    reasoning = False

    def __init__(
        self,
        syntax: CallSyntax,
        names: Collection[str],
        *,
        hold: bool,
        hidden: Collection[str] = (),
        new_id: Callable[[], str] | None = None,
    ) -> None:
        """names: the tools there are.  hidden: marks that are special tokens, which no client is to see."""
        self._syntax = syntax
        self._names = frozenset(names)
        self._hold = hold
        self._hidden = frozenset(hidden)
        self._new_id = new_id or syntax.new_id
        self._finder = MarkFinder((syntax.opening, *(mark for mark in hidden if mark != syntax.opening)))
        self._chunk, self._at = "", 0
        self._raw: list[str] = []  # read since the last call or content: content itself if it turns out to be no call
        self._from = 0  # where in the chunk that goes on
        self._after_call = False
        self._ended = False
        self._next = 0
        self._out: list[Part] = []
        self.num_calls = 0
        self._run = self._answer()
        next(self._run)

    def push(self, text: str) -> list[Part]:
        self._chunk, self._at, self._from = text, 0, 0
        return self._go_on()

    def flush(self) -> list[Part]:
        self._ended = True
        return self._go_on()

    def _go_on(self) -> list[Part]:
        next(self._run, None)
        parts, self._out = self._out, []
        return parts

    # ---- the cursor --------------------------------------------------------------------------------------------

    def _wait(self) -> Reading:
        """Until there is text at the cursor.  Raises _EndError."""
        while self._at == len(self._chunk):
            if self._ended:
                raise _EndError
            self._save()
            yield

    def _save(self) -> None:
        """Keep what was read of this chunk."""
        if self._from < self._at:
            self._raw.append(self._chunk[self._from : self._at])
        self._from = self._at

    def _forget(self) -> None:
        """What was read so far is accounted for."""
        self._raw.clear()
        self._from = self._at

    def _spaces(self) -> Word:
        """Skip white space; the character behind it."""
        while True:
            yield from self._wait()
            char = self._chunk[self._at]
            if char not in SPACE:
                return char
            self._at += 1

    def _expect(self, text: str) -> Reading:
        for wanted in text:
            yield from self._wait()
            if self._chunk[self._at] != wanted:
                raise _NoCallError
            self._at += 1

    def _quoted(self) -> Word:
        """A string without escapes: no key, name or id has any."""
        yield from self._expect('"')
        word = yield from self._until('"')
        self._at += 1
        return word

    def _until(self, ends: Collection[str]) -> Word:
        chars: list[str] = []
        while True:
            yield from self._wait()
            char = self._chunk[self._at]
            if char in ends:
                return "".join(chars)
            if char == "\\" or char < " " or len(chars) == _WORD_LIMIT:
                raise _NoCallError
            chars.append(char)
            self._at += 1

    # ---- what an answer is made of ---------------------------------------------------------------------------------

    def _answer(self) -> Reading:
        try:
            if self._syntax.bare:
                yield from self._attempt(self._bare())
            while True:
                yield from self._attempt(self._marked())
        except _EndError:
            self._say(self._finder.flush())

    def _attempt(self, reading: Reading) -> Reading:
        """reading, and where it finds no call, what it had read as content."""
        try:
            yield from reading
        except (_NoCallError, _EndError) as end:
            self._save()
            raw = "".join(self._raw)
            for mark in self._hidden:
                raw = raw.replace(mark, "")
            self._forget()
            self._say(raw)
            if isinstance(end, _EndError):
                raise

    def _say(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip(SPACE)
        if text:
            self._after_call = False
            self._out.append(Content(text))

    def _bare(self) -> Reading:
        char = yield from self._spaces()
        if char != "{":
            raise _NoCallError
        yield from self._objects()

    def _marked(self) -> Reading:
        """Content up to the next mark, and the calls behind that."""
        while True:
            yield from self._wait()
            found = self._finder.push(self._chunk, self._at)
            self._say(found.before)
            self._at = found.end
            self._forget()
            if found.mark == self._syntax.opening:
                break
            if found.mark is not None:  # a special token by itself shows as nothing
                self._say(found.spaces)
        self._raw += (found.spaces, found.mark)
        char = yield from self._spaces()
        if self._syntax.form is not CallForm.MISTRAL:
            yield from self._objects()
        elif char == "[":
            yield from self._array()
        else:
            yield from self._named()

    def _objects(self) -> Reading:
        """A call as an object; Llama's may have more behind it."""
        yield from self._object()
        if self._syntax.closing:
            yield from self._spaces()
            yield from self._expect(self._syntax.closing)
            self._forget()
        while self._syntax.bare:
            char = yield from self._spaces()
            if char == ";":
                self._at += 1
                yield from self._spaces()
            yield from self._object()

    def _array(self) -> Reading:
        yield from self._expect("[")
        while True:
            yield from self._spaces()
            yield from self._object()
            char = yield from self._spaces()
            if char == "]":
                self._at += 1
                self._forget()
                return
            yield from self._expect(",")

    def _named(self) -> Reading:
        """A name and its arguments side by side, perhaps with marks between."""
        name = yield from self._until(_NAME_ENDS)
        char = yield from self._spaces()
        if char == "[":
            yield from self._expect("[")
            char = yield from self._next_char()
            if char == "C":
                yield from self._expect(ID_MARK[1:])
                yield from self._until(_NAME_ENDS)
                yield from self._expect("[")
            yield from self._expect(ARGS_MARK[1:])
            yield from self._spaces()
        if name not in self._names:
            raise _NoCallError
        yield from self._arguments(name)
        self._forget()

    def _next_char(self) -> Word:
        yield from self._wait()
        return self._chunk[self._at]

    def _object(self) -> Reading:
        """``{"name": ..., "arguments": {...}}`` in any order; id and type may stand beside them."""
        yield from self._expect("{")
        name: str | None = None
        arguments: str | None = None
        done = False
        while True:
            yield from self._spaces()
            key = yield from self._quoted()
            yield from self._spaces()
            yield from self._expect(":")
            yield from self._spaces()
            if key == "name" and name is None:
                name = yield from self._quoted()
                if name not in self._names:
                    raise _NoCallError
            elif key in ("arguments", "parameters") and not done and arguments is None:
                arguments = yield from self._arguments(name)
                done = name is not None
            elif key in ("id", "type"):
                yield from self._quoted()
            else:
                raise _NoCallError
            if not done and name is not None and arguments is not None:
                self._call(name, arguments)
                done = True
            char = yield from self._spaces()
            if char == "}":
                break
            yield from self._expect(",")
        if not done:
            raise _NoCallError
        self._at += 1
        self._forget()

    def _arguments(self, name: str | None) -> Word:
        """A JSON object.  It is passed on as name's where that is known; otherwise it is returned."""
        reader = JsonReader()
        texts: list[str] = []
        streams = name is not None and not self._hold
        while True:
            yield from self._wait()
            begin = self._at
            self._at = reader.feed(self._chunk, begin)
            text = self._chunk[begin : self._at]
            if text and streams:
                if not texts and name is not None:
                    self._begin(name)
                    texts.append("")
                self._out.append(CallArguments(self._next - 1, text))
                self._forget()
            else:
                texts.append(text)
            if reader.state is State.BROKEN:
                raise _NoCallError
            if reader.state is State.DONE:
                break
        if streams:
            self._finished()
        elif name is not None:
            self._call(name, "".join(texts))
        return "".join(texts)

    # ---- what goes out ---------------------------------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        self._out.append(CallBegin(self._next, self._new_id(), name))
        self._next += 1
        self._after_call = False  # what breaks off within the arguments keeps its white space

    def _call(self, name: str, arguments: str) -> None:
        self._begin(name)
        self._out.append(CallArguments(self._next - 1, arguments))
        self._finished()

    def _finished(self) -> None:
        self.num_calls += 1
        self._after_call = True
        self._forget()
