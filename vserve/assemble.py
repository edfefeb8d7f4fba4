"""Model files and settings -> an engine ready to run: every part of it made and joined, on the engine thread (G).

Knows all of text, model and engine, and nothing of HTTP.  What is wrong with a file or a setting is a StartupError.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vserve.config import Config
from vserve.engine.inbox import Inbox
from vserve.engine.loop import EngineLoop, StepRunner
from vserve.engine.request import Emit, EngineStats, GenRequest, RequestId, SamplingParams
from vserve.engine.runner import Runner
from vserve.engine.scheduler import Limits, Scheduler
from vserve.engine.shapes import MIXED_SIZES
from vserve.errors import EngineDied, StartupError, shorten
from vserve.model import hub, quantization
from vserve.model.decoder import Decoder
from vserve.model.loader import load
from vserve.model.memory import CachePlan, gib, host_budget, host_memory, plan_cache
from vserve.model.quantization import Quantization
from vserve.model.source import ModelSource, SourceKind, resolve
from vserve.model.threads import Sharing
from vserve.observe.heartbeat import Heartbeat
from vserve.observe.progress import Reporter
from vserve.sizing import (
    SIZES,
    GgufTensors,
    Plan,
    Quantisation,
    Reserve,
    cache_budget,
    element_type,
    reserve,
    weight_bytes,
)
from vserve.text import gguf_vocab
from vserve.text.grammar import Grammars, why_none
from vserve.text.template import ChatTemplate, find_templates, read_template
from vserve.text.tokenizer import Tokenizer
from vserve.text.tokenizer_files import eos_ids_in, has_tokenizer

if TYPE_CHECKING:  # its kernels need Triton, which torch for CPUs comes without
    from vserve.engine.cuda_runner import CudaRunner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP_TOKENS = 32


PREFILL_TARGET = 512
"""About where products of a GPU stop being bound by reading the weights."""
CPU_CHUNK = 128
"""Prompt tokens of a CPU step that also decodes; a GPU's are measured."""


@dataclass(frozen=True, slots=True)
class Engine:
    """All that the event loop needs to know of a finished engine; loop.run is the rest of G's life."""

    source: ModelSource
    tokenizer: Tokenizer
    template: ChatTemplate | None
    loop: EngineLoop
    heartbeat: Heartbeat
    plan: CachePlan
    device: torch.device
    grammars: Grammars | None
    memory: tuple[str, ...]
    """Where the memory goes, for people: as vserve plan says it, and on a GPU what was measured."""

    @property
    def gpu_uuid(self) -> str | None:
        """The GPU's name for its driver, or None on a CPU."""
        if self.device.type != "cuda":
            return None
        return f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"


def assemble(
    config: Config,
    inbox: Inbox,
    publish: Callable[[list[Emit], EngineStats], None],
    died: Callable[[EngineDied], None],
    reporter: Reporter,
    sharing: Sharing | None = None,
) -> Engine:
    """Find, load and warm up the model of config.  G only.  Raises StartupError; anything else is a bug.

    sharing: of the cores with an embedding model in this process.
    """
    device = choose_device(config)
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    reporter.begin("finding the model")
    source = resolve(
        config.model,
        environ=hub.environ_with(os.environ, config.download_dir, config.hf_token),
        revision=config.revision,
        need_weights=config.load_format != "dummy",
        progress=lambda done, total: reporter.update(done, total),
    )
    source = replace(source, config=source.config.limited(config.max_model_len))
    dtype = _dtype(config, source, device)
    quantised = quantization.choose(
        config.quantization, source.quantization, shorten(source.name), gguf=source.kind is SourceKind.GGUF
    )
    if quantised is not None and quantised.online and device.type == "cpu":
        raise StartupError("--quantization fp8: plain weights become fp8 on a GPU only; leave the flag out")
    with ThreadPoolExecutor(1, thread_name_prefix="words") as beside:
        words = beside.submit(_words, config, source)
        decoder = _load(config, source, device, dtype, quantised, reporter)
        reporter.begin("making the KV cache")
        sizes = SIZES[device.type]
        rows = config.max_num_seqs or sizes.max_num_seqs
        tokens = config.max_num_batched_tokens or sizes.max_num_batched_tokens
        form = _stored_form(config, source, quantised)
        kept = reserve(
            source.config, max_num_seqs=rows, max_tokens=tokens, element_bytes=dtype.itemsize, quantisation=form
        )
        weights = Weighed.now(device)
        plan = plan_cache(
            source.config,
            budget_bytes=config.kv_cache_memory_bytes or _budget(config, weights, kept),
            element_bytes=dtype.itemsize,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
        )
        runner, chunk = _runner(config, decoder, plan, rows, tokens, reporter)
        tokenizer, template, grammars = words.result()
    tokenizer.check_fits(source.config.vocab_size)
    limits = Limits(
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        max_model_len=plan.max_model_len,
        max_prefill_chunk=chunk,
        prefill_target=None if device.type == "cpu" else PREFILL_TARGET,
        mixed_sizes=() if device.type == "cpu" else MIXED_SIZES,
        prefix_caching=config.enable_prefix_caching,
        vocab_size=source.config.vocab_size,
    )
    reporter.begin("warming up")
    warm_up(runner, limits)
    reporter.end()
    memory = _memory(config, source, dtype, form, weights, kept, plan)
    heartbeat = Heartbeat(time.monotonic())
    if sharing is not None and isinstance(decoder, Decoder):
        sharing.stepping = lambda: heartbeat.stepping
        decoder.share_cores(sharing)
    idle = None if isinstance(runner, Runner) else runner.idle
    depth = 1 if device.type == "cpu" else 2
    loop = EngineLoop(inbox, Scheduler(limits), runner, publish, died, heartbeat, depth=depth, idle=idle, owns_gc=True)
    return Engine(source, tokenizer, template, loop, heartbeat, plan, device, grammars, memory)


