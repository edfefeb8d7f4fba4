"""Who may call: bearer keys, compared as hashes in constant time, their scopes, rates, quotas and prefix-cache salts.

Holds no key in clear text after construction and never says which part of a key was wrong.  Knows no file: named keys
are read by key_file.py, and no issuer: access tokens are checked by vserve.oauth.  Event-loop thread only.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from vserve.api.quota import Goods, Ledger, Quota
from vserve.errors import PermissionDenied, RateLimited, StartupError, Unauthorized
from vserve.http.events import Headers
from vserve.oauth.grants import Grants, Subject

INFER = "infer"
METRICS = "metrics"
SCOPES = frozenset({INFER, "admin", METRICS})


@dataclass(frozen=True, slots=True)
class Key:
    """One accepted key.  name: None for a key of the command line, which has every scope and no rate.

    digest: SHA-256 of the key.  requests_per_minute: None is no bound.
    """

    name: str | None
    digest: bytes = field(repr=False)
    scopes: frozenset[str] = SCOPES
    requests_per_minute: float | None = None
    quotas: tuple[Quota, ...] = ()

    @property
    def salt(self) -> bytes:
        """The prefix-cache salt, 16 bytes.  That of a named key outlives a change of the key itself."""
        root = b"cache salt" + self.digest if self.name is None else b"cache salt of\0" + self.name.encode()
        return hashlib.sha256(root).digest()[:16]


class Tokens(Protocol):
    """The check of an issuer's access tokens."""

    @property
    def grants(self) -> Grants: ...

    def check(self, token: str) -> Subject:
        """Whom the token speaks for.  Raises Unauthorized, and Unavailable while that cannot be told."""


@dataclass(frozen=True, slots=True)
class Bearer:
    """The caller of an access token: a subject of the issuer."""

    subject: Subject

    @property
    def salt(self) -> bytes:
        """The prefix-cache salt, 16 bytes: that of the subject, whatever its token."""
        name = self.subject.name.encode("utf-8", "surrogatepass")
        return hashlib.sha256(b"cache salt of subject\0" + name).digest()[:16]


Caller = Key | Bearer


@dataclass(slots=True)
class _Bucket:
    """Requests that a key may still make at once; grows with time up to a minute's worth."""

    left: float
    at_s: float


