"""Quotas of keys: what counts, when it is used up, and when it begins again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes_api import standing
from tests.fakes_http import ManualClock
from vserve.api.access import SCOPES, Key, Keys, digest
from vserve.api.key_file import MAX_QUOTA, read_allowance, read_keys
from vserve.api.quota import Accounts, Goods, Quota, Span
from vserve.errors import RateLimited, StartupError
from vserve.oauth.grants import Grants, Subject

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BEARER = "Bearer secret"


def key(*quotas: Quota, name: str = "k", rate: float | None = None) -> Key:
    return Key(name, digest("secret"), frozenset({"infer"}), rate, quotas)


def test_the_file_names_each_quota(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(
        "[keys.a]\nkey = 'one'\ntokens_per_minute = 1\ntokens_per_day = 2\ntokens_per_month = 3\n"
        "requests_per_day = 4\nrequests_per_month = 5\n"
    )
    (found,) = read_keys(str(path))
    assert {(quota.goods, quota.span, quota.limit) for quota in found.quotas} == {
        (Goods.TOKENS, Span.MINUTE, 1),
        (Goods.TOKENS, Span.DAY, 2),
        (Goods.TOKENS, Span.MONTH, 3),
        (Goods.REQUESTS, Span.DAY, 4),
        (Goods.REQUESTS, Span.MONTH, 5),
    }


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "'9'", str(MAX_QUOTA + 1)])
@pytest.mark.parametrize("name", ["tokens_per_day", "requests_per_month"])
def test_a_quota_that_is_no_whole_number_is_a_bad_file(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f"[keys.a]\nkey = 'one'\n{name} = {value}\n")
    with pytest.raises(StartupError, match=f"keys.a: {name} must be a whole number from 1 to"):
        read_keys(str(path))


def test_requests_are_let_in_up_to_the_quota_and_again_when_the_window_has_ended() -> None:
    clock = ManualClock()
    keys = Keys(clock=clock)
    caller = key(Quota(Goods.REQUESTS, Span.DAY, 3))
    keys.name([caller])
    clock.now_s += 5_000  # a window begins with its first request, not with the process
    for _ in range(3):
        assert keys.spend(caller) is None
        clock.now_s += 100
    refusal = keys.spend(caller)
    assert refusal is not None
    assert refusal.retry_after_s == 86_400 - 300
    assert "3 requests, its quota is 3 a day" in refusal.message
    clock.now_s += refusal.retry_after_s - 1
    assert isinstance(keys.spend(caller), RateLimited)
    clock.now_s += 1
    assert [keys.spend(caller) is None for _ in range(4)] == [True, True, True, False]


def test_of_several_used_up_quotas_the_one_that_lasts_longest_says_when_to_come_back() -> None:
    clock = ManualClock()
    keys = Keys(clock=clock)
    caller = key(
        Quota(Goods.TOKENS, Span.MINUTE, 10), Quota(Goods.TOKENS, Span.MONTH, 20), Quota(Goods.REQUESTS, Span.DAY, 99)
    )
    keys.name([caller])
    keys.use(caller, 15)
    refusal = keys.spend(caller)
    assert refusal is not None
    assert refusal.retry_after_s == 60
    clock.now_s += 60
    assert keys.spend(caller) is None
    keys.use(caller, 15)
    refusal = keys.spend(caller)
    assert refusal is not None
    assert refusal.retry_after_s == 30 * 86_400 - 60


def test_a_reload_keeps_what_was_spent_and_takes_the_new_limits() -> None:
    clock = ManualClock()
    keys = Keys(clock=clock)
    small, large = key(Quota(Goods.TOKENS, Span.DAY, 10)), key(Quota(Goods.TOKENS, Span.DAY, 100))
    keys.name([small])
    keys.use(small, 50)
    assert keys.spend(small) is not None
    keys.name([large])
    assert keys.spend(large) is None
    keys.use(large, 50)
    assert keys.spend(large) is not None
    keys.name([key(name="another")])
    keys.name([large])  # a name that was gone begins anew
    assert keys.spend(large) is None


def test_a_request_refused_for_its_rate_costs_no_quota_and_the_other_way_round() -> None:
    clock = ManualClock()
    keys = Keys(clock=clock)
    caller = key(Quota(Goods.REQUESTS, Span.DAY, 2), rate=1)
    keys.name([caller])
    assert keys.spend(caller) is None
    refusal = keys.spend(caller)
    assert refusal is not None
    assert "requests a minute" in refusal.message
    clock.now_s += 60
    assert keys.spend(caller) is None
    refusal = keys.spend(caller)
    assert refusal is not None
    assert "its quota is 2 a day" in refusal.message


class _Issuer:
    """Every token is good, and is its subject's name."""

    grants = Grants.parse(("infer",), SCOPES)

    def check(self, token: str) -> Subject:
        return Subject(token, frozenset({"infer"}))


