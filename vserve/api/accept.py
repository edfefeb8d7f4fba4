"""What kind of reply a client would rather have, and whether it has it already (RFC 9110 12.5, 13.1).  Pure."""

from __future__ import annotations

import re

_RANGE = re.compile(r"\s*([^;,\s]+)\s*((?:;[^,]*)?)")
_WEIGHT = re.compile(r";\s*q\s*=\s*([01](?:\.\d{0,3})?)")


def prefers(accept: str | None, kind: str, over: str) -> bool:
    """Whether the header weighs the media type kind above the other; without a header it does not."""
    if accept is None:
        return False
    weights: dict[str, float] = {}
    for name, parameters in _RANGE.findall(accept[:1024]):
        weight = _WEIGHT.search(parameters)
        weights[name.lower()] = float(weight[1]) if weight else 1.0

    def weight_of(name: str) -> float:
        return weights.get(name, weights.get(f"{name.partition('/')[0]}/*", weights.get("*/*", 0.0)))

    return weight_of(kind) > weight_of(over)


def takes_gzip(accept: str | None) -> bool:
    """Whether a client reads gzip (Accept-Encoding, RFC 9110 12.5.3); one that says nothing may not."""
    weights: dict[str, float] = {}
    for name, parameters in _RANGE.findall((accept or "")[:1024]):
        weight = _WEIGHT.search(parameters)
        weights[name.lower()] = float(weight[1]) if weight else 1.0
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0


def has_it(if_none_match: str | None, etag: str) -> bool:
    """Whether a client has this very content (RFC 9110 13.1.2): 304 is then the answer.  etag: with its quotes."""
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or etag in re.split(r"[\s,]+", if_none_match.replace("W/", ""))