class Keys:
    """The accepted API keys; none means that everyone may call."""

    def __init__(self, keys: Iterable[str] = (), clock: Callable[[], float] = time.monotonic) -> None:
        """keys: those of the command line.  Raises StartupError, which does not repeat it, for one no header can carry.

        clock: seconds, never set back.
        """
        self._clock = clock
        try:
            self._plain = tuple(Key(None, digest(key)) for key in keys)
        except StartupError as error:
            raise StartupError(f"--api-key: {error}") from None
        self._all = self._plain
        self._buckets: dict[str, _Bucket] = {}
        self._ledger = Ledger()
        self._tokens: Tokens | None = None

    def trust(self, tokens: Tokens) -> None:
        """Take access tokens too: whatever is no key is then looked at as one."""
        self._tokens = tokens

    def name(self, keys: Iterable[Key]) -> None:
        """Replace the named keys.  Raises StartupError, and changes nothing, when two are the same key."""
        everything = (*self._plain, *keys)
        seen: dict[bytes, str] = {}
        for key in everything:
            label = "--api-key" if key.name is None else repr(key.name)
            if key.name is not None and key.digest in seen:
                raise StartupError(f"{seen[key.digest]} and {label} are the same API key")
            seen[key.digest] = label
        self._all = everything
        names = {key.name for key in everything}  # what was spent stays spent
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if name in names}
        self._ledger.keep(names)

    def guards(self, scope: str) -> bool:
        """Whether a route asks for this scope.  Metrics do only once a named key, or an issuer's scope, opens them."""
        if scope == METRICS:
            granted = self._tokens is not None and bool(self._tokens.grants.that_open(METRICS))
            return granted or any(key.name is not None and METRICS in key.scopes for key in self._all)
        return bool(self._all) or self._tokens is not None

    def check(self, authorization: str | None, scope: str) -> Caller | None:
        """The caller, None where none is asked for.

        authorization: the header's value, ``Bearer <key or access token>``.  Raises Unauthorized for a missing or
        wrong one, PermissionDenied for one without the scope, Unavailable while tokens cannot be checked.
        """
        if not self.guards(scope):
            return None
        caller = self._caller(authorization)
        if isinstance(caller, Bearer):
            if scope not in caller.subject.scopes:
                assert self._tokens is not None
                enough = " ".join(self._tokens.grants.that_open(scope))
                challenge = f'error="insufficient_scope", scope="{enough}"'
                raise PermissionDenied(f"The access token does not have the scope {scope}.", challenge=challenge)
        elif scope not in caller.scopes:
            raise PermissionDenied(f"The API key does not have the scope {scope}.")
        return caller

    def spend(self, caller: Caller | None) -> RateLimited | None:
        """Count one request against the caller's quotas and rate; the 429, and nothing counted, when one is used up."""
        if not isinstance(caller, Key) or caller.name is None:
            return None
        now_s = self._clock()
        refusal = self._ledger.refusal(caller.name, caller.quotas, now_s) if caller.quotas else None
        if refusal is None and caller.requests_per_minute is not None:
            refusal = self._draw(caller.name, caller.requests_per_minute, now_s)
        if refusal is None and caller.quotas:
            self._ledger.count(caller.name, caller.quotas, Goods.REQUESTS, 1, now_s)
        return refusal

    def use(self, caller: Caller | None, tokens: int) -> None:
        """Count tokens of an answer that has ended, and of its prompt, against the caller's quotas."""
        if isinstance(caller, Key) and caller.name is not None and caller.quotas and tokens > 0:
            self._ledger.count(caller.name, caller.quotas, Goods.TOKENS, tokens, self._clock())

    def caller(self, authorization: str | None) -> Caller | None:
        """Who this is; None when everyone may call.  Raises as check does."""
        return self._caller(authorization) if self.guards(INFER) else None

    def _draw(self, name: str, requests_per_minute: float, now_s: float) -> RateLimited | None:
        """Take one request out of the key's bucket."""
        most, per_s = max(1.0, requests_per_minute), requests_per_minute / 60
        bucket = self._buckets.setdefault(name, _Bucket(most, now_s))
        bucket.left = min(most, bucket.left + (now_s - bucket.at_s) * per_s)
        bucket.at_s = now_s
        # A hair below one is one: a client that waits exactly as long as it was told must not be refused again.
        if bucket.left < 1 - 1e-6:
            return RateLimited(
                f"This API key may make {requests_per_minute:g} requests a minute; try again later.",
                retry_after_s=max(1, math.ceil((1 - bucket.left) / per_s - 1e-3)),
            )
        bucket.left -= 1
        return None

    def salt(self, authorization: str | None) -> bytes:
        """The caller's cache salt; b"" when everyone may call.  Raises as check does."""
        return self._caller(authorization).salt if self.guards(INFER) else b""

    def _caller(self, authorization: str | None) -> Caller:
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            what = "An API key" if self._tokens is None else "An API key or an access token"
            raise Unauthorized(f"{what} is required: send the header Authorization: Bearer <key>.")
        hashed = _hash(given.strip())
        found: Key | None = None
        for known in self._all:  # all of them, whichever matches: the time must not tell
            if hmac.compare_digest(hashed, known.digest):
                found = known
        if found is not None:
            return found
        if self._tokens is None:
            raise Unauthorized("The API key is not valid.")
        return Bearer(self._tokens.check(given.strip()))


def credentials(headers: Headers) -> str | None:
    """What a request shows for itself, as an Authorization value; the header x-api-key is another way to send a key."""
    given = headers.get("authorization")
    if given is None and (key := headers.get("x-api-key")) is not None:
        return f"Bearer {key}"
    return given


def digest(key: str) -> bytes:
    """SHA-256 of a key.  Raises StartupError, which does not repeat it, for one that no header can carry."""
    if not key or not all("!" <= char <= "~" for char in key):
        raise StartupError("an API key must be one or more visible ASCII characters")
    return _hash(key)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
