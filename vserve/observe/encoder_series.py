"""What one embedding model's requests and batches have been, and how /metrics shows it.

Counted on the event loop in plain integers; a snapshot is turned into metrics in another thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from vserve.observe.histogram import HTTP_S, STEP_S, STEP_TOKENS, Counted, Histogram

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

    def snapshot(self) -> EncoderSnapshot:
        """A copy of all that as of now."""
        histograms = {attribute: getattr(self, attribute).snapshot() for _, _, attribute in _HISTOGRAMS}
        requests, tokens = self.waiting()
        return EncoderSnapshot(
            self.model_name, requests, tokens, dict(self.requests), self.texts_total, self.tokens_total, histograms
        )


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


_HISTOGRAMS = (
    ("vserve_embedding_latency_seconds", "Seconds from arrival to the end of an embedding request.", "latency"),
    ("vserve_embedding_queue_time_seconds", "Seconds that a request waited for its first batch.", "queue_time"),
    ("vserve_embedding_batch_texts", "Texts of one batch.", "batch_texts"),
    ("vserve_embedding_batch_tokens", "Tokens of one batch.", "batch_tokens"),
    ("vserve_embedding_batch_seconds", "Seconds of one batch.", "batch_time"),
)


def encoder_metrics(shown: EncoderSnapshot) -> Iterator[Metric]:
    """The snapshot as metrics."""
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
    for name, text, attribute in _HISTOGRAMS:
        histogram = HistogramMetricFamily(name, text, labels=names)
        counted = shown.histograms[attribute]
        histogram.add_metric(values, counted.cumulative(), counted.total)
        yield histogram
