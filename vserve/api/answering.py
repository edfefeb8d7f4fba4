"""What a chat request and the model's habits make of an answer: how it is told of tools, split, and kept to a grammar.

Owns these decisions and the names of fields that turn out to have no effect on this model. Pure:
rendering and generating are chat.py's and generation.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from vserve.api.app import Served
from vserve.api.choice import Splitting
from vserve.api.prompts import text_of
from vserve.api.requests import ChatRequest, Conversation, Wanted
from vserve.api.tools import Mode, ToolUse
from vserve.errors import BadRequest
from vserve.text import tools_grammar as rules
from vserve.text.answer import AnswerSplitter
from vserve.text.parts import Splitter
from vserve.text.reasoning import ReasoningSplitter, Start, start_of
from vserve.text.template import ChatTemplate
from vserve.text.tools_grammar import Function, Thought, UnboundedError
from vserve.text.tools_prompt import described, spelled_out
from vserve.text.tools_splitter import CallSplitter


@dataclass(frozen=True, slots=True)
class Answering:
    """A request with its answer's shape settled.  splitting: None where all text is content."""

    wanted: Wanted
    splitting: Splitting | None


def for_template(template: ChatTemplate, conversation: Conversation) -> tuple[ChatTemplate, Conversation]:
    """The template for a conversation, and the conversation so that the template prints all of it.

    Where it knows no tools they are described in the system message; where it knows no calls, calls and results of
    earlier turns are spelled out.  Both in Hermes' form.
    """
    if conversation.tools and template.for_tools is not None:
        template = template.for_tools
    messages = list(conversation.messages)
    if not template.knows("tool_calls"):
        messages = spelled_out(messages)
    if conversation.tools and not template.knows("tools"):
        messages = described(messages, conversation.tools)
        conversation = replace(conversation, tools=())
    return template, replace(conversation, messages=tuple(messages))


def with_effort(served: Served, asked: ChatRequest) -> ChatRequest:
    """The request with reasoning_effort as the variables that the template has for it; reported where it has none."""
    effort, template = asked.thinking.effort, served.model.template
    if effort is None or template is None:
        return asked
    variables: dict[str, object] = {}
    if template.knows("reasoning_effort"):
        variables["reasoning_effort"] = effort
    if template.knows("enable_thinking"):
        variables["enable_thinking"] = effort != "none"
    if "reasoning_effort" not in variables and effort != "none":  # a switch obeys no degree
        asked = replace(asked, wanted=_ignoring(asked.wanted, "reasoning_effort"))
    if not variables:
        return asked
    kwargs = {**variables, **asked.conversation.template_kwargs}
    return replace(asked, conversation=replace(asked.conversation, template_kwargs=kwargs))


def answering(served: Served, asked: ChatRequest, prompt_end: str) -> Answering:
    """How the answer to a rendered prompt is split and constrained.  prompt_end: its last 256 characters.

    Raises BadRequest for what this model or server cannot do.
    """
    habits, use, thinking = served.habits, asked.tools, asked.thinking
    conversation = asked.conversation
    continued = text_of(conversation.messages[-1]) if conversation.continue_final_message else None
    start = None if habits.reasoning is None else start_of(habits.reasoning, prompt_end, continued)
    wanted = asked.wanted
    if thinking.budget is not None and habits.reasoning is None:
        wanted = _ignoring(wanted, "thinking_token_budget")
    if use is not None and use.mode is Mode.REQUIRED and habits.syntax is None:
        raise BadRequest(
            f"`{use.choice_field}` requires a call, but this server runs with --tool-call-parser none.",
            param=use.choice_field,
        )
    holds = use is None or (use.mode is Mode.AUTO and not wanted.stream)
    wanted = _constrained(served, wanted, use, start, thinking.budget)
    parses = use is not None and habits.syntax is not None
    if start is None and not parses:
        return Answering(wanted, None)
    shown = (habits.thought_ids if start is not None else frozenset()) | (habits.call_ids if parses else frozenset())
    return Answering(
        wanted,
        Splitting(
            make=_maker(served, use if parses else None, start, thinking.shown, holds),
            one_call=use is not None and parses and use.one,
            shown=shown if wanted.skip_special else frozenset(),
            reasons=start is not None,
        ),
    )


