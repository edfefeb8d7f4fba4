"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, and back.

Event-loop thread; long texts are tokenised in the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from vserve.api.app import App, Served
from vserve.api.asked import checked
from vserve.api.chat import prompt_ids
from vserve.api.completions import decode, encode
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
        asked = await checked(app, served, exchange, parse_tokenize)
        served.name(asked.model)
        if asked.conversation is not None:
            lists = [await prompt_ids(app, served, asked.conversation)]
        else:
            texts = (asked.texts,) if isinstance(asked.texts, str) else asked.texts or ()
            lists = await encode(app, served, texts, asked.add_special)

        def worded() -> bytes:
            entries = [_entry(served, ids, asked.token_strs) for ids in lists]
            return orjson.dumps(entries if isinstance(asked.texts, tuple) else entries[0])

        long = sum(map(len, lists)) > app.options.long_text_chars
        reply = await app.off_loop(worded) if long else worded()
        return Response(200, reply, headers=ignored_header(asked.ignored))

    async def detokenize(self, exchange: Exchange) -> Response:
        """Token ids as text, under both names."""
        app = self._app
        served = app.served
        vocab_size = served.model.tokenizer.vocab_size  # ids that the model has beyond it have no text
        asked = await checked(
            app, served, exchange, lambda fields, _, strict: parse_detokenize(fields, vocab_size, strict)
        )
        served.name(asked.model)
        text = await decode(app, served, asked.tokens, skip_special=asked.skip_special)
        return Response(200, orjson.dumps({"text": text, "prompt": text}), headers=ignored_header(asked.ignored))


def _entry(served: Served, ids: Sequence[int], token_strs: bool) -> dict[str, object]:
    tokenizer = served.model.tokenizer
    return {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": served.model.max_model_len,
        "token_strs": tokenizer.token_strs(ids) if token_strs else None,
    }
