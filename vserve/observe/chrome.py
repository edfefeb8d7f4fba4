"""Traces in the Trace Event Format, which Perfetto and chrome://tracing open.  Pure.

Each request has a track, and so has each of its choices; they lie below each other.  Times are microseconds of the wall
clock.  The format: "Trace Event Format" (Chromium project), the JSON object form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

Record = Mapping[str, object]
Event = dict[str, object]

PID = 1
CATEGORY = "request"
_KEPT = ("id", "reply_id", "trace_id", "model", "status", "bytes_written", "client_gone", "stream")
_COUNTED = ("id", "prompt_tokens", "cached_tokens", "completion_tokens", "preemptions", "finish_reason", "gaps")


def events_of(records: Sequence[Record], process: str) -> dict[str, object]:
    """The JSON object of these records (trace.Trace.record), in any order.  process: the name of the one process."""
    events = [_meta("process_name", 0, {"name": process})]
    track = 0
    for record in records:
        track += 1
        events += _request(record, track)
        base_us = _number(record, "received") * 1e6
        for choice in cast("Sequence[Record]", record["choices"]):
            track += 1
            events += _choice(choice, base_us, track)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _request(record: Record, track: int) -> list[Event]:
    route, base_us = str(record["route"]), _number(record, "received") * 1e6
    ended_ms = _time(record, "ended_ms") or 0.0
    made = [
        _meta("thread_name", track, {"name": f"{route} {record['id']}"}),
        _meta("thread_sort_index", track, {"sort_index": track}),
        _span(route, track, base_us, 0.0, ended_ms, {name: record[name] for name in _KEPT}),
    ]
    admitted_ms = _time(record, "admitted_ms") or 0.0
    if admitted_ms > 0.0:
        made.append(_span("receive", track, base_us, 0.0, admitted_ms, {}))
    tokenised_ms = _time(record, "tokenised_ms")
    if tokenised_ms is not None:
        made.append(_span("read and tokenise", track, base_us, admitted_ms, tokenised_ms, {}))
    return made


def _choice(choice: Record, base_us: float, track: int) -> list[Event]:
    made = [
        _meta("thread_name", track, {"name": f"choice {choice['index']}"}),
        _meta("thread_sort_index", track, {"sort_index": track}),
    ]
    queued, scheduled = _time(choice, "queued_ms"), _time(choice, "first_scheduled_ms")
    first, ended = _time(choice, "first_token_ms"), _time(choice, "ended_ms")
    if queued is None or ended is None:
        return made
    made.append(_span("queue", track, base_us, queued, ended if scheduled is None else scheduled, {}))
    if scheduled is not None:
        until = ended if first is None else first
        made.append(_span("prefill", track, base_us, scheduled, until, {"prompt_tokens": choice["prompt_tokens"]}))
        chunks = list(cast("Sequence[Record]", choice["prefill"]))
        starts = [_time(chunk, "at_ms") or 0.0 for chunk in chunks]
        for chunk, start, end in zip(chunks, starts, [*starts[1:], until], strict=True):
            if start < until:
                made.append(_span("chunk", track, base_us, start, min(end, until), _arguments(chunk)))
            else:  # computed again after a preemption: how long it took shows in the gap between tokens
                made.append(_instant("chunk again", track, base_us, start, _arguments(chunk)))
    if first is not None:
        made.append(_span("decode", track, base_us, first, ended, {name: choice[name] for name in _COUNTED}))
    for at_ms in cast("Sequence[float]", choice["preempted_ms"]):
        made.append(_instant("preempted", track, base_us, at_ms, {}))
    return made


def _arguments(chunk: Record) -> Event:
    return {name: chunk[name] for name in ("step", "start", "tokens")}


def _span(name: str, track: int, base_us: float, begin_ms: float, end_ms: float, arguments: Event) -> Event:
    return {
        "name": name,
        "cat": CATEGORY,
        "ph": "X",
        "ts": base_us + begin_ms * 1e3,
        "dur": max(0.0, end_ms - begin_ms) * 1e3,
        "pid": PID,
        "tid": track,
        "args": arguments,
    }


def _instant(name: str, track: int, base_us: float, at_ms: float, arguments: Event) -> Event:
    ts = base_us + at_ms * 1e3
    return {"name": name, "cat": CATEGORY, "ph": "i", "s": "t", "ts": ts, "pid": PID, "tid": track, "args": arguments}


def _meta(name: str, track: int, arguments: Event) -> Event:
    return {"name": name, "ph": "M", "ts": 0, "pid": PID, "tid": track, "args": arguments}


def _time(record: Record, name: str) -> float | None:
    value = record[name]
    return float(value) if isinstance(value, int | float) else None


def _number(record: Record, name: str) -> float:
    return _time(record, name) or 0.0
