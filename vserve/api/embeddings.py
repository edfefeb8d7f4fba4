"""POST /v1/embeddings: texts or token ids in, vectors out.

Event-loop thread; long texts are tokenised, and many numbers written out, in the pool.
"""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Sequence

import orjson

from vserve.api.app import App
from vserve.api.asked import checked
from vserve.api.encoder import EncoderServed
from vserve.api.encoding import check_length, encode, limit_of, timing_header, tokenise
from vserve.api.encoding_requests import EmbeddingRequest, parse_embedding
from vserve.api.generation import ignored_header
from vserve.errors import BadRequest
from vserve.http.exchange import Exchange, Response
from vserve.text.encoder_tokenizer import EncoderIds

INLINE_BYTES = 16 * 1024
"""More bytes of vectors than this are written out off the loop."""


class Embeddings:
    """The endpoint."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def create(self, exchange: Exchange) -> Response | None:
        """Answer one request.  Raises ApiError while nothing has been sent."""
        app = self._app
        served = app.encoder
        asked = await checked(app, served, exchange, parse_embedding)
        name = served.name(asked.wanted.model)
        if served.model.cross:
            raise BadRequest(
                f"The model `{name}` scores pairs of texts and makes no embeddings; use /score or /rerank.",
                param="model",
            )
        _check_dimensions(served, asked.dimensions)
        ids = await _ids(app, served, asked)
        encoded = await encode(
            app, served, exchange, ids, asked.wanted, normalize=asked.normalize, dimensions=asked.dimensions
        )
        if encoded is None:
            return None
        tokens = sum(len(entry.ids) for entry in ids)
        opening: dict[str, object] = {
            "id": "embd-" + (asked.wanted.request_id or exchange.id.removeprefix("req-")),
            "object": "list",
            "created": int(time.time()),
            "model": name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        vectors = encoded.vectors
        if sum(map(len, vectors)) <= INLINE_BYTES:
            content = render(opening, vectors, asked.base64)
        else:
            content = await app.off_loop(lambda: render(opening, vectors, asked.base64))
        return Response(200, content, headers=(*ignored_header(asked.wanted.ignored), *timing_header(encoded)))


def render(opening: dict[str, object], vectors: Sequence[bytes], as_base64: bool) -> bytes:
    """The reply: opening with the data behind it.  One vector a call of the writer, which holds the GIL meanwhile."""
    entries = []
    for index, vector in enumerate(vectors):
        number = b'"%b"' % base64.b64encode(vector) if as_base64 else orjson.dumps(array("f", vector).tolist())
        entries.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, number))
    return orjson.dumps(opening)[:-1] + b',"data":[' + b",".join(entries) + b"]}"


def _check_dimensions(served: EncoderServed, asked: int | None) -> None:
    """Raise BadRequest for a size that the model's vectors were not made to be cut to."""
    model = served.model
    if asked is None or asked == model.size:
        return
    if asked > model.size:
        raise BadRequest(f"`dimensions` is {asked}, the model's vectors have {model.size}.", param="dimensions")
    if model.dimensions is not None and asked not in model.dimensions:
        sizes = ", ".join(map(str, model.dimensions)) if model.dimensions else f"{model.size} alone"
        raise BadRequest(
            f"`dimensions` is {asked}, which this model was not trained for: its vectors can have {sizes}.",
            param="dimensions",
        )


async def _ids(app: App, served: EncoderServed, asked: EmbeddingRequest) -> list[EncoderIds]:
    """What the encoder reads of each input, checked."""
    texts = [given for given in asked.inputs if isinstance(given, str)]
    made = iter(await tokenise(app, served, texts, asked.wanted, add_special=asked.add_special))
    cut_to = limit_of(served, asked.wanted)
    ids: list[EncoderIds] = []
    for i, given in enumerate(asked.inputs):
        if isinstance(given, str):
            entry = next(made)
        else:
            kept = given if cut_to is None else served.model.tokenizer.cut_ids(given, cut_to)
            entry = EncoderIds(kept, (), len(given))
        check_length(served, entry, "input" if len(asked.inputs) == 1 else f"input[{i}]")
        ids.append(entry)
    return ids
