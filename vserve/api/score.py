"""POST /score and /rerank: how well texts fit each other.

A cross-encoder reads both texts at once and its number is the score; of any other model it is the cosine of the two
vectors.  Event-loop thread; long texts are tokenised, and many cosines worked out, in the pool.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from operator import mul

import orjson

from vserve.api.app import App
from vserve.api.asked import checked
from vserve.api.encoder import EncoderServed
from vserve.api.encoding import check_length, encode, timing_header, tokenise
from vserve.api.encoding_requests import EncodingWanted, parse_rerank, parse_score
from vserve.api.generation import ignored_header
from vserve.http.exchange import Exchange, Response

Headers = tuple[tuple[str, str], ...]
Pair = tuple[str, str]

INLINE_PAIRS = 8
"""More cosines than this are worked out off the loop; one takes some 30 microseconds."""


class Score:
    """The endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def score(self, exchange: Exchange) -> Response | None:
        """Scores in the order of the pairs."""
        app = self._app
        served = app.encoder
        asked = await checked(app, served, exchange, parse_score)
        name = served.name(asked.wanted.model)
        scored = await self._scores(exchange, served, asked.pairs, asked.wanted, asked.fields)
        if scored is None:
            return None
        scores, tokens, headers = scored
        reply = {
            "id": _id("score-", exchange, asked.wanted),
            "object": "list",
            "created": int(time.time()),
            "model": name,
            "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return Response(200, orjson.dumps(reply), headers=headers)

    async def rerank(self, exchange: Exchange) -> Response | None:
        """The documents, the best first; equal ones keep their order."""
        app = self._app
        served = app.encoder
        asked = await checked(app, served, exchange, parse_rerank)
        name = served.name(asked.wanted.model)
        pairs = [(asked.query, document) for document in asked.documents]
        scored = await self._scores(exchange, served, pairs, asked.wanted, ("query", "documents"))
        if scored is None:
            return None
        scores, tokens, headers = scored
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: asked.top_n or None]
        results: list[dict[str, object]] = []
        for i in order:
            result: dict[str, object] = {"index": i, "relevance_score": scores[i]}
            if asked.return_documents:
                result["document"] = {"text": asked.documents[i]}
            results.append(result)
        reply = {
            "id": _id("rerank-", exchange, asked.wanted),
            "model": name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results,
        }
        return Response(200, orjson.dumps(reply), headers=headers)

    async def _scores(
        self,
        exchange: Exchange,
        served: EncoderServed,
        pairs: Sequence[Pair],
        wanted: EncodingWanted,
        names: tuple[str, str],
    ) -> tuple[list[float], int, Headers] | None:
        """Scores, tokens that were read, and the reply's headers.  None: the client has gone."""
        app, cross = self._app, served.model.cross
        # Vectors are made once of each text, however many pairs it is in.
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        keys: Sequence[str | Pair] = pairs if cross else texts
        paths = _paths(pairs, names)
        ids = await tokenise(app, served, keys, wanted)
        for entry, key in zip(ids, keys, strict=True):
            check_length(served, entry, paths[key])
        encoded = await encode(app, served, exchange, ids, wanted, normalize=None if cross else True)
        if encoded is None:
            return None
        vectors = [array("f", vector) for vector in encoded.vectors]
        if cross:
            scores = [vector[0] for vector in vectors]
        else:
            places = {text: i for i, text in enumerate(texts)}
            sides = [(vectors[places[a]], vectors[places[b]]) for a, b in pairs]
            scores = cosines(sides) if len(pairs) <= INLINE_PAIRS else await app.off_loop(lambda: cosines(sides))
        headers = (*ignored_header(wanted.ignored), *timing_header(encoded))
        return scores, sum(len(entry.ids) for entry in ids), headers


def cosines(sides: Sequence[tuple[array[float], array[float]]]) -> list[float]:
    """The cosine of each two vectors of length 1."""
    return [sum(map(mul, a, b)) for a, b in sides]


def _paths(pairs: Sequence[Pair], names: tuple[str, str]) -> dict[str | Pair, str]:
    """The field that each text, and each pair, came under."""
    paths: dict[str | Pair, str] = {}
    for i, pair in enumerate(pairs):
        many = f"{names[1]}[{i}]" if len(pairs) > 1 else names[1]
        paths.setdefault(pair, many)
        paths.setdefault(pair[1], many)
        paths.setdefault(pair[0], names[0])
    return paths


def _id(prefix: str, exchange: Exchange, wanted: EncodingWanted) -> str:
    return prefix + (wanted.request_id or exchange.id.removeprefix("req-"))
