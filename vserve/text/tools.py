"""The forms in which models write calls of tools, and which of them a model uses.

Owns the syntax of each family as data, and what follows from a chat template's text.  Reading calls is
tools_splitter's, writing grammars tools_grammar's, telling a model of tools where its template cannot tools_prompt's.
"""

from __future__ import annotations

import enum
import secrets
import string
from dataclasses import dataclass


class CallForm(enum.Enum):
    """How calls are written; the value is the flag's."""

    HERMES = "hermes"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    LLAMA3_JSON = "llama3_json"  # {"name": ..., "parameters": {...}}; the next one behind "; "
    MISTRAL = "mistral"  # [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...] or [TOOL_CALLS]name{...}


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """One family's way to write calls.

    opening: the mark before a call.  closing: the mark behind one, "" for none.  key: what the arguments are called.
    bare: an answer that begins with { may be a call without the mark.  named: calls are written as name and arguments
    side by side (newer Mistral models), which matters where calls are to be produced; both ways are read.
    """

    form: CallForm
    opening: str
    closing: str
    key: str
    bare: bool = False
    named: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, for whoever decides which special tokens have to be seen."""
        return tuple(mark for mark in (self.opening, self.closing, *_INNER.get(self.form, ())) if mark)

    def new_id(self) -> str:
        """A fresh id of a call, as long as the family's templates want it."""
        if self.form is CallForm.MISTRAL:
            return "".join(secrets.choice(_ID_CHARS) for _ in range(9))
        return "call_" + secrets.token_hex(12)


ARGS_MARK = "[ARGS]"
ID_MARK = "[CALL_ID]"
_INNER = {CallForm.MISTRAL: (ARGS_MARK, ID_MARK)}
_ID_CHARS = string.ascii_letters + string.digits

HERMES = CallSyntax(CallForm.HERMES, "<tool_call>", "</tool_call>", "arguments")
LLAMA3_JSON = CallSyntax(CallForm.LLAMA3_JSON, "<|python_tag|>", "", "parameters", bare=True)
MISTRAL = CallSyntax(CallForm.MISTRAL, "[TOOL_CALLS]", "", "arguments")
MISTRAL_NAMED = CallSyntax(CallForm.MISTRAL, "[TOOL_CALLS]", "", "arguments", named=True)

SYNTAXES = {syntax.form: syntax for syntax in (HERMES, LLAMA3_JSON, MISTRAL)}


def syntax_of(template: str) -> CallSyntax:
    """What a model with this chat template writes; Hermes' form where the template does not show one.

    A template without tools is given their description in Hermes' form (tools_prompt), so that is the form there.
    """
    if HERMES.opening in template:
        return HERMES
    if MISTRAL.opening in template:
        return MISTRAL_NAMED if ARGS_MARK in template else MISTRAL
    if LLAMA3_JSON.opening in template or ("<|start_header_id|>" in template and "parameters" in template):
        return LLAMA3_JSON
    return HERMES
