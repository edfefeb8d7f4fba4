"""The issuer's keys: found, kept, fetched again when one is unknown, and never more than is right."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from jwt.algorithms import OKPAlgorithm

from tests.fakes_http import ManualClock
from tests.issuer import RSA_KEY, Issuer, eventually, issuing, jwk, rsa_key
from vserve.oauth.issuer import MAX_KEYS, STALE_S, IssuerKeys


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing() as running:
        yield running


def begun(
    issuer: Issuer, clock: ManualClock | None = None, url: str | None = None, retry_s: float = 0.01
) -> IssuerKeys:
    keys = IssuerKeys(issuer.url, url, retry_s=retry_s, clock=clock or ManualClock())
    keys.start()
    return keys


def kids(keys: IssuerKeys) -> set[str]:
    return set() if keys.current is None else set(keys.current.keys)


def test_keys_are_found_by_discovery_and_each_has_its_own_algorithms(issuer: Issuer) -> None:
    issuer.keys = [
        jwk(RSA_KEY, "rsa"),
        jwk(RSA_KEY, "ps", alg="PS256"),
        jwk(ec.generate_private_key(ec.SECP256R1()), "p256"),
        jwk(ec.generate_private_key(ec.SECP384R1()), "p384"),
        jwk(ec.generate_private_key(ec.SECP521R1()), "p521"),
        jwk(ed25519.Ed25519PrivateKey.generate(), "ed", alg="EdDSA"),
    ]
    keys = begun(issuer)
    eventually(lambda: keys.current)
    assert keys.current is not None
    found = {kid: key.algorithms for kid, key in keys.current.keys.items()}
    assert found["rsa"] == ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
    assert [found[kid] for kid in ("ps", "p256", "p384", "p521", "ed")] == [
        ("PS256",), ("ES256",), ("ES384",), ("ES512",), ("EdDSA",)
    ]  # fmt: skip
    keys.stop()


def test_a_key_that_must_not_check_signatures_is_left_out(issuer: Issuer) -> None:
    secret = {"kty": "oct", "k": "c2VjcmV0", "kid": "oct", "alg": "HS256"}
    issuer.keys = [
        secret,
        jwk(rsa_key(1024), "short"),
        {**jwk(RSA_KEY, "enc"), "use": "enc"},
        {**jwk(RSA_KEY, "wraps"), "key_ops": ["wrapKey"]},
        jwk(RSA_KEY, "none", alg="none"),
        jwk(RSA_KEY, "hs", alg="HS256"),
        {**jwk(ec.generate_private_key(ec.SECP256R1()), "curve"), "crv": "secp256k1"},
        {"kty": "RSA", "kid": "torn", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "kid": "empty"},
        {**OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate(), as_dict=True), "kid": "private"},
        "text", None, 3, [],
        jwk(RSA_KEY, "good"),
        {**jwk(RSA_KEY, "verifies"), "key_ops": ["verify"]},
    ]  # fmt: skip
    keys = begun(issuer)
    eventually(lambda: keys.current)
    assert kids(keys) == {"good", "verifies"}
    keys.stop()


def test_no_more_keys_are_read_than_the_bound(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA_KEY, f"k{i}") for i in range(MAX_KEYS + 5)]
    keys = begun(issuer, url=f"{issuer.url}/jwks")
    eventually(lambda: keys.current)
    assert len(kids(keys)) == MAX_KEYS
    keys.stop()


@pytest.mark.parametrize(
    "answer",
    [
        (500, {}, b""),
        (302, {"location": "/jwks2"}, b""),
        (200, {}, b"not json"),
        (200, {}, b"[]"),
        (200, {}, b'{"keys": 3}'),
        (200, {}, b'{"keys": []}'),
        (200, {}, b'{"keys": [' + b"[" * 100_000),
        (200, {}, b'{"keys": "' + b"x" * 2**20 + b'"}'),
        (200, {}, b"\xff\xfe"),
    ],
    ids=["500", "redirect", "text", "list", "number", "none", "deep", "large", "bytes"],
)
def test_a_bad_document_leaves_the_keys_as_they_were_and_is_said_once(
    issuer: Issuer, answer: tuple[int, dict[str, str], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = ManualClock()
    keys = begun(issuer, clock, f"{issuer.url}/jwks")
    eventually(lambda: keys.current)
    issuer.answers["/jwks"] = answer
    issuer.answers["/jwks2"] = (200, {}, json.dumps({"keys": [jwk(RSA_KEY, "elsewhere")]}).encode())
    before = issuer.fetched
    clock.now_s += 1
    assert keys.fetching()
    eventually(lambda: issuer.fetched >= before + 3)  # it tries again by itself
    assert kids(keys) == {"first"}
    assert len([record for record in caplog.records if "cannot be fetched" in record.message]) == 1
    del issuer.answers["/jwks"]
    issuer.keys = [jwk(RSA_KEY, "second")]
    eventually(lambda: kids(keys) == {"second"})
    eventually(lambda: any("are there again" in record.message for record in caplog.records))
    keys.stop()


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://other.example", "jwks_uri": "{}/jwks"},
        {"jwks_uri": "{}/jwks"},
        {"issuer": "{}", "jwks_uri": "http://other.example/jwks"},
        {"issuer": "{}", "jwks_uri": "file:///etc/passwd"},
        {"issuer": "{}"},
    ],
)
def test_a_discovery_document_of_another_issuer_or_with_an_unsafe_address_is_not_followed(
    issuer: Issuer, document: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    text = json.dumps({name: value.format(issuer.url) for name, value in document.items()})
    issuer.answers["/.well-known/openid-configuration"] = (200, {}, text.encode())
    keys = begun(issuer)
    eventually(lambda: caplog.records)
    assert issuer.fetched == 0
    assert keys.current is None
    keys.stop()


def test_the_document_of_rfc_8414_is_looked_at_where_openid_has_none(issuer: Issuer) -> None:
    document = json.dumps({"issuer": issuer.url, "jwks_uri": f"{issuer.url}/jwks"}).encode()
    issuer.answers["/.well-known/openid-configuration"] = (404, {}, b"")
    issuer.answers["/.well-known/oauth-authorization-server"] = (200, {}, document)
    keys = begun(issuer)
    eventually(lambda: keys.current)
    keys.stop()


def test_keys_are_fetched_again_at_most_once_in_a_while(issuer: Issuer) -> None:
    clock = ManualClock()
    keys = begun(issuer, clock, f"{issuer.url}/jwks", retry_s=10)
    eventually(lambda: keys.current and not keys._busy)
    assert [keys.fetching() for _ in range(100)] == [False] * 100
    clock.now_s += 9.9
    assert not keys.fetching()
    clock.now_s += 0.1
    assert keys.fetching()
    eventually(lambda: issuer.fetched == 2)
    eventually(lambda: not keys.fetching())
    assert issuer.fetched == 2
    keys.stop()


def test_keys_too_old_open_nothing(issuer: Issuer) -> None:
    clock = ManualClock()
    keys = begun(issuer, clock, f"{issuer.url}/jwks", retry_s=1e9)
    eventually(lambda: keys.current)
    clock.now_s += STALE_S
    assert keys.current is not None
    clock.now_s += 1
    assert keys.current is None
    keys.stop()


def test_whoever_asks_never_waits_for_an_issuer_that_hangs(issuer: Issuer) -> None:
    issuer.stuck.add("/jwks")
    keys = begun(issuer, url=f"{issuer.url}/jwks")
    assert all(keys.fetching() for _ in range(1000))
    assert keys.current is None
    keys.stop()
