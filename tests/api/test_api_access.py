"""Named keys: the file, scopes, rates, salts; who is let in where."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import requests

from tests.fakes_api import standing
from tests.fakes_http import ManualClock
from vserve.api.access import SCOPES, Key, Keys, digest
from vserve.api.key_file import FILE_LIMIT_BYTES, MAX_KEYS, read_keys
from vserve.errors import PermissionDenied, RateLimited, StartupError, Unauthorized

SECRET = "sk-very-secret"
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def key(name: str, secret: str, *scopes: str, rate: float | None = None) -> Key:
    return Key(name, digest(secret), frozenset(scopes or ("infer",)), rate)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    return str(path)


def test_a_key_file_gives_names_digests_scopes_and_rates(tmp_path: Path) -> None:
    hashed = hashlib.sha256(b"two").hexdigest()
    path = write(
        tmp_path,
        f'[keys.alice]\nkey = "one"\n\n[keys."b.o.b"]\nsha256 = "{hashed.upper()}"\n'
        'scopes = ["admin", "metrics"]\nrequests_per_minute = 0.5\n',
    )
    assert read_keys(path) == (key("alice", "one"), key("b.o.b", "two", "admin", "metrics", rate=0.5))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("keys = 3", "holds no key"),
        ("[keys]", "holds no key"),
        ("[key.a]\nkey = 'x'", "only tables [keys.NAME] are known"),
        ("[keys.a]", "keys.a: give either key or sha256"),
        (f"[keys.a]\nkey = '{SECRET}'\nsha256 = '{'0' * 64}'", "keys.a: give either key or sha256"),
        ("[keys]\na = 3", "keys.a: must be a table"),
        ("[keys.a]\nkey = 3", "keys.a: key must be a string"),
        (f"[keys.a]\nkey = '{SECRET} two'", "keys.a: an API key must be one or more visible ASCII characters"),
        ("[keys.a]\nkey = ''", "keys.a: an API key must be one or more visible ASCII characters"),
        (f"[keys.a]\nkey = '{SECRET}ü'", "keys.a: an API key must be one or more visible ASCII characters"),
        ("[keys.a]\nsha256 = '00'", "keys.a: sha256 must be 64 hexadecimal digits"),
        (f"[keys.a]\nsha256 = '{SECRET}'", "keys.a: sha256 must be 64 hexadecimal digits"),
        (
            f"[keys.a]\nkey = '{SECRET}'\nscope = ['infer']",
            "keys.a: only key, requests_per_day, requests_per_minute, requests_per_month",
        ),
        (f"[keys.a]\nkey = '{SECRET}'\nscopes = []", "keys.a: scopes must be a list"),
        (f"[keys.a]\nkey = '{SECRET}'\nscopes = 'infer'", "keys.a: scopes must be a list"),
        (f"[keys.a]\nkey = '{SECRET}'\nscopes = ['root']", "keys.a: scopes must be a list"),
        (f"[keys.a]\nkey = '{SECRET}'\nscopes = [['infer']]", "keys.a: scopes must be a list"),
        *(
            (f"[keys.a]\nkey = '{SECRET}'\nrequests_per_minute = {rate}", "keys.a: requests_per_minute must be")
            for rate in ("0", "-1", "nan", "inf", "true", "'6'", "2e6")
        ),
        (f"[keys.'a b']\nkey = '{SECRET}'", "a name must be 1 to 64 visible ASCII characters"),
        (f"[keys.a]\nkey = '{SECRET}", "not TOML"),
        (f"[keys.a]\nkey = {SECRET}", "not TOML, line 2"),
        ("#" * (FILE_LIMIT_BYTES + 1), "larger than"),
        ("".join(f"[keys.k{i}]\nkey = 'k{i}'\n" for i in range(MAX_KEYS + 1)), "the most is 1024"),
        ("a = " + "1" * 5000, "not TOML"),
        ("a = " + "[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: value[:60],
)
def test_a_bad_key_file_is_one_line_that_repeats_no_key(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(StartupError) as caught:
        read_keys(path)
    message = str(caught.value)
    assert said in message
    assert message.startswith(f"--api-key-file {path}: ")
    assert SECRET not in message
    assert "\n" not in message


def test_a_key_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        read_keys(str(tmp_path / "missing"))
    with pytest.raises(StartupError, match="Is a directory"):
        read_keys(str(tmp_path))
    with pytest.raises(StartupError, match="cannot be read"):
        read_keys("a\0b")
    (tmp_path / "latin").write_bytes(b"# \xfc")
    with pytest.raises(StartupError, match="not UTF-8"):
        read_keys(str(tmp_path / "latin"))


@pytest.mark.parametrize("bad", ["", "two words", "new\nline", "ü"])
def test_a_key_that_no_header_can_carry_is_refused_at_start_and_not_repeated(bad: str) -> None:
    with pytest.raises(StartupError) as caught:
        Keys([bad])
    assert str(caught.value) == "--api-key: an API key must be one or more visible ASCII characters"


def test_a_key_opens_its_scopes_and_no_other() -> None:
    keys = Keys(["all"])
    keys.name([key("i", "i"), key("a", "a", "admin"), key("m", "m", "metrics"), key("am", "am", "admin", "metrics")])
    opens = {"all": SCOPES, "i": {"infer"}, "a": {"admin"}, "m": {"metrics"}, "am": {"admin", "metrics"}}
    for secret, scopes in opens.items():
        for scope in SCOPES:
            if scope in scopes:
                found = keys.check(f"Bearer {secret}", scope)
                assert found is not None
                assert found.name == (None if secret == "all" else secret)
            else:
                with pytest.raises(PermissionDenied, match=scope):
                    keys.check(f"Bearer {secret}", scope)


def test_metrics_are_open_until_a_named_key_has_that_scope() -> None:
    keys = Keys(["all"])
    assert keys.check(None, "metrics") is None
    keys.name([key("m", "m", "metrics")])
    with pytest.raises(Unauthorized):
        keys.check(None, "metrics")


def test_the_metrics_route_asks_for_that_key_once_there_is_one() -> None:
    with standing() as stand:
        url = f"{stand.url}/metrics"
        assert requests.get(url, timeout=10).status_code == 200
        stand.call(lambda: stand.app.keys.name([key("m", "m", "metrics"), key("i", "i")]))
        replies = [requests.get(url, headers={"authorization": f"Bearer {word}"}, timeout=10) for word in "mi?"]
        assert [reply.status_code for reply in replies] == [200, 403, 401]


def test_new_named_keys_replace_the_old_and_leave_those_of_the_command_line() -> None:
    keys = Keys(["all"])
    keys.name([key("a", "old")])
    keys.name([key("a", "new")])
    assert keys.check("Bearer new", "infer") is not None
    assert keys.check("Bearer all", "infer") is not None
    with pytest.raises(Unauthorized):
        keys.check("Bearer old", "infer")


@pytest.mark.parametrize("named", [[key("a", "all")], [key("a", "x"), key("b", "x")]])
def test_the_same_key_twice_is_refused_and_changes_nothing(named: list[Key]) -> None:
    keys = Keys(["all"])
    keys.name([key("c", "c")])
    with pytest.raises(StartupError, match="are the same API key"):
        keys.name(named)
    assert keys.check("Bearer c", "infer") is not None
    with pytest.raises(Unauthorized):
        keys.check("Bearer x", "infer")


def test_the_salt_follows_the_name_not_the_key() -> None:
    keys = Keys(["plain"])
    keys.name([key("a", "old"), key("b", "other")])
    before = keys.salt("Bearer old")
    assert len({before, keys.salt("Bearer other"), keys.salt("Bearer plain")}) == 3
    keys.name([key("a", "new")])
    assert keys.salt("Bearer new") == before


def test_a_rate_is_a_bucket_that_fills_with_time_and_says_when_to_come_back() -> None:
    clock = ManualClock()
    keys = Keys((), clock)
    keys.name([key("a", "a", rate=6), key("b", "b", rate=6), key("c", "c")])
    caller = keys.check("Bearer a", "infer")
    assert [keys.spend(caller) for _ in range(6)] == [None] * 6
    refused = keys.spend(caller)
    assert isinstance(refused, RateLimited)
    assert refused.retry_after_s == 10
    assert "6 requests a minute" in refused.message
    assert keys.spend(keys.check("Bearer b", "infer")) is None
    assert keys.spend(keys.check("Bearer c", "infer")) is None
    clock.now_s += 9.0
    refused = keys.spend(caller)
    assert refused is not None
    assert refused.retry_after_s == 1
    clock.now_s += 1.0
    assert keys.spend(caller) is None
    assert keys.spend(caller) is not None
    clock.now_s += 1e6  # never more than a minute's worth
    assert [keys.spend(caller) for _ in range(7)][:6] == [None] * 6
    assert keys.spend(caller) is not None


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 0.7, 7, 59, 1000, 99_999])
def test_who_waits_as_long_as_told_is_let_in(rate: float) -> None:
    clock = ManualClock()
    keys = Keys((), clock)
    keys.name([key("a", "a", rate=rate)])
    caller = keys.check("Bearer a", "infer")
    for _ in range(max(1, math.floor(rate))):
        assert keys.spend(caller) is None
    for _ in range(3):
        refused = keys.spend(caller)
        while refused is None:
            refused = keys.spend(caller)
        assert refused.retry_after_s is not None
        clock.now_s += refused.retry_after_s
        assert keys.spend(caller) is None


def test_a_reload_refills_no_bucket() -> None:
    keys = Keys((), ManualClock())
    keys.name([key("a", "a", rate=1)])
    assert keys.spend(keys.check("Bearer a", "infer")) is None
    keys.name([key("a", "new", rate=1)])
    assert keys.spend(keys.check("Bearer new", "infer")) is not None


def test_nothing_shows_a_digest() -> None:
    assert digest(SECRET).hex() not in repr(key("a", SECRET))
    assert repr(digest(SECRET)) not in repr(key("a", SECRET))


def test_routes_answer_401_403_and_429_before_the_body_is_read() -> None:
    with standing() as stand:
        stand.call(lambda: stand.app.keys.name([key("once", "once", rate=1), key("m", "m", "metrics")]))

        def chat(secret: str | None) -> requests.Response:
            headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
            return stand.post("/v1/chat/completions", CHAT, **headers)

        assert chat(None).status_code == 401
        denied = chat("m")
        assert (denied.status_code, denied.json()["error"]["type"]) == (403, "PermissionDeniedError")
        assert "www-authenticate" not in denied.headers
        first = chat("once")
        assert first.status_code == 200
        late = chat("once")
        assert (late.status_code, late.json()["error"]["type"]) == (429, "RateLimitError")
        assert 1 <= int(late.headers["retry-after"]) <= 60
        assert requests.get(f"{stand.url}/health", timeout=10).status_code == 200


def test_a_request_refused_for_another_reason_costs_no_rate() -> None:
    with standing(ready=False) as stand:
        stand.call(lambda: stand.app.keys.name([key("once", "once", rate=1)]))
        for _ in range(3):
            assert stand.post("/v1/chat/completions", CHAT, authorization="Bearer once").status_code == 503
        head = {"authorization": "Bearer once"}
        assert requests.get(f"{stand.url}/load", headers=head, timeout=10).status_code == 200
        assert requests.get(f"{stand.url}/load", headers=head, timeout=10).status_code == 429


def test_a_key_may_come_in_the_header_x_api_key_and_authorization_wins_over_it() -> None:
    with standing(api_keys=("secret",)) as stand:
        assert stand.get("/v1/models", x_api_key="secret").status_code == 200
        assert stand.get("/v1/models", x_api_key="other").status_code == 401
        assert stand.get("/v1/models", x_api_key="secret", authorization="Bearer other").status_code == 401
        assert stand.get("/v1/models", x_api_key="other", authorization="Bearer secret").status_code == 200
        assert stand.post("/v1/chat/completions", CHAT, x_api_key="secret").status_code == 200