def _maker(
    served: Served, use: ToolUse | None, start: Start | None, shows: bool, holds: bool
) -> Callable[[], Splitter]:
    syntax = served.habits.syntax
    calls: Callable[[], Splitter] | None = None
    if use is not None and syntax is not None:
        names = frozenset(tool.name for tool in use.tools)
        calls = partial(CallSplitter, syntax, names, hold=holds, hidden=served.habits.call_marks)

    def make() -> Splitter:
        thoughts = None if start is None else ReasoningSplitter(start)
        return AnswerSplitter(thoughts, None if calls is None else calls(), shows)

    return make


def _constrained(
    served: Served, wanted: Wanted, use: ToolUse | None, start: Start | None, budget: int | None
) -> Wanted:
    """wanted with the grammar of the whole answer: reasoning, then calls, or what the request asks of the text."""
    tokenizer = served.model.tokenizer
    ends = served.eos_ids.union(wanted.stop_token_ids)
    thought = None if start is None else Thought(start, budget, ends)
    if use is not None and _leaves_strict(served, wanted, use, thought):
        wanted = _ignoring(wanted, f"{use.field}[].strict")
    try:
        made, field = _answer(served, wanted, use, thought)
        if made is None:
            return wanted
        spec = rules.grammar(*made, thought, tokenizer)
    except UnboundedError:
        raise BadRequest(
            "`thinking_token_budget` needs a model with one token for </think>; this one spells it.",
            param="thinking_token_budget",
        ) from None
    if not ends or wanted.ignore_eos:
        raise BadRequest(f"`{field}` needs tokens that end an answer; leave out `ignore_eos`.", param=field)
    return replace(wanted, grammar=spec, grammar_field=field)


def _answer(
    served: Served, wanted: Wanted, use: ToolUse | None, thought: Thought | None
) -> tuple[tuple[Sequence[str], str] | None, str]:
    """Rules of what stands behind the reasoning and the first of them, and the field they come from.

    None where there is nothing to add to what wanted has.
    """
    syntax, tokenizer = served.habits.syntax, served.model.tokenizer
    bounded = thought is not None and thought.budget is not None
    if use is not None and syntax is not None:
        functions = [Function(tool.name, tool.parameters, tool.strict) for tool in use.tools]
        if use.mode is Mode.REQUIRED:
            return (rules.calls(syntax, functions, tokenizer, many=not use.one), "calls"), use.choice_field
        if wanted.grammar is not None:
            calls = rules.calls(syntax, functions, tokenizer, many=not use.one)
            return ([*calls, *_given(wanted)], "(calls | answer)"), wanted.grammar_field
        if _binds_strict(served, wanted, use, thought):
            return (rules.calls_at_will(syntax, functions, tokenizer, many=not use.one), "answer"), use.field
    if thought is None:
        return None, wanted.grammar_field
    if wanted.grammar is not None:
        return (_given(wanted), "answer"), wanted.grammar_field
    if bounded:
        return (rules.free(thought, tokenizer), "answer"), "thinking_token_budget"
    return None, wanted.grammar_field


def _binds_strict(served: Served, wanted: Wanted, use: ToolUse, thought: Thought | None) -> bool:
    """Whether calls at will can be kept to the schemas of strict functions, and there are any."""
    if served.habits.syntax is None or served.model.grammars is None or wanted.ignore_eos:
        return False
    # Text at will could begin with <think>, unbounded, where the model may or may not think.
    unbounded = thought is not None and thought.budget is not None and thought.start is Start.OPEN
    return not unbounded and any(tool.strict for tool in use.tools)


def _leaves_strict(served: Served, wanted: Wanted, use: ToolUse, thought: Thought | None) -> bool:
    """Whether strict functions were asked for and nothing will bind their calls."""
    bound = use.mode is Mode.REQUIRED or wanted.grammar is not None or _binds_strict(served, wanted, use, thought)
    return not bound and any(tool.strict for tool in use.tools)


def _given(wanted: Wanted) -> list[str]:
    assert wanted.grammar is not None
    try:
        return rules.given(wanted.grammar)
    except ValueError as error:
        raise BadRequest(f"`{wanted.grammar_field}`: {error}.", param=wanted.grammar_field) from None


def _ignoring(wanted: Wanted, name: str) -> Wanted:
    return replace(wanted, ignored=(*wanted.ignored, name))
