"""Probes and figures for operators: ping, health, readiness, version, load, metrics.

Every handler but metrics, and load where there is a GPU, answers within data_received and waits for nothing.
Event-loop thread only.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import orjson

from vserve.api.accept import prefers
from vserve.api.app import App
from vserve.api.status import Status
from vserve.http.exchange import Exchange, Response
from vserve.observe.metrics import CONTENT_TYPE

PONG = Response(200)


class Ops:
    """The endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._version_json = Response(200, orjson.dumps({"version": app.options.version}))
        self._version_text = Response(200, app.options.version.encode(), "text/plain; charset=utf-8")

    def ping(self, exchange: Exchange) -> Response:
        """The event loop turns: that is all it says."""
        return PONG

    def version(self, exchange: Exchange) -> Response:
        """As JSON, or bare when the client prefers plain text."""
        plain = prefers(exchange.head.headers.get("accept"), "text/plain", over="application/json")
        return self._version_text if plain else self._version_json

    def health(self, exchange: Exchange) -> Response:
        """200 when new work would be taken and the engine shows signs of life."""
        return self._report(self._well() and self._app.status is Status.READY)

    def ready(self, exchange: Exchange) -> Response:
        """The same as health: traffic may be sent here."""
        return self.health(exchange)

    def live(self, exchange: Exchange) -> Response:
        """503 only when a restart would help: the engine has died or hangs.  Starting and draining are alive."""
        return self._report(self._well())

    def startup(self, exchange: Exchange) -> Response:
        """200 once the start is over, whatever came after."""
        return self._report(self._app.status not in (Status.STARTING, Status.DEAD))

    def load(self, exchange: Exchange) -> Response | Awaitable[Response]:
        """How much there is to do and how busy the GPU is; without one, how busy the engine has been."""
        gpu = self._app.metrics.gpu
        return self._load(None) if gpu is None else self._load_of(gpu)

    async def _load_of(self, gpu: Callable[[], float | None]) -> Response:
        return self._load(await self._app.off_loop(gpu))  # the driver may take a millisecond

    def _load(self, busy: float | None) -> Response:
        app = self._app
        served = app.loaded
        figures: dict[str, object] = {
            "server_load": len(app.replies),
            "queue_size": 0,
            "active_workers": 0,
            "gpu_utilization": round(app.usage.utilization() if busy is None else busy, 4),
        }
        if served is not None:
            stats = served.model.bridge.stats
            figures["queue_size"] = served.model.waiting.size
            figures["active_workers"] = int(self._well())
            figures["running"] = stats.running
            figures["waiting"] = stats.waiting
            figures["kv_cache_usage"] = round(stats.cache_usage, 4)
            figures["kv_blocks_held"] = stats.total_blocks - stats.free_blocks - stats.cached_blocks
            figures["kv_blocks_total"] = stats.total_blocks
        encoder = app.loaded_encoder
        if encoder is not None:
            figures["active_workers"] = int(self._well())
            figures["embedding_requests"] = encoder.model.waiting.size
            figures["embedding_tokens"] = encoder.model.waiting.tokens
        return Response(200, orjson.dumps(figures))

    async def metrics(self, exchange: Exchange) -> Response:
        """The Prometheus text: counted on the loop at one moment, written out beside it."""
        metrics = self._app.metrics
        snapshot = metrics.snapshot()
        return Response(200, await self._app.off_loop(lambda: metrics.render(snapshot)), CONTENT_TYPE)

    def _well(self) -> bool:
        """Whether the engine, if it is there already, is alive and not stuck in a step."""
        app = self._app
        if app.status in (Status.DEAD, Status.STOPPED):
            return False
        bound_s, now_s = app.options.stall_timeout_s, time.monotonic()
        beats = [part.model.heartbeat for part in (app.loaded, app.loaded_encoder) if part is not None]
        return all(beat.verdict(now_s, stall_bound_s=bound_s).healthy for beat in beats)

    def _report(self, good: bool) -> Response:
        app = self._app
        status, served = app.status, app.loaded
        fields: dict[str, object] = {"status": "ok" if good else "unavailable", "phase": app.life.phase}
        share = app.life.stage.share if status is Status.STARTING else 1.0
        fields["progress"] = None if share is None or status is Status.DEAD else round(share, 4)
        fields["heartbeat_age_s"] = None  # until there is an engine
        if served is not None:
            stats = served.model.bridge.stats
            bound_s = app.options.stall_timeout_s
            verdict = served.model.heartbeat.verdict(time.monotonic(), stall_bound_s=bound_s)
            fields["heartbeat_age_s"] = round(verdict.age_s, 3)
            fields["reason"] = verdict.reason
            fields["running"] = stats.running
            fields["waiting"] = served.model.waiting.size
        encoder = app.loaded_encoder
        if encoder is not None:
            bound_s = app.options.stall_timeout_s
            verdict = encoder.model.heartbeat.verdict(time.monotonic(), stall_bound_s=bound_s)
            fields["embedding_heartbeat_age_s"] = round(verdict.age_s, 3)
            fields["embedding_reason"] = verdict.reason
            fields["embedding_requests"] = encoder.model.waiting.size
        return Response(200 if good else 503, orjson.dumps(fields), headers=() if good else _RETRY)


_RETRY = (("retry-after", "1"),)
