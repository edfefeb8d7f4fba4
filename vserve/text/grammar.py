"""Grammars: GrammarSpec in, matchers out; what an answer may go on with, as a mask over the vocabulary.

A source from a client is tried in a helper process first, which is killed when it takes too long: a grammar may loop,
fill memory or overflow the stack of whoever compiles it.  What passed is compiled here, within the same limits, and
kept.  Needs the extra "structured", imported when the first ``Grammars`` is made.
"""

from __future__ import annotations

import contextlib
import importlib.util
import marshal
import os
import queue
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vserve.errors import BadRequest, InternalError, RateLimited
from vserve.text.grammar_spec import GrammarKind, GrammarSpec
from vserve.text.pieces import DecodeStyle
from vserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

COMPILE_S = 4.0
"""Longest trial of one source."""
SLOWEST_MASK_S = 0.25
"""Processor time of one mask from which on its request is ended: all others wait for it."""
HELPERS = 2
"""Processes that try grammars, so that one slow grammar does not hold up all others."""
MOST_WAITING = 32
"""Sources that wait for a helper, or are tried, at once; further ones are told to come back."""
START_S = 60.0
KEPT = 64
"""Compiled grammars that are kept."""
KEPT_CHARS = 2**21
"""Characters of their sources, in all: a compiled schema of 3,000 properties takes about 20 MB."""
_LENGTH = struct.Struct("<I")


def why_none(tokenizer: Tokenizer, eos_ids: frozenset[int]) -> str | None:
    """Why there can be no ``Grammars`` for a model; None when there can."""
    if importlib.util.find_spec("llguidance") is None:
        return "this server was installed without it; install vserve[structured]"
    if tokenizer.style is DecodeStyle.WINDOW:
        return "this model's tokenizer does not say which bytes its tokens stand for"
    if not eos_ids:
        return "this model has no token that ends an answer"
    return None


class Matcher:
    """One answer's progress through a grammar (engine.request.Constraint).  One thread at a time."""

    __slots__ = ("_grammar", "_matcher", "_num_seen")

    def __init__(self, grammar: LLMatcher) -> None:
        self._grammar = grammar
        self._matcher: LLMatcher | None = None
        self._num_seen = 0

    def afresh(self) -> Matcher:
        """A matcher of the same grammar at its start."""
        return Matcher(self._grammar)

    def mask(self, generated: Sequence[int]) -> bytes:
        """Which ids may follow these: bit i % 8 of byte i // 8 for id i.

        generated: every id of the answer; it goes on from what the last call saw.  Where the grammar is complete only
        ids that end the answer are allowed.  Raises BadRequest when the grammar has met one of its limits.
        """
        if self._matcher is None:  # not before the first draw: a request that waits holds no state
            self._matcher = self._grammar.deep_copy()
        matcher = self._matcher
        if len(generated) > self._num_seen:
            matcher.consume_tokens(list(generated[self._num_seen :]))
            self._num_seen = len(generated)
        began_s = time.thread_time()
        mask = matcher.compute_bitmask()
        took_s = time.thread_time() - began_s
        if matcher.is_error():
            reason = matcher.get_error().replace("<non-verbose/>", "").strip()[:200]
            raise BadRequest(f"The grammar that the answer must follow failed: {reason}.")
        if took_s > SLOWEST_MASK_S:
            raise BadRequest("The grammar that the answer must follow is too complex to be followed quickly.")
        return mask


class Grammar:
    """A compiled grammar.  Any thread."""

    __slots__ = ("_first",)

    def __init__(self, first: LLMatcher) -> None:
        self._first = first

    def matcher(self) -> Matcher:
        """A matcher for one answer, at its start."""
        return Matcher(self._first)


