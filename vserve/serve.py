"""One server's life: listen, load, serve, drain, stop.

The main thread runs the event loop (L); the engine thread (G) loads the model and then runs the step loop.  The port
listens before anything is loaded, so that probes hear from the first second how far the start is.  Exit codes are
cli.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vserve import __version__, preload
from vserve.config import Config
from vserve.errors import EngineDied, EngineStalled, StartupError, Unavailable
from vserve.model import cpu
from vserve.observe.gpu import utilization_reader
from vserve.observe.progress import Progress, Reporter
from vserve.observe.watchdog import Watchdog
from vserve.settings import public

if TYPE_CHECKING:  # torch comes with it: imported on G, while L already answers probes
    from vserve.api.app import Model
    from vserve.assemble import Engine
    from vserve.http.site import AccessEntry
    from vserve.observe.otlp import Otlp

SWITCH_INTERVAL_S = 100e-6
"""A thread waits at most this long for the GIL: 5 ms, the default, would be several steps (DESIGN.md, costs)."""
STOP_GRACE_S = 1.0
SETTLE_S = 1.0
"""At the end: responses cut short get so long to be stored as failed."""
STALL_GRACE_S = 0.5
"""At the end for a stall: all streams have their error event, and it takes at most twice this to reach them."""
ENGINE_JOIN_S = 1.0
OTLP_GRACE_S = 1.0
"""At the end: spans that wait get so long to be sent."""
CHAT_EXAMPLE = (
    "/v1/chat/completions",
    '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32}',
)
EMBED_EXAMPLE = ("/v1/embeddings", '{"input": "What is the capital of France?"}')
SCORE_EXAMPLE = ("/score", '{"text_1": "What is the capital of France?", "text_2": "Paris is a city in France."}')
EXIT_BUG = 1
EXIT_ENGINE_DIED = 3

log = logging.getLogger("vserve")


def serve(config: Config) -> int:
    """Serve until a signal or the engine's end; returns the exit code.  Main thread only."""
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    # What torch's libraries read once, when they are loaded.  A tile instruction is used in reduced precision only.
    reduced = config.device != "cuda" and not {config.dtype, config.embedding_dtype}.isdisjoint(("bfloat16", "float16"))
    os.environ.update(cpu.library_environment(os.environ, reduced_precision=reduced))
    faulthandler.enable()  # a model file cut while it is mapped ends the process by a signal: say where
    ahead = preload.begin(config.device)
    gc.disable()  # until all is imported: next to nothing of that is garbage
    try:
        return _run(config)
    finally:
        ahead.wait()
        gc.enable()


def _run(config: Config) -> int:
    import uvloop

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        service = _Service(config)
        code = runner.run(service.run())
        if service.engine_runs:
            # A thread stuck in the device, or still loading, may block or crash the interpreter's own end.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
        return code


