"""Run the command line once for each list of words on stdin (JSON), each in a process of its own that shares imports.

Prints a JSON list of {"code", "stderr", "peak_kib", "idle_kib"}: idle is the memory of a process that did nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

import vserve.assemble
import vserve.serve  # noqa: F401  (the imports that every start would repeat)
from vserve.cli import main


def started(words: list[str]) -> dict[str, object]:
    """One start in a child of this process."""
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 70
            try:
                code = main(words) if words else 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        errors.seek(0)
        text = errors.read().decode("utf-8", "replace")
    return {"code": os.waitstatus_to_exitcode(status), "stderr": text, "peak_kib": usage.ru_maxrss}


if __name__ == "__main__":
    idle = started([])["peak_kib"]
    print(json.dumps([{**started(words), "idle_kib": idle} for words in json.load(sys.stdin)]))
