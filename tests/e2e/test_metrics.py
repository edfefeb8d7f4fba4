"""The real engine's figures reach /metrics, with and without an access log."""

from __future__ import annotations

import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.process import Server, serving

CHAT = {"messages": [{"role": "user", "content": "Count to a hundred, slowly and in words."}], "max_tokens": 20}


def scrape(server: Server) -> dict[str, float]:
    """Every sample by name; those of one name added up, buckets left out."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(requests.get(f"{server.url}/metrics", timeout=30).text):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def ask(server: Server) -> int:
    """Prompt tokens of one chat request of 20 tokens."""
    reply = requests.post(f"{server.url}/v1/chat/completions", json={**CHAT, "ignore_eos": True}, timeout=120)
    assert reply.status_code == 200
    return int(reply.json()["usage"]["prompt_tokens"])


def test_the_engines_counters_add_up(server: Server) -> None:
    before = scrape(server)
    prompt = sum(ask(server) for _ in range(2))
    grown = {name: value - before.get(name, 0.0) for name, value in scrape(server).items()}
    assert grown["vllm:request_success_total"] == 2
    assert grown["vllm:request_prompt_tokens_sum"] == prompt
    assert grown["vllm:generation_tokens_total"] == grown["vllm:request_generation_tokens_sum"] == 40
    assert grown["vllm:iteration_tokens_total_sum"] == 40 + grown["vllm:prompt_tokens_total"]
    assert grown["vllm:iteration_tokens_total_count"] == grown["vserve_steps_total"]
    assert grown["vllm:prefix_cache_queries_total"] == prompt
    assert grown["vllm:prefix_cache_hits_total"] > 0
    assert grown["vllm:e2e_request_latency_seconds_sum"] > grown["vllm:request_decode_time_seconds_sum"] > 0


def test_an_access_log_takes_nothing_from_the_metrics() -> None:
    with serving("--access-log") as server:
        ask(server)
        assert scrape(server)["http_requests_total"] >= 1
        assert server.terminate() == 0
