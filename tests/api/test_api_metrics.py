"""/metrics of a whole front end: every name, every request once, whatever becomes of it."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import requests
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes_api import NAME, Stand, raw_post, says, standing
from vserve.engine.request import FinishReason
from vserve.errors import EngineDied

COMPLETE = "/v1/completions"
LABELS = {"model_name": NAME, "engine": "0"}
ENDLESS: dict[str, Any] = {"prompt": "x", "max_tokens": 500, "ignore_eos": True}

SINGLE = """vllm:num_requests_running vllm:num_requests_waiting vllm:num_requests_swapped vllm:kv_cache_usage_perc
vllm:prompt_tokens_total vllm:generation_tokens_total vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total
vllm:num_preemptions_total vllm_gpu_utilization vllm_kv_cache_usage_ratio vllm_pending_requests""".split()
HISTOGRAMS = """vllm:time_to_first_token_seconds vllm:inter_token_latency_seconds
vllm:request_time_per_output_token_seconds vllm:e2e_request_latency_seconds vllm:request_queue_time_seconds
vllm:request_prefill_time_seconds vllm:request_decode_time_seconds vllm:request_prompt_tokens
vllm:request_generation_tokens vllm:iteration_tokens_total vllm_request_duration_seconds""".split()
ONCE = [name for name in HISTOGRAMS if name not in ("vllm:inter_token_latency_seconds", "vllm:iteration_tokens_total")]


class Scrape:
    """The parsed answer of one GET /metrics."""

    def __init__(self, url: str) -> None:
        self.reply = requests.get(f"{url}/metrics", timeout=30)
        assert self.reply.status_code == 200
        self.families: dict[str, Metric] = {f.name: f for f in text_string_to_metric_families(self.reply.text)}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, labels: dict[str, str] = LABELS, **more: str) -> float:
        return self.samples[name, frozenset({**labels, **more}.items())]

    def finished(self) -> dict[str, float]:
        """Ended sequences by reason, those without any left out."""
        counts = {r.value: self.value("vllm:request_success_total", finished_reason=r.value) for r in FinishReason}
        return {reason: count for reason, count in counts.items() if count}


def until(stand: Stand, what: Callable[[Scrape], bool]) -> Scrape:
    """Scrape until it holds: the engine acknowledges a cancel a little later."""
    for _ in range(2_000):
        scrape = Scrape(stand.url)
        if what(scrape):
            return scrape
    raise AssertionError(scrape.reply.text)


def test_every_name_is_there_with_its_labels_and_each_request_counts_once() -> None:
    with standing() as stand:
        for stream in (False, True):
            assert stand.post(COMPLETE, {"prompt": "abc", "n": 2, "stream": stream}).status_code == 200
        scrape = Scrape(stand.url)
        assert scrape.reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        for name in SINGLE:
            assert scrape.value(name) >= 0
        for name in HISTOGRAMS:
            assert scrape.value(f"{name}_bucket", le="+Inf") == scrape.value(f"{name}_count")
        for name in ONCE:
            assert scrape.value(f"{name}_count") == 4, name
        assert scrape.value("vllm:request_prompt_tokens_sum") == 12
        assert scrape.value("vllm:request_generation_tokens_sum") == 4 * 14
        assert scrape.finished() == {"stop": 4}
        http = {"handler": "completions", "method": "POST"}
        assert scrape.value("http_requests_total", http, status="200") == 2
        assert scrape.value("http_request_duration_seconds_count", http) == 2
        for name in ("vserve_event_loop_lag_seconds", "vserve_step_seconds", "python_gc_collections", "python_info"):
            assert name in scrape.families
        assert scrape.value("process_cpu_seconds_total", {}) > 0


def test_head_says_the_same_head_and_the_scrape_is_open_where_keys_are_asked_for() -> None:
    with standing(api_keys=("secret",)) as stand:
        head = requests.head(f"{stand.url}/metrics", timeout=10)
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert stand.post(COMPLETE, {"prompt": "x"}).status_code == 401
        assert Scrape(stand.url).value("vserve_requests_refused_total", {"reason": "unauthorized"}) == 1


def test_a_server_that_is_starting_answers_and_counts_whom_it_turns_away() -> None:
    with standing(ready=False) as stand:
        assert stand.post(COMPLETE, {"prompt": "x"}).status_code == 503
        scrape = Scrape(stand.url)
        assert scrape.families["vllm:num_requests_running"].samples == []
        assert scrape.value("vserve_requests_refused_total", {"reason": "starting"}) == 1
        assert scrape.value("http_requests_total", {"handler": "completions", "method": "POST", "status": "503"}) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_a_full_queue_is_counted_as_overloaded_whether_the_gate_or_the_queue_says_so(n: int) -> None:
    with standing(max_queue=2) as stand:
        stand.engine.running.clear()
        peers = [raw_post(stand.port, COMPLETE, ENDLESS)] if n == 2 else []
        if n == 1:
            peers.append(raw_post(stand.port, COMPLETE, {**ENDLESS, "n": 2}))
        full = 2 if n == 1 else 1
        until(stand, lambda scrape: scrape.value("vllm_pending_requests") == full)
        assert stand.post(COMPLETE, {**ENDLESS, "n": n}).status_code == 429
        assert Scrape(stand.url).value("vserve_requests_refused_total", {"reason": "overloaded"}) == 1
        for peer in peers:
            peer.close()
        stand.engine.running.set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.promise("R2")
def test_a_disconnect_counts_as_abort(stream: bool) -> None:
    with standing(engine={"step_s": 0.005}) as stand:
        peer = raw_post(stand.port, COMPLETE, {**ENDLESS, "n": 3, "stream": stream})
        until(stand, lambda scrape: scrape.value("vllm:num_requests_running") == 3)
        peer.close()
        scrape = until(stand, lambda scrape: bool(scrape.finished()))
        assert scrape.finished() == {"abort": 3}
        assert scrape.value("vllm:e2e_request_latency_seconds_count") == 3
        key = ("http_requests_total", {"handler": "completions", "method": "POST"})
        assert scrape.value(*key, status="200" if stream else "499") == 1


def test_a_stop_string_counts_as_stop_and_a_deadline_as_timeout() -> None:
    with standing(says("tick tock "), engine={"step_s": 0.002}) as stand:
        stand.post(COMPLETE, {"prompt": "x", "stop": "tock", "max_tokens": 400})
        scrape = until(stand, lambda scrape: bool(scrape.finished()))
        assert scrape.finished() == {"stop": 1}
        for name in ONCE:
            assert scrape.value(f"{name}_count") == 1, name
        assert stand.post(COMPLETE, {**ENDLESS, "timeout_ms": 50}).status_code == 504
        scrape = until(stand, lambda scrape: len(scrape.finished()) == 2)
        assert scrape.finished() == {"stop": 1, "timeout": 1}


def test_failures_of_a_request_and_of_the_engine_count_as_error() -> None:
    with standing(engine={"fail": lambda request: "no" if len(request.prompt) == 2 else None}) as stand:
        assert stand.post(COMPLETE, {"prompt": "xx"}).status_code == 500
        assert until(stand, lambda scrape: bool(scrape.finished())).finished() == {"error": 1}
        stand.engine.running.clear()
        peer = raw_post(stand.port, COMPLETE, ENDLESS)
        until(stand, lambda scrape: scrape.value("vllm_pending_requests") == 1)
        stand.bridge.died(EngineDied("told to"))
        assert until(stand, lambda scrape: scrape.finished() != {"error": 1}).finished() == {"error": 2}
        peer.close()


@pytest.mark.promise("R8", "input: odd metric labels")
def test_odd_methods_and_paths_share_one_label_set() -> None:
    with standing() as stand:
        for i in range(30):
            for method in (f"BREW{i}", "GET", "DELETE"):
                requests.request(method, f"{stand.url}/no/such/{i}", timeout=10)
            with socket.create_connection(("127.0.0.1", stand.port), timeout=10) as peer:
                peer.sendall(b"\x01\x02 nonsense\r\n\r\n")
                while peer.recv(4096):
                    pass
        samples = Scrape(stand.url).families["http_requests"].samples
        assert {sample.labels["handler"] for sample in samples} == {"other"}
        assert {sample.labels["method"] for sample in samples} == {"other", "GET", "DELETE"}
        assert sum(sample.value for sample in samples) == 120


def test_scrapes_under_load_are_consistent_and_counters_only_grow() -> None:
    with standing(engine={"step_s": 0.001}) as stand:
        work = [
            threading.Thread(
                target=lambda: [stand.events(COMPLETE, {"prompt": "x", "max_tokens": 100}) for _ in range(20)]
            )
            for _ in range(4)
        ]
        for thread in work:
            thread.start()
        scrapes = [Scrape(stand.url) for _ in range(20)]
        for thread in work:
            thread.join(30)
        scrapes.append(until(stand, lambda scrape: scrape.finished() == {"stop": 80}))
        for scrape in scrapes:
            for name in HISTOGRAMS:
                rows = [s.value for s in scrape.families[name].samples if s.name == f"{name}_bucket"]
                assert rows == sorted(rows)
                assert rows[-1] == scrape.value(f"{name}_count")
            ended = sum(scrape.finished().values())
            assert scrape.value("vllm:e2e_request_latency_seconds_count") == ended
            assert scrape.value("vllm:request_prompt_tokens_sum") == ended
        for before, after in itertools.pairwise(scrapes):
            for (name, labels), value in before.samples.items():
                if name.endswith(("_total", "_count", "_bucket")) and not name.startswith(("python", "process")):
                    assert after.samples[name, labels] >= value
        assert scrapes[-1].value("vllm:time_to_first_token_seconds_count") == 80
