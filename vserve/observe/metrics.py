"""Metrics: every name that /metrics shows, and the one registry behind it.

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

from vserve.observe.histogram import Counted, Histogram
from vserve.observe.lag import Lag

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT"})
GONE_STATUS = 499
"""Stands for the reply of a client that left before one began, as in nginx."""
FINISHED_REASONS = ("stop", "length", "abort", "error", "timeout")

# Seconds and tokens: vLLM's edges.
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
          160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
LATENCY_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
             960.0, 1920.0, 7680.0)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Ours: vLLM has no such names.
STEP_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 5.0, 30.0)
LAG_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
HTTP_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def token_bounds(largest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 and so on, up to largest."""
    bounds: list[int] = []
    power = 1
    while power <= largest:
        bounds += [digit * power for digit in (1, 2, 5) if digit * power <= largest]
        power *= 10
    return tuple(bounds)


@dataclass(frozen=True, slots=True)
class EngineNow:
    """The engine at one moment; shares in [0, 1].  Names in _total only grow."""

    running: int
    waiting: int
    swapped: int
    cache_usage: float
    utilization: float
    prompt_tokens_total: int
    generation_tokens_total: int
    prefix_queries_total: int
    prefix_hits_total: int
    preemptions_total: int
    steps_total: int


class EngineSeries:
    """What one engine's sequences and steps have been.

    model_name and engine are its labels; max_model_len bounds the token histograms.  now: its figures, asked at each
    scrape.
    """

    def __init__(self, model_name: str, max_model_len: int, now: Callable[[], EngineNow], engine: int = 0) -> None:
        self.labels = {"model_name": model_name, "engine": str(engine)}
        self.now = now
        tokens = token_bounds(max_model_len)
        self.finished: Counter[str] = Counter(dict.fromkeys(FINISHED_REASONS, 0))
        self.time_to_first_token = Histogram(TTFT_S)
        self.inter_token_latency = Histogram(TOKEN_S)
        self.time_per_output_token = Histogram(TOKEN_S)
        self.latency = Histogram(LATENCY_S)
        self.queue_time = Histogram(LATENCY_S)
        self.prefill_time = Histogram(LATENCY_S)
        self.decode_time = Histogram(LATENCY_S)
        self.prompt_tokens = Histogram(tokens)
        self.generation_tokens = Histogram(tokens)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.step_time = Histogram(STEP_S)


ENCODING_OUTCOMES = ("ok", "error", "timeout", "abort")
BATCH_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class EncoderSeries:
    """What one embedding model's requests and batches have been.  waiting: requests and tokens in its queue, asked at
    each scrape."""

    def __init__(self, model_name: str, waiting: Callable[[], tuple[int, int]]) -> None:
        self.model_name = model_name
        self.waiting = waiting
        self.requests: Counter[str] = Counter(dict.fromkeys(ENCODING_OUTCOMES, 0))
        self.texts_total = 0
        self.tokens_total = 0
        self.latency = Histogram(HTTP_S)
        self.queue_time = Histogram(HTTP_S)
        self.batch_texts = Histogram(BATCH_TEXTS)
        self.batch_tokens = Histogram(STEP_TOKENS)
        self.batch_time = Histogram(STEP_S)


_ENCODER_HISTOGRAMS = (
    ("vserve_embedding_latency_seconds", "Seconds from arrival to the end of an embedding request.", "latency"),
    ("vserve_embedding_queue_time_seconds", "Seconds that a request waited for its first batch.", "queue_time"),
    ("vserve_embedding_batch_texts", "Texts of one batch.", "batch_texts"),
    ("vserve_embedding_batch_tokens", "Tokens of one batch.", "batch_tokens"),
    ("vserve_embedding_batch_seconds", "Seconds of one batch.", "batch_time"),
)

_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "Seconds from arrival to the first token.", "time_to_first_token"),
    ("vllm:inter_token_latency_seconds", "Seconds between tokens of a sequence.", "inter_token_latency"),
    (
        "vllm:request_time_per_output_token_seconds",
        "Seconds a token after the first, mean of a sequence.",
        "time_per_output_token",
    ),
    ("vllm:e2e_request_latency_seconds", "Seconds from arrival to the end of a sequence.", "latency"),
    ("vllm:request_queue_time_seconds", "Seconds that a sequence waited before its first step.", "queue_time"),
    ("vllm:request_prefill_time_seconds", "Seconds from the first step to the first token.", "prefill_time"),
    ("vllm:request_decode_time_seconds", "Seconds from the first token to the last.", "decode_time"),
    ("vllm:request_prompt_tokens", "Prompt tokens of a sequence.", "prompt_tokens"),
    ("vllm:request_generation_tokens", "Generated tokens of a sequence.", "generation_tokens"),
    ("vllm:iteration_tokens_total", "Tokens of one engine step, prompt and generated.", "step_tokens"),
    ("vllm_request_duration_seconds", "As vllm:e2e_request_latency_seconds.", "latency"),
    ("vserve_step_seconds", "Seconds of one engine step, from planning to publishing.", "step_time"),
)
_GAUGES = (
    ("vllm:num_requests_running", "Sequences in the running batch.", "running"),
    ("vllm:num_requests_waiting", "Sequences that wait for their first step.", "waiting"),
    ("vllm:num_requests_swapped", "Sequences swapped out; preemption recomputes, so always 0.", "swapped"),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks held by live sequences, 0 to 1.", "cache_usage"),
    ("vllm_kv_cache_usage_ratio", "As vllm:kv_cache_usage_perc.", "cache_usage"),
    ("vllm_pending_requests", "As vllm:num_requests_waiting.", "waiting"),
    ("vllm_gpu_utilization", "Share of time busy, 0 to 1: the GPU's (NVML), else the engine's.", "utilization"),
)
_COUNTERS = (
    ("vllm:prompt_tokens", "Prompt tokens processed.", "prompt_tokens_total"),
    ("vllm:generation_tokens", "Tokens generated.", "generation_tokens_total"),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries_total"),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits_total"),
    ("vllm:num_preemptions", "Sequences sent back to be recomputed.", "preemptions_total"),
    ("vserve_steps", "Engine steps.", "steps_total"),
)


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """One engine's part of a Snapshot.  histograms: by attribute of EngineSeries."""

    labels: Mapping[str, str]
    now: EngineNow
    finished: Mapping[str, int]
    histograms: Mapping[str, Counted]


