"""OTLP: finished requests as OpenTelemetry spans, sent to a collector from a thread of its own.

Takes trace.Trace.record as it is.  Owns the bounded queue, the thread and the words of the spans; whoever offers a
record never waits.  ``offer`` and ``figures``: event-loop thread.  Needs the extra otel, imported when it is made.
Names: OpenTelemetry's semantic conventions for HTTP and generative AI, and vLLM's for latencies.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

from vserve.errors import StartupError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.util.types import AttributeValue

log = logging.getLogger(__name__)

QUEUE_LIMIT = 2048
BATCH = 256
FLUSH_S = 1.0
TIMEOUT_S = 5.0
COMPLAIN_S = 60.0
PATH = "/v1/traces"
OPERATIONS = {
    "chat": "chat", "batch": "chat", "messages": "chat", "responses": "chat", "invocations": "chat",
    "completions": "text_completion", "embeddings": "embeddings", "score": "embeddings", "rerank": "embeddings",
}  # fmt: skip

Record = Mapping[str, object]


class _Sender(Protocol):
    """The library's exporter, as far as it is used here."""

    def export(self, spans: Sequence[ReadableSpan]) -> object: ...
    def shutdown(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ExportFigures:
    """Spans by fate: sent, refused by or never reached the collector, dropped because too many waited."""

    sent: int
    failed: int
    dropped: int


class Otlp:
    """Sends spans to one collector from ``start`` to ``close``."""

    def __init__(self, endpoint: str, version: str) -> None:
        """endpoint: an http or https URL.  version: the server's.

        Raises StartupError where the extra is missing and where the URL is none.
        """
        self._endpoint = checked(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import SpanExportResult
        except ImportError:
            raise StartupError(
                "--otlp-traces-endpoint needs the OpenTelemetry packages: pip install 'vserve[otel]'"
            ) from None
        # The exporter writes a line a failed attempt; we say once a minute what is lost.
        logging.getLogger("opentelemetry.exporter.otlp.proto.http").setLevel(logging.CRITICAL)
        self._exporter: _Sender = OTLPSpanExporter(endpoint=self._endpoint, timeout=TIMEOUT_S)
        self._success = SpanExportResult.SUCCESS
        self._resource = Resource.create({"service.version": version})
        if str(self._resource.attributes.get("service.name", "")).startswith("unknown_service"):  # not set by OTEL_*
            self._resource = self._resource.merge(Resource({"service.name": "vserve"}))
        self._queue: queue.Queue[Record | None] = queue.Queue(QUEUE_LIMIT)
        self._sent = self._failed = self._dropped = 0
        self._complained_s = -COMPLAIN_S
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def offer(self, record: dict[str, object]) -> None:
        """Queue a record, or count it as dropped when too many wait."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self, timeout_s: float) -> None:
        """Send what waits, for at most so long; what does not get away is lost."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._exporter.shutdown()  # ends an attempt under way; the daemon thread goes with the process
            return
        self._thread.join(timeout_s)
        self._exporter.shutdown()

    @property
    def figures(self) -> ExportFigures:
        """What became of the spans so far."""
        return ExportFigures(self._sent, self._failed, self._dropped)

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        going = True
        while going:
            records, going = self._batch()
            if records:
                self._send(records)

    def _batch(self) -> tuple[list[Record], bool]:
        """What has come within FLUSH_S of the first; False behind the last."""
        records: list[Record] = []
        until_s: float | None = None
        while len(records) < BATCH:
            try:
                item = self._queue.get(timeout=None if until_s is None else max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return records, False
            if not records:
                until_s = time.monotonic() + FLUSH_S
            records.append(item)
        return records, True

    def _send(self, records: Sequence[Record]) -> None:
        try:
            well = self._exporter.export([self._span(record) for record in records]) is self._success
        except Exception:  # whatever the library comes up with: it is a trace that is lost, no request
            log.exception("spans could not be made")
            well = False
        if well:
            self._sent += len(records)
            return
        self._failed += len(records)
        now_s = time.monotonic()
        if now_s - self._complained_s >= COMPLAIN_S:
            self._complained_s = now_s
            log.warning("traces do not reach %s: %d spans lost so far", self._endpoint, self._failed)

    def _span(self, record: Record) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        trace_id, parent_id = int(str(record["trace_id"]), 16), record["parent_span_id"]
        flags = TraceFlags(TraceFlags.SAMPLED)
        parent = None
        if isinstance(parent_id, str):
            parent = SpanContext(trace_id, int(parent_id, 16), is_remote=True, trace_flags=flags)
        status = record["status"]
        failed = not isinstance(status, int) or status >= 500
        operation = OPERATIONS.get(str(record["route"]))
        name = f"{operation} {record['model']}" if operation and record["model"] else str(record["route"])
        return ReadableSpan(
            name=name,
            context=SpanContext(trace_id, int(str(record["span_id"]), 16), is_remote=False, trace_flags=flags),
            parent=parent,
            resource=self._resource,
            attributes=attributes_of(record),
            events=self._events(record),
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
            start_time=_ns(record, 0.0),
            end_time=_ns(record, _ms(record, "ended_ms") or 0.0),
            instrumentation_scope=InstrumentationScope("vserve"),
        )

    def _events(self, record: Record) -> list[Event]:
        from opentelemetry.sdk.trace import Event

        events: list[Event] = []
        first_ms = _ms(record, "first_token_ms")
        if first_ms is not None:
            events.append(Event("first token", timestamp=_ns(record, first_ms)))
        for choice in cast("Sequence[Record]", record["choices"]):
            for at_ms in cast("Sequence[float]", choice["preempted_ms"]):
                events.append(Event("preempted", {"choice": str(choice["index"])}, _ns(record, at_ms)))
        return events


def checked(endpoint: str) -> str:
    """The URL with its path.  Raises StartupError for what is no http URL, or has credentials in it."""
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise StartupError("--otlp-traces-endpoint must be a URL such as http://127.0.0.1:4318/v1/traces")
    if "@" in parts.netloc or parts.query:  # the URL is shown: in logs, in vserve config
        raise StartupError("--otlp-traces-endpoint takes no credentials; OTEL_EXPORTER_OTLP_HEADERS does")
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + PATH


def attributes_of(record: Record) -> dict[str, AttributeValue]:
    """What the span says of the request; times in seconds.  What is not known is left out."""
    choices = cast("Sequence[Record]", record["choices"])
    ended, queued = _ms(record, "ended_ms"), _ms(record, "queued_ms")
    begun, first = _ms(record, "first_scheduled_ms"), _ms(record, "first_token_ms")
    generated = [done for choice in choices if (done := _ms(choice, "ended_ms")) is not None]
    prompt, completion = record["prompt_tokens"], record["completion_tokens"]
    last = max(generated, default=None)
    found: dict[str, object] = {
        "http.request.method": record["method"],
        "http.route": record["route"],
        "http.response.status_code": record["status"],
        "http.response.body.size": record["bytes_written"],
        "gen_ai.operation.name": OPERATIONS.get(str(record["route"])),
        "gen_ai.provider.name": "vserve",
        "gen_ai.request.id": record["id"],
        "gen_ai.request.model": record["model"],
        "gen_ai.response.model": record["model"],
        "gen_ai.response.id": record["reply_id"],
        "gen_ai.request.max_tokens": record["max_tokens"],
        "gen_ai.request.temperature": record["temperature"],
        "gen_ai.request.top_p": record["top_p"],
        "gen_ai.request.n": record["n"] if choices else None,
        "gen_ai.usage.prompt_tokens": prompt or None,
        "gen_ai.usage.input_tokens": prompt or None,
        "gen_ai.latency.time_in_queue": _seconds(queued, begun),
    }
    if choices:
        found |= {
            "gen_ai.usage.num_sequences": len(choices) + cast(int, record["choices_left_out"]),
            "gen_ai.usage.completion_tokens": completion,
            "gen_ai.usage.output_tokens": completion,
            "gen_ai.response.finish_reasons": [str(one["finish_reason"]) for one in choices if one["finish_reason"]],
            "gen_ai.latency.time_to_first_token": _seconds(0.0, first),
            "gen_ai.latency.time_in_model_prefill": _seconds(begun, first),
            "gen_ai.latency.time_in_model_decode": _seconds(first, last),
            "gen_ai.latency.time_in_model_inference": _seconds(begun, last),
        }
    found["gen_ai.latency.e2e"] = _seconds(0.0, ended)
    return {name: cast("AttributeValue", value) for name, value in found.items() if value is not None}


def _seconds(begin_ms: float | None, end_ms: float | None) -> float | None:
    return None if begin_ms is None or end_ms is None else max(0.0, end_ms - begin_ms) / 1e3


def _ms(record: Record, name: str) -> float | None:
    value = record[name]
    return float(value) if isinstance(value, int | float) else None


def _ns(record: Record, at_ms: float) -> int:
    return int((_ms(record, "received") or 0.0) * 1e9 + at_ms * 1e6)
