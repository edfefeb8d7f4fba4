"""A checked request of /v1/responses, and how it is said as a body of chat completions.  Pure.

Owns the rules that join its fields.  What chat completions refuse is told in the words of the field it came from.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vserve.api import schema as row
from vserve.api.fields import Fate, Values, read, without_effect
from vserve.api.prompts import Message
from vserve.api.responses_fields import LOGPROBS, chat_tool
from vserve.api.responses_items import Item, message, messages
from vserve.errors import BadRequest, Conflict, NotFound, shorten

INVALID_REQUEST = "invalid_request_error"

_NAMES = (
    (re.compile(r"\bresponse_format\.json_schema\b"), "text.format"),
    (re.compile(r"\bresponse_format\b"), "text.format"),
    (re.compile(r"\b(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"\btool_choice\.function\b"), "tool_choice"),
    (re.compile(r"\bmax_completion_tokens\b"), "max_output_tokens"),
    (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"(?<![.\w])verbosity\b"), "text.verbosity"),
)


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """A checked body.

    source: the field the input came from.  items: the input, references unresolved.  chat: a body of chat completions
    without messages.  echoed: what the response repeats of the request.  logprobs: the text's are to be returned.
    ignored: names without effect.
    """

    source: str
    items: tuple[Item, ...]
    instructions: str | None
    background: bool
    stream: bool
    store: bool
    previous: str | None
    cut_oldest: bool
    logprobs: bool
    chat: dict[str, object]
    echoed: dict[str, object]
    ignored: tuple[str, ...]


def parse(body: dict[str, object], vocab_size: int, strict: bool = False) -> ResponseRequest:
    """body as a ResponseRequest.  Raises BadRequest."""
    values, unknown = read(body, row.RESPONSES, vocab_size, strict)
    unknown += values[row.STREAM_CHOICES] + values[row.TEXT_ANSWER].ignored + values[row.REASONING].ignored
    unknown += tuple(f"include.{name}" for name in values[row.INCLUDE] if name != LOGPROBS)
    if strict and unknown:
        raise without_effect(unknown[0])
    items, prompt = values[row.RESPONSE_INPUT], values[row.PROMPT_TEXT]
    if items is None and prompt is None:
        raise BadRequest("`input` is required.", param="input")
    if items is not None and prompt is not None:
        raise BadRequest("Give one of `input` and `prompt`, got both.", param="prompt")
    background, store = values[row.BACKGROUND], values[row.STORE]
    if background is None:
        background = prompt is not None
    if background and not store:
        raise BadRequest("`background` needs `store` to be true: the answer is fetched from there.", param="store")
    return ResponseRequest(
        source="input" if prompt is None else "prompt",
        items=items if items is not None else (message("user", prompt or ""),),
        instructions=values[row.INSTRUCTIONS],
        background=background,
        stream=values[row.STREAM],
        store=store,
        previous=values[row.PREVIOUS],
        cut_oldest=values[row.TRUNCATION] == "auto",
        logprobs=_wants_logprobs(values),
        chat=_chat(body, values),
        echoed=_echoed(body, values, background),
        ignored=unknown,
    )


def _wants_logprobs(values: Values) -> bool:
    return LOGPROBS in values[row.INCLUDE] or values[row.TOP_LOGPROBS] > 0


def _chat(body: dict[str, object], values: Values) -> dict[str, object]:
    """All of a chat body but its messages.  Raises BadRequest for a choice of tools that are not there."""
    chat: dict[str, object] = {
        name: body[name]
        for name in row.PASSED_ON
        if row.RESPONSES[name].fate is Fate.OBEYED and body.get(name) is not None
    }
    text, tools, choice = values[row.TEXT_ANSWER], values[row.RESPONSE_TOOLS], values[row.RESPONSE_TOOL_CHOICE]
    wishes: dict[str, object] = {
        "max_completion_tokens": values[row.MAX_OUTPUT_TOKENS],
        "response_format": text.response_format,
        "verbosity": text.verbosity,
        "reasoning_effort": values[row.REASONING].effort,
    }
    if choice is not None:
        names = {str(tool["name"]) for tool in tools}
        allowed = choice.allowed
        if isinstance(choice.chat, dict):
            function = choice.chat["function"]
            assert isinstance(function, dict)
            wanted = frozenset({function["name"]})
        else:
            wanted = allowed or frozenset()
        if not wanted <= names:
            missing = shorten(min(wanted - names))
            raise BadRequest(f"`tool_choice` names the function {missing}, which `tools` lacks.", param="tool_choice")
        if choice.chat == "required" and not tools:
            raise BadRequest("`tool_choice` is required, but there are no `tools`.", param="tool_choice")
        if allowed is not None:
            tools = tuple(tool for tool in tools if tool["name"] in allowed)
        wishes["tool_choice"] = choice.chat
    if tools:
        wishes["tools"] = [chat_tool(tool) for tool in tools]
    if _wants_logprobs(values):
        wishes |= {"logprobs": True, "top_logprobs": values[row.TOP_LOGPROBS]}
    return chat | {name: value for name, value in wishes.items() if value is not None}


def _echoed(body: dict[str, object], values: Values, background: bool) -> dict[str, object]:
    def text(name: str) -> str | None:
        value = body.get(name)
        return value if isinstance(value, str) else None

    answer, choice = values[row.TEXT_ANSWER], values[row.RESPONSE_TOOL_CHOICE]
    return {
        "background": background,
        "instructions": values[row.INSTRUCTIONS],
        "max_output_tokens": values[row.MAX_OUTPUT_TOKENS],
        "max_tool_calls": None,
        "metadata": values[row.METADATA],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": values[row.PREVIOUS],
        "prompt_cache_key": text("prompt_cache_key"),
        "reasoning": {"effort": values[row.REASONING].effort, "summary": None},
        "safety_identifier": text("safety_identifier"),
        "service_tier": "default",
        "store": values[row.STORE],
        "text": {"format": answer.format or {"type": "text"}, "verbosity": answer.verbosity or "medium"},
        "tool_choice": "auto" if choice is None else choice.raw,
        "tools": [_shown_tool(tool) for tool in values[row.RESPONSE_TOOLS]],
        "top_logprobs": values[row.TOP_LOGPROBS],
        "truncation": values[row.TRUNCATION],
        "user": text("user"),
    }


def _shown_tool(tool: dict[str, object]) -> dict[str, object]:
    return {"description": None, "parameters": None, "strict": None, **tool}


def conversation(asked: ResponseRequest, context: Sequence[Item], items: Sequence[Item]) -> list[Message]:
    """The messages of a chat body: instructions, what came before, the input.  Raises BadRequest."""
    said = messages((*context, *items))
    if asked.instructions is not None:
        said.insert(0, {"role": "system", "content": asked.instructions})
    if not said:
        raise BadRequest("`input` is empty; give at least one item.", param="input")
    return said


def without_oldest(said: Sequence[Message], count: int) -> list[Message]:
    """The conversation without its first count messages, those of the system apart; no tool's output comes first."""
    heads = [entry for entry in said if entry["role"] == "system"]
    rest = [entry for entry in said if entry["role"] != "system"][count:]
    while len(rest) > 1 and rest[0]["role"] == "tool":
        rest = rest[1:]
    return heads + rest


def turns(said: Sequence[Message]) -> int:
    """Messages that truncation may leave out, but for the last, which always stays."""
    return max(0, sum(entry["role"] != "system" for entry in said) - 1)


def renamed(names: Sequence[str], source: str) -> tuple[str, ...]:
    """Names of chat's fields as this endpoint has them."""
    return tuple(_rename(name, source) for name in names)


@contextlib.contextmanager
def own_type() -> Iterator[None]:
    """The client's errors raised inside have this endpoint's type."""
    try:
        yield
    except (BadRequest, NotFound, Conflict) as error:
        error.type = INVALID_REQUEST
        raise


@contextlib.contextmanager
def own_words(source: str) -> Iterator[None]:
    """As own_type; what was said of chat's fields is said of this endpoint's.  source: where the input came from."""
    with own_type():
        try:
            yield
        except (BadRequest, NotFound) as error:
            if error.param is not None:
                error.param = _rename(error.param, source)
                error.message = re.sub(r"`[^`]*`", lambda name: _rename(name[0], source), error.message)
            raise


def _rename(text: str, source: str) -> str:
    for pattern, name in _NAMES:
        text = pattern.sub(name, text)
    return re.sub(r"(?<![.\w])messages\b", source, text)
