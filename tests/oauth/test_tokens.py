"""Access tokens: what is let in, and all that is not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.fakes_http import ManualClock
from tests.issuer import AUDIENCE, RSA_KEY, Issuer, PrivateKey, eventually, issuing, jwk, rsa_key
from vserve.api.access import SCOPES
from vserve.errors import Unauthorized, Unavailable
from vserve.oauth.grants import Grants
from vserve.oauth.issuer import IssuerKeys
from vserve.oauth.tokens import LEEWAY_S, MAX_KNOWN, TOKEN_LIMIT, Tokens

EC_KEY, ED_KEY = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
GRANTS = Grants.parse(["infer", "write=admin"], SCOPES)


class Door:
    """The check and its issuer."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.clock = ManualClock()
        self.keys = IssuerKeys(issuer.url, retry_s=10, clock=self.clock)
        self.tokens = Tokens(self.keys, issuer.url, AUDIENCE, GRANTS)
        self.keys.start()
        eventually(lambda: self.keys.current and not self.keys._busy)

    def refusal(self, token: str) -> str:
        with pytest.raises(Unauthorized) as caught:
            self.tokens.check(token)
        assert dict(caught.value.headers())["www-authenticate"] == 'Bearer error="invalid_token"'
        return caught.value.message


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    with issuing() as issuer:
        issuer.keys = [jwk(RSA_KEY, "first"), jwk(EC_KEY, "ec"), jwk(ED_KEY, "ed")]
        made = Door(issuer)
        yield made
        made.keys.stop()


@pytest.mark.parametrize(
    ("alg", "key", "kid"),
    [("RS256", RSA_KEY, "first"), ("PS512", RSA_KEY, "first"), ("ES256", EC_KEY, "ec"), ("EdDSA", ED_KEY, "ed")],
)
def test_a_token_of_the_issuer_speaks_for_its_subject(door: Door, alg: str, key: PrivateKey, kid: str) -> None:
    subject = door.tokens.check(door.issuer.token(alg, key, {"kid": kid}))
    assert (subject.name, subject.scopes) == ("alice", {"infer"})


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({"scope": "infer write openid"}, {"infer", "admin"}),
        ({"scope": None, "scp": ["write", 3]}, {"admin"}),
        ({"scope": None, "scp": "infer"}, {"infer"}),
        ({"scope": "admin"}, set()),
        ({"scope": None}, set()),
        ({"scope": {"infer": True}}, set()),
        ({"aud": ["other", AUDIENCE]}, {"infer"}),
    ],
)
def test_scopes_are_taken_as_issuers_write_them(door: Door, claims: dict[str, Any], scopes: set[str]) -> None:
    assert door.tokens.check(door.issuer.token(**claims)).scopes == scopes


NOW = int(time.time())


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"exp": NOW - LEEWAY_S - 1}, "has expired"),
        ({"exp": None}, "has no claim exp"),
        ({"exp": "soon"}, "is not valid"),
        ({"nbf": NOW + 600}, "is not valid yet"),
        ({"iat": NOW + 600}, "is not valid yet"),
        ({"aud": "other"}, "is for another audience"),
        ({"aud": None}, "has no claim aud"),
        ({"aud": ["other"]}, "is for another audience"),
        ({"iss": "https://other.example"}, "is of another issuer"),
        ({"iss": None}, "has no claim iss"),
        ({"sub": None}, "has no claim sub"),
        ({"sub": ""}, "has no claim sub"),
        ({"sub": "a" * TOKEN_LIMIT}, "is longer than"),
    ],
)
def test_a_wrong_claim_is_named(door: Door, claims: dict[str, Any], said: str) -> None:
    assert said in door.refusal(door.issuer.token(**claims))


