"""The routes under /debug: versions, figures, the cache, the last requests and the settings, for people at night.

Served with --enable-rca only, for keys with the scope admin.  Shows no key, no prompt and no answer.  Event-loop thread
only.
"""

from __future__ import annotations

import functools
import platform
from typing import cast

import orjson

from vserve.api.app import App
from vserve.api.asked import query_fields
from vserve.api.fields import Field, Int, OneOf, Text, read, table
from vserve.api.generation import ignored_header
from vserve.build import git_hash
from vserve.engine.request import EngineStats
from vserve.http.exchange import Exchange, Response
from vserve.observe.chrome import Record, events_of

MOST_TRACES = 100_000
LIMIT: Field[int] = Field("limit", Int(1, MOST_TRACES), 100, "most traces, the latest first")
ID: Field[str | None] = Field(
    "id", Text(160, 1), None, "only of the request with this X-Request-Id, reply id, trace id or number of a choice"
)
FORMAT: Field[str] = Field(
    "format", OneOf(("json", "chrome")), "json", "chrome: trace events, for Perfetto and chrome://tracing"
)
TRACES = table(LIMIT, ID, FORMAT)


class Debug:
    """The endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._commit = git_hash()

    def version(self, exchange: Exchange) -> Response:
        """What runs: torch's are null until it is loaded, the commit where the build did not write it down."""
        runtime = self._app.runtime
        return _json(
            {
                "version": self._app.options.version,
                "git_hash": self._commit,
                "cuda_version": None if runtime is None else runtime.cuda_version,
                "torch_version": None if runtime is None else runtime.torch_version,
                "python_version": platform.python_version(),
                "device": None if runtime is None else runtime.device,
                "platform": platform.platform(),
            }
        )

    def stats(self, exchange: Exchange) -> Response:
        """What the engine does now, and how fast it was over the last seconds."""
        app, stats = self._app, self._stats()
        done = app.usage.throughput()
        served = app.loaded
        return _json(
            {
                "num_running_requests": stats.running,
                "num_waiting_requests": 0 if served is None else served.model.waiting.size,
                "num_swapped_requests": stats.swapped,
                "gpu_cache_usage": round(stats.cache_usage, 4),
                "cpu_cache_usage": 0.0,  # nothing is swapped out: a sequence that loses its blocks is computed again
                "avg_prompt_throughput": round(done.prompt, 1),
                "avg_generation_throughput": round(done.generation, 1),
                "num_open_replies": len(app.replies),
                "num_preemptions": stats.preemptions_total,
                "num_finished": stats.finished_total,
                "num_aborted": stats.aborted_total,
                "num_steps": stats.steps_total,
                "utilization": round(app.usage.utilization(), 4),
                "prompt_tokens": stats.prompt_tokens_total,
                "generation_tokens": stats.generated_tokens_total,
            }
        )

    def cache_stats(self, exchange: Exchange) -> Response:
        """Blocks of the KV cache: used ones are held by live sequences; cached ones are free until they are needed."""
        stats = self._stats()
        used = stats.total_blocks - stats.free_blocks - stats.cached_blocks
        asked = stats.prefix_queries_total
        return _json(
            {
                "num_free_gpu_blocks": stats.total_blocks - used,
                "num_used_gpu_blocks": used,
                "gpu_cache_percent": round(100.0 * stats.cache_usage, 2),
                "num_free_cpu_blocks": 0,
                "num_used_cpu_blocks": 0,
                "num_cached_blocks": stats.cached_blocks,
                "prefix_cache_queries": asked,
                "prefix_cache_hits": stats.prefix_hits_total,
                "prefix_cache_hit_rate": round(stats.prefix_hits_total / asked, 4) if asked else None,
            }
        )

    async def traces(self, exchange: Exchange) -> Response:
        """The last requests: as JSON, or as trace events.  Raises BadRequest."""
        app = self._app
        values, ignored = read(query_fields(exchange.request, TRACES), TRACES, 0, app.options.strict)
        ring = None if app.tracing is None else app.tracing.ring
        found = [] if ring is None else ring.find(values[LIMIT], values[ID])
        if values[FORMAT] == "chrome":
            body = await app.off_loop(functools.partial(_chrome, found, f"vserve {app.options.version}"))
        else:
            figures = {} if ring is None else {"kept": ring.figures.kept, "pushed_out": ring.figures.pushed_out}
            body = b'{"traces":[' + b",".join(found) + b'],"ring":' + orjson.dumps(figures) + b"}"
        return Response(200, body, headers=ignored_header(ignored))

    def config(self, exchange: Exchange) -> Response:
        """What the server was started with, and what came of it.  Of secrets only whether they were given."""
        app = self._app
        served, encoder = app.loaded, app.loaded_encoder
        shown: dict[str, object] = dict(app.options.settings)
        shown["model_name"] = None if served is None else served.model.names[0]
        shown["max_model_len"] = None if served is None else served.model.max_model_len
        shown["embedding_model_name"] = None if encoder is None else encoder.model.names[0]
        shown["num_gpu_blocks"] = self._stats().total_blocks
        shown["swap_space_bytes"] = 0
        return _json(shown)

    def _stats(self) -> EngineStats:
        served = self._app.loaded
        return EngineStats() if served is None else served.model.bridge.stats


def _json(fields: dict[str, object]) -> Response:
    return Response(200, orjson.dumps(fields))


def _chrome(records: list[bytes], process: str) -> bytes:
    parsed = [cast(Record, orjson.loads(record)) for record in records]
    return orjson.dumps(events_of(parsed, process))
