"""Metrics: what /metrics shows, and the one registry behind it.

Names, labels and buckets of ``vllm:`` are vLLM's, so that its dashboards work unchanged.  What happens often is
counted in plain integers on the event loop (histogram.py); ``snapshot`` copies them there, in one go, and ``render``
turns the copy into text in another thread.  Knows neither engine nor HTTP: plain values come in.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from vserve.observe.encoder_series import EncoderSeries, EncoderSnapshot, encoder_metrics
from vserve.observe.engine_series import EngineSeries, EngineSnapshot, engine_metrics
from vserve.observe.histogram import HTTP_S, Counted, Histogram
from vserve.observe.lag import Lag

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT"})
GONE_STATUS = 499
"""Stands for the reply of a client that left before one began, as in nginx."""

LAG_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Stored(Protocol):
    """The store of responses at one moment."""

    @property
    def entries(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def evictions(self) -> int: ...


class Ring(Protocol):
    """The memory of traces at one moment."""

    @property
    def kept(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def pushed_out(self) -> int: ...


class Exported(Protocol):
    """Spans by fate."""

    @property
    def sent(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def dropped(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the event loop counts, as of one moment."""

    engine: EngineSnapshot | None
    encoder: EncoderSnapshot | None
    http: Mapping[tuple[str, str, str], int]
    http_time: Mapping[tuple[str, str], Counted]
    refused: Mapping[str, int]
    lag: Counted
    ring: Ring | None = None
    exported: Exported | None = None
    stored: Stored | None = None


class Metrics:
    """One server's metrics.  Event-loop thread only, but for ``render``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.lag = Histogram(LAG_S)
        self.timer = Lag(self.lag.observe)
        self.gpu: Callable[[], float | None] | None = None  # asked in render's thread
        self.ring: Callable[[], Ring] | None = None
        self.exported: Callable[[], Exported] | None = None
        self.stored: Callable[[], Stored] | None = None
        self._engine: EngineSeries | None = None
        self._encoder: EncoderSeries | None = None
        self._http: Counter[tuple[str, str, str]] = Counter()
        self._http_time: dict[tuple[str, str], Histogram] = {}
        self._refused: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ours = _Ours()
        self.registry.register(self._ours)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def serve(self, engine: EngineSeries) -> None:
        """From now on this engine is shown; before, its names stand there without a value."""
        self._engine = engine

    def serve_encoder(self, encoder: EncoderSeries) -> None:
        """From now on this embedding model is shown; a server without one has no such names."""
        self._encoder = encoder

    def exchange(self, handler: str | None, method: str | None, status: int, duration_s: float) -> None:
        """Count one HTTP exchange.

        handler: a route's name, None when none matched; method: the client's own word; status 0: it left first.
        """
        name = handler or OTHER
        verb = method if method in METHODS and method is not None else OTHER
        self._http[name, verb, str(status or GONE_STATUS)] += 1
        times = self._http_time.get((name, verb))
        if times is None:
            times = self._http_time[name, verb] = Histogram(HTTP_S)
        times.observe(duration_s)

    def refused(self, reason: str) -> None:
        """Count a request that was not let in.  reason: a word of the program, never the client's."""
        self._refused[reason] += 1

    def snapshot(self) -> Snapshot:
        """All counts as of now; tens of microseconds."""
        times = {key: histogram.snapshot() for key, histogram in self._http_time.items()}
        return Snapshot(
            None if self._engine is None else self._engine.snapshot(),
            None if self._encoder is None else self._encoder.snapshot(),
            dict(self._http),
            times,
            dict(self._refused),
            self.lag.snapshot(),
            ring=None if self.ring is None else self.ring(),
            exported=None if self.exported is None else self.exported(),
            stored=None if self.stored is None else self.stored(),
        )

    def render(self, snapshot: Snapshot) -> bytes:
        """The exposition text.  Takes milliseconds: any thread but the loop's."""
        with self._lock:  # the registry passes nothing on to a collector
            self._ours.show(snapshot, self.gpu)
            return generate_latest(self.registry)


class _Ours(Collector):
    """All but the process's own metrics, as of the snapshot shown last."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._gpu: Callable[[], float | None] | None = None

    def show(self, snapshot: Snapshot, gpu: Callable[[], float | None] | None) -> None:
        self._snapshot, self._gpu = snapshot, gpu

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        if snapshot is None:  # the registry asks for the names when we are registered
            return
        yield from engine_metrics(snapshot.engine, self._gpu)
        if snapshot.encoder is not None:
            yield from encoder_metrics(snapshot.encoder)
        yield from _http(snapshot)
        refused = CounterMetricFamily("vserve_requests_refused", "Requests not let in.", labels=("reason",))
        for reason, count in snapshot.refused.items():
            refused.add_metric((reason,), count)
        yield refused
        if snapshot.stored is not None:
            yield from _stored(snapshot.stored)
        lag = HistogramMetricFamily("vserve_event_loop_lag_seconds", "Seconds by which a timer of the loop was late.")
        lag.add_metric((), snapshot.lag.cumulative(), snapshot.lag.total)
        yield lag
        yield from _traces(snapshot.ring, snapshot.exported)


def _traces(ring: Ring | None, exported: Exported | None) -> Iterator[Metric]:
    if ring is not None:
        yield GaugeMetricFamily("vserve_traces_kept", "Requests whose timeline is kept.", ring.kept)
        yield GaugeMetricFamily("vserve_traces_bytes", "Bytes of these timelines.", ring.bytes)
        yield CounterMetricFamily("vserve_traces", "Requests whose timeline was noted.", ring.total)
        yield CounterMetricFamily("vserve_traces_pushed_out", "Timelines dropped for newer ones.", ring.pushed_out)
    if exported is not None:
        spans = CounterMetricFamily("vserve_spans", "Spans for the OpenTelemetry collector.", labels=("outcome",))
        for outcome, count in (("sent", exported.sent), ("failed", exported.failed), ("dropped", exported.dropped)):
            spans.add_metric((outcome,), count)
        yield spans


def _stored(stored: Stored) -> Iterator[Metric]:
    yield GaugeMetricFamily("vserve_stored_responses", "Responses in the store.", stored.entries)
    yield GaugeMetricFamily("vserve_stored_responses_bytes", "Bytes of the responses in the store.", stored.bytes)
    yield CounterMetricFamily(
        "vserve_stored_responses_evicted", "Responses dropped for a bound of the store.", stored.evictions
    )


def _http(snapshot: Snapshot) -> Iterator[Metric]:
    requests = CounterMetricFamily("http_requests", "HTTP exchanges.", labels=("handler", "method", "status"))
    for key, count in snapshot.http.items():
        requests.add_metric(key, count)
    yield requests
    times = HistogramMetricFamily(
        "http_request_duration_seconds", "Seconds from the head to the end of the reply.", labels=("handler", "method")
    )
    for pair, counted in snapshot.http_time.items():
        times.add_metric(pair, counted.cumulative(), counted.total)
    yield times
