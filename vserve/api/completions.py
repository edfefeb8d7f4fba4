"""POST /v1/completions: texts or token ids in, what follows them out.

Owns the wording of completion replies.  Event-loop thread; long texts are tokenised in the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from vserve.api.app import App, Served
from vserve.api.asked import checked
from vserve.api.choice import Choice
from vserve.api.generation import Order, Prompt, check_length, generate, reply_head
from vserve.api.reply import CountsNow
from vserve.api.requests import CompletionRequest, Wanted, parse_completion
from vserve.api.resume import resume
from vserve.api.shapes import Counts, Echoed, Head, Piece, TokenText, completion_logprobs, frame, prompt_logprobs
from vserve.http.exchange import Exchange, Response

DEFAULT_MAX_TOKENS = 16


class Completions:
    """The endpoint."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def create(self, exchange: Exchange) -> Response | None:
        """Answer one request.  Raises ApiError while nothing has been sent."""
        app = self._app
        served = app.served
        event_id = exchange.request.headers.get("last-event-id")
        if event_id:
            return await resume(app, served, exchange, event_id)
        asked = await checked(app, served, exchange, parse_completion)
        wanted = asked.wanted
        head = reply_head(served, exchange, wanted, "cmpl-")
        order = await prepare(app, served, asked)
        text = TokenText(served.model.tokenizer, wanted.tokens_as_ids)

        def dialect() -> CompletionDialect:
            return CompletionDialect(head, wanted, text, echo=asked.echo)

        return await generate(app, served, exchange, order, dialect(), renew=dialect)


async def prepare(app: App, served: Served, asked: CompletionRequest) -> Order:
    """What is to be generated for prompts.  Raises BadRequest."""
    return Order(
        wanted=asked.wanted,
        prompts=await _prompts(app, served, asked),
        default_max_tokens=DEFAULT_MAX_TOKENS,
        continuation=True,
        prompt_logprobs=asked.scored,
    )


async def _prompts(app: App, served: Served, asked: CompletionRequest) -> list[Prompt]:
    texts = [prompt for prompt in asked.prompts if isinstance(prompt, str)]
    if asked.wanted.truncate is None:
        for i, prompt in enumerate(asked.prompts):
            if isinstance(prompt, str):
                path = "prompt" if len(asked.prompts) == 1 else f"prompt[{i}]"
                check_length(served.model.tokenizer, prompt, served.model.max_model_len, path)
    encoded = iter(await encode(app, served, texts, asked.add_special))
    prompts: list[Prompt] = []
    for i, prompt in enumerate(asked.prompts):
        path = "prompt" if len(asked.prompts) == 1 else f"prompt[{i}]"
        if isinstance(prompt, str):
            prompts.append(Prompt(next(encoded), path, prompt if asked.echo else ""))
        else:
            prompts.append(Prompt(prompt, path, await decode(app, served, prompt) if asked.echo else ""))
    return prompts


async def encode(app: App, served: Served, texts: Sequence[str], add_special: bool) -> list[list[int]]:
    """The ids of each text, off the loop when they are long."""
    if not texts:
        return []
    tokenizer = served.model.tokenizer
    if sum(map(len, texts)) <= app.options.long_text_chars:
        return tokenizer.encode_batch(texts, add_special=add_special)
    return await app.off_loop(lambda: tokenizer.encode_batch(texts, add_special=add_special))


async def decode(app: App, served: Served, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """The text of ids, off the loop when there are many."""
    tokenizer = served.model.tokenizer
    if len(ids) <= app.options.long_text_chars:
        return tokenizer.decode(ids, skip_special=skip_special)
    return await app.off_loop(lambda: tokenizer.decode(ids, skip_special=skip_special))


class CompletionDialect:
    """How completion replies are worded."""

    def __init__(self, head: Head, wanted: Wanted, text: TokenText, *, echo: bool = False) -> None:
        self._wanted = wanted
        self._echo_scores = echo and wanted.logprobs is not None  # the prompt waits for its log-probabilities
        self._text = text
        options = wanted.stream_options
        self._each_usage = options.continuous_usage_stats
        self._last_usage = options.include_usage
        self._extra = b',"usage":null' if options.include_usage and not options.continuous_usage_stats else b""
        self._chunk_head = head.json("text_completion")
        self._head = head

    def affixes(self, index: int) -> tuple[bytes, bytes]:
        """See reply.Dialect."""
        before = b'data: %b,"choices":[{"index":%d,"text":' % (self._chunk_head, index)
        return before, b',"logprobs":null,"finish_reason":null,"stop_reason":null}]%b}\n\n' % self._extra

    def opening(self, choice: Choice, counts: CountsNow) -> bytes:
        """The prompt, when it is to be echoed or its ids returned."""
        lead = "" if self._echo_scores else choice.lead
        if not lead and not self._wanted.return_token_ids:
            return b""
        entry = self._entry(choice, Piece(lead))
        return frame(self._chunk_head, entry, counts().usage() if self._each_usage else None, self._extra)

    def chunk(self, choice: Choice, piece: Piece, counts: CountsNow) -> bytes:
        """See reply.Dialect."""
        entry = self._entry(choice, piece)
        entry.pop("prompt_token_ids", None)  # the opening has them
        if piece.scores is not None:
            if self._echo_scores:
                entry["text"] = choice.lead + piece.text
            if self._wanted.prompt_logprobs is not None:
                entry["prompt_logprobs"] = self._scores(choice, piece)
        return frame(self._chunk_head, entry, counts().usage() if self._each_usage else None, self._extra)

    def ending(self, counts: CountsNow) -> bytes:
        """See reply.Dialect."""
        return frame(self._chunk_head, None, counts().usage()) if self._last_usage else b""

    def whole(self, pieces: Sequence[tuple[Choice, Piece]], counts: Counts) -> bytes:
        """See reply.Dialect."""
        choices = []
        for choice, piece in pieces:
            entry = self._entry(choice, piece)
            entry["text"] = choice.lead + piece.text
            entry["prompt_logprobs"] = None if piece.scores is None else self._scores(choice, piece)
            choices.append(entry)
        reply: dict[str, object] = {
            "id": self._head.id,
            "object": "text_completion",
            "created": self._head.created_s,
            "model": self._head.model,
            "choices": choices,
            "usage": counts.usage(),
            "system_fingerprint": self._head.fingerprint,
        }
        return orjson.dumps(reply)

    def _scores(self, choice: Choice, piece: Piece) -> list[dict[str, object] | None] | None:
        top = self._wanted.prompt_logprobs
        return None if top is None else prompt_logprobs(choice.prompt, piece.scores or (), top, self._text)

    def _logprobs(self, choice: Choice, piece: Piece) -> dict[str, object] | None:
        echoed = None
        if piece.scores is not None and self._echo_scores:
            echoed = Echoed(choice.prompt, piece.scores, self._wanted.logprobs or 0)
        if not piece.drawn and echoed is None:
            return None
        return completion_logprobs(piece.drawn, piece.offset, self._text, echoed)

    def _entry(self, choice: Choice, piece: Piece) -> dict[str, object]:
        entry: dict[str, object] = {
            "index": choice.index,
            "text": piece.text,
            "logprobs": self._logprobs(choice, piece),
            "finish_reason": None if piece.finish is None else piece.finish.value,
            "stop_reason": piece.stop_reason,
        }
        if self._wanted.return_token_ids:
            entry["token_ids"] = piece.ids
            entry["prompt_token_ids"] = list(choice.prompt)
        return entry