class _Service:
    """The parts that live as long as the process.  L only, but for ``_engine_main``."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._began_s = time.perf_counter()
        self._stop = asyncio.Event()
        self._signals = 0
        self._hurry = asyncio.Event()
        self._failure: BaseException | None = None
        self._engine: Engine | None = None
        self._encoder_runs = False
        self._watchdog: Watchdog | None = None
        self._otlp: Otlp | None = None

    @property
    def engine_runs(self) -> bool:
        """Whether a thread that computes is still there.  After ``run``: it did not end when it was told to."""
        return self._thread.is_alive() or self._encoder_runs

    async def run(self) -> int:
        """The whole life.  Raises StartupError when the server cannot start as asked."""
        from vserve.api.app import App, Options
        from vserve.api.failure import render
        from vserve.api.routes import Gate, routes, table
        from vserve.bridge import Bridge
        from vserve.edge import Edge, flow, limits, response_store, root_path
        from vserve.encoder_service import EncoderService
        from vserve.engine.inbox import Inbox
        from vserve.http.router import Router
        from vserve.http.server import HttpServer

        config = self._config
        loop = asyncio.get_running_loop()
        if config.otlp_traces_endpoint is not None:
            from vserve.observe.otlp import Otlp

            self._otlp = Otlp(config.otlp_traces_endpoint, __version__)
            self._otlp.start()
        self._app = App(
            Options(
                version=__version__,
                api_keys=config.api_key,
                strict=config.strict,
                docs=not config.disable_docs,
                root_path=root_path(config),
                oauth2=flow(config),
                keep_alive_s=config.sse_ping_s,
                request_timeout_s=config.request_timeout_s,
                stall_timeout_s=config.stall_timeout_s,
                max_queue=config.max_queue,
                max_queued_tokens=config.max_queued_tokens,
                resume_s=config.resume_timeout_s,
                resume_streams=config.resume_streams,
                resume_bytes=config.resume_bytes,
                tool_call_parser=config.tool_call_parser,
                reasoning_parser=config.reasoning_parser,
                rca=config.enable_rca,
                rca_traces=config.rca_traces,
                rca_trace_bytes=config.rca_trace_bytes,
                settings=public(config),
            ),
            response_store(config),
            exporter=self._otlp,
        )
        edge = self._edge = Edge(config, self._app.keys)
        edge.watch(loop)
        self._access_log = edge.access_log
        entries = table(self._app)
        self._http = HttpServer(
            Router(routes(entries), root_path(config)),
            limits(config),
            render,
            Gate(self._app, entries),
            reply_headers=edge.cors,
            access_log=self._exchanged,
        )
        self._app.metrics.timer.start()
        if config.uds is None:
            await self._http.listen(config.host, config.port, ssl_context=edge.ssl_context)
        else:
            await self._http.listen(uds=config.uds, ssl_context=edge.ssl_context)
        self._inbox = Inbox(config.max_queue, token_limit=config.max_queued_tokens, retry_after=self._app.retry_after_s)
        self._bridge = Bridge(loop, self._inbox, turns=self._http.site.turns)
        self._encoder = EncoderService(config, self._app, loop)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        reporter = Reporter(sys.stderr, self._progress)
        self._thread = threading.Thread(target=self._engine_main, args=(loop, reporter), name="engine", daemon=True)
        self._thread.start()
        await self._stop.wait()
        return await self._end()

    # ---- G -----------------------------------------------------------------------------------------------------

    def _engine_main(self, loop: asyncio.AbstractEventLoop, reporter: Reporter) -> None:
        """The engine thread: load, report, run."""

        def tell(callback: Callable[..., None], *args: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: the server ended while this loaded
                loop.call_soon_threadsafe(callback, *args)

        def died(error: EngineDied) -> None:
            self._bridge.died(error)
            tell(self._on_failure, error)

        def encoder_failed(error: EngineDied) -> None:
            tell(self._on_failure, error)

        engine: Engine | None = None
        encoder = self._encoder
        try:
            from vserve.assemble import assemble, choose_device
            from vserve.assemble_encoder import wanted

            gc.freeze()  # what was imported stays: the collector need not look at it again
            gc.enable()
            if not preload.has_bytecode("torch"):
                log.info("Python compiles torch anew at every start, for seconds: its bytecode is not on disk, and "
                         "cannot be written or may not (PYTHONDONTWRITEBYTECODE)")  # fmt: skip
            embedding, generates = wanted(self._config)
            if embedding is not None:  # first: what it takes of a GPU is then known when the KV cache is made
                encoder.load(embedding, choose_device(self._config), encoder_failed, reporter)
            if generates:
                sharing = None if encoder.engine is None else encoder.engine.sharing
                engine = assemble(self._config, self._inbox, self._bridge.publish, died, reporter, sharing)
        except BaseException as error:  # whatever it is, L must hear of it: it waits for nothing else
            reporter.end()
            tell(self._on_failure, error)
            return
        gc.collect()
        gc.freeze()  # so does what is left of the loading
        tell(self._on_ready, engine)
        if engine is not None and engine.gpu_uuid is not None:
            threading.Thread(target=self._meet_driver, args=(engine.gpu_uuid,), name="nvml", daemon=True).start()
        if encoder.engine is not None:
            encoder.start()
        if engine is not None:
            engine.loop.run()

    def _meet_driver(self, gpu_uuid: str) -> None:
        """On a thread of its own: the driver may take its time, and nobody waits for what it says."""
        self._app.metrics.gpu = utilization_reader(gpu_uuid)

    # ---- L -----------------------------------------------------------------------------------------------------

    def _progress(self, progress: Progress) -> None:
        self._app.starting(progress.phase, progress.share)  # any thread may

    def _on_ready(self, engine: Engine | None) -> None:
        import torch  # it is there by now

        from vserve.api.app import Runtime

        self._engine = engine
        computes = engine if engine is not None else self._encoder.engine
        device = "cpu" if computes is None else computes.device.type
        self._app.runtime = Runtime(str(torch.__version__), torch.version.cuda, device)
        self._app.ready(None if engine is None else self._model(engine), self._encoder.model())
        on_stall = self._stalled if self._config.exit_on_stall else None
        self._encoder.watch(on_stall)
        if engine is not None:
            self._watchdog = Watchdog(
                engine.heartbeat,
                self._config.stall_timeout_s,
                sys.stderr,
                on_stall=self._on_stall if self._config.exit_on_stall else None,
            )
            self._watchdog.start()
        self._welcome(engine)

    def _model(self, engine: Engine) -> Model:
        from vserve.api.app import Model

        source = engine.source
        return Model(
            names=self._config.served_model_name or (source.name,),
            tokenizer=engine.tokenizer,
            template=engine.template,
            bridge=self._bridge,
            waiting=self._inbox,
            max_model_len=engine.plan.max_model_len,
            vocab_size=source.config.vocab_size,
            generation_config=source.generation_config,
            grammars=engine.grammars,
            heartbeat=engine.heartbeat,
        )

    def _welcome(self, engine: Engine | None) -> None:
        """Say where, what and how fast, and give a line to try."""
        address = self._http.addresses[0]
        scheme = "http" if self._config.ssl_certfile is None else "https"
        if self._config.uds is not None:
            url, option = f"{scheme}://localhost", f"--unix-socket {address} "
        else:
            # What is bound to every address is reached by the loopback one.
            url = f"{scheme}://{address}".replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
            option = ""
        key = " -H 'authorization: Bearer KEY'" if self._app.keys.guards("infer") else ""
        took = time.perf_counter() - self._began_s
        encoder = self._encoder.engine
        names: list[str] = []
        device = ""
        path, body = "", ""
        if encoder is not None:
            print(encoder)
            names.insert(0, (self._config.served_embedding_model_name or (encoder.source.name,))[0])
            device, (path, body) = encoder.device.type, EMBED_EXAMPLE
            if encoder.source.config.architecture.cross:
                path, body = SCORE_EXAMPLE
        if engine is not None:
            print(*engine.memory, sep="\n")
            names.insert(0, (self._config.served_model_name or (engine.source.name,))[0])
            device, (path, body) = engine.device.type, CHAT_EXAMPLE
        served = " and ".join(names)
        print(f"vserve {__version__} serves {served} on {device} at {url} (ready in {took:.1f} s)")
        print(f"try: curl {option}{url}{path}{key} -H 'content-type: application/json' -d '{body}'", flush=True)

    def _on_stall(self, reason: str) -> None:
        error = EngineStalled(f"The engine hangs: {reason}")
        self._bridge.died(error)  # as if it had ended: every open and later stream fails
        self._stalled(error)

    def _stalled(self, error: EngineStalled) -> None:
        asyncio.get_running_loop().call_soon(self._on_failure, error)

    def _exchanged(self, entry: AccessEntry) -> None:
        self._app.exchanged(entry)
        if self._access_log is not None:
            self._access_log(entry)

    def _on_failure(self, error: BaseException) -> None:
        self._failure = error
        self._stop.set()
        self._hurry.set()

    def _on_signal(self) -> None:
        self._signals += 1
        self._app.drain()
        self._http.drain()
        self._stop.set()
        if self._signals > 1:
            self._hurry.set()

    async def _end(self) -> int:
        """Drain, stop the engine, close the sockets; returns the exit code."""
        if self._failure is None:
            await self._drained()
        if self._app.replies:
            self._app.abort(Unavailable("The server is shutting down; this reply was cut short."))
        await self._app.settle(SETTLE_S)
        self._encoder.stop()
        if self._engine is not None:
            self._engine.loop.stop()
        if self._watchdog is not None:
            self._watchdog.stop()
        stalled = isinstance(self._failure, EngineStalled)
        await self._http.close(STALL_GRACE_S if stalled else STOP_GRACE_S)
        self._app.stopped()
        self._edge.stop()
        if self._otlp is not None:
            self._otlp.close(OTLP_GRACE_S)
        if self._engine is not None and not stalled:
            self._thread.join(ENGINE_JOIN_S)
        self._encoder_runs = self._encoder.join(0.0 if stalled else ENGINE_JOIN_S)
        if isinstance(self._failure, StartupError):
            raise self._failure
        if isinstance(self._failure, EngineDied):
            log.error("%s", self._failure)
            return EXIT_ENGINE_DIED
        if self._failure is not None:
            log.error("the server could not start", exc_info=self._failure)
            return EXIT_BUG
        return 0

    async def _drained(self) -> None:
        """Wait until nothing is in flight, the drain timeout has passed or somebody is in a hurry."""
        idle = asyncio.ensure_future(self._idle(self._config.drain_timeout_s))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({idle, hurry}, return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, hurry):
            task.cancel()

    async def _idle(self, timeout_s: float) -> None:
        """Wait for the replies in flight and for what goes on without a client, at most so long."""
        await asyncio.gather(self._http.wait_idle(timeout_s), self._app.settle(timeout_s))
