"""CudaRunner: planned steps on a GPU, most of them as the replay of one captured graph.

The device keeps its rows (vserve.kernels.rows); a step brings its int32 words in one copy and takes the drawn ids back
in one.  Launching queues work and returns; ``Pending.wait`` blocks until the ids are on the host.  So two steps can be
in flight, and the second takes its input ids from where the first leaves them.  Steps are padded to shapes
(engine.shapes); a shape that has no graph yet runs padded to a larger one that has, until its own is captured in an
idle moment (``idle``) or was missed often.  G only: all work is on a stream of its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vserve.engine.packing import Packed, Packer, Words, fits
from vserve.engine.sequence import Plan, Results
from vserve.engine.shapes import ENTRY_WORDS, MAX_GRAPH_TOKENS, UPDATE_WORDS, Buckets, Layout, Shape
from vserve.engine.special import CANNOT_DRAW, Answers, SpecialDraws, answers_for
from vserve.kernels import ahead, sampling
from vserve.kernels import rows as row_kernels
from vserve.kernels.cuda import StepPlan
from vserve.kernels.rows import Inputs
from vserve.model.gpu_decoder import GpuDecoder
from vserve.model.ops import KvCache

log = logging.getLogger(__name__)

SLOTS: Final = 4
"""Host buffers of steps in flight; the loop keeps two in flight at most."""
WISHES: Final = 32
"""After so many steps padded to a larger graph, a shape gets its own between two steps: some 30 ms, once."""
PADDING_MOST: Final = 2.0
CHEAP_TOKENS: Final = 256
"""A mixed step takes a larger graph than its own only up to so many times its tokens, or so many tokens, of which the
weights are the larger part of the cost: they are computed for nothing."""
LEFT_FREE_BYTES: Final = 256 << 20
"""Graphs leave so much of the GPU's memory alone: steps without a graph and the driver need some, and on the last few
megabytes every allocation of theirs would first give back what the one before took."""
INVALID: Final = "The model produced invalid numbers for this request."
UNUSABLE: Final = "The sampling parameters of this request cannot be used."

assert row_kernels.WORDS == ENTRY_WORDS


class _Slot:
    """Host memory of one step: the words it brings, the ids it drew, and the event after which these are there."""

    def __init__(self, words: int, draws: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.words_tensor = torch.zeros(words, dtype=torch.int32, pin_memory=pinned)
        self.ids_tensor = torch.zeros(draws, dtype=torch.int64, pin_memory=pinned)
        self.words: Words = self.words_tensor.numpy()
        self.ids: NDArray[np.int64] = self.ids_tensor.numpy()
        self.event = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until the step that used this slot last has ended; the GIL is released meanwhile."""
        if self.event is not None:
            self.event.synchronize()


@dataclass(frozen=True, slots=True)
class CudaPending:
    """A step in flight.  wait it before SLOTS more are launched."""

    slot: _Slot
    packed: Packed
    answers: Answers | None
    scores: Answers | None = None

    def wait(self) -> Results:
        """What the step drew.  Blocks until the device has come so far."""
        self.slot.wait()
        packed = self.packed
        ids: list[int] = self.slot.ids[: packed.draws].tolist()
        errors = dict.fromkeys(packed.broken, UNUSABLE)
        if ids and min(ids) < 0:
            changed = {place for place, _, _ in packed.special}
            for place, token in enumerate(ids):
                if token < 0:
                    errors.setdefault(place, CANNOT_DRAW if place in changed else INVALID)
        logprobs = {} if self.answers is None else self.answers.read()
        scores = [] if self.scores is None else list(self.scores.read().values())
        return Results(
            ids,
            {place: one for place, one in logprobs.items() if place not in errors},
            errors,
            [one if math.isfinite(one.logprob) else None for one in scores],
        )