def _load(
    config: Config,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    quantised: Quantization | None,
    reporter: Reporter,
) -> Decoder:
    """The model on its device, and beside it what the first step on a GPU would wait for."""
    with ThreadPoolExecutor(2, thread_name_prefix="beside") as beside:
        prepared = [] if device.type == "cpu" else [
            beside.submit(_prepare_compiler), beside.submit(_prepare_products, device, dtype)
        ]  # fmt: skip
        reporter.begin("loading weights")
        with _explained(device, "loading weights"):
            decoder = load(
                source,
                device=device,
                dtype=dtype,
                load_format=config.load_format,
                seed=config.seed,
                allow_nan=config.allow_nan_weights,
                quantization=quantised,
                progress=reporter.update,
            )
            for one in prepared:
                one.result()
    return decoder


def _prepare_compiler() -> None:
    from vserve.kernels import ahead

    ahead.prepare()


def _prepare_products(device: torch.device, dtype: torch.dtype) -> None:
    """Let torch's products load and set up what they need: a tenth of a second.  Its thread must end before G's first.

    The handle that the library keeps for a thread goes to another only then.
    """
    square = torch.zeros((64, 64), dtype=dtype, device=device)
    torch.mm(square, square)
    torch.nn.functional.embedding(torch.zeros(1, dtype=torch.int64, device=device), square)
    torch.cuda.synchronize(device)


def _explained(device: torch.device, what: str) -> AbstractContextManager[None]:
    """Where a GPU's memory may run out: a StartupError with the numbers then."""
    if device.type == "cpu":
        return nullcontext()
    from vserve import assemble_cuda

    return assemble_cuda.explained(what)


def _runner(
    config: Config, decoder: Decoder, plan: CachePlan, rows: int, tokens: int, reporter: Reporter
) -> tuple[Runner | CudaRunner, int]:
    """The runner for the decoder's device, and the prompt tokens that a step of it should take beside decodes."""
    if decoder.device.type == "cpu":
        cache = decoder.new_cache(plan.num_blocks, plan.block_size)
        runner = Runner(decoder, cache, max_num_seqs=rows, max_model_len=plan.max_model_len)
        return runner, config.max_prefill_chunk or CPU_CHUNK
    from vserve import assemble_cuda
    from vserve.model.gpu_decoder import GpuDecoder

    assert isinstance(decoder, GpuDecoder)
    cuda = assemble_cuda.make_runner(decoder, plan, max_num_seqs=rows, max_tokens=tokens, reporter=reporter)
    chunk = config.max_prefill_chunk or assemble_cuda.prefill_chunk(cuda)
    cuda.leave_out(chunk)
    return cuda, chunk


def warm_up(runner: StepRunner, limits: Limits) -> None:
    """Run one short request to its end, so that first touches are paid before the first client.  G only.

    A scheduler of its own: the real one starts with an empty cache and counters at zero.
    """
    scheduler = Scheduler(limits)
    length = max(1, min(WARM_UP_TOKENS, limits.max_sequence_tokens - 2))
    for request_id, sampling in enumerate((SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=0))):
        # Ids below the bridge's first: rows remember whose they were.
        scheduler.add(GenRequest(RequestId(-1 - request_id), [0] * length, 2, sampling), 0.0)
        while (plan := scheduler.plan(0.0)) is not None:
            scheduler.commit(plan, runner.launch(plan).wait(), 0.0)


