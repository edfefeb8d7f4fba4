"""The issuer's public keys: fetched by a thread of their own, kept within bounds, fetched again when one is unknown.

Whoever asks never waits: it gets the key, "there is none", or "being fetched".  A dead issuer costs others nothing.
OpenID Connect Discovery 1.0 section 4, RFC 8414 section 3, RFC 7517.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.types import JWKDict

from vserve.errors import StartupError, shorten
from vserve.oauth.grants import check_url

log = logging.getLogger("vserve")

ALGORITHMS: Mapping[tuple[str, str | None], tuple[str, ...]] = {
    # (kty, crv) of a key -> the signatures it may make.  No "none", and no HS*: whoever checks those could sign them.
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey
LEAST_RSA_BITS = 2048
REFRESH_S = 300.0
"""How often keys are fetched unasked: a key that the issuer has taken back opens nothing after that."""
RETRY_S = 10.0
"""The least time between two fetches, whatever is asked for."""
STALE_S = 86_400.0
"""Keys that could not be fetched again for so long open nothing any more."""
READ_S = 5.0
TOTAL_S = 15.0
DOCUMENT_LIMIT_BYTES = 2**20
MAX_KEYS = 64
_KNOWN = ("/.well-known/openid-configuration", "/.well-known/oauth-authorization-server")


@dataclass(frozen=True, slots=True)
class Key:
    """A public key and the algorithms it may be used with."""

    key: PublicKey
    algorithms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeySet:
    """What one fetch found.  keys: by kid; "" is that of the one key without.  fetched_s: of the issuer's clock."""

    keys: Mapping[str, Key]
    fetched_s: float


class IssuerKeys:
    """The keys of one issuer.  ``find`` belongs to the event-loop thread; fetching to a thread of its own."""

    def __init__(
        self,
        issuer: str,
        jwks_url: str | None = None,
        *,
        retry_s: float = RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """jwks_url: None finds it by discovery.  clock: seconds, never set back."""
        self._issuer = issuer
        self._jwks_url = jwks_url
        self._retry_s = retry_s
        self._clock = clock
        self._set: KeySet | None = None
        self._wanted = threading.Condition()
        self._asked = True  # at the start, all keys are unknown
        self._busy = False
        self._began_s: float | None = None
        self._stopped = False
        self._failing = False

    def start(self) -> None:
        """Begin to fetch."""
        threading.Thread(target=self._run, name="oauth", daemon=True).start()

    def stop(self) -> None:
        """Let the thread end."""
        with self._wanted:
            self._stopped = True
            self._wanted.notify()

    @property
    def current(self) -> KeySet | None:
        """The keys that count now; None until there are any, and once they are stale."""
        found = self._set
        return None if found is None or self._clock() - found.fetched_s > STALE_S else found

    def fetching(self) -> bool:
        """Have the keys fetched again, if that was not just done; whether it is worth coming back soon."""
        with self._wanted:
            if self._asked or self._busy:
                return True
            if self._began_s is not None and self._clock() - self._began_s < self._retry_s:
                return False
            self._asked = True
            self._wanted.notify()
            return True

    def _run(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._asked or self._stopped, self._pause_s())
                if self._stopped:
                    return
                self._asked, self._busy, self._began_s = False, True, self._clock()
            try:
                self._set = self._fetch()
                if self._failing:
                    log.info("the keys of %s are there again", self._issuer)
                self._failing = False
            except Exception as error:  # the next round is the remedy for whatever it is
                if not self._failing:  # once, not every ten seconds
                    log.warning("the keys of %s cannot be fetched: %s", self._issuer, shorten(str(error)))
                self._failing = True
            finally:
                with self._wanted:
                    self._busy = False

    def _pause_s(self) -> float:
        return self._retry_s if self._failing else REFRESH_S

    def _fetch(self) -> KeySet:
        now_s = self._clock()
        url = self._jwks_url or self._discover()
        document = _get(url)
        rows = document.get("keys")
        if not isinstance(rows, list):
            raise ValueError("no list of keys")
        keys: dict[str, Key] = {}
        for row in rows[:MAX_KEYS]:
            made = _key(row) if isinstance(row, dict) else None
            if made is not None:
                keys.setdefault(str(row.get("kid") or ""), made)
        if not keys:
            raise ValueError("none of the keys can be used")
        return KeySet(keys, now_s)

    def _discover(self) -> str:
        """The address of the keys.  Raises ValueError for a document that is not of this issuer."""
        failure: Exception = ValueError("no document")
        for path in _KNOWN:
            try:
                document = _get(self._issuer.rstrip("/") + path)
            except (OSError, ValueError) as error:
                failure = error
                continue
            if document.get("issuer") != self._issuer:
                raise ValueError(f"its document is of another issuer, {shorten(document.get('issuer'))}")
            try:
                return check_url("jwks_uri", str(document.get("jwks_uri")))
            except StartupError as error:
                raise ValueError(str(error)) from None
        raise failure


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What is fetched comes from where the operator said."""

    def redirect_request(self, *given: object, **named: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _get(url: str) -> dict[str, object]:
    """The JSON object at url.  Raises OSError and ValueError."""
    until_s = time.monotonic() + TOTAL_S
    data = b""
    with _OPENER.open(urllib.request.Request(url, headers={"accept": "application/json"}), timeout=READ_S) as reply:
        while chunk := reply.read1(65536):
            data += chunk
            if len(data) > DOCUMENT_LIMIT_BYTES:
                raise ValueError(f"the document is larger than {DOCUMENT_LIMIT_BYTES} bytes")
            if time.monotonic() > until_s:
                raise TimeoutError(f"the document took longer than {TOTAL_S:g} s")
    try:
        document = json.loads(data)
    except RecursionError:
        raise ValueError("the document is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("the document is not an object")
    return document


def _key(row: JWKDict) -> Key | None:
    """A key that signatures can be checked with, or None for any other."""
    kty, operations = str(row.get("kty")), row.get("key_ops")
    algorithms = ALGORITHMS.get((kty, None if kty == "RSA" else str(row.get("crv"))), ())
    if row.get("use") not in (None, "sig") or (isinstance(operations, list) and "verify" not in operations):
        return None
    if row.get("alg") is not None:
        algorithms = tuple(name for name in algorithms if name == row["alg"])
    if not algorithms:
        return None
    try:
        key = jwt.PyJWK.from_dict(row, algorithms[0]).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    # A private key in such a document is everyone's: it proves nothing.
    if not isinstance(key, PublicKey) or (isinstance(key, RSAPublicKey) and key.key_size < LEAST_RSA_BITS):
        return None
    return Key(key, algorithms)
