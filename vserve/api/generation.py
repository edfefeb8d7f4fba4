"""From a checked request and its prompts to a reply under way: names, limits, deadlines, ids, submission.

What chat and completions share between schema and reply.  Event-loop thread only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vserve.api.app import App, Served
from vserve.api.choice import Choice, Reading, Splitting
from vserve.api.reply import OPENAI, Dialect, Framing, Headers, Reply, WholeReply
from vserve.api.requests import Wanted
from vserve.api.shapes import Head
from vserve.api.stream import StreamReply
from vserve.api.tracing import trace_of
from vserve.api.trail import Trail
from vserve.engine.request import GenRequest
from vserve.errors import BadRequest, DeadlineExceeded, shorten
from vserve.http.exchange import Exchange, Response
from vserve.text.grammar import Grammar
from vserve.text.tokenizer import Tokenizer

IGNORED_LIMIT = 16
"""Most names listed in x-ignored-params."""

MAX_SCORES = 2**20
"""Most log-probabilities of prompt tokens in one reply."""

TIMEOUT_HEADER = "x-request-timeout"
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s)?")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt to go on from.

    path: the field it came from, for messages.  lead: text that goes out before the first token (echo), mostly empty.
    """

    ids: Sequence[int]
    path: str
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """All that decides how prompts are generated from.

    default_max_tokens: where the request does not say; None is what is left of the context.
    continuation: the answer goes on with the prompt's own text.  prompt_logprobs: those wanted of the
    prompt's tokens.  splitting: None where all text is content.
    """

    wanted: Wanted
    prompts: Sequence[Prompt]
    default_max_tokens: int | None
    continuation: bool
    prompt_logprobs: int | None = None
    splitting: Splitting | None = None


def deadline(app: App, exchange: Exchange, timeout_ms: int | None) -> float | None:
    """time.monotonic() seconds at which the request ends: the earliest of what body, header and operator say.

    Raises BadRequest for a header that is not a duration.
    """
    spans: list[float] = []
    if timeout_ms is not None:
        spans.append(timeout_ms / 1000)
    header = exchange.head.headers.get(TIMEOUT_HEADER)
    if header is not None:
        spans.append(_seconds(header))
    if app.options.request_timeout_s is not None:
        spans.append(app.options.request_timeout_s)
    return exchange.received_s + min(spans) if spans else None


def _seconds(text: str) -> float:
    match = _DURATION.fullmatch(text.strip())
    seconds = 0.0
    if match is not None:
        seconds = float(match[1]) / (1000 if match[2] == "ms" else 1)
    if not 0.001 <= seconds <= 86400:
        raise BadRequest(
            f"The header X-Request-Timeout must be a time such as 30, 2.5s or 500ms, at most 86400 s, "
            f"got {shorten(text)}.",
            param=TIMEOUT_HEADER,
        )
    return seconds


def ignored_header(names: Sequence[str]) -> Headers:
    """x-ignored-params for the fields without effect: bounded, and only characters a header can carry."""
    if not names:
        return ()
    shown = [re.sub(r"[^\w.\[\]-]", "?", name[:64], flags=re.ASCII) for name in names[:IGNORED_LIMIT]]
    if len(names) > IGNORED_LIMIT:
        shown.append(f"and {len(names) - IGNORED_LIMIT} more")
    return (("x-ignored-params", ", ".join(shown)),)


def reply_head(served: Served, exchange: Exchange, wanted: Wanted, prefix: str) -> Head:
    """Id, time and model of a reply.  The client's own request id is part of the id, and no key to anything."""
    head = Head(
        id=prefix + (wanted.request_id or exchange.id.removeprefix("req-")),
        created_s=int(time.time()),
        model=served.name(wanted.model),
        fingerprint=served.fingerprint,
    )
    trace = trace_of(exchange)
    if trace is not None:
        trace.reply_id = head.id
    return head


async def generate(
    app: App,
    served: Served,
    exchange: Exchange,
    order: Order,
    dialect: Dialect,
    framing: Framing = OPENAI,
    renew: Callable[[], Dialect] | None = None,
) -> Response | None:
    """Generate all choices and answer the exchange.  Raises ApiError while nothing has been sent.

    renew: makes the dialect as it was at the start, for a client that goes on with a broken stream (resume.py); None:
    the events of such a stream have no ids and it cannot be gone on with.
    """
    wanted, bridge = order.wanted, served.model.bridge
    made = await choices(app, served, exchange, order)
    if exchange.gone:
        return None
    headers = ignored_header(wanted.ignored)
    reply: Reply
    if wanted.stream:
        trail = _trail(app, exchange, renew, made, headers) if renew is not None and app.trails.enabled else None
        reply = StreamReply(app, bridge, exchange, dialect, made, headers, framing, trail)
    else:
        reply = WholeReply(app, bridge, exchange, dialect, made, headers)
    reply.caller = app.caller(exchange)
    return await reply.run()


