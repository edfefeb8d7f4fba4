"""App: what every route shares, from the first second (no model yet) to the last (draining).

Owns the life cycle, the keys, the small thread pool for long texts, the open replies and the shared keep-alive timer.
Knows nothing of sockets or of how a model computes.  Event-loop thread only, but for ``starting``.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from vserve.api.access import Caller, Keys, credentials
from vserve.api.defaults import Defaults
from vserve.api.encoder import EncoderModel, EncoderServed
from vserve.api.keepalive import KeepAlive
from vserve.api.load import Usage
from vserve.api.meter import SeriesMeter, engine_now
from vserve.api.status import Lifecycle, Status
from vserve.api.tracing import Exporter, Tracing
from vserve.api.trail import Trails
from vserve.bridge import Bridge
from vserve.errors import ApiError, BadRequest, NotFound, RateLimited, Unavailable, shorten
from vserve.http.exchange import Exchange
from vserve.http.site import AccessEntry
from vserve.oauth.grants import Flow
from vserve.observe.engine_series import EngineSeries
from vserve.observe.heartbeat import Heartbeat
from vserve.observe.metrics import Metrics
from vserve.observe.trace import TraceRing
from vserve.scale.workers import LocalWorker, Workers
from vserve.store.memory import MemoryStore
from vserve.store.record import Store
from vserve.text.grammar import HELPERS, Grammar, Grammars, why_none
from vserve.text.grammar_spec import GrammarSpec
from vserve.text.habits import Habits, habits_of
from vserve.text.template import ChatTemplate
from vserve.text.tokenizer import Tokenizer
from vserve.text.tokenizer_files import eos_ids_in

T = TypeVar("T")

TEXT_THREADS = 2
START_RETRY_S = 5

_REFUSED = {401: "unauthorized", 403: "forbidden", 429: "overloaded"}


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator chose.  Times in seconds.

    rca: the routes under /debug are served.  rca_traces, rca_trace_bytes: bounds of the traces kept for them.
    settings: what the server was started with, as JSON has it and without secrets, for them.
    docs: /openapi.json and the pages are served.  root_path: what a proxy puts before every path, "" for nothing.
    oauth2: how a browser gets an access token, None where /openapi.json does not say.
    long_text_chars: texts longer than this are rendered and tokenised off the loop.
    resume_s, resume_streams, resume_bytes: how long, and how many, broken streams can be gone on with.
    tool_call_parser, reasoning_parser: the flags' values; "auto" is what the chat template shows.
    max_sequences: most choices of one request, over all its prompts.
    """

    version: str
    api_keys: tuple[str, ...] = ()
    strict: bool = False
    docs: bool = True
    rca: bool = False
    rca_traces: int = 1000
    rca_trace_bytes: int = 16 * 2**20
    settings: Mapping[str, object] = field(default_factory=dict)
    root_path: str = ""
    oauth2: Flow | None = None
    keep_alive_s: float = 15.0
    request_timeout_s: float | None = None
    stall_timeout_s: float = 60.0
    drain_retry_s: int = 5
    max_queue: int = 1024
    max_queued_tokens: int = 2**20
    max_sequences: int = 1024
    long_text_chars: int = 8192
    resume_s: float = 60.0
    resume_streams: int = 1024
    resume_bytes: int = 64 * 2**20
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"


class Waiting(Protocol):
    """The queue in front of the engine, as far as the gate looks at it."""

    @property
    def size(self) -> int:
        """Requests that wait for the engine to start on them."""

    @property
    def tokens(self) -> int:
        """Prompt tokens of those requests."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What computes.  cuda_version: None where torch was built without; device: "cpu" or "cuda"."""

    torch_version: str
    cuda_version: str | None
    device: str


@dataclass(frozen=True, slots=True)
class Model:
    """What exists once the model is loaded.

    names: what clients call it, the default first.  vocab_size: the width of its logits.  max_model_len: tokens of
    prompt plus answer.  grammars: None where there can be no structured output.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    bridge: Bridge
    waiting: Waiting
    heartbeat: Heartbeat
    max_model_len: int
    vocab_size: int
    generation_config: Mapping[str, object] = field(default_factory=dict)
    grammars: Grammars | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """A Model with what follows from it, worked out once.

    habits: how it writes calls of tools and reasoning.  embedding: names of the embedding model beside it.
    """

    model: Model
    defaults: Defaults
    habits: Habits
    eos_ids: frozenset[int]
    fingerprint: str
    created_s: int
    embedding: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """The width of the model's output: every id of a request is below it."""
        return self.model.vocab_size

    def name(self, asked: str | None) -> str:
        """The name that replies show, the first, for any that is served.

        Raises NotFound that lists the valid ones, BadRequest for one that does not generate.
        """
        names = self.model.names
        if not asked or asked in names:
            return names[0]
        shown, valid = shorten(asked)[1:-1], ", ".join(names)
        if asked in self.embedding:
            raise BadRequest(
                f"The model `{shown}` is for embeddings and does not generate text; use {valid}.", param="model"
            )
        raise NotFound(f"The model `{shown}` does not exist. Valid models: {valid}", param="model")


