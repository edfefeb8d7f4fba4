"""Checked requests: a body and a field table in, a frozen request or BadRequest out.  Pure.

Owns the rules that join several fields; what one field may hold is its row's (schema.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vserve.api import schema as row
from vserve.api.fields import Field, Table, Values, read, without_effect
from vserve.api.prompts import Message, Prompt
from vserve.api.schema import StreamOptions
from vserve.api.structured import Constraint, only, spaced
from vserve.api.tools import Mode, Tool, ToolUse, tool_use
from vserve.errors import BadRequest
from vserve.text.grammar_spec import GrammarSpec


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are to be drawn, as asked; None leaves it to the model's defaults."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int | None
    allowed_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What chat and completions have in common.

    max_tokens None: the endpoint's default; max_tokens_field: the name it came under.  logprobs: None is off, k >= 0
    adds the k most likely tokens; prompt_logprobs: the same of the prompt's tokens.
    grammar: what the answer must follow, None for anything; grammar_field: where it came from, for messages.
    ignored: field names without effect, for x-ignored-params.
    """

    model: str | None
    n: int
    stream: bool
    stream_options: StreamOptions
    max_tokens: int | None
    max_tokens_field: str
    min_tokens: int
    drawing: Drawing
    stop: tuple[str, ...]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    skip_special: bool
    logprobs: int | None
    prompt_logprobs: int | None
    bad_words: tuple[str, ...]
    truncate: int | None
    priority: int
    cache_salt: str | None
    timeout_ms: int | None
    request_id: str | None
    return_token_ids: bool
    tokens_as_ids: bool
    grammar: GrammarSpec | None
    grammar_field: str
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and how the template is to render them."""

    messages: tuple[Message, ...]
    add_generation_prompt: bool
    continue_final_message: bool
    add_special: bool
    documents: tuple[dict[str, object], ...]
    tools: tuple[dict[str, object], ...]
    template_kwargs: dict[str, object]


@dataclass(frozen=True, slots=True)
class Thinking:
    """What is asked of a model's reasoning.  shown: it is part of the reply.  budget: its most tokens, None for any."""

    shown: bool = True
    effort: str | None = None
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked body of /v1/chat/completions.  tools: None where none is to be called."""

    wanted: Wanted
    conversation: Conversation
    echo: bool
    tools: ToolUse | None = None
    thinking: Thinking = Thinking()


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A checked body of /v1/completions."""

    wanted: Wanted
    prompts: tuple[Prompt, ...]
    echo: bool
    add_special: bool

    @property
    def scored(self) -> int | None:
        """As wanted.prompt_logprobs, for all that the reply says of the prompt: echo puts logprobs there too."""
        wanted = self.wanted
        if not self.echo or wanted.logprobs is None:
            return wanted.prompt_logprobs
        return max(wanted.logprobs, wanted.prompt_logprobs or 0)


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A checked body of /tokenize: exactly one of texts (a tuple came as a list) and conversation is set."""

    model: str | None
    texts: str | tuple[str, ...] | None
    add_special: bool
    conversation: Conversation | None
    token_strs: bool
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    """A checked body of /detokenize."""

    model: str | None
    tokens: list[int]
    skip_special: bool
    ignored: tuple[str, ...]


def parse_chat(body: dict[str, object], vocab_size: int, strict: bool = False) -> ChatRequest:
    """body as a ChatRequest.  Raises BadRequest."""
    values, unknown = _read(body, row.CHAT, vocab_size, strict)
    if values[row.TOP_LOGPROBS] and not values[row.LOGPROBS]:
        raise BadRequest("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
    limit = row.MAX_TOKENS if values[row.MAX_COMPLETION_TOKENS] is None else row.MAX_COMPLETION_TOKENS
    wanted = _wanted(values, unknown, limit, logprobs=values[row.TOP_LOGPROBS] if values[row.LOGPROBS] else None)
    tools, mode = _tools(values)
    if mode is Mode.REQUIRED and wanted.ignore_eos:
        raise BadRequest("`ignore_eos` cannot be combined with calls that are required.", param="ignore_eos")
    # With none asked for the model is not told of them either: that way it calls none.
    definitions = () if tools is None else tuple(tool.definition for tool in _offered(values))
    return ChatRequest(
        wanted,
        _conversation(values, values[row.MESSAGES], values[row.ADD_SPECIAL_CHAT], definitions),
        values[row.ECHO],
        tools,
        Thinking(values[row.INCLUDE_REASONING], values[row.EFFORT], values[row.THINKING_BUDGET]),
    )


def _offered(values: Values) -> tuple[Tool, ...]:
    return values[row.TOOLS] or values[row.FUNCTIONS]


def _tools(values: Values) -> tuple[ToolUse | None, Mode]:
    """What is said of tools, under either name, and whether they are to be called."""
    newer, older = values[row.TOOLS], values[row.FUNCTIONS]
    choice, call = values[row.TOOL_CHOICE], values[row.FUNCTION_CALL]
    if newer and older:
        raise BadRequest("Give one of `tools` and `functions`, got both.", param="functions")
    legacy = bool(older) or (call is not None and not newer)
    if legacy and choice is not None and older:
        raise BadRequest("`tool_choice` goes with `tools`; with `functions` give `function_call`.", param="tool_choice")
    if newer and call is not None:
        raise BadRequest(
            "`function_call` goes with `functions`; with `tools` give `tool_choice`.", param="function_call"
        )
    use = tool_use(
        newer or older, call if legacy and choice is None else choice, parallel=values[row.PARALLEL], legacy=legacy
    )
    return use, Mode.NONE if use is None else use.mode


def parse_completion(body: dict[str, object], vocab_size: int, strict: bool = False) -> CompletionRequest:
    """body as a CompletionRequest.  Raises BadRequest."""
    values, unknown = _read(body, row.COMPLETIONS, vocab_size, strict)
    best_of, n, echo = values[row.BEST_OF], values[row.N], values[row.ECHO]
    if best_of is not None and best_of != n:
        raise BadRequest(f"`best_of` must equal `n` ({n}) or be left out, got {best_of}.", param="best_of")
    if values[row.MAX_TOKENS_OR_0] == 0 and not echo:
        raise BadRequest("`max_tokens` must be at least 1 unless `echo` is true, got 0.", param="max_tokens")
    wanted = _wanted(values, unknown, row.MAX_TOKENS_OR_0, logprobs=values[row.LOGPROBS_COUNT])
    return CompletionRequest(wanted, values[row.PROMPT], echo, values[row.ADD_SPECIAL])


def parse_tokenize(body: dict[str, object], vocab_size: int, strict: bool = False) -> TokenizeRequest:
    """body as a TokenizeRequest.  Raises BadRequest."""
    values, unknown = _read(body, row.TOKENIZE, vocab_size, strict)
    text, prompt, messages = values[row.TEXT], values[row.TEXT_PROMPT], values[row.TOKENIZE_MESSAGES]
    given = [name for name, value in (("prompt", prompt), ("text", text), ("messages", messages)) if value is not None]
    if len(given) != 1:
        said = " and ".join(f"`{name}`" for name in given) if given else "none of them"
        raise BadRequest(
            f"Give one of `prompt`, `text` and `messages`, got {said}.", param=given[-1] if given else None
        )
    special = values[row.ADD_SPECIAL_ANY]
    conversation = None
    if messages is not None:
        conversation = _conversation(
            values, messages, bool(special), tuple(tool.definition for tool in values[row.TOOLS])
        )
    texts = prompt if prompt is not None else text
    return TokenizeRequest(
        values[row.MODEL], texts, special is not False, conversation, values[row.TOKEN_STRS], unknown
    )


def parse_detokenize(body: dict[str, object], vocab_size: int, strict: bool = False) -> DetokenizeRequest:
    """body as a DetokenizeRequest.  Raises BadRequest."""
    values, unknown = _read(body, row.DETOKENIZE, vocab_size, strict)
    tokens, other = values[row.TOKENS], values[row.TOKEN_IDS]
    if tokens is None and other is None:
        raise BadRequest("`tokens` (or `token_ids`) is required.", param="tokens")
    if tokens is not None and other is not None:
        raise BadRequest("Give one of `tokens` and `token_ids`, got both.", param="token_ids")
    return DetokenizeRequest(values[row.MODEL], tokens or other or [], values[row.KEEP_SPECIAL], unknown)


def _read(body: dict[str, object], rows: Table, vocab_size: int, strict: bool) -> tuple[Values, tuple[str, ...]]:
    values, unknown = read(body, rows, vocab_size, strict)
    options = values[row.STREAM_OPTIONS]
    if options is not None and options.ignored:
        if strict:
            raise without_effect(options.ignored[0])
        unknown += options.ignored
    return values, unknown


def _wanted(values: Values, unknown: tuple[str, ...], limit: Field[int | None], *, logprobs: int | None) -> Wanted:
    options = values[row.STREAM_OPTIONS]
    if options is not None and not values[row.STREAM]:
        raise BadRequest("`stream_options` is allowed only when `stream` is true.", param="stream_options")
    allowed = values[row.ALLOWED_IDS]
    if allowed is not None and not allowed:
        raise BadRequest("`allowed_token_ids` is empty: no token could be drawn.", param="allowed_token_ids")
    constraint = _constraint(values)
    drawing = Drawing(
        temperature=values[row.TEMPERATURE],
        top_p=values[row.TOP_P],
        top_k=values[row.TOP_K],
        min_p=values[row.MIN_P],
        repetition_penalty=values[row.REPETITION],
        presence_penalty=values[row.PRESENCE],
        frequency_penalty=values[row.FREQUENCY],
        logit_bias=values[row.LOGIT_BIAS],
        seed=None if values[row.SEED] == -1 else values[row.SEED],
        allowed_ids=None if allowed is None else tuple(sorted(set(allowed))),
    )
    return Wanted(
        model=values[row.MODEL],
        n=values[row.N],
        stream=values[row.STREAM],
        stream_options=options or StreamOptions(),
        max_tokens=values[limit],
        max_tokens_field=limit.name,
        min_tokens=values[row.MIN_TOKENS],
        drawing=drawing,
        stop=values[row.STOP],
        stop_token_ids=values[row.STOP_TOKEN_IDS],
        include_stop=values[row.INCLUDE_STOP],
        ignore_eos=values[row.IGNORE_EOS],
        skip_special=values[row.SKIP_SPECIAL],
        logprobs=logprobs,
        prompt_logprobs=values[row.PROMPT_LOGPROBS],
        bad_words=values[row.BAD_WORDS],
        truncate=values[row.TRUNCATE],
        priority=values[row.PRIORITY],
        cache_salt=values[row.CACHE_SALT],
        timeout_ms=values[row.TIMEOUT_MS],
        request_id=values[row.REQUEST_ID],
        return_token_ids=values[row.RETURN_TOKEN_IDS],
        tokens_as_ids=values[row.TOKENS_AS_IDS],
        grammar=None if constraint is None else constraint.spec,
        grammar_field="response_format" if constraint is None else constraint.path,
        ignored=unknown,
    )


def _constraint(values: Values) -> Constraint | None:
    """The one constraint on the answer's text, whichever of the fields it came in."""
    rows = (
        row.RESPONSE_FORMAT, row.STRUCTURED_OUTPUTS, row.GUIDED_JSON, row.GUIDED_REGEX, row.GUIDED_CHOICE,
        row.GUIDED_GRAMMAR,
    )  # fmt: skip
    made = only([values[one] for one in rows])
    pattern = values[row.GUIDED_WHITESPACE]
    if pattern is not None:
        made = spaced(made, pattern, row.GUIDED_WHITESPACE.name)
    if made is not None and values[row.IGNORE_EOS]:
        raise BadRequest(
            f"`ignore_eos` cannot be combined with `{made.path}`: a complete answer has nothing to go on with.",
            param="ignore_eos",
        )
    return made


def _conversation(
    values: Values, messages: tuple[Message, ...], add_special: bool, tools: tuple[dict[str, object], ...]
) -> Conversation:
    open_last, add_turn = values[row.CONTINUE_FINAL], values[row.ADD_GENERATION_PROMPT]
    if open_last and not values.given(row.ADD_GENERATION_PROMPT):
        add_turn = False
    if open_last and add_turn:
        raise BadRequest(
            "`continue_final_message` and `add_generation_prompt` cannot both be true.", param="continue_final_message"
        )
    return Conversation(
        messages, add_turn, open_last, add_special, values[row.DOCUMENTS], tools, values[row.TEMPLATE_KWARGS]
    )
