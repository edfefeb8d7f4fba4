"""The command line: argv -> Config -> a command, and the exit code.

Exit codes: 0 done, or drained after a signal; 1 a bug, or vserve health found the server unwell; 2 a flag, a file or an
address that cannot be used (one line on stderr says which); 3 the engine died while serving, or hung with
--exit-on-stall.  Nothing heavy is imported before argv has been understood.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from vserve import __version__, settings
from vserve.errors import StartupError

EXIT_BAD_START = 2

USAGE = """usage: vserve COMMAND [flags]

  serve [MODEL]   serve a model over an OpenAI-compatible API; with no command, serve is meant
  plan [MODEL]    print what a model takes of a GPU, and how many sequences fit
  config          print the settings that serve would have, and where each comes from
  health          ask a running server whether it is healthy; for container probes
  version         print the version

vserve serve --help lists the flags; each is also an environment variable (--max-queue: VSERVE_MAX_QUEUE) and a key of
the TOML file that --config names (max-queue = 10).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of argv (default sys.argv) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words, os.environ)
    except StartupError as error:
        print(f"vserve: {error}", file=sys.stderr)
        return EXIT_BAD_START
    except SystemExit as done:  # argparse ends so after --help
        return done.code if isinstance(done.code, int) else EXIT_BAD_START


def _run(words: Sequence[str], environ: Mapping[str, str]) -> int:
    if words and words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if words and words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    command = COMMANDS.get(words[0]) if words else None
    if command is not None:
        return command(words[1:], environ)
    # As with vLLM's "python -m … --model X": flags or a model without a command mean serve.
    return _serve(words, environ)


def _serve(words: Sequence[str], environ: Mapping[str, str]) -> int:
    found = settings.read(words, environ)
    for note in found.notes:
        print(f"vserve: {note}", file=sys.stderr)
    from vserve.serve import serve

    return serve(found.config)


def _config(words: Sequence[str], environ: Mapping[str, str]) -> int:
    if any(word in ("-h", "--help") for word in words):
        print("usage: vserve config [the flags of vserve serve]\n\nPrint the settings that vserve serve would have "
              "with these flags, as a TOML file,\neach with its origin.  --config FILE reads such a file.")  # fmt: skip
        return 0
    print(settings.show(settings.read(words, environ)), end="")
    return 0


def _plan(words: Sequence[str], environ: Mapping[str, str]) -> int:
    from vserve import plan

    return plan.run(words, environ)


def _health(words: Sequence[str], environ: Mapping[str, str]) -> int:
    from vserve.client import health

    return health.run(words, environ)


def _version(words: Sequence[str], environ: Mapping[str, str]) -> int:
    if words:
        raise StartupError(f"version takes no arguments, got {words[0]!r}")
    print(__version__)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str], Mapping[str, str]], int]] = {
    "serve": _serve,
    "config": _config,
    "plan": _plan,
    "health": _health,
    "version": _version,
}


if __name__ == "__main__":
    sys.exit(main())
