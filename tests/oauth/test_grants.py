"""What an issuer's scopes open, and which addresses it may have."""

from __future__ import annotations

import pytest

from vserve.errors import StartupError
from vserve.oauth.grants import MAX_SCOPES, Grants, check_url

OURS = frozenset({"infer", "admin", "metrics"})


def test_a_scope_opens_what_it_is_said_to_and_others_open_nothing() -> None:
    grants = Grants.parse(["read=infer", "read=metrics", "api://vserve/.default=admin", "infer"], OURS)
    assert grants.of(["read"]) == {"infer", "metrics"}
    assert grants.of(["api://vserve/.default", "read"]) == OURS
    assert grants.of(["infer", "write", ""]) == {"infer"}
    assert grants.of([]) == frozenset()
    assert grants.that_open("infer") == ("read", "infer")
    assert grants.that_open("metrics") == ("read",)
    assert Grants.parse(["infer"], OURS).that_open("metrics") == ()


@pytest.mark.parametrize(
    "words", [[], ["read"], ["read=root"], ["=infer2"], ["a b=infer"], ['a"=infer'], ["a\\=infer"], ["ü=infer"], [""]]
)
def test_other_words_are_refused_at_start(words: list[str]) -> None:
    with pytest.raises(StartupError, match=r"^--oauth2-scopes: "):
        Grants.parse(words, OURS)


def test_the_number_of_scopes_is_bounded() -> None:
    assert len(Grants.parse([f"s{i}=infer" for i in range(MAX_SCOPES)], OURS).opens) == MAX_SCOPES
    with pytest.raises(StartupError, match="at most 64"):
        Grants.parse([f"s{i}=infer" for i in range(MAX_SCOPES + 1)], OURS)


@pytest.mark.parametrize(
    "url", ["https://sso.example", "https://sso.example:8443/realm/a?x=y", "http://127.0.0.1:1/", "http://localhost"]
)
def test_https_and_loopback_addresses_are_taken(url: str) -> None:
    assert check_url("--flag", url) == url


@pytest.mark.parametrize(
    "url",
    ["", "sso.example", "http://sso.example", "ftp://sso.example", "https://", "https://u:p@sso.example", "file:///etc",
     "https://sso.example;script-src *", "https://a b", "https://sso.example:99999", "http://localhost.example", "https://[",
     "https://a,b", "https://ü.example"],
)  # fmt: skip
def test_other_addresses_are_not(url: str) -> None:
    with pytest.raises(StartupError, match=r"^--flag: "):
        check_url("--flag", url)
