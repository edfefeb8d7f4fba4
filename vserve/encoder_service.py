"""The embedding model's part of a server's life: its queue, its bridge, its thread and its watchdog.

serve.py drives it; each method says on which thread.  Knows nothing of sockets.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from vserve.api.app import App
from vserve.api.encoder import EncoderModel
from vserve.config import Config
from vserve.encoder_bridge import EncoderBridge
from vserve.engine.encoding_queue import EncodingQueue
from vserve.errors import EngineDied, EngineStalled
from vserve.observe.progress import Reporter
from vserve.observe.watchdog import Watchdog

if TYPE_CHECKING:  # torch comes with it: imported on G, while L already answers probes
    import torch

    from vserve.assemble_encoder import EncoderEngine


class EncoderService:
    """Made on L.  app: asked how long a full queue will last."""

    def __init__(self, config: Config, app: App, loop: asyncio.AbstractEventLoop) -> None:
        self._config = config
        self._queue = EncodingQueue(
            config.max_queue, token_limit=config.max_queued_tokens, retry_after=app.encoder_retry_after_s
        )
        self._bridge = EncoderBridge(loop, self._queue)
        self._watchdog: Watchdog | None = None
        self._thread: threading.Thread | None = None
        self.engine: EncoderEngine | None = None

    def load(self, model: str, device: torch.device, failed: Callable[[EngineDied], None], reporter: Reporter) -> None:
        """Find, load and warm up the model.  G only.  failed: told, on its thread, when the loop ends of itself."""
        from vserve.assemble_encoder import assemble_encoder

        def died(error: EngineDied) -> None:
            self._bridge.died(error)
            failed(error)

        self.engine = assemble_encoder(self._config, model, device, self._queue, self._bridge.publish, died, reporter)

    def start(self) -> None:
        """Serve on a thread of its own.  G only, after ``load``."""
        assert self.engine is not None
        self._thread = threading.Thread(target=self.engine.loop.run, name="encoder", daemon=True)
        self._thread.start()

    def model(self) -> EncoderModel | None:
        """What the routes need to know; None when there is no such model.  L only."""
        engine = self.engine
        if engine is None:
            return None
        source, config = engine.source, engine.source.config
        return EncoderModel(
            names=self._config.served_embedding_model_name or (source.name,),
            tokenizer=engine.tokenizer,
            bridge=self._bridge,
            waiting=self._queue,
            heartbeat=engine.heartbeat,
            max_tokens=source.max_tokens,
            vocab_size=config.vocab_size,
            size=source.size,
            cross=config.architecture.cross,
            dimensions=config.dimensions,
            lower_case=source.lower_case,
        )

    def watch(self, on_stall: Callable[[EngineStalled], None] | None) -> None:
        """Look at the heartbeat from now on.  on_stall: called after every waiting request has failed.  L only."""
        if self.engine is None:
            return

        def stalled(reason: str) -> None:
            error = EngineStalled(f"The embedding engine hangs: {reason}")
            self._bridge.stalled(error)
            if on_stall is not None:
                on_stall(error)

        self._watchdog = Watchdog(
            self.engine.heartbeat,
            self._config.stall_timeout_s,
            sys.stderr,
            on_stall=stalled if on_stall is not None else None,
        )
        self._watchdog.start()

    def stop(self) -> None:
        """Tell the thread to end.  L only."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self.engine is not None:
            self.engine.loop.stop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; whether it still runs.  L only."""
        if self._thread is None:
            return False
        self._thread.join(timeout_s)
        return self._thread.is_alive()
