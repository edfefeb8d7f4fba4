"""Traces: quantiles, parents, the bounds of the ring, and that a record says what happened and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vserve.observe.chrome import events_of
from vserve.observe.trace import MOST_CHOICES, MOST_GAPS, Gaps, Kept, Parent, Trace, TraceRing, parent_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@given(
    st.lists(st.floats(0.0, 100.0), min_size=1, max_size=300),
    st.sampled_from((0.5, 0.99, 1.0)),
)
def test_up_to_the_bound_quantiles_are_exact(values: list[float], share: float) -> None:
    gaps = Gaps()
    for value in values:
        gaps.add(value)
    wanted = sorted(values)[math.ceil(share * len(values)) - 1]
    assert gaps.quantile(share) == wanted
    assert (gaps.count, gaps.largest_s) == (len(values), max(values))


def test_beyond_the_bound_memory_stays_and_quantiles_are_near() -> None:
    gaps = Gaps()
    total = 20 * MOST_GAPS
    for i in range(total):
        gaps.add(i / total)
    assert len(gaps._kept) < MOST_GAPS
    assert gaps.count == total
    assert gaps.largest_s == (total - 1) / total
    assert abs(gaps.quantile(0.5) - 0.5) < 0.01
    assert abs(gaps.quantile(0.99) - 0.99) < 0.01


@pytest.mark.parametrize(
    ("header", "meaning"),
    [
        (f"00-{TRACE}-{SPAN}-01", Parent(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-00", Parent(TRACE, SPAN, False)),
        (f"01-{TRACE}-{SPAN}-03-what-comes-later", Parent(TRACE, SPAN, True)),  # a later version: the known part
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        ("a key or a prompt", None),
        ("", None),
        (None, None),
    ],
)
def test_a_traceparent_is_taken_as_w3c_has_it(header: str | None, meaning: Parent | None) -> None:
    assert parent_of(header) == meaning


@given(
    st.lists(st.integers(1, 60), max_size=60),
    st.integers(1, 8),
    st.integers(1, 200),
)
def test_a_ring_keeps_the_last_within_both_bounds(sizes: list[int], limit: int, limit_bytes: int) -> None:
    ring = TraceRing(limit, limit_bytes)
    bodies = [bytes([i % 256]) * size for i, size in enumerate(sizes)]
    for i, body in enumerate(bodies):
        ring.add(Kept(frozenset({str(i)}), body))
        figures = ring.figures
        assert figures.kept <= limit
        assert figures.bytes <= limit_bytes
        assert figures.total == i + 1 == figures.kept + figures.pushed_out
        kept = bodies[i + 1 - figures.kept : i + 1]
        assert ring.find(1000) == kept[::-1]
        assert ring.find(1) == kept[::-1][:1]
        assert sum(map(len, kept)) == figures.bytes
        if figures.kept < limit and i + 1 > figures.kept:  # no more was dropped than had to be
            assert figures.bytes + len(bodies[i - figures.kept]) > limit_bytes
        for j in range(i + 1):
            assert ring.find(5, str(j)) == ([bodies[j]] if j > i - figures.kept else [])


def traced() -> Trace:
    """A request of two choices; one was preempted, the other never began."""
    trace = Trace("req-1", "chat", "POST", 10.0, 10.001, None)
    trace.tokenised_s, trace.reply_id, trace.model, trace.stream, trace.n = 10.002, "chatcmpl-1", "m", True, 2
    first, second = trace.choice(7, 20), trace.choice(8, 20)
    assert first is not None
    assert second is not None
    first.queued_s, first.scheduled_s, first.first_token_s, first.ended_s = 10.002, 10.010, 10.050, 10.090
    first.chunks = ((3, 10.010, 0, 16), (4, 10.030, 16, 4), (9, 10.080, 0, 22))
    first.preemptions, first.preempted_s = 1, (10.070,)
    first.tokens, first.finish_reason = 3, "stop"
    for gap_s in (0.01, 0.03):
        first.gaps.add(gap_s)
    second.queued_s, second.ended_s, second.finish_reason = 10.002, 10.090, "abort"
    trace.ended_s, trace.status, trace.bytes_written = 10.091, 200, 1234
    trace.prompt_tokens, trace.completion_tokens = 20, 3
    return trace


def test_a_record_has_the_whole_timeline_in_milliseconds() -> None:
    record = json.loads(json.dumps(traced().record()))
    times = [record[f"{name}_ms"] for name in ("admitted", "tokenised", "queued", "first_scheduled", "first_token")]
    assert times == pytest.approx([1.0, 2.0, 2.0, 10.0, 50.0])
    assert record["ended_ms"] == pytest.approx(91.0)
    first, second = record["choices"]
    assert first["prefill"][1] == {"step": 4, "at_ms": 30.0, "start": 16, "tokens": 4}
    assert first["gaps"] == {"count": 2, "p50_ms": 10.0, "p99_ms": 30.0, "max_ms": 30.0}
    assert (first["preemptions"], first["preempted_ms"]) == (1, [70.0])
    assert (second["first_scheduled_ms"], second["gaps"], second["finish_reason"]) == (None, {"count": 0}, "abort")


def test_choices_beyond_the_bound_are_counted() -> None:
    trace = Trace("req-1", "chat", "POST", 0.0, 0.0, None)
    made = [trace.choice(i, 1) for i in range(MOST_CHOICES + 5)]
    assert [one is None for one in made].count(True) == trace.record()["choices_left_out"] == 5


NUMBER = (int, float)
REQUIRED: dict[str, dict[str, type | tuple[type, ...]]] = {
    # Trace Event Format: complete, instant and metadata events
    "X": {"name": str, "cat": str, "ts": NUMBER, "dur": NUMBER, "pid": int, "tid": int, "args": dict},
    "i": {"name": str, "cat": str, "ts": NUMBER, "s": str, "pid": int, "tid": int},
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
}
META: dict[str, Callable[[object], bool]] = {
    "process_name": lambda name: isinstance(name, str),
    "thread_name": lambda name: isinstance(name, str),
    "thread_sort_index": lambda index: isinstance(index, int),
}


def test_trace_events_have_every_field_that_the_format_requires() -> None:
    made = json.loads(json.dumps(events_of([traced().record()], "vserve")))
    assert made["displayTimeUnit"] in ("ms", "ns")
    seen = set()
    for event in made["traceEvents"]:
        seen.add(event["ph"])
        for name, kind in REQUIRED[event["ph"]].items():
            assert isinstance(event[name], kind), (event, name)
        if event["ph"] == "M":
            ((key, value),) = event["args"].items()
            assert META[event["name"]](value)
            assert key == ("sort_index" if event["name"] == "thread_sort_index" else "name")
        else:
            assert event["ts"] > 0
            assert event.get("s", "t") in ("g", "p", "t")
    assert seen == set(REQUIRED)


def test_spans_of_one_track_lie_within_each_other_or_apart() -> None:
    events = [event for event in events_of([traced().record()] * 2, "vserve")["traceEvents"] if event["ph"] == "X"]  # type: ignore[union-attr,index,attr-defined]
    tracks = {event["tid"] for event in events}
    assert len(tracks) == 6  # two requests, each with two choices
    slack_us = 1.0  # of the double that holds a wall clock in microseconds
    for track in tracks:
        spans = [(one["ts"], one["ts"] + one["dur"]) for one in events if one["tid"] == track]
        for begin, end in spans:
            for other_begin, other_end in spans:
                apart = end <= other_begin + slack_us or other_end <= begin + slack_us
                within = begin >= other_begin - slack_us and end <= other_end + slack_us
                around = other_begin >= begin - slack_us and other_end <= end + slack_us
                assert apart or within or around