def part(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def test_no_signature_and_no_secret_is_taken_for_a_signature(door: Door) -> None:
    claims = door.issuer.token().split(".")[1]
    for alg in ("none", "None", "NONE", ""):
        assert "not" in door.refusal(f"{part({'alg': alg, 'kid': 'first'})}.{claims}.")
    # The public key, which everyone knows, as the secret of a hash: what a check without an allow-list takes.
    public = RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = f"{part({'alg': 'HS256', 'kid': 'first'})}.{claims}"
    mark = base64.urlsafe_b64encode(hmac.digest(public, signed.encode(), hashlib.sha256)).rstrip(b"=").decode()
    assert "not accepted" in door.refusal(f"{signed}.{mark}")


def test_a_key_serves_its_own_algorithms_only(door: Door) -> None:
    assert "not" in door.refusal(door.issuer.token("ES256", EC_KEY, {"kid": "first"}))
    assert "not" in door.refusal(door.issuer.token("RS256", RSA_KEY, {"kid": "ec"}))
    assert "not valid" in door.refusal(door.issuer.token("RS256", rsa_key(2049)))


def test_a_token_with_an_unknown_extension_is_refused(door: Door) -> None:
    door.refusal(door.issuer.token(headers={"crit": ["x"], "x": 1}))


def test_a_key_inside_the_token_is_not_believed(door: Door) -> None:
    other = rsa_key(2049)
    assert "not valid" in door.refusal(door.issuer.token("RS256", other, {"jwk": jwk(other, "first"), "jku": "x"}))


@pytest.mark.parametrize(
    "token",
    ["", ".", "..", "a.b.c", "sk-some-key", f"{part({'alg': 'RS256'})}.{part({})}.", f"{part([])}.{part({})}.x",
     f"{part('[' * 9000)}.a.b", f"{part({'alg': 'RS256', 'kid': 3})}.{part({})}.x", "\udc80.\udc80.\udc80", "é.é.é",
     f"{part({'alg': 'RS256', 'kid': ['first']})}.{part({})}.x", f"{part({'alg': 5, 'kid': 'first'})}.{part({})}.x"],
)  # fmt: skip
def test_whatever_is_no_token_is_refused(door: Door, token: str) -> None:
    door.refusal(token)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_token_changed_anywhere_is_refused(door: Door, data: st.DataObject) -> None:
    token = door.issuer.token("ES256", EC_KEY, {"kid": "ec"})
    # The last character of a part has bits that mean nothing.
    places = [i for i in range(len(token) - 1) if token[i] != "." and token[i + 1] != "."]
    place, char = data.draw(st.sampled_from(places)), data.draw(st.sampled_from("Aaz09-_."))
    assume(token[place] != char)
    changed = token[:place] + char + token[place + 1 :]
    try:
        door.tokens.check(changed)
    except (Unauthorized, Unavailable):
        return
    raise AssertionError("it was let in")


def test_a_token_of_a_new_key_waits_for_a_fetch_and_is_then_let_in() -> None:
    with issuing() as issuer:
        door = Door(issuer)
        issuer.keys.append(jwk(EC_KEY, "new"))
        token = issuer.token("ES256", EC_KEY, {"kid": "new"})
        assert "does not have" in door.refusal(token)  # just fetched: the issuer is not asked again
        assert issuer.fetched == 1
        door.clock.now_s += 10
        with pytest.raises(Unavailable) as caught:
            door.tokens.check(token)
        assert caught.value.retry_after_s == 1
        eventually(lambda: issuer.fetched == 2 and not door.keys.fetching())
        assert door.tokens.check(token).name == "alice"
        issuer.keys = [jwk(EC_KEY, "new")]
        old = issuer.token()
        assert door.tokens.check(old).name == "alice"
        door.clock.now_s += 10
        with pytest.raises(Unavailable):
            door.tokens.check(issuer.token(headers={"kid": "unheard"}))
        eventually(lambda: issuer.fetched == 3 and not door.keys.fetching())
        assert "does not have" in door.refusal(old)  # what was remembered went with the key
        door.keys.stop()


def test_a_token_without_kid_is_checked_with_the_only_key_and_no_other() -> None:
    with issuing() as issuer:
        issuer.keys = [jwk(RSA_KEY, None)]
        door = Door(issuer)
        assert door.tokens.check(issuer.token(headers={"kid": None})).name == "alice"
        door.keys.stop()
    with issuing() as issuer:
        issuer.keys = [jwk(RSA_KEY, "a"), jwk(EC_KEY, "b")]
        door = Door(issuer)
        assert "does not have" in door.refusal(issuer.token(headers={"kid": None}))
        door.keys.stop()


def test_without_keys_the_answer_is_to_come_back() -> None:
    with issuing() as issuer:
        issuer.stuck.add("/.well-known/openid-configuration")
        keys = IssuerKeys(issuer.url)
        keys.start()
        tokens = Tokens(keys, issuer.url, AUDIENCE, GRANTS)
        for _ in range(3):
            with pytest.raises(Unavailable) as caught:
                tokens.check(issuer.token())
            assert caught.value.retry_after_s == 1
        keys.stop()


def test_a_token_that_passed_is_not_believed_beyond_its_time(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.time()
    clock = ManualClock()
    clock.now_s = now_s
    tokens = Tokens(door.keys, door.issuer.url, AUDIENCE, GRANTS, clock)
    token = door.issuer.token(exp=int(now_s) + 100)
    checked = []
    real = jwt.decode
    monkeypatch.setattr(jwt, "decode", lambda *given, **named: checked.append(1) or real(*given, **named))
    for _ in range(3):
        tokens.check(token)
    assert len(checked) == 1
    clock.now_s += 100 + LEEWAY_S
    tokens.check(token)  # looked at anew, by a clock that has not moved
    assert len(checked) == 2


def test_the_memory_of_tokens_is_bounded(door: Door) -> None:
    tokens = Tokens(door.keys, door.issuer.url, AUDIENCE, GRANTS)
    for i in range(MAX_KNOWN + 20):
        tokens.check(door.issuer.token("EdDSA", ED_KEY, {"kid": "ed"}, sub=f"s{i}"))
    assert len(tokens._known) == MAX_KNOWN
