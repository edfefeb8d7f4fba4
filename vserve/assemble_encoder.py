"""Model files and settings -> an embedding engine ready to run: its parts made and joined, on the engine thread (G).

Knows text, model and engine, and nothing of HTTP.  What is wrong with a file or a setting is a StartupError.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from vserve.config import Config
from vserve.engine.encoding import BatchStats, Encoded
from vserve.engine.encoding_loop import EncodingLoop
from vserve.engine.encoding_queue import EncodingQueue, Pace
from vserve.errors import EngineDied, StartupError
from vserve.model import hub
from vserve.model.encoder import Encoder
from vserve.model.encoder_loader import load_encoder
from vserve.model.encoder_source import EncoderSource, names_encoder, resolve_encoder
from vserve.model.threads import Sharing, StepThreads
from vserve.observe.heartbeat import Heartbeat
from vserve.observe.progress import Reporter
from vserve.text.encoder_tokenizer import EncoderTokenizer

log = logging.getLogger(__name__)

BATCH_S: Final = 0.05
"""How long a batch should take: so long a short request waits behind one, and the token loop for the cores."""
LEAST_TOKENS: Final = 128
MOST_TOKENS: Final = 32768
WARM_UP_TOKENS: Final = 32
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class EncoderEngine:
    """All that the event loop needs to know of a finished embedding engine; loop.run is its thread's life."""

    source: EncoderSource
    tokenizer: EncoderTokenizer
    loop: EncodingLoop
    heartbeat: Heartbeat
    sharing: Sharing
    device: torch.device

    def __str__(self) -> str:
        size, config = self.source.size, self.source.config
        what = "scores of text pairs" if config.architecture.cross else f"vectors of {size} numbers"
        return f"{self.source.name}: {what}, inputs of up to {self.source.max_tokens} tokens, {config.architecture}"


def wanted(config: Config) -> tuple[str | None, bool]:
    """The embedding model to serve, None for none; and whether a generative one is served beside it.

    Raises StartupError for two embedding models.
    """
    environ = hub.environ_with(os.environ, config.download_dir, config.hf_token)
    if not names_encoder(config.model, environ=environ, revision=config.revision):
        return config.embedding_model, True
    if config.embedding_model is not None and config.embedding_model != config.model:
        raise StartupError(
            f"{config.model} is an embedding model, as --embedding-model {config.embedding_model} is: one can be served"
        )
    return config.model, False


def assemble_encoder(
    config: Config,
    model: str,
    device: torch.device,
    queue: EncodingQueue,
    publish: Callable[[Sequence[Encoded], BatchStats | None], None],
    died: Callable[[EngineDied], None],
    reporter: Reporter,
) -> EncoderEngine:
    """Find, load and warm up the embedding model.  G only.  Raises StartupError; anything else is a bug."""
    reporter.begin("finding the embedding model")
    source = resolve_encoder(
        model,
        environ=hub.environ_with(os.environ, config.download_dir, config.hf_token),
        revision=config.revision if model == config.model else None,
        progress=reporter.update,
    )
    tokenizer = EncoderTokenizer.from_folder(source.path)
    tokenizer.check_fits(source.config.vocab_size)
    reporter.begin("loading the embedding model")
    dtype = _dtype(config, source, device)
    encoder = load_encoder(source, device=device, dtype=dtype, progress=reporter.update)
    pace = Pace(BATCH_S, LEAST_TOKENS, MOST_TOKENS)
    _warm_up(encoder, source, pace)
    reporter.end()
    sharing = Sharing(config.threads or os.cpu_count() or 1)
    heartbeat = Heartbeat(time.monotonic())
    loop = EncodingLoop(
        queue,
        encoder,
        publish,
        died,
        heartbeat,
        pace,
        normalize=source.normalize,
        prepare=_preparer(sharing) if device.type == "cpu" else lambda busy: None,
    )
    return EncoderEngine(source, tokenizer, loop, heartbeat, sharing, device)


def _preparer(sharing: Sharing) -> Callable[[bool], None]:
    """What the thread does before a batch, and when there is none: says so, and takes the threads that are its."""

    threads = StepThreads(sharing.total)
    threads.limit = lambda: sharing.encoder_threads

    def prepare(busy: bool) -> None:
        sharing.encoding = busy
        if busy:
            threads.prepare()

    return prepare


def _warm_up(encoder: Encoder, source: EncoderSource, pace: Pace) -> None:
    """First touches, and on a GPU the largest batch: its memory is then held before the KV cache takes the rest."""
    length = min(WARM_UP_TOKENS, source.max_tokens)
    for _ in range(2):
        began_s = time.perf_counter()
        encoder.encode([[0] * length] * 8)
    pace.saw(8 * length, time.perf_counter() - began_s)
    if encoder.device.type == "cuda":
        whole = source.max_tokens
        encoder.encode([[0] * whole] * max(1, MOST_TOKENS // whole))


def _dtype(config: Config, source: EncoderSource, device: torch.device) -> torch.dtype:
    if config.embedding_dtype != "auto":
        return _DTYPES[config.embedding_dtype]
    if device.type == "cpu":
        return torch.float32
    return _DTYPES.get(source.config.dtype or "", torch.float32)
