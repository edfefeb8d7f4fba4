"""The helper process of text/grammar.py: compiles and tries grammars, and answers with what is wrong with them.

Whatever a hostile grammar does, it does here: it may loop, fill memory up to a limit or overflow the stack, and the
server lives on.  Speaks length-prefixed messages over stdin and stdout; ends when stdin does.
"""

from __future__ import annotations

import marshal
import resource
import struct
import sys
import threading
from typing import BinaryIO

from vserve.text.grammar_library import GrammarError, Vocabulary, compile_spec, tokenizer_for, trial
from vserve.text.grammar_spec import GrammarKind, GrammarSpec

LENGTH = struct.Struct("<I")
MEMORY_BYTES = 1 << 30
THREAD_STACK_BYTES = 2 << 20
"""Of a thread where the limit on stacks says nothing."""


def main() -> None:
    """Read a vocabulary, then specs until the end of stdin; "" is the answer for one that is fine."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    # Half of what a thread of the server has: what fits here fits there.
    threading.stack_size(min(THREAD_STACK_BYTES if soft == resource.RLIM_INFINITY else soft, 8 << 20) // 2)
    worker = threading.Thread(target=_serve, args=(sys.stdin.buffer, sys.stdout.buffer))
    worker.start()
    worker.join()


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    tokens, special, eos, size = marshal.loads(_read(requests) or b"")
    tokenizer = tokenizer_for(Vocabulary(tokens, special, eos, size))
    _write(answers, b"")
    while (message := _read(requests)) is not None:
        kind, source, whitespace = marshal.loads(message)
        problem = ""
        try:
            trial(compile_spec(tokenizer, GrammarSpec(GrammarKind(kind), source, whitespace)))
        except GrammarError as error:
            problem = str(error)
        except MemoryError:
            problem = "it needs too much memory"
        _write(answers, problem.encode("utf-8", "replace"))


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def _write(stream: BinaryIO, message: bytes) -> None:
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()


if __name__ == "__main__":
    main()
