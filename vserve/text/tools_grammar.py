"""Grammars for answers made of parts: reasoning first, then calls of tools in the model's own syntax, or other text.

Owns how such grammars are put together, in the notation of llguidance.  It compiles nothing: a GrammarSpec leaves.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vserve.text.grammar_spec import GrammarKind, GrammarSpec
from vserve.text.reasoning import CLOSE, OPEN, Start
from vserve.text.tools import ARGS_MARK, CallForm, CallSyntax

CALL_LIMIT = 32
"""Most calls in one answer: a small model left free to repeat itself would do so to the end of the context."""

_SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""One way to space JSON, as models write it: without a bound on white space some never leave it."""


class Ids(Protocol):
    """What a tokenizer says about tokens."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens: their text is theirs alone."""

    def token_id(self, piece: str) -> int | None:
        """The id of a token by its spelling."""


@dataclass(frozen=True, slots=True)
class Function:
    """One tool.  parameters: the JSON Schema of its arguments, None for none.  strict: the client wants it followed."""

    name: str
    parameters: Mapping[str, object] | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Thought:
    """Reasoning before the answer.  budget: its most tokens, None for no bound.  ends: ids that end an answer."""

    start: Start
    budget: int | None
    ends: Collection[int]


class UnboundedError(ValueError):
    """This model's reasoning cannot be bounded in tokens."""


def mark_of(ids: Ids, text: str) -> str:
    """A mark as a grammar writes it: by its id where it is a control token, whose text means nothing."""
    found = ids.token_id(text)
    return f"<[{found}]>" if found is not None and found in ids.special_ids else json.dumps(text)


def calls(syntax: CallSyntax, functions: Sequence[Function], ids: Ids, *, many: bool) -> list[str]:
    """The rule ``calls``, and those it needs: one call or more, each to one of functions with arguments as it asks."""
    rules, after_mark = _calls(syntax, functions, ids, many)
    one = after_mark if syntax.bare else f"{mark_of(ids, syntax.opening)} {after_mark}"
    between = {CallForm.HERMES: '"\\n" ', CallForm.LLAMA3_JSON: '"; " '}.get(syntax.form, "")
    more = f" ({between}{one}){{0,{CALL_LIMIT - 1}}}" if many and after_mark == "call" else ""
    return [*rules, f"calls: {one}{more}"]


def calls_at_will(syntax: CallSyntax, functions: Sequence[Function], ids: Ids, *, many: bool) -> list[str]:
    """The rule ``answer``: any text, but what begins as a call goes on as one."""
    if syntax.bare:
        return [*calls(syntax, functions, ids, many=many), "answer: calls | TEXT?", r"TEXT: /[^{ \t\r\n](?s:.*)/"]
    rules, after_mark = _calls(syntax, functions, ids, many)
    mark = mark_of(ids, syntax.opening)
    times = f"{{0,{CALL_LIMIT}}}" if many and after_mark == "call" else "?"
    rules += [f"answer: (lead {after_mark}){times} TEXT?", "TEXT: /(?s:.+)/"]
    return [*rules, f"lead: TEXT? {mark}" if mark.startswith("<") else f"lead[lazy]: /(?s:.*)/ {mark}"]


def _calls(syntax: CallSyntax, functions: Sequence[Function], ids: Ids, many: bool) -> tuple[list[str], str]:
    """Rules for what stands behind the opening mark, and the name of the one to begin with: ``call`` or ``array``."""
    rules = [rule for i, function in enumerate(functions) for rule in _call(i, function, syntax, ids)]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    if syntax.form is not CallForm.MISTRAL or syntax.named:
        return rules, "call"
    more = f' (", " call){{0,{CALL_LIMIT - 1}}}' if many else ""
    return [*rules, f'array: " "? "[" call{more} "]"'], "array"


def _call(index: int, function: Function, syntax: CallSyntax, ids: Ids) -> list[str]:
    name, arguments = json.dumps(function.name), f"args_{index}"
    schema: dict[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}
    if function.parameters is not None:
        schema = {"type": "object", **function.parameters}
    if syntax.named:
        call = f"{name} {mark_of(ids, ARGS_MARK)} {arguments}"
    else:
        opened = json.dumps('{"name": ' + name + f', "{syntax.key}": ')
        call = f'{opened} {arguments} "}}"'
    if syntax.form is CallForm.HERMES:
        call = f'"\\n" {call} "\\n" {mark_of(ids, syntax.closing)}'
    return [f"call_{index}: {call}", f"{arguments}: %json {json.dumps({**schema, 'x-guidance': _SPACING})}"]


def given(spec: GrammarSpec) -> list[str]:
    """The rule ``answer`` for what a request asks of its answer's text.  Raises ValueError for a source in GBNF."""
    match spec.kind:
        case GrammarKind.JSON_OBJECT | GrammarKind.JSON_SCHEMA:
            schema = json.loads(spec.source) if spec.source else {"type": "object"}
            if spec.whitespace is not None and isinstance(schema, dict):
                options: dict[str, object] = {"whitespace_pattern": spec.whitespace}
                schema = {**schema, "x-guidance": options if spec.whitespace else {"whitespace_flexible": False}}
            return [f"answer: %json {json.dumps(schema)}"]
        case GrammarKind.REGEX:
            pattern = spec.source.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n")
            return [f"answer: /{pattern}/"]
        case GrammarKind.CHOICE:
            return ["answer: " + " | ".join(map(json.dumps, json.loads(spec.source)))]
        case GrammarKind.LARK:
            if "::=" in spec.source:
                raise ValueError("write it in Lark's notation: GBNF cannot stand behind reasoning or beside tools")
            return [f"answer: %lark {{\n{spec.source}\n}}"]


def grammar(rules: Sequence[str], start: str, thought: Thought | None, ids: Ids) -> GrammarSpec:
    """The rules as one grammar that begins with start, behind the reasoning if there is any.

    Raises UnboundedError for a budget where no single token closes the reasoning.
    """
    lead = ""
    if thought is not None:
        lead = "thought GAP? " if thought.start is Start.INSIDE else "GAP? (opened thought GAP?)? "
    lines = [f"start: {lead}{start}", *rules]
    if thought is not None:
        lines += [_thought(thought, ids), r"GAP: /[ \t\r\n]{1,8}/"]
        if thought.start is Start.OPEN:
            lines.append(f"opened: {_one(ids, OPEN)}")
    return GrammarSpec(GrammarKind.LARK, "\n".join(lines))


def free(thought: Thought, ids: Ids) -> list[str]:
    """The rule ``answer`` for any text that ends no answer, nor begins to reason once more.  Raises UnboundedError."""
    opened = ids.token_id(OPEN)
    if opened is None and thought.start is Start.OPEN:
        raise UnboundedError
    out = {*thought.ends} if opened is None else {opened, *thought.ends}
    return [f"answer: <[^{_listed(out)}]>*"]


def _thought(thought: Thought, ids: Ids) -> str:
    close = ids.token_id(CLOSE)
    if close is None:
        if thought.budget is not None:
            raise UnboundedError
        return f'thought[suffix="{CLOSE}"]: /(?s:.*)/'
    many = "*" if thought.budget is None else f"{{0,{thought.budget}}}"
    inside = f"<[^{_listed({close, *thought.ends})}]>{many} " if thought.budget != 0 else ""
    return f"thought: {inside}<[{close}]>"


def _one(ids: Ids, mark: str) -> str:
    found = ids.token_id(mark)
    return json.dumps(mark) if found is None else f"<[{found}]>"


def _listed(ids: Collection[int]) -> str:
    return ",".join(map(str, sorted(ids)))