class Ending(Protocol):
    """A reply under way, as the shutdown sees it."""

    def fail(self, error: ApiError) -> None:
        """End now with this error."""


class App:
    """One server's shared state.  Made before the model; ``ready`` brings the model in."""

    def __init__(self, options: Options, store: Store | None = None, exporter: Exporter | None = None) -> None:
        """store: of responses; in memory with the default bounds where none is given.

        exporter: takes the traces of finished requests.
        """
        self.options = options
        self.store = store or MemoryStore()
        self.runtime: Runtime | None = None  # once it is loaded
        self.tracing: Tracing | None = None
        if options.rca or exporter is not None:
            ring = TraceRing(options.rca_traces, options.rca_trace_bytes) if options.rca else None
            self.tracing = Tracing(ring, exporter)
        self.life = Lifecycle()
        self.keys = Keys(options.api_keys)
        self.keep_alive = KeepAlive(options.keep_alive_s)
        self.usage = Usage()
        self.trails = Trails(options.resume_s, options.resume_streams, options.resume_bytes)
        self.metrics = Metrics()
        if self.tracing is not None:
            self.tracing.show(self.metrics)
        self.metrics.stored = lambda: self.store.figures
        self.replies: set[Ending] = set()
        self.tasks: set[asyncio.Task[None]] = set()  # what goes on without a connection
        self.workers: Workers = LocalWorker()
        self._pool = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        # Apart from the other: a grammar may take seconds, and most of them in a process of its own.
        self._compilers = ThreadPoolExecutor(HELPERS, thread_name_prefix="grammar")
        self._served: Served | None = None
        self._encoder: EncoderServed | None = None

    def starting(self, phase: str, share: float | None = None) -> None:
        """Say what the start is busy with, and how much of it is done in [0, 1].  Any thread."""
        self.life.report(phase, share)

    def ready(self, model: Model | None, encoder: EncoderModel | None = None) -> None:
        """Start serving the model, an embedding model, or both.  A server already told to drain stays so."""
        if encoder is not None:
            self._encoder = EncoderServed(encoder, self.options.max_queue, self.options.max_queued_tokens)
            self.metrics.serve_encoder(self._encoder.series)
        if model is not None:
            self._serve(model)
        if self.life.status is Status.STARTING:
            self.life.to(Status.READY)

    def _serve(self, model: Model) -> None:
        embedding: tuple[str, ...] = ()
        if self._encoder is not None:
            embedding = self._encoder.model.names
            self._encoder.generative = model.names
        self._served = Served(
            model=model,
            defaults=Defaults.of(model.generation_config),
            habits=habits_of(
                model.template, model.tokenizer, self.options.tool_call_parser, self.options.reasoning_parser
            ),
            eos_ids=model.tokenizer.eos_ids | eos_ids_in(model.generation_config, model.vocab_size),
            fingerprint="fp_" + hashlib.sha256(f"{self.options.version}/{model.names}".encode()).hexdigest()[:10],
            created_s=int(time.time()),
            embedding=embedding,
        )
        model.bridge.on_stats = self.usage.observe
        model.bridge.tracer = self.tracing
        series = EngineSeries(
            model.names[0],
            model.max_model_len,
            lambda: engine_now(model.bridge.stats, model.waiting.size, self.usage.utilization()),
        )
        model.bridge.meter = SeriesMeter(series)
        self.metrics.serve(series)

    def drain(self) -> None:
        """Refuse new work from now on; replies under way go on.  Calling it again changes nothing."""
        if self.life.can(Status.DRAINING):
            self.life.to(Status.DRAINING)

    def abort(self, error: ApiError) -> None:
        """End every reply under way with error."""
        for reply in list(self.replies):
            reply.fail(error)

    async def settle(self, timeout_s: float) -> None:
        """Wait until nothing goes on without a connection, at most so long."""
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=timeout_s)

    def stopped(self) -> None:
        """The last reply is out: give the threads back."""
        if self.life.can(Status.STOPPED):
            self.life.to(Status.STOPPED)
        self.keep_alive.close()
        self.trails.close()
        self.metrics.timer.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.store.close()
        self._compilers.shutdown(wait=False, cancel_futures=True)
        if self._served is not None and self._served.model.grammars is not None:
            self._served.model.grammars.close()

    @property
    def status(self) -> Status:
        """The status now; an engine that died since the last look is noticed here."""
        bridges = [part.model.bridge for part in (self._served, self._encoder) if part is not None]
        if any(bridge.death is not None for bridge in bridges) and self.life.can(Status.DEAD):
            self.life.to(Status.DEAD)
        return self.life.status

    @property
    def served(self) -> Served:
        """The model that generates.  Raises Unavailable while nothing is served, NotFound where only embeddings are."""
        error = self.unavailable()
        if error is not None:
            raise error
        if self._served is None:
            raise NotFound("This server has only an embedding model: it does not generate text.", param="model")
        return self._served

    @property
    def encoder(self) -> EncoderServed:
        """The embedding model.  Raises Unavailable while nothing is served, NotFound where there is no such model."""
        error = self.unavailable()
        if error is not None:
            raise error
        if self._encoder is None:
            raise NotFound(
                "This server has no embedding model; it is started with --embedding-model to have one.", param="model"
            )
        return self._encoder

    @property
    def loaded(self) -> Served | None:
        """The model, whatever the status; None until it is loaded."""
        return self._served

    @property
    def loaded_encoder(self) -> EncoderServed | None:
        """The embedding model, whatever the status; None until it is loaded, and where there is none."""
        return self._encoder

    def unavailable(self) -> Unavailable | None:
        """Why no new work is taken, or None when it is."""
        match self.status:
            case Status.READY:
                return None
            case Status.STARTING:
                share = self.life.stage.share
                done = "" if share is None else f", {share:.0%} done"
                return Unavailable(
                    f"The server is starting ({self.life.phase}{done}); try again in a moment.",
                    retry_after_s=START_RETRY_S,
                    close=True,
                )
            case Status.DRAINING:
                return Unavailable(
                    "The server is shutting down and takes no new requests.",
                    retry_after_s=self.options.drain_retry_s,
                    close=True,
                )
            case Status.DEAD | Status.STOPPED:
                return Unavailable("The engine has stopped; the server is shutting down.", close=True)

    def overloaded(self) -> RateLimited | None:
        """The 429 for a full queue, or None while there is room for one more token."""
        if self._served is None:
            return None
        waiting = self._served.model.waiting
        for count, limit, what in (
            (waiting.size, self.options.max_queue, "requests"),
            (waiting.tokens, self.options.max_queued_tokens, "prompt tokens"),
        ):
            if count >= limit:
                text = f"{count} {what} are waiting, the limit is {limit}; try again later."
                return RateLimited(text, retry_after_s=self.retry_after_s())
        return None

    def encoder_overloaded(self) -> RateLimited | None:
        """The 429 for the embedding model's full queue, or None while there is room."""
        return None if self._encoder is None else self._encoder.overloaded()

    def encoder_retry_after_s(self) -> int:
        """Whole seconds until the embedding model's queue has probably drained."""
        return 1 if self._encoder is None else self._encoder.retry_after_s()

    def retry_after_s(self) -> int:
        """Whole seconds until a full queue has probably drained, from the rate at which requests finished lately."""
        waiting = self._served.model.waiting.size if self._served is not None else 0
        return self.usage.seconds_to_finish(waiting)

    def exchanged(self, entry: AccessEntry) -> None:
        """Count a finished, refused or broken-off exchange (the access log's hook)."""
        self.metrics.exchange(entry.route, entry.method, entry.status, entry.duration_s)
        if self.tracing is not None:
            self.tracing.exchanged(entry)

    def refused(self, error: ApiError) -> None:
        """Count a request that was not let in."""
        reason = _REFUSED.get(error.status)
        if reason is None:  # a server that is ready lets in all it can tell who they are
            reason = "issuer" if self.status is Status.READY else self.status.value
        self.metrics.refused(reason)

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Run work in the pool for long texts."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def caller(self, exchange: Exchange) -> Caller | None:
        """Whose key came with this request; None when no keys are configured."""
        return self.keys.caller(credentials(exchange.request.headers))

    async def compiled(self, served: Served, spec: GrammarSpec, path: str) -> Grammar:
        """The grammar of spec, which came in the field path.  Raises BadRequest with the reason why there is none."""
        grammars = served.model.grammars
        if grammars is None:
            reason = why_none(served.model.tokenizer, served.eos_ids) or "this model's vocabulary cannot be used for it"
            raise BadRequest(f"`{path}` needs structured output: {reason}.", param=path)
        found = grammars.kept(spec)
        if found is not None:
            return found
        work = functools.partial(grammars.compile, spec, path)
        return await asyncio.get_running_loop().run_in_executor(self._compilers, work)

    def salt(self, exchange: Exchange, asked: str | None) -> bytes:
        """The prefix-cache salt of this request: the caller's own, then the one it asked for."""
        own = self.keys.salt(credentials(exchange.request.headers))
        return own if asked is None else own + asked.encode("utf-8", "surrogatepass")
