"""A request's body as one JSON object: media type, syntax and nesting checked.

Knows nothing of what the object means.  NaN, Infinity, numbers beyond float range, lone surrogates and invalid UTF-8
are refused by the JSON reader itself.
"""

from __future__ import annotations

import orjson

from vserve.errors import BadRequest, UnsupportedMediaType, shorten

Container = dict[str, object] | list[object]

DEPTH_LIMIT = 128
"""Deepest nesting of lists and objects."""


def read(data: bytes, content_type: str | None) -> dict[str, object]:
    """The JSON object in data.

    Raises UnsupportedMediaType when content_type names anything but JSON (a missing one is taken for JSON) and
    BadRequest when data is not one JSON object nested at most DEPTH_LIMIT deep.
    """
    if content_type is not None:
        kind = content_type.partition(";")[0].strip().lower()
        if kind and kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise UnsupportedMediaType(
                f"Content-Type {shorten(content_type)} is not supported; send a JSON body as application/json."
            )
    if not data:
        raise BadRequest("The request has no body; send a JSON object.")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {_reason(error, data)}.") from None
    if type(value) is not dict:
        raise BadRequest(f"The body must be a JSON object, not {kind_of(value)}.")
    # Every level costs an opening bracket, so a body with few of them (nearly all) needs no walk.
    if data.count(b"[") + data.count(b"{") > DEPTH_LIMIT:
        _check_depth(value)
    return value


def _reason(error: orjson.JSONDecodeError, data: bytes) -> str:
    text = str(error)
    # The reader has a limit of its own, which some of its paths report as a lack of memory.
    if any(word in text for word in ("depth", "memory", "recursion")):
        return f"it is nested deeper than {DEPTH_LIMIT} levels"
    return text if data.isascii() or "UTF-8" not in text else "it is not valid UTF-8"


def _check_depth(root: Container) -> None:
    """Walk level by level: no recursion, each container seen once."""
    level: list[Container] = [root]
    for _ in range(DEPTH_LIMIT):
        inner: list[Container] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            inner += [child for child in children if type(child) is dict or type(child) is list]
        if not inner:
            return
        level = inner
    raise BadRequest(f"The body is nested deeper than {DEPTH_LIMIT} levels.")


def kind_of(value: object) -> str:
    """JSON's word for the type of a value, with its article."""
    if value is None:
        return "null"
    return _WORDS.get(type(value), "a value")


_WORDS: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
