"""What one engine's sequences and steps have been, and how /metrics shows it.

Names and edges are vLLM's, and a few ours.  Counted on the event loop in plain integers; a snapshot is turned into
metrics in another thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from vserve.observe.histogram import STEP_S, STEP_TOKENS, Counted, Histogram

FINISHED_REASONS = ("stop", "length", "abort", "error", "timeout")

# Seconds and tokens: vLLM's edges.
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
          160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
LATENCY_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
             960.0, 1920.0, 7680.0)  # fmt: skip


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

    def snapshot(self) -> EngineSnapshot:
        """A copy of all that as of now."""
        histograms = {attribute: getattr(self, attribute).snapshot() for _, _, attribute in _HISTOGRAMS}
        return EngineSnapshot(self.labels, self.now(), dict(self.finished), histograms)


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """One engine's part of a Snapshot.  histograms: by attribute of EngineSeries."""

    labels: Mapping[str, str]
    now: EngineNow
    finished: Mapping[str, int]
    histograms: Mapping[str, Counted]


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


def engine_metrics(shown: EngineSnapshot | None, gpu: Callable[[], float | None] | None) -> Iterator[Metric]:
    """The snapshot; None: the names without a value.  gpu: the driver's word on how busy the GPU is."""
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
