"""Spans reach a collector that reads the protobuf; one that is dead or slow costs nobody anything but the spans."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.fakes_otlp import Collector, attributes
from tests.observe.test_trace import SPAN, TRACE, traced
from vserve.errors import StartupError
from vserve.observe import otlp
from vserve.observe.otlp import Otlp, attributes_of, checked
from vserve.observe.trace import Parent


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@contextmanager
def exporting(url: str) -> Iterator[Otlp]:
    exporter = Otlp(url, "1.2.3")
    exporter.start()
    try:
        yield exporter
    finally:
        exporter.close(5.0)


def test_a_request_is_one_span_under_the_callers(collector: Collector) -> None:
    trace = traced()
    trace.parent, trace.trace_id = Parent(TRACE, SPAN, True), TRACE
    with exporting(collector.url) as exporter:
        exporter.offer(trace.record())
        message = collector.requests.get(timeout=20)
    (group,) = message.resource_spans
    resource = {item.key: item.value.string_value for item in group.resource.attributes}
    assert (resource["service.name"], resource["service.version"]) == ("vserve", "1.2.3")
    ((span,),) = [list(scope.spans) for scope in group.scope_spans]
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.span_id.hex()) == (TRACE, SPAN, trace.span_id)
    assert (span.name, span.kind) == ("chat m", Span.SPAN_KIND_SERVER)
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(91e6, abs=1e3)
    assert span.start_time_unix_nano == pytest.approx(trace.unix_s * 1e9, abs=2e3)
    assert [event.name for event in span.events] == ["first token", "preempted"]
    found = attributes(span)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "m"
    assert found["gen_ai.request.id"] == "req-1"
    assert found["gen_ai.usage.prompt_tokens"] == found["gen_ai.usage.input_tokens"] == 20
    assert found["gen_ai.usage.completion_tokens"] == found["gen_ai.usage.output_tokens"] == 3
    assert found["gen_ai.usage.num_sequences"] == 2
    assert found["gen_ai.response.finish_reasons"] == ["stop", "abort"]
    assert found["gen_ai.latency.time_in_queue"] == pytest.approx(0.008)
    assert found["gen_ai.latency.time_to_first_token"] == pytest.approx(0.05)
    assert found["gen_ai.latency.time_in_model_prefill"] == pytest.approx(0.04)
    assert found["gen_ai.latency.e2e"] == pytest.approx(0.091)
    assert found["http.response.status_code"] == 200
    assert exporter.figures.sent == 1


def test_what_is_not_known_is_left_out() -> None:
    trace = traced()
    trace.choices.clear()
    trace.prompt_tokens = 0
    trace.model = trace.reply_id = None
    found = attributes_of(trace.record())
    assert None not in found.values()
    assert not [name for name in found if name.startswith("gen_ai.usage")]


def test_requests_close_together_travel_together(collector: Collector) -> None:
    with exporting(collector.url) as exporter:
        for _ in range(20):
            exporter.offer(traced().record())
    assert len(collector.spans()) == 20
    assert exporter.figures.sent == 20


def test_offering_never_waits_for_a_collector_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "QUEUE_LIMIT", 10)
    with socket.create_server(("127.0.0.1", 0), backlog=1) as deaf:  # connects, and is never answered
        exporter = Otlp(f"http://127.0.0.1:{deaf.getsockname()[1]}", "1.2.3")
        exporter.start()
        record = traced().record()
        offered = 0
        while exporter.figures.dropped < 100:  # a full queue only counts
            exporter.offer(record)
            offered += 1
        assert offered < 100 + 10 + 2 * otlp.BATCH
        exporter.close(0.1)


def test_a_dead_collector_is_complained_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(otlp, "BATCH", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with exporting(url) as exporter:
        exporter.offer(traced().record())
        exporter.offer(traced().record())
    assert (exporter.figures.sent, exporter.figures.failed) == (0, 2)
    said = [text for text in (entry.getMessage() for entry in caplog.records) if url in text]
    assert len(said) == 1


def test_a_collector_that_refuses_is_counted() -> None:
    refusing = Collector(status=400)
    with exporting(refusing.url) as exporter:
        exporter.offer(traced().record())
        assert len(refusing.spans()) == 1
    refusing.close()
    assert exporter.figures.failed == 1


def test_closing_waits_no_longer_than_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        exporter = Otlp(f"http://127.0.0.1:{deaf.getsockname()[1]}", "1.2.3")
        exporter.start()
        exporter.offer(traced().record())
        began = time.monotonic()
        exporter.close(0.05)
        assert time.monotonic() - began < otlp.TIMEOUT_S


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("https://collector/otlp/traces", "https://collector/otlp/traces"),
        ("http://[::1]:4318/v1/traces", "http://[::1]:4318/v1/traces"),
    ],
)
def test_an_endpoint_without_a_path_gets_the_usual_one(given: str, meant: str) -> None:
    assert checked(given) == meant


@pytest.mark.parametrize(
    "given",
    [
        "collector:4317",
        "grpc://collector:4317",
        "http://",
        "http://collector:port",
        "http://me:word@collector",
        "http://collector/v1/traces?key=word",
    ],
)
def test_what_is_no_endpoint_ends_the_start_and_is_not_repeated(given: str) -> None:
    with pytest.raises(StartupError, match="--otlp-traces-endpoint") as caught:
        checked(given)
    assert "word" not in str(caught.value)
