"""Who may call: bearer keys, compared as hashes in constant time, their scopes, rates, quotas and prefix-cache salts.

Holds no key in clear text after construction and never says which part of a key was wrong.  Knows no file: named keys
are read by key_file.py, and no issuer: access tokens are checked by vserve.oauth.  Event-loop thread only.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from vserve.api.quota import NO_BOUND, Accounts, Allowance, Quota
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
    def allowance(self) -> Allowance:
        """What it may spend."""
        return Allowance(self.requests_per_minute, self.quotas)

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

    @property
    def account(self) -> str:
        """Under what its spending is kept: short, however long the subject's name is."""
        return self.salt.hex()


Caller = Key | Bearer


MAX_SUBJECTS = 16_384
"""Subjects whose spending is known: about 1 KiB each with every kind of quota."""


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
        self._of_keys = Accounts("API key")
        self._of_subjects = Accounts("subject", MAX_SUBJECTS)
        self._tokens: Tokens | None = None
        self._each_subject = NO_BOUND

    def trust(self, tokens: Tokens, each: Allowance = NO_BOUND) -> None:
        """Take access tokens too: whatever is no key is then looked at as one.  each: what every subject may spend."""
        self._tokens = tokens
        self._each_subject = each

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
        self._of_keys.keep({key.name for key in everything})  # what was spent stays spent

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
        if isinstance(caller, Bearer):
            return self._of_subjects.spend(caller.account, self._each_subject, self._clock())
        if caller is None or caller.name is None:
            return None
        return self._of_keys.spend(caller.name, caller.allowance, self._clock())

    def use(self, caller: Caller | None, tokens: int) -> None:
        """Count tokens of an answer that has ended, and of its prompt, against the caller's quotas."""
        if isinstance(caller, Bearer):
            self._of_subjects.use(caller.account, self._each_subject, tokens, self._clock())
        elif caller is not None and caller.name is not None:
            self._of_keys.use(caller.name, caller.allowance, tokens, self._clock())

    def caller(self, authorization: str | None) -> Caller | None:
        """Who this is; None when everyone may call.  Raises as check does."""
        return self._caller(authorization) if self.guards(INFER) else None

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