class _Step:
    """One shape's views of the static buffers, and its graph once there is one."""

    def __init__(self, layout: Layout, words: Tensor, inputs: Inputs, logits: Tensor) -> None:
        self.layout = layout
        self.shape = shape = layout.shape
        self.words = words[: layout.words]
        self.logits = logits[: shape.sequences]
        self.fields = {name: words[span.start : span.end] for name, span in layout.fields.items()}
        tokens, sequences = shape.tokens, shape.sequences
        self.inputs = Inputs(
            ids=inputs.ids[:tokens],
            slots=inputs.slots[:tokens],
            cos=inputs.cos[:tokens],
            sin=inputs.sin[:tokens],
            context_lens=inputs.context_lens[:sequences] if shape.is_decode else self.fields["lens"],
            tables=inputs.tables[:sequences],
            temperature=inputs.temperature[:sequences],
            top_k=inputs.top_k[:sequences],
            top_p=inputs.top_p[:sequences],
            min_p=inputs.min_p[:sequences],
            seeds=inputs.seeds[:sequences],
            counters=inputs.counters[:sequences],
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.wishes = 0
        self.refused = False


class CudaRunner:
    """Steps for max_num_seqs rows of sequences of at most max_model_len tokens, up to max_tokens tokens a step.

    use_graphs False runs every step kernel by kernel, with the same results: for tests and for finding faults.  On a
    device that is no GPU (the kernels interpreted, in tests) there are no graphs either.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        cache: KvCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_tokens: int,
        use_graphs: bool = True,
    ) -> None:
        device = cache.pairs[0].device
        self._decoder = decoder
        self._cache = cache
        self._layers = (decoder, cache.pairs)
        self._use_graphs = use_graphs and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
            torch.cuda.set_stream(self._stream)
        self.buckets = Buckets(max_num_seqs, min(MAX_GRAPH_TOKENS, max_tokens))
        largest = self.buckets.choose(max_num_seqs, max_num_seqs, max_tokens)
        max_blocks = -(-max_model_len // cache.block_size)
        half = decoder.rotation[0].shape[1]
        self._rows = row_kernels.new_rows(max_num_seqs, max_blocks, device)
        self._inputs = row_kernels.new_inputs(
            largest.tokens, largest.sequences, largest.sequences, max_blocks, half, device
        )
        vocab = decoder.config.vocab_size
        self._logits = torch.zeros((largest.sequences, vocab), dtype=torch.float32, device=device)
        self._drawn = torch.zeros(largest.sequences, dtype=torch.int64, device=device)
        words = max(Layout(shape, cache.block_size).words for shape in (largest, *self.buckets.graphs()))
        self._words = torch.zeros(words, dtype=torch.int32, device=device)
        self._slots = [_Slot(words, largest.sequences, device) for _ in range(SLOTS)]
        self._turn = 0
        self._special = SpecialDraws(vocab, device)
        self._packer = Packer(max_num_seqs=max_num_seqs, block_size=cache.block_size, on_enter=self._special.enter)
        self._steps: dict[Shape, _Step] = {}
        self._captured: list[_Step] = []
        self._to_capture = list(reversed(self.buckets.graphs())) if self._use_graphs else []
        self._pool = torch.cuda.graph_pool_handle() if self._use_graphs else None

    # ---- steps ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: Plan) -> CudaPending:
        """Queue the step.  Plans come in the order they were made, each once, right after they were made."""
        step = self._choose(plan)
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % SLOTS
        packed = self._packer.pack(plan, step.layout, slot.words)
        if packed.overflow is not None:
            self._enter(packed.overflow)
        step.words.copy_(slot.words_tensor[: step.layout.words], non_blocking=True)
        scores = None
        if plan.scorings:
            scores = self._run_and_score(step, plan)
        elif step.graph is not None:
            step.graph.replay()
        else:
            self._run(step)
        answers = None
        if packed.special:
            answers = self._special.draw(packed.special, step.logits, step.inputs, self._rows, self._drawn)
        if packed.draws:
            slot.ids_tensor[: packed.draws].copy_(self._drawn[: packed.draws], non_blocking=True)
        if slot.event is not None:
            slot.event.record()
        return CudaPending(slot, packed, answers, scores)

    def _choose(self, plan: Plan) -> _Step:
        """The step's own shape, or a larger one that has its graph already."""
        step = self._step(self.buckets.choose(plan.num_decodes, len(plan.works) - plan.num_decodes, plan.num_tokens))
        if step.graph is not None or not self._use_graphs or not self.buckets.is_graph(step.shape):
            return step
        most = max(CHEAP_TOKENS, step.shape.tokens * PADDING_MOST) if step.shape.chunks else float("inf")
        others = [
            one
            for one in self._captured
            if one.shape.is_decode == step.shape.is_decode and one.shape.tokens <= most and fits(plan, one.shape)
        ]
        step.wishes += 1
        # Kernel by kernel it would take about as long as capturing it takes, every time.
        if (not others or step.wishes > WISHES) and self._capture(step):
            return step
        if not others:
            return step
        return min(others, key=lambda one: (one.shape.tokens, one.shape.decodes))

    def _step(self, shape: Shape) -> _Step:
        step = self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = _Step(
                Layout(shape, self._cache.block_size), self._words, self._inputs, self._logits
            )
        return step

    def _enter(self, updates: Words) -> None:
        """Table updates that found no room in the step's own words."""
        device = self._words.device
        host = torch.from_numpy(updates)
        on_device = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
        row_kernels.enter(self._rows, on_device, self._words[:0].view(0, ENTRY_WORDS))

    def _run_and_score(self, step: _Step, plan: Plan) -> Answers:
        """Queue the step kernel by kernel, with the log-probabilities of the prompt tokens that plan wants scored."""
        firsts = list(accumulate((work.num_tokens for work in plan.works), initial=0))
        rows: list[int] = []
        ids: list[int] = []
        tops: list[int | None] = []
        for number, places in plan.scorings:
            sequence, start = plan.works[number].sequence, plan.works[number].start
            rows += [firsts[number] + place - 1 - start for place in places]
            ids += [sequence.tokens[place] for place in places]
            tops += [sequence.request.prompt_logprobs or 0] * len(places)
        packed = torch.tensor([rows, ids], dtype=torch.int64)
        if self._words.device.type != "cpu":
            packed = packed.pin_memory().to(self._words.device, non_blocking=True)
        raw = self._run(step, packed[0].to(torch.int32))
        assert raw is not None
        return answers_for(list(range(len(rows))), tops, raw.to(torch.float32), packed[1])

    def _run(self, step: _Step, scored: Tensor | None = None) -> Tensor | None:
        """Queue every kernel of the step, from its words to its logits [S, V] float32 and drawn ids.

        scored [P] int32: further tokens of the step, never one of decodes alone; returns their logits [P, V] then.
        """
        fields, inputs, shape = step.fields, step.inputs, step.shape
        cos, sin = self._decoder.rotation
        size = self._cache.block_size
        if shape.is_decode:
            row_kernels.decode_inputs(
                self._rows, fields["rows"], fields["positions"], fields["fresh"], cos, sin, size, inputs
            )
            starts, logit_rows, draw_rows = fields["rows"], None, fields["rows"]
        else:
            row_kernels.enter(
                self._rows, fields["updates"].view(-1, UPDATE_WORDS), fields["entries"].view(-1, ENTRY_WORDS)
            )
            row_kernels.mixed_inputs(
                self._rows,
                fields["token_ids"],
                fields["positions"],
                fields["rows"],
                fields["sequence_rows"],
                fields["draw_tokens"],
                fields["draw_rows"],
                cos,
                sin,
                size,
                inputs,
            )
            starts, logit_rows, draw_rows = fields["starts"], fields["draw_tokens"], fields["draw_rows"]
        plan = StepPlan(
            inputs.cos,
            inputs.sin,
            inputs.slots,
            starts,
            inputs.context_lens,
            inputs.tables,
            shape.decodes,
            fields["positions"],
        )
        # One buffer for all: a graph that kept its own would hold on to hundreds of megabytes.
        decoder, pairs = self._layers
        further = None
        if scored is None or logit_rows is None:
            step.logits.copy_(decoder.compute(inputs.ids, plan, pairs, logit_rows))
        else:
            every = torch.cat((logit_rows, scored))
            logits = decoder.compute(inputs.ids, plan, pairs, every)
            further = logits[shape.sequences :]
            step.logits.copy_(logits[: shape.sequences])
        ids = sampling.sample(
            step.logits, inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.seeds, inputs.counters
        )
        row_kernels.keep(self._rows, draw_rows, ids, self._drawn[: shape.sequences])
        return further

    # ---- graphs -----------------------------------------------------------------------------------------------

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._captured)

    @torch.inference_mode()
    def idle(self) -> bool:
        """Capture one more graph while nobody waits; False when all are there."""
        while self._to_capture:
            step = self._step(self._to_capture.pop())
            if step.graph is None:
                self._capture(step)
                if not self._to_capture:
                    free, total = torch.cuda.mem_get_info()
                    used = (total - free) / 2**30
                    log.info("%d CUDA graphs captured; %.1f GiB of the GPU in use", len(self._captured), used)
                return True
        return False

    def leave_out(self, max_chunk: int) -> None:
        """Capture no graph in advance of a step that decodes and takes in more than max_chunk prompt tokens."""
        self._to_capture = [
            shape
            for shape in self._to_capture
            if shape.is_decode or not shape.decodes or shape.tokens <= max_chunk + shape.decodes
        ]

    @torch.inference_mode()
    def compile(self, shapes: Iterable[Shape], threads: int) -> int:
        """Compile the kernels of steps of these shapes on so many threads, before any step; returns how many."""
        if not self._use_graphs:
            return 0
        assert not self._captured
        whole = self._layers
        ends = self._decoder.ends()
        self._layers = ends, self._cache.pairs[: ends.num_layers]

        def work() -> None:
            for shape in shapes:
                step = self._step(shape)
                self._make_empty(step)
                self._run(step)

        try:
            return ahead.compile_all(work, threads)
        finally:
            self._layers = whole

    @torch.inference_mode()
    def capture(self, shape: Shape) -> None:
        """Capture the graph of one shape now, if it has none."""
        step = self._step(shape)
        if self._use_graphs and step.graph is None:
            self._capture(step)

    def _capture(self, step: _Step) -> bool:
        """Give the step its graph; False where there is no memory for one, and then ever after."""
        if step.refused:
            return False
        free, _ = torch.cuda.mem_get_info()
        if free >= LEFT_FREE_BYTES:
            try:
                step.graph = self._captured_graph(step)
            except RuntimeError as error:
                # What the driver lacks memory for is no OutOfMemoryError of torch's
                if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
                    raise
        if step.graph is not None:
            self._captured.append(step)
        else:
            step.refused = True
            log.warning("no memory for the graph of %s (%.2f GiB free): another serves it", step.shape, free / 2**30)
        return not step.refused

    def _captured_graph(self, step: _Step) -> torch.cuda.CUDAGraph:
        self._make_empty(step)
        self._run(step)  # compiles and loads what it needs: that must not happen during a capture
        graph = torch.cuda.CUDAGraph()
        # thread_local: what the event loop's thread does meanwhile does not matter
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._run(step)
        finally:
            graph.capture_end()
        return graph

    def _make_empty(self, step: _Step) -> None:
        """Words of a step of padding alone: it changes no row and no page."""
        step.words.fill_(-1)
        if not step.shape.is_decode:
            for name in ("lens", "starts", "draw_tokens"):
                step.fields[name].zero_()

    @torch.inference_mode()
    def seconds(self, shape: Shape, times: int = 5) -> float:
        """Least seconds of an empty step of shape, whose products take as long as any's."""
        step = self._step(shape)
        self._make_empty(step)
        return min(self._timed(step) for _ in range(times))

    @torch.inference_mode()
    def replay_seconds(self, shape: Shape) -> float:
        """Seconds of the last step of shape over again, by the device's clock; for bench/."""
        return self._timed(self._step(shape))

    def _timed(self, step: _Step) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        if step.graph is not None:
            step.graph.replay()
        else:
            self._run(step)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