def test_each_subject_of_an_issuer_has_the_same_quotas_and_an_account_of_its_own() -> None:
    clock = ManualClock()
    keys = Keys(clock=clock)
    keys.name([key(Quota(Goods.REQUESTS, Span.DAY, 1), name="alice")])
    keys.trust(_Issuer(), read_allowance(["requests_per_day=2", "tokens_per_minute=10", "requests_per_minute=1.5"]))
    alice, bob = keys.check("Bearer alice", "infer"), keys.check("Bearer bob", "infer")
    assert keys.spend(alice) is None
    refusal = keys.spend(alice)
    assert refusal is not None
    assert refusal.message.startswith("This subject may make 1.5 requests a minute")
    clock.now_s += 60
    keys.use(alice, 11)
    refusal = keys.spend(alice)
    assert refusal is not None
    assert refusal.message.startswith("This subject has used 11 tokens, its quota is 10 a minute")
    assert keys.spend(bob) is None
    clock.now_s += 60
    assert keys.spend(keys.check("Bearer alice", "infer")) is None
    keys.name([])  # a reload of the key file is no concern of subjects
    refusal = keys.spend(alice)
    assert refusal is not None
    assert "its quota is 2 a day" in refusal.message


def test_of_more_subjects_than_are_kept_those_are_forgotten_that_came_longest_ago() -> None:
    accounts, each = Accounts("subject", 2), read_allowance(["requests_per_day=1"])
    assert [accounts.spend(name, each, 0.0) is None for name in "aba"] == [True, True, False]
    assert accounts.spend("c", each, 0.0) is None  # b came longest ago
    assert [accounts.spend(name, each, 0.0) is None for name in "acb"] == [False, False, True]


def test_tokens_of_answers_count_and_then_the_key_gets_429() -> None:
    with standing() as stand:
        stand.call(lambda: stand.app.keys.name([key(Quota(Goods.TOKENS, Span.DAY, 100))]))
        whole = stand.post("/v1/chat/completions", CHAT, Authorization=BEARER)
        each = whole.json()["usage"]["total_tokens"]
        assert 25 < each < 100
        others = 0
        while stand.post("/v1/chat/completions", {**CHAT, "stream": True}, Authorization=BEARER).status_code == 200:
            others += 1
        assert others == -(-100 // each) - 1  # streamed ones count the same; the last one let in passes the quota
        refused = stand.post("/v1/chat/completions", CHAT, Authorization=BEARER)
        assert refused.status_code == 429
        assert 86_000 < int(refused.headers["retry-after"]) <= 86_400
        assert stand.post("/tokenize", {"prompt": "x"}, Authorization=BEARER).status_code == 429


@pytest.mark.parametrize("body", [{"prompt": "hi"}, {"input": "hi"}, {"input": "hi", "stream": True}])
def test_tokens_of_stored_responses_count_though_nobody_waits_for_them(body: dict[str, object]) -> None:
    with standing() as stand:
        caller = key(Quota(Goods.TOKENS, Span.DAY, 30))
        stand.call(lambda: stand.app.keys.name([caller]))
        reply = stand.post("/v1/responses", body, Authorization=BEARER)
        assert reply.status_code == 200, reply.text
        while stand.call(lambda: bool(stand.app.tasks)):
            pass
        refused = stand.post("/v1/responses", body, Authorization=BEARER)
        assert refused.status_code == 429
        assert "its quota is 30 a day" in refused.json()["error"]["message"]
