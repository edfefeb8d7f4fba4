"""How one model writes calls of tools and reasoning, worked out once from its template, its tokenizer and two flags.

Owns that choice.  Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from vserve.text.reasoning import CLOSE, OPEN, ReasoningStyle, style_of
from vserve.text.template import ChatTemplate
from vserve.text.tokenizer import Tokenizer
from vserve.text.tools import SYNTAXES, CallForm, CallSyntax, syntax_of


@dataclass(frozen=True, slots=True)
class Habits:
    """A model's ways.

    syntax: None leaves calls in the text.  reasoning: None leaves reasoning there.  call_ids, thought_ids: the special
    tokens among their marks, which have to be seen by whoever reads them; call_marks: the text of the former.
    """

    syntax: CallSyntax | None
    reasoning: ReasoningStyle | None
    call_ids: frozenset[int]
    thought_ids: frozenset[int]
    call_marks: tuple[str, ...]


def habits_of(
    template: ChatTemplate | None, tokenizer: Tokenizer, tool_call_parser: str, reasoning_parser: str
) -> Habits:
    """The habits of a model.  The parsers are the flags' values: "auto", "none" or a name."""
    text = "" if template is None else template.source
    if template is not None and template.for_tools is not None:
        text += template.for_tools.source
    syntax = syntax_of(text) if tool_call_parser == "auto" else None
    if tool_call_parser not in ("auto", "none"):
        syntax, shown = SYNTAXES[CallForm(tool_call_parser)], syntax_of(text)
        if shown.form is syntax.form:  # the template says which of the form's variants
            syntax = shown
    style = style_of(text) if reasoning_parser == "auto" else None
    if reasoning_parser not in ("auto", "none"):
        style = ReasoningStyle(reasoning_parser)
    calls = _special(tokenizer, () if syntax is None else syntax.marks)
    thoughts = _special(tokenizer, () if style is None else (OPEN, CLOSE))
    return Habits(syntax, style, frozenset(calls.values()), frozenset(thoughts.values()), tuple(calls))


def _special(tokenizer: Tokenizer, marks: tuple[str, ...]) -> dict[str, int]:
    ids = {mark: tokenizer.token_id(mark) for mark in marks}
    return {mark: id for mark, id in ids.items() if id is not None and tokenizer.is_special(id)}
