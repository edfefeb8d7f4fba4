"""Checked requests of the embedding endpoints: a body and a field table in, a frozen request or BadRequest out.  Pure.

Owns the rules that join several fields; what one field may hold is its row's (schema.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from vserve.api import schema as row
from vserve.api.fields import Field, Values, read
from vserve.api.prompts import Prompt
from vserve.errors import BadRequest


@dataclass(frozen=True, slots=True)
class EncodingWanted:
    """What the embedding endpoints have in common.

    truncate: None refuses long inputs, -1 cuts them to what fits.  ignored: field names without effect.
    """

    model: str | None
    truncate: int | None
    priority: int
    timeout_ms: int | None
    request_id: str | None
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A checked body of /v1/embeddings."""

    wanted: EncodingWanted
    inputs: tuple[Prompt, ...]
    base64: bool
    dimensions: int | None
    normalize: bool | None
    add_special: bool


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A checked body of /score: pairs to compare.  fields: the names under which both sides came."""

    wanted: EncodingWanted
    pairs: tuple[tuple[str, str], ...]
    fields: tuple[str, str]


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """A checked body of /rerank.  top_n 0: all."""

    wanted: EncodingWanted
    query: str
    documents: tuple[str, ...]
    top_n: int
    return_documents: bool


def parse_embedding(body: dict[str, object], vocab_size: int, strict: bool = False) -> EmbeddingRequest:
    """body as an EmbeddingRequest.  Raises BadRequest."""
    values, ignored = read(body, row.EMBEDDINGS, vocab_size, strict)
    return EmbeddingRequest(
        wanted=_wanted(values, ignored),
        inputs=values[row.INPUT],
        base64=values[row.ENCODING_FORMAT] == "base64",
        dimensions=values[row.DIMENSIONS],
        normalize=values[row.NORMALIZE],
        add_special=values[row.ADD_SPECIAL],
    )


def parse_score(body: dict[str, object], vocab_size: int, strict: bool = False) -> ScoreRequest:
    """body as a ScoreRequest: one text against each of the others, or as many against as many.  Raises BadRequest."""
    values, ignored = read(body, row.SCORE, vocab_size, strict)
    left_name, left = _either(values, row.TEXT_1, row.QUERIES)
    right_name, right = _either(values, row.TEXT_2, row.SCORE_DOCUMENTS)
    lefts = (left,) if isinstance(left, str) else left
    rights = (right,) if isinstance(right, str) else right
    for name, texts in ((left_name, lefts), (right_name, rights)):
        if not texts:
            raise BadRequest(f"`{name}` is an empty list; give at least one text.", param=name)
    if len(lefts) == 1:
        lefts = lefts * len(rights)
    if len(lefts) != len(rights):
        raise BadRequest(
            f"`{left_name}` has {len(lefts)} texts and `{right_name}` has {len(rights)}; give one or as many.",
            param=left_name,
        )
    return ScoreRequest(_wanted(values, ignored), tuple(zip(lefts, rights, strict=True)), (left_name, right_name))


def parse_rerank(body: dict[str, object], vocab_size: int, strict: bool = False) -> RerankRequest:
    """body as a RerankRequest.  Raises BadRequest."""
    values, ignored = read(body, row.RERANK, vocab_size, strict)
    return RerankRequest(
        _wanted(values, ignored),
        values[row.QUERY],
        values[row.DOCUMENTS_RANKED],
        values[row.TOP_N],
        values[row.RETURN_DOCUMENTS],
    )


Side = Field[str | tuple[str, ...] | None]


def _either(values: Values, field: Side, other: Side) -> tuple[str, str | tuple[str, ...]]:
    first, second = values[field], values[other]
    if first is not None and second is not None:
        raise BadRequest(f"Give one of `{field.name}` and `{other.name}`, got both.", param=other.name)
    if first is not None:
        return field.name, first
    if second is not None:
        return other.name, second
    raise BadRequest(f"`{field.name}` is required.", param=field.name)


def _wanted(values: Values, ignored: tuple[str, ...]) -> EncodingWanted:
    return EncodingWanted(
        values[row.MODEL],
        values[row.TRUNCATE_INPUT],
        values[row.PRIORITY],
        values[row.TIMEOUT_MS],
        values[row.REQUEST_ID],
        ignored,
    )
