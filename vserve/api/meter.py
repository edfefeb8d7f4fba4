"""What crosses the bridge, as metrics: the bridge's Meter over one EngineSeries.

Event-loop thread only.  ``first`` and ``gap`` run once a push, ``step`` once a step, ``ended`` once a sequence.
"""

from __future__ import annotations

from vserve.bridge import Ended
from vserve.engine.request import EngineStats
from vserve.observe.engine_series import EngineNow, EngineSeries


def engine_now(stats: EngineStats, waiting: int, utilization: float) -> EngineNow:
    """The engine's last figures as the scrape shows them; waiting counts those it has not yet looked at, too."""
    return EngineNow(
        running=stats.running,
        waiting=waiting,
        swapped=stats.swapped,
        cache_usage=stats.cache_usage,
        utilization=utilization,
        prompt_tokens_total=stats.prompt_tokens_total,
        generation_tokens_total=stats.generated_tokens_total,
        prefix_queries_total=stats.prefix_queries_total,
        prefix_hits_total=stats.prefix_hits_total,
        preemptions_total=stats.preemptions_total,
        steps_total=stats.steps_total,
    )


class SeriesMeter:
    """See bridge.Meter.

    Every ended sequence counts once in its latency, queue time and token histograms, whatever its reason: leaving out
    those that ran into a deadline would hide the tail.  Prefill and decode count once they were reached.  Of sequences
    that the engine took down with it only latency and tokens are known.
    """

    def __init__(self, series: EngineSeries) -> None:
        self._series = series
        self._last = EngineStats()
        self.first = series.time_to_first_token.observe
        self.gap = series.inter_token_latency.observe

    def step(self, stats: EngineStats) -> None:
        """See bridge.Meter.  Turns without a step count with the next one that has one."""
        last = self._last
        steps = stats.steps_total - last.steps_total
        if steps <= 0:
            return
        self._last = stats
        tokens = stats.prompt_tokens_total - last.prompt_tokens_total
        tokens += stats.generated_tokens_total - last.generated_tokens_total
        self._series.step_tokens.observe(tokens / steps)
        busy_s = stats.busy_s_total - last.busy_s_total
        if busy_s > 0.0:  # the engine adds a step's time after publishing it: these are the seconds of the one before
            self._series.step_time.observe(busy_s / steps)

    def ended(self, end: Ended) -> None:
        """See bridge.Meter."""
        series, timing = self._series, end.timing
        series.finished[end.reason.value] += 1
        series.latency.observe(end.latency_s)
        series.prompt_tokens.observe(end.prompt_tokens)
        series.generation_tokens.observe(end.tokens)
        if timing is None:  # the engine died, and with it what it knew
            return
        series.queue_time.observe(max(0.0, timing.scheduled_s - timing.arrival_s))
        if not end.tokens:
            return
        decode_s = max(0.0, timing.finished_s - timing.first_token_s)
        series.prefill_time.observe(max(0.0, timing.first_token_s - timing.scheduled_s))
        series.decode_time.observe(decode_s)
        if end.tokens > 1:
            series.time_per_output_token.observe(decode_s / (end.tokens - 1))
