"""Probes, models, the gate: who is let in, when, and what operators see."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.fakes_api import NAME, Stand, raw_post, says, standing
from vserve.api.status import Status
from vserve.observe.heartbeat import Heartbeat

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
PROBES = ["/ping", "/health", "/health/ready", "/readyz", "/livez", "/startupz", "/version"]
GUARDED = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{NAME}"),
    ("GET", "/load"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/v1/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/detokenize"),
]


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as running:
        yield running


def get(stand: Stand, path: str, **headers: str) -> requests.Response:
    return requests.get(stand.url + path, headers=headers, timeout=10)


def statuses(stand: Stand) -> dict[str, int]:
    return {path: get(stand, path).status_code for path in PROBES}


@pytest.mark.parametrize("path", PROBES)
def test_every_probe_of_a_ready_server_is_200_for_get_and_head(stand: Stand, path: str) -> None:
    assert get(stand, path).status_code == 200
    head = requests.head(stand.url + path, timeout=10)
    assert (head.status_code, head.content) == (200, b"")


def test_ping_is_empty_and_takes_post_too(stand: Stand) -> None:
    assert get(stand, "/ping").content == b""
    assert requests.post(stand.url + "/ping", data=b"x", timeout=10).status_code == 200


def test_version_is_json_or_bare_text(stand: Stand) -> None:
    assert get(stand, "/version").json() == {"version": "1.2.3"}
    plain = get(stand, "/version", Accept="text/plain")
    assert (plain.text, plain.headers["content-type"]) == ("1.2.3", "text/plain; charset=utf-8")


def test_models_are_listed_and_found_by_names_with_slashes(stand: Stand) -> None:
    listed = get(stand, "/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == [NAME, "short"]
    card = listed["data"][0]
    assert card == get(stand, f"/v1/models/{NAME}").json() == get(stand, "/v1/models/fake%2Fletters").json()
    assert card["object"] == "model"
    assert card["max_model_len"] == 512
    assert card["root"] == NAME
    assert card["parent"] is None
    assert card["permission"][0]["object"] == "model_permission"
    missing = get(stand, "/v1/models/no/such")
    assert missing.status_code == 404
    assert "`no/such`" in missing.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("DELETE", "/v1/models", 405),
                                                        ("GET", "/v1/chat/completions", 405)])  # fmt: skip
def test_unknown_paths_and_methods_have_the_error_shape(stand: Stand, method: str, path: str, status: int) -> None:
    reply = requests.request(method, stand.url + path, timeout=10)
    assert reply.status_code == status
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
    assert ("allow" in reply.headers) == (status == 405)


def test_a_body_that_is_not_json_is_415_and_a_broken_one_400(stand: Stand) -> None:
    url = stand.url + "/v1/completions"
    assert requests.post(url, data={"prompt": "x"}, timeout=10).status_code == 415
    assert requests.post(url, data=b"{", timeout=10).status_code == 400
    assert requests.post(url, data=b"", timeout=10).status_code == 400
    assert requests.post(url, data=b'{"prompt": "x"}', timeout=10).status_code == 200


@pytest.mark.promise("R5")
def test_while_starting_probes_tell_the_phase_and_inference_is_503() -> None:
    with standing(ready=False) as stand:
        assert get(stand, "/health").json()["phase"] == "starting"
        stand.app.starting("loading weights", 0.25)
        assert statuses(stand) == {
            "/ping": 200, "/health": 503, "/health/ready": 503, "/readyz": 503, "/livez": 200, "/startupz": 503,
            "/version": 200,
        }  # fmt: skip
        body = get(stand, "/readyz").json()
        assert (body["status"], body["phase"], body["progress"]) == ("unavailable", "loading weights", 0.25)
        assert get(stand, "/load").status_code == 200
        for method, path in GUARDED:
            if path == "/load":
                continue
            reply = requests.request(method, stand.url + path, json={}, timeout=10)
            assert reply.status_code == 503
            assert "loading weights, 25% done" in reply.json()["error"]["message"]
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.headers["connection"] == "close"


@pytest.mark.promise("R6")
def test_while_draining_newcomers_are_503_and_what_runs_goes_on() -> None:
    with standing(says("abc")) as stand:
        stand.engine.running.clear()
        peer = raw_post(stand.port, "/v1/completions", {"prompt": "x", "max_tokens": 3})
        wait_for_replies(stand, 1)
        stand.call(stand.app.drain)
        stand.call(stand.app.drain)
        assert statuses(stand)["/health"] == statuses(stand)["/readyz"] == 503
        assert statuses(stand)["/livez"] == statuses(stand)["/startupz"] == 200
        refused = stand.post("/v1/completions", {"prompt": "x"})
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert refused.headers["connection"] == "close"
        assert int(refused.headers["retry-after"]) >= 1
        stand.engine.running.set()
        assert b'"text":"abc"' in read_reply(peer)


def wait_for_replies(stand: Stand, count: int) -> None:
    """Until so many replies are under way; each look is a round trip to the loop."""
    for _ in range(10_000):
        if stand.call(lambda: len(stand.app.replies)) == count:
            return
    raise AssertionError("no reply got under way")


def read_reply(peer: Any) -> bytes:
    data = b""
    with peer:
        while b"\r\n\r\n" not in data or not data.rstrip().endswith(b"}"):
            part = peer.recv(65536)
            if not part:
                break
            data += part
    return data


@pytest.mark.promise("R3", "fault: full inbox")
def test_a_full_queue_is_429_before_the_body_is_read() -> None:
    with standing(max_queue=2) as stand:
        stand.engine.running.clear()
        stand.engine._inbox.wake()
        peers = [raw_post(stand.port, "/v1/completions", {"prompt": "x", "max_tokens": 1}) for _ in range(3)]
        for _ in range(10_000):
            if stand.call(lambda: stand.engine._inbox.size) >= 2:
                break
        # Only the head is sent: the answer comes all the same.
        with raw_post(stand.port, "/v1/completions", {}) as head_only:
            data = head_only.recv(65536)
        assert data.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1" in data
        assert b'"RateLimitError"' in data
        assert get(stand, "/ping").status_code == 200
        assert stand.post("/tokenize", {"text": "x"}).status_code == 200
        stand.engine.running.set()
        for peer in peers:
            peer.close()


def test_only_the_right_key_opens_the_guarded_routes() -> None:
    with standing(api_keys=("right", "second")) as stand:
        for path in PROBES:
            assert get(stand, path).status_code == 200
        for method, path in GUARDED:
            for key in (None, "Bearer wrong", "right"):
                reply = requests.request(
                    method, stand.url + path, headers={"authorization": key} if key else {}, timeout=10
                )
                assert reply.status_code == 401, (path, key)
                assert reply.headers["www-authenticate"] == "Bearer"
                assert reply.json()["error"]["type"] == "AuthenticationError"
        for key in ("right", "second"):
            assert stand.post("/v1/chat/completions", CHAT, authorization=f"Bearer {key}").status_code == 200
        one, two = (request.cache_salt for request in stand.engine.requests[-2:])
        assert one
        assert one != two
        stand.post("/v1/chat/completions", {**CHAT, "cache_salt": "x"}, authorization="Bearer right")
        assert stand.engine.requests[-1].cache_salt == one + b"x"


def test_the_key_is_asked_for_before_anything_else_is_told() -> None:
    with standing(ready=False, api_keys=("right",)) as stand:
        assert stand.post("/v1/completions", {"prompt": "x"}).status_code == 401
        assert stand.post("/v1/completions", {"prompt": "x"}, authorization="Bearer right").status_code == 503


def test_a_stuck_step_turns_health_and_liveness_503_and_ping_stays_200() -> None:
    heartbeat = Heartbeat(time.monotonic())
    with standing(engine={"heartbeat": heartbeat}, stall_timeout_s=60.0) as stand:
        stand.engine.running.clear()
        heartbeat.step(time.monotonic() - 61.0)
        seen = statuses(stand)
        assert (seen["/health"], seen["/livez"], seen["/readyz"], seen["/ping"]) == (503, 503, 503, 200)
        body = get(stand, "/health").json()
        assert body["heartbeat_age_s"] >= 61.0
        assert "ago" in body["reason"]
        assert get(stand, "/load").json()["active_workers"] == 0
        heartbeat.step(time.monotonic())
        assert statuses(stand)["/health"] == 200


def test_a_dead_engine_is_seen_by_probes_and_by_every_request() -> None:
    with standing(engine={"dies_on": 0}) as stand:
        reply = stand.post("/v1/completions", {"prompt": [0]})
        assert reply.status_code == 503
        assert reply.headers["connection"] == "close"
        seen = statuses(stand)
        assert (seen["/health"], seen["/livez"], seen["/startupz"], seen["/ping"]) == (503, 503, 503, 200)
        assert get(stand, "/health").json()["phase"] == "dead"
        assert stand.post("/v1/completions", {"prompt": "x"}).status_code == 503
        assert stand.app.status is Status.DEAD


def test_load_counts_replies_under_way() -> None:
    with standing() as stand:
        stand.engine.running.clear()
        peer = raw_post(stand.port, "/v1/completions", {"prompt": "x", "max_tokens": 1})
        wait_for_replies(stand, 1)
        figures = get(stand, "/load").json()
        assert figures["server_load"] == 1
        assert {"queue_size", "active_workers", "gpu_utilization"} <= figures.keys()
        stand.engine.running.set()
        read_reply(peer)
        assert get(stand, "/load").json()["server_load"] == 0


def test_load_and_metrics_say_the_same_utilisation_the_drivers_where_there_is_one(stand: Stand) -> None:
    def scraped() -> float:
        lines = get(stand, "/metrics").text.splitlines()
        (line,) = [line for line in lines if line.startswith("vllm_gpu_utilization{")]
        return float(line.rsplit(" ", 1)[1])

    readings: list[float | None] = [0.75, 0.75, None, None]
    stand.app.metrics.gpu = lambda: readings.pop(0)
    try:
        assert (get(stand, "/load").json()["gpu_utilization"], scraped()) == (0.75, 0.75)
        failed = get(stand, "/load").json()["gpu_utilization"], scraped()  # then the engine's own, as without a GPU
        assert failed == pytest.approx((stand.call(stand.app.usage.utilization),) * 2, abs=0.01)
    finally:
        stand.app.metrics.gpu = None


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/readyz", "/livez", "/startupz"])
def test_a_probe_tells_phase_progress_and_the_age_of_the_last_beat(path: str) -> None:
    with standing(ready=False) as stand:
        first = get(stand, path).json()
        assert (first["phase"], first["progress"], first["heartbeat_age_s"]) == ("starting", None, None)
        stand.app.starting("loading weights", 0.5)
        assert get(stand, path).json()["progress"] == 0.5
    with standing() as stand:
        for phase, act in (("ready", lambda: None), ("draining", stand.app.drain)):
            stand.call(act)
            told = get(stand, path).json()
            assert (told["phase"], told["progress"]) == (phase, 1.0)
            assert 0.0 <= told["heartbeat_age_s"] < 60.0
