"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, and back.

Event-loop thread; long texts are tokenised in the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from vserve.api import body
from vserve.api.app import App, Served
from vserve.api.chat import prompt_ids
from vserve.api.completions import encode
from vserve.api.generation import ignored_header
from vserve.api.requests import parse_detokenize, parse_tokenize
from vserve.http.exchange import Exchange, Response


class Tokens:
    """The two endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def tokenize(self, exchange: Exchange) -> Response:
        """A text or a conversation gives one object; a list of texts gives a list of them."""
        app = self._app
        served = app.served
        request = exchange.request
        fields = body.read(request.body, request.headers.get("content-type"))
        asked = parse_tokenize(fields, served.model.vocab_size, app.options.strict)
        served.name(asked.model)
        if asked.conversation is not None:
            ids = await prompt_ids(app, served, asked.conversation)
            reply: object = _entry(served, ids, asked.token_strs)
        elif isinstance(asked.texts, str):
            ids = (await encode(app, served, [asked.texts], asked.add_special))[0]
            reply = _entry(served, ids, asked.token_strs)
        else:
            lists = await encode(app, served, asked.texts or (), asked.add_special)
            reply = [_entry(served, ids, asked.token_strs) for ids in lists]
        return Response(200, orjson.dumps(reply), headers=ignored_header(asked.ignored))

    async def detokenize(self, exchange: Exchange) -> Response:
        """Token ids as text, under both names."""
        app = self._app
        served = app.served
        request = exchange.request
        fields = body.read(request.body, request.headers.get("content-type"))
        tokenizer = served.model.tokenizer
        asked = parse_detokenize(fields, tokenizer.vocab_size, app.options.strict)
        served.name(asked.model)
        if len(asked.tokens) > app.options.long_text_chars:
            text = await app.off_loop(lambda: tokenizer.decode(asked.tokens, skip_special=asked.skip_special))
        else:
            text = tokenizer.decode(asked.tokens, skip_special=asked.skip_special)
        return Response(200, orjson.dumps({"text": text, "prompt": text}), headers=ignored_header(asked.ignored))


def _entry(served: Served, ids: Sequence[int], token_strs: bool) -> dict[str, object]:
    tokenizer = served.model.tokenizer
    return {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": served.model.max_model_len,
        "token_strs": [tokenizer.token_str(token) for token in ids] if token_strs else None,
    }
