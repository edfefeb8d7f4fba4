"""Who may call: bearer keys, compared as hashes in constant time, and the cache salt each key gets.

Holds no key in clear text after construction and never says which part of a key was wrong.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from vserve.errors import Unauthorized


class Keys:
    """The accepted API keys; none means that everyone may call."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def check(self, authorization: str | None) -> bytes:
        """The caller's cache salt (b"" when no keys are configured).  Raises Unauthorized for a missing or wrong key.

        authorization: the header's value, ``Bearer <key>``.
        """
        if not self._digests:
            return b""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("An API key is required: send the header Authorization: Bearer <key>.")
        digest = _digest(key.strip())
        found = False
        for known in self._digests:  # all of them, whichever matches: the time must not tell
            found |= hmac.compare_digest(digest, known)
        if not found:
            raise Unauthorized("The API key is not valid.")
        return hashlib.sha256(b"cache salt" + digest).digest()[:16]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
