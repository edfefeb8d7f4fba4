"""A small OAuth2 issuer for tests: real keys, a discovery document, a code flow with PKCE, tokens signed on demand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "vserve-test"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

RSA_KEY = rsa.generate_private_key(65537, 2048)
"""Made once: a key of RSA takes a tenth of a second."""


def rsa_key(bits: int) -> rsa.RSAPrivateKey:
    return RSA_KEY if bits == 2048 else rsa.generate_private_key(65537, bits)


def jwk(key: PrivateKey, kid: str | None, **more: object) -> dict[str, object]:
    """The public half as RFC 7517 has it."""
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        made = RSAAlgorithm.to_jwk(public, as_dict=True)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        made = ECAlgorithm.to_jwk(public, as_dict=True)
    else:
        made = OKPAlgorithm.to_jwk(public, as_dict=True)
    made.pop("key_ops", None)
    return {**made, **({} if kid is None else {"kid": kid}), "use": "sig", **more}


class Issuer:
    """Its state, which a test may change while it runs.

    keys: what the key document lists.  fetched: how often it was.  answers: in place of a path's own answer, raw.
    hold: set while a path in stuck waits for ever, that is until the issuer is closed.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.keys: list[object] = []
        self.fetched = 0
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.stuck: set[str] = set()
        self.closed = threading.Event()
        self.key: PrivateKey = RSA_KEY
        self.kid = "first"
        self.codes: dict[str, dict[str, str]] = {}
        self.granted: list[dict[str, str]] = []

    def token(
        self, alg: str = "RS256", key: Any = None, headers: dict[str, object] | None = None, **claims: object
    ) -> str:
        """A token that is valid for five minutes, but for what claims change; None leaves one out."""
        now_s = int(time.time())
        said = {"iss": self.url, "aud": AUDIENCE, "sub": "alice", "iat": now_s, "exp": now_s + 300, "scope": "infer"}
        said = {name: value for name, value in {**said, **claims}.items() if value is not None}
        head = {"kid": self.kid, **(headers or {})}
        head = {name: value for name, value in head.items() if value is not None}
        return jwt.encode(said, self.key if key is None else key, algorithm=alg, headers=head)


def _handler(issuer: Issuer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            if parts.path in issuer.stuck:
                issuer.closed.wait(60)
                return
            if parts.path == "/jwks":
                issuer.fetched += 1
            if parts.path in issuer.answers:
                self.answer(*issuer.answers[parts.path])
            elif parts.path == "/.well-known/openid-configuration":
                self.json({"issuer": issuer.url, "jwks_uri": f"{issuer.url}/jwks"})
            elif parts.path == "/jwks":
                self.json({"keys": issuer.keys})
            elif parts.path == "/authorize":
                code = f"code-{len(issuer.codes)}"
                issuer.codes[code] = query
                answer = urlencode({"code": code, "state": query["state"]})
                self.answer(302, {"location": f"{query['redirect_uri']}?{answer}"}, b"")
            else:
                self.answer(404, {}, b"")

        def do_OPTIONS(self) -> None:
            self.answer(204, {"access-control-allow-headers": "*, authorization, x-requested-with"}, b"")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            form = {name: values[0] for name, values in parse_qs(body).items()}
            asked = issuer.codes.pop(form.get("code", ""), None)
            verifier = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
            challenge = base64.urlsafe_b64encode(verifier).rstrip(b"=").decode()
            if asked is None or asked.get("code_challenge") != challenge:
                self.json({"error": "invalid_grant"}, 400)
                return
            issuer.granted.append(asked)
            token = issuer.token(scope=asked.get("scope", ""))
            self.json({"access_token": token, "token_type": "Bearer", "expires_in": 300})

        def json(self, document: object, status: int = 200) -> None:
            self.answer(status, {"content-type": "application/json"}, json.dumps(document).encode())

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("access-control-allow-origin", "*")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@contextlib.contextmanager
def issuing() -> Iterator[Issuer]:
    """An issuer on a free loopback port, with one key of RSA."""
    made: list[Issuer] = []

    def handler(*given: Any) -> BaseHTTPRequestHandler:
        return _handler(made[0])(*given)

    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    issuer = Issuer(server.server_address[1])
    issuer.keys = [jwk(RSA_KEY, "first")]
    made.append(issuer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield issuer
    finally:
        issuer.closed.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def eventually(look: Callable[[], object], within_s: float = 30.0) -> None:
    """Look again and again, each time after a moment, until it is so."""
    until_s, moment = time.monotonic() + within_s, threading.Event()
    while not look():
        assert time.monotonic() < until_s, "it never came about"
        moment.wait(0.005)
