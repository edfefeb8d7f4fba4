"""Access tokens: a JWT in, who it is of and what it opens out (RFC 7519, RFC 9068).  Nothing here waits.

Owns the checks and a bounded memory of tokens that passed; keys are issuer.py's.  Event-loop thread only.  No message
repeats any part of a token.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import jwt

from vserve.errors import Unauthorized, Unavailable
from vserve.oauth.grants import Grants, Subject
from vserve.oauth.issuer import IssuerKeys, Key, KeySet

TOKEN_LIMIT = 16_384
"""Characters of a token; a longer one is refused unread."""
LEEWAY_S = 30
"""How far the issuer's clock may be from ours."""
MAX_KNOWN = 1024
"""Tokens that passed and need no second check: one of RSA takes 0.1 ms."""
_REQUIRED = ["exp", "iss", "aud", "sub"]


@dataclass(frozen=True, slots=True)
class _Known:
    subject: Subject
    until_s: float
    keys: KeySet


class Tokens:
    """The check of one issuer's tokens."""

    def __init__(
        self, keys: IssuerKeys, issuer: str, audience: str, grants: Grants, clock: Callable[[], float] = time.time
    ) -> None:
        """audience: what a token's aud must be, or hold.  clock: seconds since 1970."""
        self.grants = grants
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._clock = clock
        self._known: dict[bytes, _Known] = {}

    def check(self, token: str) -> Subject:
        """Whom the token speaks for.

        Raises Unauthorized for one that is not valid here and now, Unavailable while keys are being fetched.
        """
        if len(token) > TOKEN_LIMIT:
            raise _invalid(f"is longer than {TOKEN_LIMIT} characters")
        keys = self._keys.current
        if keys is None:
            self._keys.fetching()
            raise Unavailable("The keys of the issuer of access tokens are not there yet.", retry_after_s=1)
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        known = self._known.get(digest)
        if known is not None and known.keys is keys and self._clock() < known.until_s:
            return known.subject
        self._known.pop(digest, None)
        claims = self._claims(token, keys)
        subject = Subject(str(claims["sub"]), self.grants.of(_scopes(claims)))
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[digest] = _Known(subject, float(str(claims["exp"])) + LEEWAY_S, keys)
        return subject

    def _claims(self, token: str, keys: KeySet) -> dict[str, object]:
        try:
            header = jwt.get_unverified_header(token)
            if "crit" in header:  # RFC 7515 4.1.11: extensions one must know, and we know none
                raise _invalid("has an extension that is not known here")
            kid = header.get("kid")
            key = keys.keys.get(str(kid)) if kid is not None else self._only(keys)
            if key is None:
                if self._keys.fetching():
                    raise Unavailable("The access token's key is being fetched; try again.", retry_after_s=1)
                raise _invalid("is signed with a key that the issuer does not have")
            claims: dict[str, object] = jwt.decode(
                token,
                key.key,
                algorithms=list(key.algorithms),
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_S,
                options={"require": _REQUIRED},
            )
        except jwt.ExpiredSignatureError:
            raise _invalid("has expired") from None
        except jwt.ImmatureSignatureError:
            raise _invalid("is not valid yet") from None
        except jwt.InvalidAudienceError:
            raise _invalid("is for another audience") from None
        except jwt.InvalidIssuerError:
            raise _invalid("is of another issuer") from None
        except jwt.MissingRequiredClaimError as error:
            raise _invalid(f"has no claim {error.claim}") from None
        except jwt.InvalidAlgorithmError:
            raise _invalid("is signed in a way that is not accepted") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            # OverflowError: a date of 1e999; RecursionError: a header of ten thousand brackets.
            raise _invalid("is not valid") from None
        if not claims["sub"]:
            raise _invalid("has no claim sub")
        return claims

    @staticmethod
    def _only(keys: KeySet) -> Key | None:
        return next(iter(keys.keys.values())) if len(keys.keys) == 1 else None


def _invalid(what: str) -> Unauthorized:
    return Unauthorized(f"The access token {what}.", challenge='error="invalid_token"')


def _scopes(claims: dict[str, object]) -> list[str]:
    """RFC 9068 2.2.3: scope is words; others call it scp, or make it a list."""
    found: list[str] = []
    for name in ("scope", "scp"):
        value = claims.get(name)
        if isinstance(value, str):
            found += value.split()
        elif isinstance(value, list):
            found += [word for word in value if isinstance(word, str)]
    return found