async def choices(app: App, served: Served, exchange: Exchange, order: Order) -> list[Choice]:
    """What an order generates, ready to be run; the exchange is asked now and not kept.

    Raises BadRequest for what does not fit, DeadlineExceeded when too late.
    """
    wanted = order.wanted
    grammar = None if wanted.grammar is None else await app.compiled(served, wanted.grammar, wanted.grammar_field)
    bad_words = await _bad_words(app, served, wanted.bad_words)
    return _choices(app, served, exchange, order, Limited(grammar, bad_words))


def _trail(
    app: App, exchange: Exchange, renew: Callable[[], Dialect], choices: Sequence[Choice], headers: Headers
) -> Trail:
    request, route = exchange.request, exchange.route
    endpoint = route.name if route is not None else ""
    return Trail(endpoint, app.salt(exchange, None), hash(request.body), renew, choices, headers)


@dataclass(frozen=True, slots=True)
class Limited:
    """What keeps tokens out of the answers, made ready: the grammar to follow, and words as sequences of ids."""

    grammar: Grammar | None
    bad_words: tuple[tuple[int, ...], ...]


async def _bad_words(app: App, served: Served, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as the model spells it, at the start of a text and behind a space."""
    if not words:
        return ()
    tokenizer = served.model.tokenizer
    bare = [word.lstrip() or word for word in words]
    texts = [prefix + word for word in bare for prefix in ("", " ")]

    def encode() -> list[list[int]]:
        return tokenizer.encode_batch(texts, add_special=False)

    ids = encode() if sum(map(len, texts)) <= app.options.long_text_chars else await app.off_loop(encode)
    return tuple(dict.fromkeys(tuple(word) for word in ids if word))


def _choices(app: App, served: Served, exchange: Exchange, order: Order, limited: Limited) -> list[Choice]:
    """Prompt by prompt, n choices each.  Raises BadRequest for what does not fit, DeadlineExceeded when too late."""
    wanted, model = order.wanted, served.model
    total = len(order.prompts) * wanted.n
    if total > app.options.max_sequences:
        raise BadRequest(
            f"{len(order.prompts)} prompts with n={wanted.n} make {total} choices, "
            f"the limit is {app.options.max_sequences}.",
            param="n",
        )
    now = time.monotonic()
    deadline_s = deadline(app, exchange, wanted.timeout_ms)
    if deadline_s is not None and deadline_s <= now:
        raise DeadlineExceeded("The request's deadline passed before it could be started.")
    eos_ids = frozenset() if wanted.ignore_eos else served.eos_ids
    reading = _reading(served, order, eos_ids)
    sampling = served.defaults.sampling(wanted.drawing, wanted.logprobs, model.vocab_size)
    sampling = replace(sampling, bad_words=limited.bad_words)
    # seed + i: the choices of one prompt differ, and each can be had again.  63 bits: what every back end can hold.
    draws = [
        sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + i) & (2**63 - 1))
        for i in range(wanted.n)
    ]
    stop_ids = eos_ids.union(wanted.stop_token_ids)
    salt = app.salt(exchange, wanted.cache_salt)
    tracing, trace = app.tracing, trace_of(exchange)
    if trace is not None:
        trace.tokenised_s = now
        trace.model, trace.stream, trace.n = served.name(wanted.model), wanted.stream, wanted.n
        trace.max_tokens, trace.temperature, trace.top_p = wanted.max_tokens, sampling.temperature, sampling.top_p
    choices: list[Choice] = []
    scores = 0
    for prompt in order.prompts:
        ids, max_tokens = fit(prompt, order, model.max_model_len)
        if trace is not None:
            trace.prompt_tokens += len(ids)
        if order.prompt_logprobs is not None:
            scores += len(ids) * wanted.n * (order.prompt_logprobs + 1)
            if scores > MAX_SCORES:
                raise BadRequest(
                    f"The log-probabilities of these prompts are more than {MAX_SCORES} numbers; ask for fewer "
                    "prompts, choices or likely tokens.",
                    param="prompt_logprobs" if wanted.prompt_logprobs is not None else "logprobs",
                )
        lead = prompt.lead
        if lead and len(ids) < len(prompt.ids) and wanted.truncate is not None:
            lead = model.tokenizer.decode(ids)
        for i, draw in enumerate(draws):
            request = None
            if max_tokens or order.prompt_logprobs is not None:
                request = GenRequest(
                    id=model.bridge.next_id(),
                    prompt=ids,
                    max_tokens=max_tokens,
                    sampling=draw,
                    min_tokens=wanted.min_tokens,
                    stop_ids=stop_ids,
                    cache_salt=salt,
                    priority=wanted.priority,
                    arrival_s=exchange.received_s,
                    deadline_s=deadline_s,
                    constraint=None if limited.grammar is None else limited.grammar.matcher(),
                    prompt_logprobs=order.prompt_logprobs,
                    traced=trace is not None,
                )
                if trace is not None and tracing is not None:
                    tracing.expect(trace, request.id, len(ids))
            choices.append(Choice(len(choices), i == 0, ids, request, reading, lead))
    _check_queue(app, choices)
    return choices


def _check_queue(app: App, choices: Sequence[Choice]) -> None:
    """Raise BadRequest for choices that an empty queue could not take: 429 would send the client round for ever."""
    options = app.options
    prompts = [len(choice.prompt) for choice in choices if choice.request is not None]
    if len(prompts) > options.max_queue:
        raise BadRequest(
            f"The request makes {len(prompts)} choices, more than the {options.max_queue} requests that may wait at "
            "once (--max-queue).",
            param="n",
        )
    if len(prompts) > 1 and sum(prompts) > options.max_queued_tokens:
        raise BadRequest(
            f"The request's {len(prompts)} choices bring {sum(prompts)} prompt tokens together, more than the "
            f"{options.max_queued_tokens} that may wait at once (--max-queued-tokens).",
            param="n",
        )


def _reading(served: Served, order: Order, eos_ids: frozenset[int]) -> Reading:
    wanted = order.wanted
    return Reading(
        tokenizer=served.model.tokenizer,
        skip_special=wanted.skip_special,
        continuation=order.continuation,
        stops=wanted.stop,
        include_stop=wanted.include_stop,
        min_tokens=wanted.min_tokens,
        eos_ids=eos_ids,
        keep_ids=wanted.return_token_ids,
        keep_logprobs=wanted.logprobs is not None,
        scored=order.prompt_logprobs is not None,
        count_chunks=wanted.stream_options.continuous_usage_stats,
        splitting=order.splitting,
    )


def check_length(tokenizer: Tokenizer, text: str, most: int, path: str) -> None:
    """Raise BadRequest, in a moment, for a text that cannot but have more than most tokens.  Any thread."""
    least = tokenizer.least_tokens(text)
    if least > most:
        raise BadRequest(
            f"`{path}` has {len(text)} characters, which are at least {least} tokens; the context has {most}.",
            param=path,
        )


def fit(prompt: Prompt, order: Order, context: int) -> tuple[Sequence[int], int]:
    """The prompt, cut if that was asked for, and the most tokens it may be followed by.

    Raises BadRequest with all numbers when they do not fit into context tokens.
    """
    wanted, ids = order.wanted, prompt.ids
    if wanted.truncate is not None:
        if wanted.truncate > context:
            raise BadRequest(
                f"`truncate_prompt_tokens` is {wanted.truncate}, the context has {context} tokens.",
                param="truncate_prompt_tokens",
            )
        keep = wanted.truncate if wanted.truncate > 0 else max(1, context - (wanted.max_tokens or 1))
        ids = ids[-keep:]
    length = len(ids)
    if length == 0:
        raise BadRequest(f"`{prompt.path}` is empty: it has no tokens.", param=prompt.path)
    left = context - length
    if left < 0 or (left == 0 and wanted.max_tokens != 0):
        raise BadRequest(
            f"`{prompt.path}` has {length} tokens, which leaves no room for an answer: the context has {context} "
            "tokens for both.",
            param=prompt.path,
        )
    max_tokens = wanted.max_tokens
    if max_tokens is None:
        max_tokens = left if order.default_max_tokens is None else min(left, order.default_max_tokens)
    elif max_tokens > left:
        raise BadRequest(
            f"`{wanted.max_tokens_field}` is {max_tokens}, but a prompt of {length} tokens leaves {left} of the "
            f"context's {context}.",
            param=wanted.max_tokens_field,
        )
    if wanted.min_tokens > max_tokens:
        raise BadRequest(
            f"`min_tokens` is {wanted.min_tokens}, more than the {max_tokens} tokens the answer may have.",
            param="min_tokens",
        )
    return ids, max_tokens
