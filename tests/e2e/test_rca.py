"""The user's own scripts against the real server, its traces, and its spans at a collector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from tests.e2e.process import Server, serving
from tests.fakes_otlp import Collector, attributes

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEY, PROMPT = "sk-planted-key", "Zwetschgendatschi"


@dataclass(frozen=True, slots=True)
class Watched:
    """A server that is watched, and the collector that it reports to."""

    server: Server
    collector: Collector


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    collector = Collector()
    with serving("--enable-rca", "--otlp-traces-endpoint", collector.url, "--max-prefill-chunk", "16") as server:
        yield Watched(server, collector)
        assert server.terminate() == 0
    collector.close()


def ask(server: Server, **body: Any) -> requests.Response:
    reply = requests.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": PROMPT + " and then count to ten."}], "max_tokens": 12, **body},
        headers={"Authorization": f"Bearer {KEY}", "traceparent": f"00-{TRACE}-{SPAN}-01"},
        timeout=120,
    )
    assert reply.status_code == 200
    return reply


def rca_demo(base: str) -> dict[str, dict[str, Any]]:
    endpoints = [
        ("/debug/version", "version"),
        ("/debug/stats", "stats"),
        ("/debug/cache_stats", "cache"),
        ("/debug/config", "config"),
    ]
    found = {}
    for endpoint, label in endpoints:
        resp = requests.get(f"{base}{endpoint}", timeout=5)
        data = resp.json()
        json.dumps(data, indent=2, ensure_ascii=False)
        found[label] = data
    return found


def health_check_demo(base: str) -> dict[str, int]:
    checks = {
        "GET /health": lambda: requests.get(f"{base}/health", timeout=5),
        "GET /health/ready": lambda: requests.get(f"{base}/health/ready", timeout=5),
        "GET /version": lambda: requests.get(f"{base}/version", timeout=5),
        "GET /v1/models": lambda: requests.get(f"{base}/v1/models", timeout=5),
    }
    return {name: fn().status_code for name, fn in checks.items()}


def test_the_rca_script_finds_real_figures(watched: Watched) -> None:
    import torch

    ask(watched.server)
    found = rca_demo(watched.server.url)
    version, stats, cache, config = (found[name] for name in ("version", "stats", "cache", "config"))
    assert version["torch_version"] == str(torch.__version__)
    assert version["cuda_version"] == torch.version.cuda
    assert version["version"] == requests.get(f"{watched.server.url}/version", timeout=5).json()["version"]
    assert version["python_version"].count(".") == 2
    assert (stats["num_running_requests"], stats["num_waiting_requests"], stats["num_swapped_requests"]) == (0, 0, 0)
    assert stats["avg_prompt_throughput"] > 0
    assert stats["avg_generation_throughput"] > 0
    assert cache["num_free_gpu_blocks"] + cache["num_used_gpu_blocks"] == config["num_gpu_blocks"] > 0
    assert 0 <= cache["gpu_cache_percent"] <= 100
    assert config["block_size"] == 16
    assert config["max_model_len"] > 0
    assert config["model_name"] == requests.get(f"{watched.server.url}/v1/models", timeout=5).json()["data"][0]["id"]
    assert config["swap_space_bytes"] == 0


def test_the_health_script_is_content(watched: Watched) -> None:
    assert set(health_check_demo(watched.server.url).values()) == {200}


def test_a_request_has_its_timeline_and_its_span(watched: Watched) -> None:
    while not watched.collector.requests.empty():
        watched.collector.requests.get()
    reply = ask(watched.server, stream=True)
    spans = watched.collector.spans()
    span = spans[-1]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    (trace,) = requests.get(f"{watched.server.url}/debug/traces?limit=1", timeout=5).json()["traces"]
    assert span.span_id.hex() == trace["span_id"]
    assert trace["trace_id"] == TRACE
    assert trace["bytes_written"] == len(reply.content)
    (choice,) = trace["choices"]
    assert choice["completion_tokens"] == attributes(span)["gen_ai.usage.completion_tokens"]
    covered = sum(chunk["tokens"] for chunk in choice["prefill"]) + choice["cached_tokens"]
    assert covered == choice["prompt_tokens"] == attributes(span)["gen_ai.usage.prompt_tokens"]
    assert choice["gaps"]["count"] == choice["completion_tokens"] - 1
    order = ("admitted", "tokenised", "queued", "first_scheduled", "first_token", "ended")
    times = [trace[f"{name}_ms"] for name in order]
    assert times == sorted(times)
    assert trace["ended_ms"] / 1e3 == pytest.approx(attributes(span)["gen_ai.latency.e2e"])


def test_all_that_is_shown_and_sent_has_neither_key_nor_prompt(watched: Watched) -> None:
    url = watched.server.url
    ask(watched.server)
    sent = watched.collector.requests.get(timeout=20)
    paths = ("version", "stats", "cache_stats", "config", "traces", "traces?format=chrome")
    shown = "".join(requests.get(f"{url}/debug/{path}", timeout=5).text for path in paths)
    shown += requests.get(f"{url}/metrics", timeout=5).text + str(sent)
    assert "vserve_spans_total" in shown
    assert KEY not in shown
    assert PROMPT not in shown


def test_a_server_whose_collector_is_dead_serves_and_ends_as_any_other() -> None:
    dead = Collector()
    dead.close()
    with serving("--otlp-traces-endpoint", dead.url, "--api-key", KEY) as server:
        ask(server)
        assert requests.get(f"{server.url}/debug/traces", timeout=5).status_code == 404
        assert server.terminate() == 0