def choose_device(config: Config) -> torch.device:
    """Where models run.  Raises StartupError for a device that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch sees no CUDA device here; use --device cpu or install torch for CUDA")
    use_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _dtype(config: Config, source: ModelSource, device: torch.device) -> torch.dtype:
    return DTYPES[element_type(config.dtype, source.config.dtype, device.type)]


@dataclass(frozen=True, slots=True)
class Weighed:
    """What a GPU says of its memory, in bytes: its size, all that is taken, and what of it are tensors; 0 on a CPU."""

    total: int
    taken: int
    tensors: int

    @classmethod
    def now(cls, device: torch.device) -> Weighed:
        if device.type == "cpu":
            return cls(0, 0, 0)
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, total - free, torch.cuda.memory_allocated(device))


def _budget(config: Config, weighed: Weighed, kept: Reserve) -> int:
    """Bytes for the KV cache when no flag says: what is left beside weights, steps and graphs."""
    if not weighed.total:
        return host_budget(host_memory())
    utilization = config.gpu_memory_utilization
    return cache_budget(total=weighed.total, utilization=utilization, taken=weighed.taken, reserve=kept)


def _stored_form(
    config: Config, source: ModelSource, quantised: Quantization | None
) -> Quantisation | GgufTensors | None:
    """How a GPU keeps the weights, for the arithmetic of memory."""
    if source.gguf is not None and config.load_format != "dummy":
        return GgufTensors(source.gguf.tensors)
    return None if quantised is None else Quantisation.of(quantised)


def _memory(
    config: Config,
    source: ModelSource,
    dtype: torch.dtype,
    form: Quantisation | GgufTensors | None,
    loaded: Weighed,
    kept: Reserve,
    cache: CachePlan,
) -> tuple[str, ...]:
    """Engine.memory; loaded: as it was with the weights alone."""
    if not loaded.total:
        return (cache.explain(),)
    planned = Plan(
        total=loaded.total,
        allowed=int(loaded.total * config.gpu_memory_utilization),
        weights=weight_bytes(source.config, dtype.itemsize, form),
        context=loaded.taken - loaded.tensors,
        reserve=kept,
        cache=cache,
    )
    taken, most = Weighed.now(torch.device("cuda")).taken, torch.cuda.max_memory_allocated()
    return (
        *planned.lines(),
        f"measured: weights {gib(loaded.tensors)}, tensors at most {gib(most)}, {gib(taken)} of the GPU taken",
    )


def _words(config: Config, source: ModelSource) -> tuple[Tokenizer, ChatTemplate | None, Grammars | None]:
    """The tokenizer and the chat template of the model, and what compiles grammars, where there can be one.

    That index of the vocabulary holds the GIL for a tenth of a second: better now than beside the first streams.
    """
    tokenizer, template = _tokens_and_template(config, source)
    vocab_size = source.config.vocab_size
    eos_ids = tokenizer.eos_ids | eos_ids_in(source.generation_config, vocab_size)
    usable = tokenizer.vocab_size <= vocab_size and why_none(tokenizer, eos_ids) is None
    return tokenizer, template, Grammars(tokenizer, eos_ids, vocab_size) if usable else None


def _tokens_and_template(config: Config, source: ModelSource) -> tuple[Tokenizer, ChatTemplate | None]:
    folder = source.path if config.tokenizer is None else Path(config.tokenizer)
    if config.tokenizer is not None and not has_tokenizer(folder):
        raise StartupError(f"--tokenizer {shorten(config.tokenizer)}: no folder with a tokenizer.json")
    if config.load_format == "dummy" and source.kind is SourceKind.FOLDER and not has_tokenizer(folder):
        tokenizer, texts = Tokenizer.of_bytes(source.config.vocab_size), dict[str, str]()
    elif source.kind is SourceKind.GGUF and config.tokenizer is None:
        assert source.gguf_metadata is not None
        tokenizer = gguf_vocab.build(source.gguf_metadata)
        texts = {} if source.chat_template is None else {"default": source.chat_template}
    else:
        tokenizer = Tokenizer.from_folder(folder, generation_config=source.generation_config)
        texts = find_templates(folder)
        if not texts and source.chat_template is not None:  # a GGUF file's own
            texts = {"default": source.chat_template}
    if config.chat_template is not None:
        texts = {"default": read_template(config.chat_template)}  # for conversations with tools too
    made: ChatTemplate | None = None
    for name in ("tool_use", "default"):  # the one for chats has the other beside it
        if name in texts:
            made = ChatTemplate(
                texts[name],
                bos_token=tokenizer.bos_token,
                eos_token=tokenizer.eos_token,
                special_tokens=tokenizer.special_tokens,
                for_tools=made,
            )
    return tokenizer, made
