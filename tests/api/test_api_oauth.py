"""Access tokens at the door of the server: beside keys, with scopes, and with an issuer that may be dead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests

from tests.fakes_api import Stand, standing
from tests.issuer import AUDIENCE, RSA_KEY, Issuer, eventually, issuing, jwk
from vserve.api.access import SCOPES, Key
from vserve.api.quota import NO_BOUND, Allowance, Goods, Quota, Span
from vserve.oauth.grants import Grants
from vserve.oauth.issuer import IssuerKeys
from vserve.oauth.tokens import Tokens

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def trusting(stand: Stand, issuer: Issuer, *scopes: str, wait: bool = True, each: Allowance = NO_BOUND) -> IssuerKeys:
    keys = IssuerKeys(issuer.url)
    grants = Grants.parse(scopes or ("chat=infer", "ops=admin"), SCOPES)
    stand.call(lambda: stand.app.keys.trust(Tokens(keys, issuer.url, AUDIENCE, grants), each))
    keys.start()
    if wait:
        eventually(lambda: keys.current)
    return keys


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with issuing() as running:
        yield running


@pytest.fixture(scope="module")
def stand(issuer: Issuer) -> Iterator[Stand]:
    with standing(api_keys=("sk-key",)) as running:
        keys = trusting(running, issuer)
        yield running
        keys.stop()


def chat(stand: Stand, token: str | None) -> requests.Response:
    return stand.post("/v1/chat/completions", CHAT, **({} if token is None else {"authorization": f"Bearer {token}"}))


def test_a_token_opens_what_its_scopes_stand_for(stand: Stand, issuer: Issuer) -> None:
    assert chat(stand, issuer.token(scope="openid chat")).status_code == 200
    assert stand.get("/v1/models", authorization=f"Bearer {issuer.token(scope='chat')}").status_code == 200
    denied = chat(stand, issuer.token(scope="ops"))
    assert (denied.status_code, denied.json()["error"]["type"]) == (403, "PermissionDeniedError")
    assert denied.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="chat"'
    scaling = stand.get("/is_scaling_elastic_ep", authorization=f"Bearer {issuer.token(scope='ops')}")
    assert scaling.status_code == 200


def test_keys_go_on_working_beside_tokens(stand: Stand) -> None:
    assert chat(stand, "sk-key").status_code == 200


@pytest.mark.parametrize(
    ("token", "challenge"),
    [(None, "Bearer"), ("sk-wrong", 'Bearer error="invalid_token"'), ("a.b.c", 'Bearer error="invalid_token"')],
)
def test_whoever_is_not_let_in_is_told_how(stand: Stand, token: str | None, challenge: str) -> None:
    reply = chat(stand, token)
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, challenge)


def test_an_expired_token_is_401_and_no_part_of_it_is_repeated(stand: Stand, issuer: Issuer) -> None:
    token = issuer.token(exp=1000, sub="secret-subject")
    reply = chat(stand, token)
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')
    assert reply.json()["error"]["message"] == "The access token has expired."
    assert not any(part in reply.text for part in [*token.split("."), "secret-subject"])


def test_metrics_stay_open_unless_a_scope_is_for_them(stand: Stand, issuer: Issuer) -> None:
    assert stand.get("/metrics").status_code == 200
    with standing() as other:
        keys = trusting(other, issuer, "chat=infer", "watch=metrics")
        assert other.get("/metrics").status_code == 401
        assert other.get("/metrics", authorization=f"Bearer {issuer.token(scope='watch')}").status_code == 200
        assert other.get("/ping").status_code == 200
        keys.stop()


def test_each_subject_has_its_own_cache_and_keeps_it_with_a_new_token(stand: Stand, issuer: Issuer) -> None:
    def salt(token: str) -> bytes:
        return stand.call(lambda: stand.app.keys.salt(f"Bearer {token}"))

    alice, again, bob = (issuer.token(sub=sub, jti=jti) for sub, jti in (("a", "1"), ("a", "2"), ("b", "3")))
    assert alice != again
    assert salt(alice) == salt(again)
    assert len({salt(alice), salt(bob), salt("sk-key"), salt(issuer.token(sub="\ud800"))}) == 4
    # A key named like a subject is not that subject.
    assert Key("a", b"").salt != salt(alice)


def test_a_response_is_kept_for_its_subject_alone(stand: Stand, issuer: Issuer) -> None:
    def head(sub: str) -> dict[str, str]:
        return {"authorization": f"Bearer {issuer.token(sub=sub, scope='chat')}"}

    made = stand.post("/v1/responses", {"input": "Hi"}, **head("alice"))
    assert made.status_code == 200
    path = f"/v1/responses/{made.json()['id']}"
    assert stand.get(path, **head("alice")).status_code == 200
    assert stand.get(path, **head("bob")).status_code == 404


def test_answers_count_against_the_quota_of_their_subject_alone(issuer: Issuer) -> None:
    with standing() as stand:
        keys = trusting(stand, issuer, each=Allowance(None, (Quota(Goods.TOKENS, Span.DAY, 1),)))
        alice, bob = (issuer.token(sub=sub, scope="chat") for sub in ("alice", "bob"))
        assert chat(stand, alice).status_code == 200
        again = chat(stand, issuer.token(sub="alice", scope="chat", jti="another"))
        assert (again.status_code, again.json()["error"]["type"]) == (429, "RateLimitError")
        assert int(again.headers["retry-after"]) > 86_000
        assert chat(stand, bob).status_code == 200
        keys.stop()


def test_a_dead_issuer_costs_bearers_of_keys_and_probes_nothing(issuer: Issuer) -> None:
    with issuing() as dead, standing(api_keys=("sk-key",)) as stand:
        dead.stuck.add("/.well-known/openid-configuration")
        keys = trusting(stand, dead, wait=False)
        refused = chat(stand, dead.token())
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert refused.headers["retry-after"] == "1"
        for _ in range(20):  # while the fetch hangs
            assert chat(stand, "sk-key").status_code == 200
            assert stand.get("/ping").status_code == 200
        assert 'vserve_requests_refused_total{reason="issuer"} 1.0' in stand.get("/metrics").text
        keys.stop()


def test_a_key_the_issuer_gives_out_later_is_found(issuer: Issuer) -> None:
    with issuing() as young, standing() as stand:
        young.keys = []
        keys = IssuerKeys(young.url, retry_s=0.01)
        grants = Grants.parse(("chat=infer",), SCOPES)
        stand.call(lambda: stand.app.keys.trust(Tokens(keys, young.url, AUDIENCE, grants)))
        keys.start()
        token = young.token(scope="chat")
        assert chat(stand, token).status_code == 503
        young.keys = [jwk(RSA_KEY, "first")]
        eventually(lambda: chat(stand, token).status_code == 200)
        keys.stop()
