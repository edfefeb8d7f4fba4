"""/debug: there only when asked for, for admins, with real figures, and never a key, a prompt or an answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.fakes_api import NAME, Stand, raw_post, says, standing
from vserve.api.access import Key, digest
from vserve.errors import EngineDied

PATHS = ("/debug/version", "/debug/stats", "/debug/cache_stats", "/debug/traces", "/debug/config")
FIELDS = {
    "/debug/version": {"version", "git_hash", "cuda_version", "torch_version", "python_version"},
    "/debug/stats": {
        "num_running_requests", "num_waiting_requests", "num_swapped_requests", "gpu_cache_usage", "cpu_cache_usage",
        "avg_prompt_throughput", "avg_generation_throughput",
    },
    "/debug/cache_stats": {
        "num_free_gpu_blocks", "num_used_gpu_blocks", "gpu_cache_percent", "num_free_cpu_blocks",
        "num_used_cpu_blocks",
    },
    "/debug/config": {"model_name", "max_model_len", "block_size", "num_gpu_blocks", "swap_space_bytes"},
}  # fmt: skip
HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing(rca=True, settings={"block_size": 16}, engine={"step_s": 0.001}) as running:
        yield running


def traces(stand: Stand, query: str = "", **headers: str) -> list[dict[str, Any]]:
    reply = requests.get(f"{stand.url}/debug/traces{query}", headers=headers, timeout=30)
    assert reply.status_code == 200, reply.text
    found: list[dict[str, Any]] = reply.json()["traces"]
    return found


def trace(stand: Stand, id: str) -> dict[str, Any]:
    """The one trace of that request; the last word of the wire and of the engine may be a moment behind the reply."""
    done = threading.Event()
    for _ in range(500):
        found = traces(stand, f"?id={id}")
        if found:
            assert len(found) == 1
            return found[0]
        done.wait(0.01)
    raise AssertionError(f"no trace of {id}")


@pytest.mark.parametrize("path", PATHS)
def test_without_the_flag_there_is_no_such_route(path: str) -> None:
    with standing() as plain:
        reply = plain.get(path)
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_there_from_the_first_second(path: str, stand: Stand) -> None:
    assert set(stand.get(path).json()) >= FIELDS[path]
    with standing(ready=False, rca=True, settings={"block_size": 16}) as starting:
        reply = starting.get(path)
        assert reply.status_code == 200
        assert set(reply.json()) >= FIELDS[path]


def test_only_keys_with_the_scope_admin_are_let_in() -> None:
    with standing(rca=True, api_keys=("sk-all",)) as stand:
        named = [Key("user", digest("sk-infer"), frozenset({"infer"})),
                 Key("boss", digest("sk-admin"), frozenset({"admin"}))]  # fmt: skip
        stand.call(lambda: stand.app.keys.name(named))
        for path in PATHS:
            statuses = {
                key: requests.get(stand.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=30).status_code
                for key in ("sk-all", "sk-admin", "sk-infer", "sk-none")
            }
            assert statuses == {"sk-all": 200, "sk-admin": 200, "sk-infer": 403, "sk-none": 401}
            assert stand.get(path).status_code == 401


def test_figures_are_the_engines_own() -> None:
    with standing(says("a"), rca=True, engine={"step_s": 0.002}, context=2**20) as stand:
        with requests.post(stand.url + CHAT, json={"messages": HI, "stream": True}, stream=True, timeout=30) as open_:
            body = open_.iter_content(1)  # kept: without it the connection is closed
            next(body)
            stats, cache = stand.get("/debug/stats").json(), stand.get("/debug/cache_stats").json()
            assert stats["num_running_requests"] == 1
            assert stats["gpu_cache_usage"] == 0.01
            assert (cache["num_free_gpu_blocks"], cache["num_used_gpu_blocks"]) == (99, 1)
            assert cache["gpu_cache_percent"] == 1.0
            assert stand.get("/debug/config").json()["num_gpu_blocks"] == 100
        assert stats["num_steps"] > 0


def test_throughput_is_measured_over_the_last_seconds() -> None:
    with standing(says("a"), rca=True) as stand:
        assert stand.get("/debug/stats").json()["avg_generation_throughput"] == 0.0
        for _ in range(3):
            assert stand.post(CHAT, {"messages": HI, "max_tokens": 200}).status_code == 200
        stats = stand.get("/debug/stats").json()
        assert stats["avg_generation_throughput"] > 0.0
        assert stats["avg_generation_throughput"] <= stats["generation_tokens"] / 0.001


def test_a_stream_leaves_its_whole_timeline(stand: Stand) -> None:
    reply = stand.post(CHAT, {"messages": HI, "stream": True, "n": 2, "temperature": 0.5}, x_request_id="whole-1")
    found = trace(stand, "whole-1")
    assert (found["route"], found["method"], found["status"], found["model"]) == ("chat", "POST", 200, NAME)
    assert (found["stream"], found["n"], found["temperature"]) == (True, 2, 0.5)
    assert found["reply_id"] == "chatcmpl-whole-1"
    assert found["bytes_written"] == len(reply.content)
    order = ("admitted", "tokenised", "queued", "first_scheduled", "first_token", "ended")
    times = [found[f"{name}_ms"] for name in order]
    assert times == sorted(times)
    assert times[0] >= 0.0
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    for choice in found["choices"]:
        assert choice["completion_tokens"] == 14  # "Hello, world!" and the end of the turn
        assert choice["finish_reason"] == "stop"
        (chunk,) = choice["prefill"]
        assert (chunk["start"], chunk["tokens"]) == (0, choice["prompt_tokens"])
        assert chunk["step"] >= 1
        assert 1 <= choice["gaps"]["count"] <= 13
        assert 0.0 <= choice["gaps"]["p50_ms"] <= choice["gaps"]["p99_ms"] <= choice["gaps"]["max_ms"]
        own = [choice["queued_ms"], chunk["at_ms"], choice["first_token_ms"], choice["ended_ms"]]
        assert own == sorted(own)


@pytest.mark.parametrize("field", ["id", "reply_id", "trace_id"])
def test_a_trace_is_found_by_any_of_its_ids(field: str, stand: Stand) -> None:
    stand.post(CHAT, {"messages": HI}, x_request_id=f"by-{field}")
    wanted = trace(stand, f"by-{field}")
    assert traces(stand, f"?id={wanted[field]}") == [wanted]
    assert traces(stand, f"?id={wanted['choices'][0]['id']}") == [wanted]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, {"messages": HI, "temperature": 9}, 400),
        (CHAT, {"messages": HI, "max_tokens": 10**6}, 400),
        ("/v1/completions", {"prompt": "x", "model": "none"}, 404),
        ("/tokenize", {"prompt": "x"}, 200),
        ("/v1/messages", {"messages": HI, "max_tokens": 5}, 200),
        ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 2}, 200),
    ],
)
def test_requests_that_fail_or_generate_nothing_are_traced_too(
    path: str, body: dict[str, Any], status: int, stand: Stand
) -> None:
    id = f"r-{hash((path, str(body))) & 0xFFFFFF:x}"
    assert stand.post(path, body, x_request_id=id).status_code == status
    found = trace(stand, id)
    assert found["status"] == status
    assert (found["first_token_ms"] is None) == (status != 200 or path == "/tokenize")


def test_probes_and_refused_requests_do_not_push_traces_out() -> None:
    with standing(rca=True, rca_traces=2, api_keys=("sk",)) as stand:
        head = {"Authorization": "Bearer sk"}
        for i in range(3):
            requests.post(
                stand.url + CHAT, json={"messages": HI}, headers={**head, "X-Request-Id": f"n{i}"}, timeout=30
            )
        for _ in range(5):
            stand.get("/health")
            stand.post(CHAT, {"messages": HI})
            requests.get(stand.url + "/v1/models", headers=head, timeout=30)
        assert [one["id"] for one in traces(stand, **head)] == ["n2", "n1"]
        text = requests.get(stand.url + "/metrics", headers=head, timeout=30).text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("vserve_traces"))
        assert float(lines["vserve_traces_total"]) == 3
        assert float(lines["vserve_traces_kept"]) == 2
        assert float(lines["vserve_traces_pushed_out_total"]) == 1
        assert float(lines["vserve_traces_bytes"]) > 100


@pytest.mark.parametrize(
    ("query", "param"),
    [("?limit=0", "limit"), ("?limit=x", "limit"), ("?format=xml", "format"), ("?limit=1&limit=2", "limit"),
     ("?id=", "id")],
)  # fmt: skip
def test_a_bad_query_is_refused_by_name(query: str, param: str, stand: Stand) -> None:
    reply = stand.get(f"/debug/traces{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_the_latest_come_first_and_no_more_than_asked_for(stand: Stand) -> None:
    for i in range(3):
        stand.post(CHAT, {"messages": HI}, x_request_id=f"late-{i}")
        trace(stand, f"late-{i}")
    assert [one["id"] for one in traces(stand, "?limit=2")] == ["late-2", "late-1"]


def test_trace_events_come_as_one_object(stand: Stand) -> None:
    stand.post(CHAT, {"messages": HI}, x_request_id="for-perfetto")
    trace(stand, "for-perfetto")
    made = stand.get("/debug/traces?format=chrome&id=for-perfetto").json()
    names = [event["name"] for event in made["traceEvents"] if event["ph"] == "X"]
    assert names[0] == "chat"
    assert {"queue", "prefill", "chunk", "decode"} <= set(names)
    assert all(isinstance(event[name], int) for event in made["traceEvents"] for name in ("pid", "tid"))


def test_a_client_that_leaves_is_noted_with_what_it_got() -> None:
    with standing(says("a"), rca=True, engine={"step_s": 0.001}, context=2**20) as stand:
        peer = raw_post(stand.port, CHAT, {"messages": HI, "stream": True})
        assert b"200 OK" in peer.recv(4096)
        peer.close()
        found = [one for _ in range(500) for one in traces(stand) if not threading.Event().wait(0.005)][:1]
        (only,) = found
        assert (only["client_gone"], only["status"]) == (True, 200)
        assert only["choices"][0]["finish_reason"] == "abort"
        assert only["choices"][0]["prefill"]


def test_a_dying_engine_leaves_traces_of_what_it_took_along() -> None:
    with standing(says("a"), rca=True, engine={"step_s": 0.002}, context=2**20) as stand:
        with requests.post(stand.url + CHAT, json={"messages": HI, "stream": True}, stream=True, timeout=30) as open_:
            body = open_.iter_content(1)
            next(body)
            stand.bridge.died(EngineDied("told to"))
            assert b"error" in b"".join(body)
        found = traces(stand)
        assert [one["choices"][0]["finish_reason"] for one in found] == ["error"]
        assert found[0]["choices"][0]["prefill"] == []


def test_nothing_is_kept_of_requests_that_have_ended(stand: Stand) -> None:
    for body in ({"messages": HI, "n": 40}, {"messages": HI, "max_tokens": 10**6}, {"messages": HI, "timeout_ms": 1}):
        stand.post(CHAT, body)
    stand.post(CHAT, {"messages": HI}, x_request_id="the-last")
    trace(stand, "the-last")
    tracing = stand.app.tracing
    assert tracing is not None
    assert stand.call(lambda: dict(tracing._choices)) == {}


def test_prompts_count_once_and_answers_each_however_many_there_are(stand: Stand) -> None:
    reply = stand.post("/v1/completions", {"prompt": ["ab", "cde"], "n": 20, "max_tokens": 3}, x_request_id="many")
    found, usage = trace(stand, "many"), reply.json()["usage"]
    assert found["prompt_tokens"] == usage["prompt_tokens"]
    assert found["completion_tokens"] == usage["completion_tokens"] == 120
    assert (len(found["choices"]), found["choices_left_out"]) == (32, 8)


def test_a_trace_that_cannot_be_kept_harms_no_request(caplog: pytest.LogCaptureFixture) -> None:
    with standing(rca=True) as stand:
        tracing = stand.app.tracing
        assert tracing is not None
        assert tracing.ring is not None
        tracing.ring.add = None  # type: ignore[assignment,method-assign]
        for how in ({"stream": True}, {}):
            assert "Hello" in stand.post(CHAT, {"messages": HI, **how}).text
        stand.until(lambda: caplog.text.count("a trace could not be kept") == 2)  # a reply may be read before its end
        assert traces(stand) == []


@pytest.mark.parametrize("how", [{}, {"stream": True}, {"background": True}])
def test_a_response_is_traced_to_its_end_whoever_waits_for_it(how: dict[str, bool], stand: Stand) -> None:
    id = "resp-" + "".join(how)
    reply = stand.post("/v1/responses", {"input": "hi", **how}, x_request_id=id)
    found = trace(stand, id)
    (choice,) = found["choices"]
    assert (found["route"], found["status"], choice["finish_reason"]) == ("responses", 200, "stop")
    assert choice["completion_tokens"] == found["completion_tokens"] == 14
    assert found["reply_id"].startswith("resp_")
    assert found["reply_id"] in reply.text
    assert found["stream"] == ("stream" in how)
    assert (choice["ended_ms"] > found["ended_ms"]) == ("background" in how)


KEY, OTHER_KEY, WRONG = "sk-planted-key", "sk-planted-other", "sk-planted-wrong"
PROMPT, ANSWER = "zwetschge kirsche", "quitte mispel"
PLANTED = (KEY, OTHER_KEY, WRONG, *PROMPT.split(), *ANSWER.split())


@pytest.mark.promise("R12")
def test_no_key_no_prompt_and_no_answer_is_in_any_of_it() -> None:
    settings = {"api_key": "(1 hidden)", "block_size": 16}
    with standing(says(ANSWER), rca=True, api_keys=(KEY,), settings=settings) as stand:
        stand.call(lambda: stand.app.keys.name([Key("n", digest(OTHER_KEY), frozenset({"infer", "admin"}))]))
        head = {"Authorization": f"Bearer {KEY}"}
        bodies: list[tuple[str, Any]] = [
            (CHAT, {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 30}),
            (
                CHAT,
                {"messages": [{"role": "user", "content": PROMPT}], "stream": True, "user": PROMPT, "stop": "mispel"},
            ),
            (CHAT, {"messages": [{"role": PROMPT, "content": PROMPT}]}),
            ("/v1/completions", {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 5}),
            ("/v1/completions", {"prompt": PROMPT, "model": PROMPT}),
            ("/v1/completions?api_key=" + KEY, {"prompt": PROMPT * 100}),
            ("/tokenize", {"prompt": PROMPT, "return_token_strs": True}),
            ("/v1/messages", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, "system": PROMPT}),
            ("/invocations", {"prompt": PROMPT, "cache_salt": PROMPT}),
            ("/v1/responses", {"input": PROMPT, "instructions": PROMPT, "metadata": {"x": PROMPT}}),
        ]
        for key in (KEY, OTHER_KEY, WRONG):
            for path, body in bodies:
                carried = {"Authorization": f"Bearer {key}", "Cookie": key, "traceparent": key, "X-Other": PROMPT}
                requests.post(stand.url + path, json=body, headers=carried, timeout=30)
            requests.get(f"{stand.url}/v1/models/{PROMPT}?q={PROMPT}", headers=head, timeout=30)
        assert len(traces(stand, **head)) == 2 * len(bodies)
        shown = ""
        for path in (*PATHS, "/debug/traces?format=chrome", "/debug/traces?limit=100000", "/metrics", "/load"):
            reply = requests.get(stand.url + path, headers=head, timeout=30)
            assert reply.status_code == 200
            shown += reply.text + json.dumps(dict(reply.headers))
    for secret in PLANTED:
        assert secret not in shown, secret
