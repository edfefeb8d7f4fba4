"""Flags of vLLM that launch scripts carry along and that change nothing here: taken, and said so at start.

Owns the one table of them.  A value that would ask for something we do not do is an error, not a note.
"""

from __future__ import annotations

from dataclasses import dataclass

from vserve.errors import StartupError, shorten


@dataclass(frozen=True, slots=True)
class Familiar:
    """One flag.  values: None for a switch, else the values that are taken; empty: any.  why: what is done instead."""

    names: tuple[str, ...]
    why: str
    values: tuple[str, ...] | None = None

    @property
    def dest(self) -> str:
        """Where argparse puts it: no field of Config begins so."""
        return "familiar:" + self.names[0]


_ANY: tuple[str, ...] = ()

FAMILIAR: tuple[Familiar, ...] = (
    Familiar(("--trust-remote-code", "--no-trust-remote-code"), "code from a model's folder is never run"),
    Familiar(("--disable-log-requests", "--enable-log-requests"), "requests are logged with --access-log only"),
    Familiar(("--disable-log-stats",), "figures are at /metrics, not in the log"),
    Familiar(("--disable-uvicorn-access-log",), "requests are logged with --access-log only"),
    Familiar(("--uvicorn-log-level",), "there is no uvicorn", _ANY),
    Familiar(("--enforce-eager", "--no-enforce-eager"), "graphs are captured few at a time, beside serving"),
    Familiar(("--enable-chunked-prefill", "--no-enable-chunked-prefill"), "prompts are always taken in chunks"),
    Familiar(("--swap-space",), "a sequence that loses its blocks is computed again, not swapped", _ANY),
    Familiar(("--max-num-partial-prefills", "--max-seq-len-to-capture"), "shapes are chosen by measurement", _ANY),
    Familiar(("--disable-frontend-multiprocessing", "--worker-use-ray"), "there is one process"),
    Familiar(("--distributed-executor-backend",), "there is one process", _ANY),
    Familiar(("--tensor-parallel-size", "-tp"), "there is one worker", ("1",)),
    Familiar(("--pipeline-parallel-size", "-pp"), "there is one worker", ("1",)),
    Familiar(("--data-parallel-size", "-dp"), "there is one worker", ("1",)),
    Familiar(("--enable-server-load-tracking",), "/load is always on"),
    Familiar(("--enable-auto-tool-choice",), "a model may always choose to call a tool"),
    Familiar(("--generation-config",), "the model's own generation_config.json gives the defaults", ("auto",)),
    Familiar(("--response-role",), "answers are the assistant's", ("assistant",)),
    Familiar(("--runner", "--task"), "what a model does follows from its files", ("auto", "generate")),
    Familiar(("--allow-deprecated-quantization",), "formats are not told apart so"),
)


def note(flag: Familiar, value: object) -> str:
    """What is said of a flag that was given.  Raises StartupError for a value that asks for what we do not do."""
    name = flag.names[0]
    if flag.values and str(value) not in flag.values:
        taken = " or ".join(flag.values)
        raise StartupError(f"{name}: {shorten(value)} is not supported: {flag.why}; only {taken} is taken")
    return f"{name} has no effect: {flag.why}"