class Stored(Protocol):
    """The store of responses at one moment."""

    @property
    def entries(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def evictions(self) -> int: ...


@dataclass(frozen=True, slots=True)
class EncoderSnapshot:
    """The embedding model's part of a Snapshot.  histograms: by attribute of EncoderSeries."""

    model_name: str
    waiting_requests: int
    waiting_tokens: int
    requests: Mapping[str, int]
    texts_total: int
    tokens_total: int
    histograms: Mapping[str, Counted]


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
        engine = self._engine
        shown = None
        if engine is not None:
            histograms = {attribute: getattr(engine, attribute).snapshot() for _, _, attribute in _HISTOGRAMS}
            shown = EngineSnapshot(engine.labels, engine.now(), dict(engine.finished), histograms)
        times = {key: histogram.snapshot() for key, histogram in self._http_time.items()}
        encoder = None if self._encoder is None else _encoder_snapshot(self._encoder)
        return Snapshot(
            shown,
            encoder,
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
        yield from _engine(snapshot.engine, self._gpu)
        if snapshot.encoder is not None:
            yield from _encoder(snapshot.encoder)
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


def _engine(shown: EngineSnapshot | None, gpu: Callable[[], float | None] | None) -> Iterator[Metric]:
    names = ("model_name", "engine")
    values = () if shown is None else tuple(shown.labels[name] for name in names)
    busy = gpu() if gpu is not None else None
    for name, text, attribute in _GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=names)
        if shown is not None:
            use_driver = attribute == "utilization" and busy is not None
            gauge.add_metric(values, busy if use_driver and busy is not None else getattr(shown.now, attribute))
        yield gauge
    for name, text, attribute in _COUNTERS:
        counter = CounterMetricFamily(name, text, labels=names)
        if shown is not None:
            counter.add_metric(values, getattr(shown.now, attribute))
        yield counter
    finished = CounterMetricFamily("vllm:request_success", "Ended sequences.", labels=(*names, "finished_reason"))
    if shown is not None:
        for reason, count in shown.finished.items():
            finished.add_metric((*values, reason), count)
    yield finished
    for name, text, attribute in _HISTOGRAMS:
        histogram = HistogramMetricFamily(name, text, labels=names)
        if shown is not None:
            counted = shown.histograms[attribute]
            histogram.add_metric(values, counted.cumulative(), counted.total)
        yield histogram


def _stored(stored: Stored) -> Iterator[Metric]:
    yield GaugeMetricFamily("vserve_stored_responses", "Responses in the store.", stored.entries)
    yield GaugeMetricFamily("vserve_stored_responses_bytes", "Bytes of the responses in the store.", stored.bytes)
    yield CounterMetricFamily(
        "vserve_stored_responses_evicted", "Responses dropped for a bound of the store.", stored.evictions
    )


def _encoder_snapshot(series: EncoderSeries) -> EncoderSnapshot:
    histograms = {attribute: getattr(series, attribute).snapshot() for _, _, attribute in _ENCODER_HISTOGRAMS}
    requests, tokens = series.waiting()
    return EncoderSnapshot(
        series.model_name, requests, tokens, dict(series.requests), series.texts_total, series.tokens_total, histograms
    )


def _encoder(shown: EncoderSnapshot) -> Iterator[Metric]:
    names, values = ("model_name",), (shown.model_name,)
    for name, text, value in (
        ("vserve_embedding_requests_waiting", "Embedding requests not yet done.", shown.waiting_requests),
        ("vserve_embedding_tokens_waiting", "Tokens not yet in a batch.", shown.waiting_tokens),
    ):
        gauge = GaugeMetricFamily(name, text, labels=names)
        gauge.add_metric(values, value)
        yield gauge
    for name, text, value in (
        ("vserve_embedding_texts", "Texts of requests that succeeded.", shown.texts_total),
        ("vserve_embedding_tokens", "Tokens of requests that succeeded.", shown.tokens_total),
    ):
        counter = CounterMetricFamily(name, text, labels=names)
        counter.add_metric(values, value)
        yield counter
    ended = CounterMetricFamily("vserve_embedding_requests", "Ended embedding requests.", labels=(*names, "outcome"))
    for outcome, count in shown.requests.items():
        ended.add_metric((*values, outcome), count)
    yield ended
    for name, text, attribute in _ENCODER_HISTOGRAMS:
        histogram = HistogramMetricFamily(name, text, labels=names)
        counted = shown.histograms[attribute]
        histogram.add_metric(values, counted.cumulative(), counted.total)
        yield histogram


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