class Grammars:
    """Compiles for one vocabulary and keeps what it compiled.  Any thread; ``compile`` may take seconds.

    Making one takes a quarter of a second.  Raises ImportError without the library.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int], vocab_size: int) -> None:
        """eos_ids: what ends an answer, not empty.  vocab_size: the width of the logits."""
        from vserve.text import grammar_library as library

        self._library = library
        vocabulary = library.Vocabulary(
            tokens=list(tokenizer.byte_table(skip_special=False)),
            special=sorted(tokenizer.special_ids | eos_ids),
            eos=sorted(eos_ids),
            size=vocab_size,
        )
        self._tokenizer = library.tokenizer_for(
            vocabulary, lambda text: tokenizer.encode(text, add_special=False, parse_special=False)
        )
        self._lock = threading.Lock()
        self._kept: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._waiting = 0
        words = marshal.dumps(
            (list(vocabulary.tokens), list(vocabulary.special), list(vocabulary.eos), vocabulary.size)
        )
        self._helpers = [_Helper(words) for _ in range(HELPERS)]
        self._idle: queue.LifoQueue[_Helper] = queue.LifoQueue()  # the last one used: the others need not be started
        for helper in self._helpers:
            self._idle.put(helper)

    def kept(self, spec: GrammarSpec) -> Grammar | None:
        """The grammar, if it has been compiled lately.  Quick."""
        with self._lock:
            found = self._kept.get(spec)
            if found is not None:
                self._kept.move_to_end(spec)
            return found

    def compile(self, spec: GrammarSpec, path: str) -> Grammar:
        """The grammar of spec.  path: the request's field.

        Raises BadRequest with the reason why there is none, and RateLimited when too many wait.
        """
        with self._lock:
            if self._waiting >= MOST_WAITING:
                raise RateLimited(
                    f"{self._waiting} grammars are being compiled, the limit is {MOST_WAITING}; try again later.",
                    retry_after_s=int(COMPILE_S),
                )
            self._waiting += 1
        try:
            return self._compile(spec, path)
        finally:
            with self._lock:
                self._waiting -= 1

    def _compile(self, spec: GrammarSpec, path: str) -> Grammar:
        helper = self._idle.get()
        try:
            found = self.kept(spec)  # another request may have brought it meanwhile
            if found is not None:
                return found
            if spec.kind is not GrammarKind.JSON_OBJECT or spec.whitespace:  # from a client, then
                problem = helper.problem(spec)
                if problem:
                    raise BadRequest(f"`{path}` cannot be used: {problem}.", param=path)
        finally:
            self._idle.put(helper)
        try:
            grammar = Grammar(self._library.compile_spec(self._tokenizer, spec))
        except self._library.GrammarError as error:
            raise BadRequest(f"`{path}` cannot be used: {error}.", param=path) from None
        with self._lock:
            self._kept[spec] = grammar
            while len(self._kept) > 1 and (len(self._kept) > KEPT or self._chars() > KEPT_CHARS):
                self._kept.popitem(last=False)
        return grammar

    def close(self) -> None:
        """End the helper processes.  A later compile starts a new one."""
        for helper in self._helpers:
            helper.close()

    def _chars(self) -> int:
        return sum(len(spec.source) for spec in self._kept)


class _Helper:
    """A process that tries grammars, started for the first one; one trial at a time.  close: any thread."""

    def __init__(self, words: bytes) -> None:
        """words: the vocabulary, as the process reads it."""
        self._words = words
        self._child: subprocess.Popen[bytes] | None = None

    def problem(self, spec: GrammarSpec) -> str:
        """What is wrong with spec, or "".  Raises InternalError when no helper can be started."""
        try:
            child = self._child or self._start()
        except OSError:
            raise InternalError("The helper that compiles grammars could not be started.") from None
        try:
            said = _ask(child, marshal.dumps((spec.kind.value, spec.source, spec.whitespace)), COMPILE_S)
        except TimeoutError:
            self._kill(child)
            return f"compiling it takes longer than {COMPILE_S:g} s"
        except (OSError, ValueError):  # the process is gone: out of memory or of stack, or closed with the server
            self._kill(child)
            return "compiling it takes more memory than it may"
        return said.decode("utf-8", "replace")

    def close(self) -> None:
        """End the process; a trial under way ends with a problem."""
        child = self._child
        if child is not None:
            self._kill(child)

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(os.path.abspath(folder or ".") for folder in sys.path)
        child = subprocess.Popen(
            [sys.executable, "-m", "vserve.text.grammar_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            bufsize=0,
        )
        self._child = child
        try:
            _ask(child, self._words, START_S)
        except OSError:  # TimeoutError is one
            self._kill(child)
            raise
        return child

    def _kill(self, child: subprocess.Popen[bytes]) -> None:
        if self._child is child:
            self._child = None
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _ask(child: subprocess.Popen[bytes], message: bytes, limit_s: float) -> bytes:
    """Send a message and wait for the answer.  Raises TimeoutError, and ConnectionError when the child is gone."""
    assert child.stdin is not None
    deadline_s = time.monotonic() + limit_s
    data = memoryview(_LENGTH.pack(len(message)) + message)
    while data:
        data = data[child.stdin.write(data) :]
    head = _read(child, _LENGTH.size, deadline_s)
    return _read(child, _LENGTH.unpack(head)[0], deadline_s)


def _read(child: subprocess.Popen[bytes], count: int, deadline_s: float) -> bytes:
    assert child.stdout is not None
    data = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while len(data) < count:
            if not selector.select(max(0.0, deadline_s - time.monotonic())):
                raise TimeoutError
            more = os.read(child.stdout.fileno(), count - len(data))
            if not more:
                raise ConnectionError("the helper has ended")
            data += more
    return data
